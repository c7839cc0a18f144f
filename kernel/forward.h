// Forward: x·kernel of a chunk of steps as one product, then the recurrence step by step. The plain LSTM takes each
// block of units from the sums to h in registers; every other cell takes row by row, when the sums of all blocks are
// there.
#pragma once
#include "gru.h"
#include "lstm.h"
#include "quantised.h"
#include "rnn.h"

namespace cellstack {
namespace {

// Rows that start afresh before step n: their state becomes the cell's initial state.
template <class T>
__attribute__((noinline)) void restart(const Forward<T>& f, int64_t n) {
    const Description& d = *f.w.d;
    const int64_t wide = f.w.blocks * Vec<T>::W, output_wide = f.w.output_blocks * Vec<T>::W, t = time_of(f, n);
    const Arrays<const T>& arrays = f.w.arrays;
    for (int64_t r = 0; r < f.rows; ++r) {
        if (!f.reset[r * f.steps + t]) continue;
        for (int64_t k = 0; k < d.output; ++k) {
            const T h = arrays.initial_h ? arrays.initial_h[k] : T(0);
            f.h[r * output_wide + k] = f.recurrent_dropout ? h * f.recurrent_dropout[r * d.output + k] : h;
            if (f.recurrent_dropout) f.h_kept[r * output_wide + k] = h;
        }
        for (int64_t k = 0; f.c && k < d.units; ++k) f.c[r * wide + k] = arrays.initial_c ? arrays.initial_c[k] : T(0);
    }
}

template <class T>
INLINE void swap_states(Forward<T>& f) {
    T* h = f.h;
    f.h = f.h_next, f.h_next = h;
}

// ── the plain LSTM, by blocks ────────────────────────────────────────────────────────────────────────────────────────

// The k of a panel, and of the rows that it is multiplied with: numbers, or pairs of bfloat16.
template <bool Pairs>
INLINE int64_t depth_of(int64_t columns) {
    return Pairs ? narrow_words(columns, 16) : columns;
}

// Rows of x of a chunk, one step after the other.
template <class T>
INLINE Rows<T> rows_of_x(const Forward<T>& f) {
    return {f.x + time_of(f, f.first) * f.x_time, f.x_row, f.reverse ? -f.x_time : f.x_time, f.rows};
}

// z[block][m] = bias + x·kernel for the rows m = (n - first)·rows + r of a chunk: one matrix product.
template <class T, bool Pairs>
void project(const Forward<T>& f) {
    constexpr int W = Vec<T>::W;
    const int64_t total = (f.last - f.first) * f.rows, depth = depth_of<Pairs>(f.w.d->input);
    const int64_t x_row = narrow_stride(f.w.element, f.w.d->input);
    for (int64_t block = f.block; block < f.end_block; ++block) {
        const T* panel = f.w.kernel + block * depth * 4 * W;
        const T* bias = f.w.bias + block * 4 * W;
        tiles(total, [&](auto R, int64_t m) INLINED {
            const T* a[R];
            bool used = !f.mask;
            int64_t n = f.first + m / f.rows, r = m % f.rows;
            for (int k = 0; k < R; ++k) {
                const int64_t t = time_of(f, n);
                a[k] = Pairs ? f.narrow_x + (m + k) * x_row : f.x + r * f.x_row + t * f.x_time;
                used = used || f.mask[r * f.steps + t];
                if (++r == f.rows) r = 0, ++n;
            }
            if (!used) return;
            V<T> sums[1][R][4];
            unroll<R>([&](auto k) INLINED { unroll<4>([&](auto v) INLINED { sums[0][k][v] = load(bias + v * W); }); });
            accumulate<T, R, 1, 4, 4, false, Pairs>(sums, a, panel, 0, depth);
            T* z = f.z + (block * total + m) * 4 * W;
            unroll<R>([&](auto k)
                          INLINED { unroll<4>([&](auto v) INLINED { store(z + (k * 4 + v) * W, sums[0][k][v]); }); });
        });
    }
}

// From the four sums of one row and block to c and h, and to whatever is asked for beside them.
template <class T>
INLINE void finish(const Forward<T>& f, V<T> (&z)[4], int64_t block, int64_t r, int64_t t, const T* h, T* h_next) {
    const Place at = place<T>(r, t, block, f.w.d->units);
    if (!f.mask || f.mask[r * f.steps + t]) {
        const V<T> c = lstm_gates<T, true, true>(f, at, z);
        give<T, true>(f, at, z[3] * tanh<T>(c), h, h_next);
    } else {
        write_h(f, at, h_before(f, at, h), load(h + r * f.w.blocks * Vec<T>::W + at.unit), h_next);
        unroll<4>([&](auto v) INLINED { z[v] = splat(T(0)); });
    }
    keep_gates(f, at, z);
    keep_cell(f, at);
}

// Rows and blocks that the mask leaves out at a step: the state stays, gates are zero.
template <class T>
__attribute__((noinline)) void leave_out(const Forward<T>& f, int64_t block, int blocks, int64_t row, int rows,
                                         int64_t t, const T* h, T* h_next) {
    V<T> none[4] = {};
    for (int b = 0; b < blocks; ++b)
        for (int r = 0; r < rows; ++r) finish<T>(f, none, block + b, row + r, t, h, h_next);
}

// Rows r … r+R of blocks block … block+N at step n. A tile of several rows has time to fetch some of `ahead`, the panel
// that comes next: its first tile would wait for it, where the weights don't fit into a near cache.
template <class T, int R, int N, bool Ahead, bool Pairs>
INLINE void step_tile(const Forward<T>& f, int64_t n, int64_t block, int64_t row, const T* h, T* h_next,
                      const T* ahead = nullptr) {
    constexpr int W = Vec<T>::W;
    const int64_t t = time_of(f, n), wide = f.w.blocks * W;
    const int64_t I = depth_of<Pairs>(f.w.d->input), H = depth_of<Pairs>(f.w.d->units);
    V<T> sums[N][R][4];
    const auto each = [&](auto&& body) INLINED {
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED { unroll<4>([&](auto v) INLINED { body(b, r, v); }); });
        });
    };
    // Rows that the mask leaves out, such as those of a packed sequence that have ended, are summed only where one
    // beside them isn't.
    bool used = !f.mask;
    for (int r = 0; r < R; ++r) used = used || f.mask[(row + r) * f.steps + t];
    if (!used) {
        leave_out(f, block, N, row, R, t, h, h_next);
        return;
    }
    // The sums over x: made ahead, or here, where they pass through the stack.
    alignas(kVectorBytes) V<T> here[N][R][4];
    const T* a[R];
    if (!f.z) {
        const T* x = Pairs ? f.narrow_x : f.x + t * f.x_time;
        const int64_t x_row = Pairs ? narrow_stride(f.w.element, f.w.d->input) : f.x_row;
        for (int r = 0; r < R; ++r) a[r] = x + (row + r) * x_row;
        each([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = load(f.w.bias + ((block + b) * 4 + v) * W); });
        accumulate<T, R, N, 4, 4, false, Pairs>(sums, a, f.w.kernel + block * I * 4 * W, I * 4 * W, I);
        each([&](auto b, auto r, auto v) INLINED { here[b][r][v] = sums[b][r][v]; });
    }
    const T* h_rows = Pairs ? f.narrow_h : h;
    const int64_t h_row = Pairs ? narrow_stride(f.w.element, f.w.d->units) : wide;
    for (int r = 0; r < R; ++r) a[r] = h_rows + (row + r) * h_row;
    each([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = splat(T(0)); });
    accumulate<T, R, N, 4, 4, Ahead, Pairs>(sums, a, f.w.recurrent + block * H * 4 * W, H * 4 * W, H, ahead);
    const int64_t total = (f.last - f.first) * f.rows, m = (n - f.first) * f.rows + row;
    const T* over_x = f.z ? f.z + (block * total + m) * 4 * W : reinterpret_cast<const T*>(here);
    const int64_t stride = (f.z ? total : R) * 4 * W;
    each([&](auto b, auto r, auto v)
             INLINED { sums[b][r][v] = load(over_x + b * stride + (r * 4 + v) * W) + sums[b][r][v]; });
    if constexpr (R == 1) {
        unroll<N>([&](auto b) INLINED { finish<T>(f, sums[b][0], block + b, row, t, h, h_next); });
    } else {  // more sums than the activations leave registers for: they pass through the stack, one row at a time
        alignas(kVectorBytes) V<T> spilled[N][R][4];
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED { unroll<4>([&](auto v) INLINED { spilled[b][r][v] = sums[b][r][v]; }); });
        });
        for (int b = 0; b < N; ++b)
