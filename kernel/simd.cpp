// The inner routines (leaf.h), compiled once per instruction set: the same source, other flags.
//
// Nothing here may be shared with another translation unit (an inline function compiled for AVX-512 must not be the
// copy that the linker keeps for all), hence the anonymous namespaces and no standard templates.
#include "leaf.h"
#include "vec.h"

extern "C" double log1p(double);
extern "C" float log1pf(float);

namespace cellstack {
namespace {

constexpr int64_t kChunk = 96;  // rows of dz that stay in L1 while a weight gradient's columns pass over them

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6;  // of a tile: 6·4 sums, 6 broadcasts and a weight fill 32 registers
#else
constexpr int kRows = 3;  // 3·4 sums, 3 broadcasts and a weight fill 16
#endif

INLINE float log1p_of(float x) { return log1pf(x); }
INLINE double log1p_of(double x) { return log1p(x); }

template <class T>
INLINE V<T> apply(int activation, V<T> z) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    switch (activation) {
        case kSigmoid:
            return sigmoid<T>(z);
        case kTanh:
            return tanh<T>(z);
        case kRelu:
            return z < zero ? zero : z;
        case kHardSigmoid:
            return clamp(fma(z, splat(T(1) / T(6)), splat(T(0.5))), T(0), T(1));
        case kSoftsign:
            return z / (one + (z < zero ? -z : z));
        case kSoftplus: {  // max(z, 0) + log(1 + e^-|z|)
            V<T> tail = exp_minus_one<T>(z < zero ? z : -z) + one;
            for (int k = 0; k < Vec<T>::W; ++k) tail[k] = log1p_of(tail[k]);
            return (z < zero ? zero : z) + tail;
        }
        case kElu:
            return z > zero ? z : exp_minus_one<T>(z);
        default:
            return z;
    }
}

// Derivative of an activation, from its value.
template <class T>
INLINE V<T> slope(int activation, V<T> y) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    switch (activation) {
        case kSigmoid:
            return y * (one - y);
        case kTanh:
            return one - y * y;
        case kRelu:
            return y > zero ? one : zero;
        case kHardSigmoid:
            return (y > zero) & (y < one) ? splat(T(1) / T(6)) : zero;
        case kSoftsign: {
            V<T> rest = one - (y < zero ? -y : y);
            return rest * rest;
        }
        case kSoftplus:
            return -exp_minus_one<T>(-y);
        case kElu:
            return y > zero ? one : y + one;
        default:
            return one;
    }
}

// The usual activations are constants in a copy of each routine, so their switch costs nothing there.
template <bool Usual>
INLINE int choose(int activation, int usual) {
    return Usual ? usual : activation;
}

// sums[b][r][v] += a[r][k] · panel_b[k][v] for k < n: the one loop that all of this is about.
template <class T, int R, int N>
INLINE void accumulate(V<T> (&sums)[N][R][4], const T* const (&a)[R], const T* panel, int64_t panel_stride, int64_t n) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; ++k) {
        const T* p = panel + k * 4 * W;
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r][k]); });
        unroll<N>([&](auto b) INLINED {
            unroll<4>([&](auto v) INLINED {
                V<T> w = load(p + b * panel_stride + v * W);
                unroll<R>([&](auto r) INLINED { sums[b][r][v] = fma(s[r], w, sums[b][r][v]); });
            });
        });
    }
}

// Calls body(Int<R>, first row) on tiles of at most kRows rows, as even as they can be.
template <class F>
INLINE void tiles(int64_t rows, F&& body) {
    int64_t count = (rows + kRows - 1) / kRows;
    for (int64_t n = 0, r = 0; n < count; ++n) {
        int64_t size = (rows - r + (count - n) - 1) / (count - n);
        switch (size) {
            case 1: body(Int<1>{}, r); break;
            case 2: body(Int<2>{}, r); break;
            case 3: if constexpr (kRows >= 3) body(Int<3>{}, r); break;
            case 4: if constexpr (kRows >= 4) body(Int<4>{}, r); break;
            case 5: if constexpr (kRows >= 5) body(Int<5>{}, r); break;
            default: if constexpr (kRows >= 6) body(Int<6>{}, r); break;
        }
        r += size;
    }
}

