// Forward: x·kernel of a chunk of steps as one product, then step by step the recurrence, each block of units to its
// end.
#pragma once
#include "tile.h"

namespace cellstack {
namespace {

// z[block][m] = bias + x·kernel for the rows m = (n - first)·rows + r of a chunk: one matrix product.
template <class T>
void project(const Forward<T>& f) {
    constexpr int W = Vec<T>::W;
    const int64_t total = (f.last - f.first) * f.rows;
    for (int64_t block = 0; block < f.w.blocks; ++block) {
        const T* panel = f.w.kernel + block * f.w.input * 4 * W;
        const T* bias = f.w.bias + block * 4 * W;
        tiles(total, [&](auto R, int64_t m) INLINED {
            const T* a[R];
            int64_t n = f.first + m / f.rows, r = m % f.rows;
            for (int k = 0; k < R; ++k) {
                a[k] = f.x + r * f.x_row + time_of(f, n) * f.x_time;
                if (++r == f.rows) r = 0, ++n;
            }
            V<T> sums[1][R][4];
            unroll<R>([&](auto k) INLINED { unroll<4>([&](auto v) INLINED { sums[0][k][v] = load(bias + v * W); }); });
            accumulate<T, R, 1>(sums, a, panel, 0, f.w.input);
            T* z = f.z + (block * total + m) * 4 * W;
            unroll<R>([&](auto k)
                          INLINED { unroll<4>([&](auto v) INLINED { store(z + (k * 4 + v) * W, sums[0][k][v]); }); });
        });
    }
}

// From the four sums of one row and block to c and h, and to whatever is asked for beside them.
template <class T, bool Usual>
INLINE void finish(const Forward<T>& f, V<T> (&z)[4], int64_t block, int64_t r, int64_t t, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W;
    const int64_t H = f.w.units, at = r * f.w.blocks * W + block * W, left = H - block * W;
    const int lanes = left < W ? int(left) : W;
    const bool used = !f.mask || f.mask[r * f.steps + t];
    const int phi = choose<Usual>(f.w.activation, kTanh), sigma = choose<Usual>(f.w.recurrent_activation, kSigmoid);
    V<T> kept;
    if (used) {
        V<T> i = apply<T>(sigma, z[0]), fo = apply<T>(sigma, z[1]), g = apply<T>(phi, z[2]), o = apply<T>(sigma, z[3]);
        V<T> c = fma(fo, load(f.c + at), i * g);
        kept = o * apply<T>(phi, c);
        store(f.c + at, c);
        z[0] = i, z[1] = fo, z[2] = g, z[3] = o;
        V<T> fed = kept;
        if (f.recurrent_dropout) {
            fed = kept * load_lanes(f.recurrent_dropout + r * H + block * W, lanes);
            store(f.h_kept + at, kept);
        }
        store(h_next + at, fed);
    } else {
        store(h_next + at, load(h + at));
        kept = load((f.recurrent_dropout ? f.h_kept : h) + at);
        unroll<4>([&](auto v) INLINED { z[v] = splat(T(0)); });
    }
    if (f.y) store_lanes(f.y + r * f.y_row + t * f.y_time + block * W, kept, lanes);
    if (f.gates) {
        T* gates = f.gates + (r * f.steps + t) * 4 * H + block * W;
        unroll<4>([&](auto v) INLINED { store_lanes(gates + v * H, z[v], lanes); });
        store_lanes(f.cells + (r * f.steps + t) * H + block * W, load(f.c + at), lanes);
    }
}

// Rows r … r+R of blocks block … block+N at step n.
template <class T, bool Usual, int R, int N>
INLINE void step_tile(const Forward<T>& f, int64_t n, int64_t block, int64_t row, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W;
    const int64_t t = time_of(f, n), wide = f.w.blocks * W;
    V<T> sums[N][R][4];
    if (f.z) {
        const int64_t total = (f.last - f.first) * f.rows, m = (n - f.first) * f.rows + row;
        unroll<N>([&](auto b) INLINED {
            const T* z = f.z + ((block + b) * total + m) * 4 * W;
            unroll<R>([&](auto r)
                          INLINED { unroll<4>([&](auto v) INLINED { sums[b][r][v] = load(z + (r * 4 + v) * W); }); });
        });
    } else {
        const T* x[R];
        for (int r = 0; r < R; ++r) x[r] = f.x + (row + r) * f.x_row + t * f.x_time;
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED {
                unroll<4>([&](auto v) INLINED { sums[b][r][v] = load(f.w.bias + ((block + b) * 4 + v) * W); });
            });
        });
        const int64_t stride = f.w.input * 4 * W;
        accumulate<T, R, N>(sums, x, f.w.kernel + block * stride, stride, f.w.input);
    }
    const T* a[R];
    for (int r = 0; r < R; ++r) a[r] = h + (row + r) * wide;
    const int64_t stride = f.w.units * 4 * W;
    accumulate<T, R, N>(sums, a, f.w.recurrent + block * stride, stride, f.w.units);
    if constexpr (R == 1 && Usual) {
        unroll<N>([&](auto b) INLINED { finish<T, Usual>(f, sums[b][0], block + b, row, t, h, h_next); });
    } else {  // more sums than the activations leave registers for: they pass through the stack, one row at a time
        alignas(kVectorBytes) V<T> spilled[N][R][4];
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED { unroll<4>([&](auto v) INLINED { spilled[b][r][v] = sums[b][r][v]; }); });
        });
        for (int b = 0; b < N; ++b)