#pragma GCC unroll 1
            for (int r = 0; r < R; ++r) finish<T>(f, spilled[b][r], block + b, row + r, t, h, h_next);
    }
}

template <class T, bool Pairs>
void run_blocks(Forward<T>& f) {
    const int64_t blocks = f.end_block - f.block, depth = depth_of<Pairs>(f.w.d->units);
    if constexpr (Pairs)
        if (f.project) halve_rows<true>(f.narrow_x, rows_of_x(f), (f.last - f.first) * f.rows, f.w.d->input);
    if (f.z && f.project) project<T, Pairs>(f);
    for (int64_t n = f.from; n < f.to; ++n) {
        if (f.reset) restart(f, n);
        const T* h = f.h;
        T* h_next = f.h_next;
        if constexpr (Pairs) halve_rows<true>(f.narrow_h, {h, f.w.blocks * Vec<T>::W, 0, f.rows}, f.rows, f.w.d->units);
        // Blocks go up in even steps and down in odd ones: the last ones are still in the cache.
        const bool down = n & 1;
        if (f.rows == 1) {  // two blocks together: eight chains hide the latency of one
            const int64_t pairs = blocks / 2;
            if ((blocks & 1) && down) step_tile<T, 1, 1, false, Pairs>(f, n, f.end_block - 1, 0, h, h_next);
            for (int64_t k = 0; k < pairs; ++k)
                step_tile<T, 1, 2, false, Pairs>(f, n, f.block + 2 * (down ? pairs - 1 - k : k), 0, h, h_next);
            if ((blocks & 1) && !down) step_tile<T, 1, 1, false, Pairs>(f, n, f.end_block - 1, 0, h, h_next);
        } else {
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t block = down ? f.end_block - 1 - k : f.block + k;
                const int64_t after = down ? f.end_block - 2 - k : f.block + k + 1;
                const T* ahead = f.w.recurrent + (k + 1 < blocks ? after : block) * depth * 4 * Vec<T>::W;
                tiles(f.rows, [&](auto R, int64_t row) INLINED {
                    step_tile<T, R, 1, true, Pairs>(f, n, block, row, h, h_next, ahead);
                    ahead += depth * kLine<T>;
                });
            }
        }
        swap_states(f);
    }
}