template <class T>
void pack(T* to, const T* from, int64_t rows, int64_t units) {
    constexpr int W = Vec<T>::W;
    const int64_t blocks = (units + W - 1) / W;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t left = units - block * W;
        const int lanes = left < W ? int(left) : W;
        for (int64_t k = 0; k < rows; ++k)
            for (int gate = 0; gate < 4; ++gate, to += W)
                store(to, load_lanes(from + k * 4 * units + gate * units + block * W, lanes));
    }
}

template <class T>
void pack_transposed(T* to, const T* from, int64_t rows, int64_t units) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const int64_t blocks = (units + W - 1) / W, panels = (rows + wide - 1) / wide;
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t block = 0; block < blocks; ++block)
            for (int gate = 0; gate < 4; ++gate)
                for (int lane = 0; lane < W; ++lane, to += wide) {
                    const int64_t unit = block * W + lane;
                    for (int k = 0; k < wide; ++k) {
                        const int64_t row = panel * wide + k;
                        to[k] = row < rows && unit < units ? from[row * 4 * units + gate * units + unit] : T(0);
                    }
                }
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
INLINE int64_t time_of(const T& f, int64_t n) {
    return f.reverse ? f.steps - 1 - n : n;
}

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
            unroll<R>([&](auto k) INLINED {
                unroll<4>([&](auto v) INLINED { store(z + (k * 4 + v) * W, sums[0][k][v]); });
            });
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
            unroll<R>([&](auto r) INLINED {
                unroll<4>([&](auto v) INLINED { sums[b][r][v] = load(z + (r * 4 + v) * W); });
            });
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

