// Backward, some steps at a time: their dz, last to first, with dh going through the transposed weights; then, over all
// of these steps and rows at once, the gradients of x and of the weights.
#pragma once
#include "tile.h"

namespace cellstack {
namespace {

// sums[r][v] = dz[m+r]·panel over all blocks, for R rows that lie side by side in each block of dz.
template <class T, int R>
INLINE void times_transposed(V<T> (&sums)[1][R][4], const T* dz, int64_t blocks, int64_t dz_rows, const T* panel) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    unroll<R>([&](auto r) INLINED { unroll<4>([&](auto v) INLINED { sums[0][r][v] = splat(T(0)); }); });
    for (int64_t block = 0; block < blocks; ++block) {
        const T* a[R];
        unroll<R>([&](auto r) INLINED { a[r] = dz + (block * dz_rows + r) * wide; });
        accumulate<T, R, 1>(sums, a, panel + block * wide * wide, 0, wide);
    }
}

template <class T, bool Usual>
INLINE void differentiate(const Backward<T>& f, int64_t block, int64_t r, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t H = f.units, t = time_of(f, n), left = H - block * W, lane = block * W;
    const int lanes = left < W ? int(left) : W;
    const int phi = choose<Usual>(f.activation, kTanh), sigma = choose<Usual>(f.recurrent_activation, kSigmoid);
    const int64_t here = r * f.steps + t;
    T* dz = f.dz + ((block * (f.last - f.first) + n - f.first) * f.batch + f.row0 + r) * 4 * W;
    T* dh_at = f.dh + r * columns + lane;
    T* dc_at = f.dc + r * f.blocks * W + lane;
    const V<T> zero = splat(T(0));
    V<T> dh = load(dh_at), dc = load(dc_at);
    if (f.dy) dh += load_lanes(f.dy + here * H + lane, lanes);
    if (f.dcells) dc += load_lanes(f.dcells + here * H + lane, lanes);
    if (f.mask && !f.mask[here]) {
        unroll<4>([&](auto v) INLINED { store(dz + v * W, zero); });
        store(dh_at, dh);
        store(dc_at, dc);
        return;
    }
    const T* gates = f.gates + here * 4 * H + lane;
    V<T> i = load_lanes(gates, lanes), fo = load_lanes(gates + H, lanes), g = load_lanes(gates + 2 * H, lanes),
         o = load_lanes(gates + 3 * H, lanes), c = load_lanes(f.cells + here * H + lane, lanes), c_prev = zero;
    if (n > 0)
        c_prev = load_lanes(f.cells + (r * f.steps + time_of(f, n - 1)) * H + lane, lanes);
    else if (f.c0)
        c_prev = load_lanes(f.c0 + r * H + lane, lanes);
    const V<T> phi_c = apply<T>(phi, c);
    dc = fma(dh * o, slope<T>(phi, phi_c), dc);
    V<T> di = dc * g, df = dc * c_prev, dg = dc * i, d_o = dh * phi_c;
    if (f.dgates) {
        const T* extra = f.dgates + here * 4 * H + lane;
        di += load_lanes(extra, lanes), df += load_lanes(extra + H, lanes);
        dg += load_lanes(extra + 2 * H, lanes), d_o += load_lanes(extra + 3 * H, lanes);
    }
    store(dz, di * slope<T>(sigma, i));
    store(dz + W, df * slope<T>(sigma, fo));
    store(dz + 2 * W, dg * slope<T>(phi, g));
    store(dz + 3 * W, d_o * slope<T>(sigma, o));
    store(dc_at, dc * fo);
}

template <class T, bool Usual>
void run_back(Backward<T>& f) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const int64_t dz_rows = (f.last - f.first) * f.batch, panels = (f.units + wide - 1) / wide, columns = panels * wide;
    for (int64_t n = f.last - 1; n >= f.first; --n) {
        const int64_t t = time_of(f, n);
        for (int64_t r = 0; r < f.rows; ++r)
            for (int64_t block = 0; block < f.blocks; ++block) differentiate<T, Usual>(f, block, r, n, columns);
        for (int64_t p = 0; p < panels; ++p)
            tiles(f.rows, [&](auto R, int64_t row) INLINED {
                V<T> sums[1][R][4];
                times_transposed<T, R>(sums, f.dz + ((n - f.first) * f.batch + f.row0 + row) * wide, f.blocks, dz_rows,
                                       f.recurrent_t + p * f.blocks * wide * wide);
                unroll<R>([&](auto r) INLINED {
                    const bool used = !f.mask || f.mask[(row + r) * f.steps + t];
                    unroll<4>([&](auto v) INLINED {
                        const int64_t unit = p * wide + v * W, left = f.units - unit;
                        T* dh = f.dh + (row + r) * columns + unit;
                        V<T> d = sums[0][r][v];
                        if (f.recurrent_dropout && left > 0)
                            d *= load_lanes(f.recurrent_dropout + (row + r) * f.units + unit, left < W ? int(left) : W);
                        if (used) store(dh, d);
                    });
                });
            });
    }
}