// What becomes of the sums of a tile over h, and of those over x at `over_x`, a block `stride` apart: once for tiles of
// any size, which are many.
__attribute__((noinline)) void finish_tile(const Forward<float>& f, const V<float>* sums, const float* over_x,
                                           int64_t stride, int64_t n, int64_t block, int blocks, int64_t row, int rows,
                                           const float* h, float* h_next) {
    constexpr int W = Vec<float>::W;
    const int64_t t = time_of(f, n);
    for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 1
        for (int r = 0; r < rows; ++r) {
            V<float> z[4];
            unroll<4>([&](auto v) INLINED {
                z[v] = load(over_x + b * stride + (r * 4 + v) * W) + sums[(b * rows + r) * 4 + v];
            });
            finish<float>(f, z, block + b, row + r, t, h, h_next);
        }
}

// The plain LSTM with weights of bfloat16 that are made floats, by blocks too; the sums over x are always made ahead.
__attribute__((noinline)) void run_halves(Forward<float>& f) {
    constexpr int W = Vec<float>::W;
    const int64_t total = (f.last - f.first) * f.rows, I = f.w.d->input, H = f.w.d->units;
    const auto zeros = [](auto& sums, int64_t) INLINED {
        constexpr int N = sizeof sums / sizeof sums[0], R = sizeof sums[0] / sizeof sums[0][0];
        each_sum<N, R, 4>([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = splat(0.0f); });
    };
    const auto panel = [](const float* matrix, int64_t depth, int64_t block) INLINED {
        return reinterpret_cast<const uint32_t*>(matrix) + block * narrow_words(depth, 16) * 4 * W;
    };
    // Whether the mask leaves any of the rows m … m+R in, which are those of a batch at one step after the other.
    const auto used = [&](int64_t m, int R) INLINED {
        bool any = !f.mask;
        for (int64_t k = m; !any && k < m + R; ++k)
            any = f.mask[k % f.rows * f.steps + time_of(f, f.first + k / f.rows)];
        return any;
    };
    const int64_t x_stride = narrow_stride(f.w.element, I), h_stride = narrow_stride(f.w.element, H);
    if (f.project) halve_rows<false>(f.narrow_x, rows_of_x(f), total, I);
    for (int64_t block = f.block; f.project && block < f.end_block; ++block) {
        const float* bias = f.w.bias + block * 4 * W;
        float* z = f.z + block * total * 4 * W;
        halves_product<4, 4, 1, false>(
            panel(f.w.kernel, I, block), I, f.narrow_x, x_stride, total, used,
            [&](auto& sums, int64_t) INLINED {
                constexpr int R = sizeof sums[0] / sizeof sums[0][0];
                each_sum<1, R, 4>([&](auto, auto r, auto v) INLINED { sums[0][r][v] = load(bias + v * W); });
            },
            [&](auto& sums, int64_t m) INLINED {
                constexpr int R = sizeof sums[0] / sizeof sums[0][0];
                each_sum<1, R, 4>([&](auto, auto r, auto v)
                                      INLINED { store(z + ((m + r) * 4 + v) * W, sums[0][r][v]); });
            });
    }
    for (int64_t n = f.from; n < f.to; ++n) {
        if (f.reset) restart(f, n);
        const float* h = f.h;
        float* h_next = f.h_next;
        const int64_t before = (n - f.first) * f.rows;
        halve_rows<false>(f.narrow_h, {h, f.w.blocks * W, 0, f.rows}, f.rows, H);
        const auto blocks = [&](auto N, auto Alone, int64_t block) INLINED {
            halves_product<4, 4, N, Alone>(
                panel(f.w.recurrent, H, block), H, f.narrow_h, h_stride, f.rows,
                [&](int64_t r, int R) INLINED { return used(before + r, R); }, zeros,
                [&](auto& sums, int64_t r) INLINED {
                    constexpr int R = sizeof sums[0] / sizeof sums[0][0];
                    const float* over_x = f.z + (block * total + before + r) * 4 * W;
                    finish_tile(f, &sums[0][0][0], over_x, total * 4 * W, n, block, N, r, R, h, h_next);
                });
        };
        blocks_together<4>(
            f.block, f.end_block, f.rows, n & 1, [&](auto N, int64_t block) INLINED { blocks(N, Int<1>{}, block); },
            [&](auto N, int64_t block) INLINED { blocks(N, Int<0>{}, block); });
        swap_states(f);
    }
}