template <class T, bool Usual>
void run(Forward<T>& f) {
    if (f.z) project(f);
    for (int64_t n = f.first; n < f.last; ++n) {
        const T* h = f.h;
        T* h_next = f.h_next;
        // Blocks go up in even steps and down in odd ones: the last ones are still in the cache.
        const bool down = n & 1;
        if (f.rows == 1) {  // two blocks together: eight chains hide the latency of one
            const int64_t pairs = f.w.blocks / 2;
            if ((f.w.blocks & 1) && down) step_tile<T, Usual, 1, 1>(f, n, f.w.blocks - 1, 0, h, h_next);
            for (int64_t k = 0; k < pairs; ++k)
                step_tile<T, Usual, 1, 2>(f, n, 2 * (down ? pairs - 1 - k : k), 0, h, h_next);
            if ((f.w.blocks & 1) && !down) step_tile<T, Usual, 1, 1>(f, n, f.w.blocks - 1, 0, h, h_next);
        } else {
            for (int64_t k = 0; k < f.w.blocks; ++k) {
                const int64_t block = down ? f.w.blocks - 1 - k : k;
                tiles(f.rows, [&](auto R, int64_t row) INLINED {
                    step_tile<T, Usual, R, 1>(f, n, block, row, h, h_next);
                });
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

// ── backward ─────────────────────────────────────────────────────────────────────────────────────────────────────────

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
    T* dz = f.dz + (block * f.steps * f.batch + t * f.batch + f.row0 + r) * 4 * W;
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
    const int64_t dz_rows = f.steps * f.batch, panels = (f.units + wide - 1) / wide, columns = panels * wide;
    for (int64_t n = f.steps - 1; n >= 0; --n) {
        const int64_t t = time_of(f, n);
        for (int64_t block = 0; block < f.blocks; ++block)
            for (int64_t r = 0; r < f.rows; ++r) differentiate<T, Usual>(f, block, r, n, columns);
        for (int64_t p = 0; p < panels; ++p)
            tiles(f.rows, [&](auto R, int64_t row) INLINED {
                V<T> sums[1][R][4];
                times_transposed<T, R>(sums, f.dz + (t * f.batch + f.row0 + row) * wide, f.blocks, dz_rows,
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
INLINE void weight_tile(const T* dz, const T* const* a, int64_t rows, int64_t column, bool more, T* scratch) {
    constexpr int W = Vec<T>::W;
    V<T> sums[R][4];
    T* at = scratch + column * 4 * W;
    unroll<R>([&](auto r) INLINED {
        unroll<4>([&](auto v) INLINED { sums[r][v] = more ? load(at + (r * 4 + v) * W) : splat(T(0)); });
    });
    for (int64_t m = 0; m < rows; ++m) {
        const T* row = a[m] + column;
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(row[r]); });
        unroll<4>([&](auto v) INLINED {
            V<T> w = load(dz + (m * 4 + v) * W);
            unroll<R>([&](auto r) INLINED { sums[r][v] = fma(s[r], w, sums[r][v]); });
        });
    }
    unroll<R>([&](auto r) INLINED { unroll<4>([&](auto v) INLINED { store(at + (r * 4 + v) * W, sums[r][v]); }); });
}

template <class T>
void weight_gradient(const WeightGradient<T>& f) {
    constexpr int W = Vec<T>::W;
    V<T> bias[4];
    unroll<4>([&](auto v) INLINED { bias[v] = splat(T(0)); });
    for (int64_t m = 0; m < f.dz_rows; m += kChunk) {
        const int64_t rows = f.dz_rows - m < kChunk ? f.dz_rows - m : kChunk;
        const T* dz = f.dz + m * 4 * W;
        for (const auto& of : f.of)
            tiles(of.columns, [&](auto R, int64_t column) INLINED {
                weight_tile<T, R>(dz, of.rows + m, rows, column, m > 0, of.scratch);
            });
        for (int64_t k = 0; k < rows; ++k)
            unroll<4>([&](auto v) INLINED { bias[v] += load(dz + (k * 4 + v) * W); });
    }
    const int64_t left = f.units - f.block * W;
    const int lanes = left < W ? int(left) : W;
    for (const auto& of : f.of)
        for (int64_t k = 0; k < of.columns; ++k)
            for (int gate = 0; gate < 4; ++gate)
                store_lanes(of.out + k * 4 * f.units + gate * f.units + f.block * W,
                            f.dz_rows ? load(of.scratch + (k * 4 + gate) * W) : splat(T(0)), lanes);
    if (f.bias) unroll<4>([&](auto v) INLINED { store_lanes(f.bias + v * f.units + f.block * W, bias[v], lanes); });
}

template <class T>
void activate(int activation, const T* x, T* y, int64_t n) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; k += W) {
        const int lanes = n - k < W ? int(n - k) : W;
        store_lanes(y + k, apply<T>(activation, load_lanes(x + k, lanes)), lanes);
    }
}

template <class T>
constexpr Leaf<T> leaf() {
    return {Vec<T>::W,         pack<T>,           pack_transposed<T>, forward<T>, backward<T>,
            input_gradient<T>, weight_gradient<T>, activate<T>};
}

// Four chains of lanes, each 31·lane + word: one word that differs always shows, and all words are read at about
// the speed of a load.
uint64_t digest(const void* data, int64_t words) {
    typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
    constexpr int W = kVectorBytes / 4;
    const char* p = static_cast<const char*>(data);
    U lanes[4] = {U{} + 1, U{} + 2, U{} + 3, U{} + 4};
    int64_t at = 0;
    for (; at + 4 * W <= words; at += 4 * W)
        unroll<4>([&](auto k) INLINED {
            U x;
            memcpy(&x, p + (at + k * W) * 4, sizeof x);
            lanes[k] = (lanes[k] << 5) - lanes[k] + x;
        });
    uint64_t all = uint64_t(words);
    const auto mix = [&](uint64_t x) { all = (all ^ x) * 0x9e3779b97f4a7c15u, all ^= all >> 29; };
    for (; at < words; ++at) {
        uint32_t x;
        memcpy(&x, p + at * 4, sizeof x);
        mix(x);
    }
    for (int k = 0; k < 4; ++k)
        for (int w = 0; w < W; ++w) mix(lanes[k][w]);
    return all;
}

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

}  // namespace

namespace CELLSTACK_ISA {
extern const InstructionSet set;
const InstructionSet set = {NAME(CELLSTACK_ISA), leaf<float>(), leaf<double>(), digest};
}  // namespace CELLSTACK_ISA

}  // namespace cellstack