template <class T>
void backward(Backward<T>& f) {
    if (f.activation == kTanh && f.recurrent_activation == kSigmoid)
        run_back<T, true>(f);
    else
        run_back<T, false>(f);
}

template <class T>
void input_gradient(const T* dz, int64_t blocks, int64_t dz_rows, const T* kernel_t, int64_t columns, int64_t first,
                    int64_t last, T* const* out) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    for (int64_t column = 0; column < columns; column += wide, kernel_t += blocks * wide * wide)
        tiles(last - first, [&](auto R, int64_t row) INLINED {
            const int64_t m = first + row;
            V<T> sums[1][R][4];
            times_transposed<T, R>(sums, dz + m * wide, blocks, dz_rows, kernel_t);
            unroll<R>([&](auto r) INLINED {
                unroll<4>([&](auto v) INLINED {
                    const int64_t at = column + v * W, left = columns - at;
                    if (left > 0) store_lanes(out[m + r] + at, sums[0][r][v], left < W ? int(left) : W);
                });
            });
        });
}

template <class T, int R>
INLINE void weight_tile(const T* dz, const T* a, int64_t stride, int64_t rows, bool more, T* sums_at) {
    constexpr int W = Vec<T>::W;
    V<T> sums[R][4];
    unroll<R>([&](auto r) INLINED {
        unroll<4>([&](auto v) INLINED { sums[r][v] = more ? load(sums_at + (r * 4 + v) * W) : splat(T(0)); });
    });
    for (int64_t m = 0; m < rows; ++m, a += stride) {
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r]); });
        unroll<4>([&](auto v) INLINED {
            V<T> w = load(dz + (m * 4 + v) * W);
            unroll<R>([&](auto r) INLINED { sums[r][v] = fma(s[r], w, sums[r][v]); });
        });
    }
    unroll<R>([&](auto r)
                  INLINED { unroll<4>([&](auto v) INLINED { store(sums_at + (r * 4 + v) * W, sums[r][v]); }); });
}

template <class T>
void weight_gradient(const WeightGradient<T>& f) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    for (int64_t m = 0; m < f.dz_rows; m += kGradientRows) {
        const int64_t rows = f.dz_rows - m < kGradientRows ? f.dz_rows - m : kGradientRows;
        for (const auto& of : f.of)
            for (int64_t k = 0; of.columns && k < rows; ++k)
                memcpy(of.copy + k * gradient_stride(of.columns), of.rows[m + k], size_t(of.columns) * sizeof(T));
        for (int64_t block = f.first; block < f.last; ++block) {
            const T* dz = f.dz + (block * f.dz_rows + m) * wide;
            for (const auto& of : f.of) {
                T* sums = of.sums + (block - f.first) * of.columns * wide;
                tiles(of.columns, [&](auto R, int64_t column) INLINED {
                    weight_tile<T, R>(dz, of.copy + column, gradient_stride(of.columns), rows, f.more || m > 0,
                                      sums + column * wide);
                });
            }
            T* bias = f.bias_sums + (block - f.first) * wide;
            unroll<4>([&](auto v) INLINED {
                V<T> sum = f.more || m > 0 ? load(bias + v * W) : splat(T(0));
                for (int64_t k = 0; k < rows; ++k) sum += load(dz + k * wide + v * W);
                store(bias + v * W, sum);
            });
        }
    }
    if (!f.write) return;
    const auto write = [&](T* out, const T* sums, int64_t rows) INLINED {
        for (int64_t block = f.first; block < f.last; ++block) {
            const int64_t left = f.units - block * W;
            const int lanes = left < W ? int(left) : W;
            for (int64_t k = 0; k < rows; ++k)
                for (int gate = 0; gate < 4; ++gate, sums += W)
                    store_lanes(out + (k * 4 + gate) * f.units + block * W, f.dz_rows ? load(sums) : splat(T(0)),
                                lanes);
        }
    };
    for (const auto& of : f.of) write(of.out, of.sums, of.columns);
    if (f.bias) write(f.bias, f.bias_sums, 1);
}

}  // namespace
}  // namespace cellstack