// ── every cell, by rows ──────────────────────────────────────────────────────────────────────────────────────────────

template <class T, int Kind, int G, bool Usual>
void run_rows(Forward<T>& f) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    const int64_t H = d.units, wide = w.blocks * Vec<T>::W, output_wide = w.output_blocks * Vec<T>::W;
    const int64_t stride = w.unpacked ? H : wide, row = G * stride;
    const auto sums_of = [&](const T* matrix, const T* bias, bool add, int64_t depth, T* to) {
        return Product<T>{matrix,      bias, add,    w.unpacked, depth,     H,          w.blocks, f.block,
                          f.end_block, to,   stride, false,      w.element, f.narrow_h, f.scales, w.pairs};
    };
    // Layer normalisation comes between the product and its bias.
    const T* bias = d.layer_norm ? nullptr : w.bias;
    const T* other_bias = d.layer_norm ? nullptr : w.recurrent_bias;
    if (f.project) {
        Product<T> over_x = sums_of(w.kernel, bias, false, d.input, f.z);
        over_x.narrow = f.narrow_x;
        multiply<T, G, 0, G>(over_x, rows_of_x(f), (f.last - f.first) * f.rows);
    }
    for (int64_t n = f.from; n < f.to; ++n) {
        if (f.reset) restart(f, n);
        const int64_t t = time_of(f, n);
        T* z = f.z + (n - f.first) * f.rows * row;
        T* sums = d.apart() ? f.q : z;
        const Rows<T> h{f.h, output_wide, 0, f.rows};
        Product<T> over_h = sums_of(w.recurrent, other_bias, !d.apart(), d.output, sums);
        over_h.down = n & 1;
        const auto rows = [&](auto&& body) INLINED {
            for (int64_t r = 0; r < f.rows; ++r) body(r, !f.mask || f.mask[r * f.steps + t]);
        };
        if constexpr (Kind == kGru) {
            if (d.reset_after) {
                multiply<T, G, 0, G>(over_h, h, f.rows);
            } else {
                multiply<T, G, 0, 2>(over_h, h, f.rows);
                rows([&](int64_t r, bool) { gru_reset<T, Usual>(f, r, t, z + r * row, stride, f.h); });
                multiply<T, G, 2, 1>(over_h, {f.m, wide, 0, f.rows}, f.rows);
            }
        } else {
            multiply<T, G, 0, G>(over_h, h, f.rows);
        }
        rows([&](int64_t r, bool used) {
            if (!used) return carry(f, r, t, f.h, f.h_next);
            T *own = z + r * row, *q = sums + r * row;
            if constexpr (Kind == kLstm)
                lstm_row<T, Usual>(f, r, t, own, q, stride, f.h, f.h_next);
            else if constexpr (Kind == kGru)
                gru_row<T, Usual>(f, r, t, own, q, stride, f.h, f.h_next);
            else
                rnn_row<T, Usual>(f, r, t, own, q, stride, f.h, f.h_next);
        });
        if (Kind == kLstm && d.projects()) {
            const int64_t apart = w.unpacked ? d.output : output_wide;
            Product<T> projected = sums_of(w.projection, nullptr, false, H, f.p);
            projected.units = d.output, projected.stride = apart;
            projected.blocks = projected.end_block = w.output_blocks, projected.block = 0;
            multiply<T, 1, 0, 1>(projected, {f.m, wide, 0, f.rows}, f.rows);
            rows([&](int64_t r, bool used) {
                if (!used) return;
                each_block<T>(r, t, w.output_blocks, d.output, [&](const Place& at) INLINED {
                    give<T, false>(f, at, load_lanes(f.p + r * apart + at.unit, at.lanes), f.h, f.h_next);
                });
            });
        }
        swap_states(f);
    }
}