#pragma GCC unroll 1
            for (int r = 0; r < R; ++r) finish<T, Usual>(f, spilled[b][r], block + b, row + r, t, h, h_next);
    }
}

// z[c] += a·matrix[:, c] for N vectors of columns, in the order of `accumulate`.
template <class T, int N>
INLINE void add_columns(T* z, const T* a, const T* matrix, int64_t stride, int64_t n) {
    constexpr int W = Vec<T>::W;
    V<T> sums[N];
    unroll<N>([&](auto v) INLINED { sums[v] = load(z + v * W); });
    for (int64_t k = 0; k < n; ++k, matrix += stride) {
        const V<T> s = splat(a[k]);
        unroll<N>([&](auto v) INLINED { sums[v] = fma(s, load(matrix + v * W), sums[v]); });
    }
    unroll<N>([&](auto v) INLINED { store(z + v * W, sums[v]); });
}

// z [columns] += a [n] · matrix [n, columns]
template <class T>
void add_product(T* z, const T* a, const T* matrix, int64_t columns, int64_t n) {
    constexpr int W = Vec<T>::W;
    int64_t at = 0;
    for (; at + 16 * W <= columns; at += 16 * W) add_columns<T, 16>(z + at, a, matrix + at, columns, n);
    for (; at + 4 * W <= columns; at += 4 * W) add_columns<T, 4>(z + at, a, matrix + at, columns, n);
    for (; at + W <= columns; at += W) add_columns<T, 1>(z + at, a, matrix + at, columns, n);
    if (const int lanes = int(columns - at)) {
        V<T> sum = load_n(z + at, lanes);
        for (int64_t k = 0; k < n; ++k) sum = fma(splat(a[k]), load_n(matrix + k * columns + at, lanes), sum);
        store_n(z + at, sum, lanes);
    }
}

// Step n on weights that nobody packed: one row after the other, all columns of the four gates side by side.
template <class T, bool Usual>
void step_plain(const Forward<T>& f, int64_t n, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W;
    const int64_t t = time_of(f, n), H = f.w.units;
    for (int64_t row = 0; row < f.rows; ++row) {
        for (int64_t k = 0; k < 4 * H; ++k) f.z[k] = f.w.bias ? f.w.bias[k] : T(0);
        add_product(f.z, f.x + row * f.x_row + t * f.x_time, f.w.kernel, 4 * H, f.w.input);
        add_product(f.z, h + row * f.w.blocks * W, f.w.recurrent, 4 * H, H);
        for (int64_t block = 0; block < f.w.blocks; ++block) {
            const int64_t left = H - block * W;
            const int lanes = left < W ? int(left) : W;
            V<T> z[4];
            unroll<4>([&](auto v) INLINED { z[v] = load_lanes(f.z + v * H + block * W, lanes); });
            finish<T, Usual>(f, z, block, row, t, h, h_next);
        }
    }
}

template <class T, bool Usual>
void run(Forward<T>& f) {
    if (f.z && !f.w.plain) project(f);
    for (int64_t n = f.first; n < f.last; ++n) {
        const T* h = f.h;
        T* h_next = f.h_next;
        // Blocks go up in even steps and down in odd ones: the last ones are still in the cache.
        const bool down = n & 1;
        if (f.w.plain) {
            step_plain<T, Usual>(f, n, h, h_next);
        } else if (f.rows == 1) {  // two blocks together: eight chains hide the latency of one
            const int64_t pairs = f.w.blocks / 2;
            if ((f.w.blocks & 1) && down) step_tile<T, Usual, 1, 1>(f, n, f.w.blocks - 1, 0, h, h_next);
            for (int64_t k = 0; k < pairs; ++k)
                step_tile<T, Usual, 1, 2>(f, n, 2 * (down ? pairs - 1 - k : k), 0, h, h_next);
            if ((f.w.blocks & 1) && !down) step_tile<T, Usual, 1, 1>(f, n, f.w.blocks - 1, 0, h, h_next);
        } else {
            for (int64_t k = 0; k < f.w.blocks; ++k) {
                const int64_t block = down ? f.w.blocks - 1 - k : k;
                tiles(f.rows,
                      [&](auto R, int64_t row) INLINED { step_tile<T, Usual, R, 1>(f, n, block, row, h, h_next); });
            }
        }
        T* swap = f.h;
        f.h = f.h_next, f.h_next = swap;
    }
}

template <class T>
void forward(Forward<T>& f) {
    if (f.w.activation == kTanh && f.w.recurrent_activation == kSigmoid)
        run<T, true>(f);
    else
        run<T, false>(f);
}

}  // namespace
}  // namespace cellstack