// A layer without a state: the product, and its activation.
template <class T>
void run_dense(const Forward<T>& f) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    const int64_t wide = w.blocks * Vec<T>::W;
    multiply<T, 1, 0, 1>({w.kernel, w.bias, false, w.unpacked, d.input, d.units, w.blocks, f.block, f.end_block, f.z,
                          wide, false, w.element, f.narrow_x, f.scales, w.pairs},
                         rows_of_x(f), (f.last - f.first) * f.rows);
    for (int64_t n = f.first; n < f.last; ++n)
        for (int64_t r = 0; r < f.rows; ++r)
            each_block(f, r, time_of(f, n), [&](const Place& at) INLINED {
                const V<T> z = load(f.z + ((n - f.first) * f.rows + r) * wide + at.unit);
                T* y = f.y + r * f.y_row + at.t * f.y_time + at.unit;
                store_lanes(y, act<T, false, true>(d.activations[0], z), at.lanes);
            });
}

template <class T, bool Usual>
void choose(Forward<T>& f) {
    const Description& d = *f.w.d;
    if (d.kind == kGru)
        run_rows<T, kGru, 3, Usual>(f);
    else if (d.kind == kRnn)
        run_rows<T, kRnn, 1, Usual>(f);
    else if (d.coupled)
        run_rows<T, kLstm, 3, Usual>(f);
    else
        run_rows<T, kLstm, 4, Usual>(f);
}

template <class T>
void forward(Forward<T>& f) {
    if constexpr (sizeof(T) == 4)
        if (f.w.halves_by_blocks()) return run_halves(f);
    if (f.w.d->kind == kDense)
        run_dense<T>(f);
    else if (f.w.by_blocks())
        f.w.pairs ? run_blocks<T, kPairs<T>>(f) : run_blocks<T, false>(f);
    else if (f.w.d->usual())
        choose<T, true>(f);
    else
        choose<T, false>(f);
}

}  // namespace
}  // namespace cellstack
