// The forward pass: x·kernel for a chunk of steps as one product, then the recurrence step by step. The plain LSTM
// computes each block of units from the sums to h in registers; all other cells compute a row once the sums of all its
// blocks are known.
#pragma once
#include "backbone.h"
#include "narrow.h"
#include "nodes_forward.h"
#include "one_row.h"
#include "rows.h"

namespace cellstack {
namespace {

// Sets the state of rows that are reset before step n to the cell's initial state.
template <class T>
NOINLINE void restart(const Forward<T>& f, int64_t n) {
    const Description& d = *f.w.d;
    const int64_t wide = f.w.blocks * Vec<T>::W, output_wide = f.w.output_blocks * Vec<T>::W, t = time_of(f, n);
    const Arrays<const T>& arrays = f.w.arrays;
    for (int64_t r = 0; r < f.rows; ++r) {
        if (!f.reset[r * f.steps + t]) continue;
        for (int64_t k = 0; k < d.output; ++k) {
            const T h = arrays.initial[0] ? arrays.initial[0][k] : T(0);
            f.h[r * output_wide + k] = f.recurrent_dropout ? h * f.recurrent_dropout[r * d.output + k] : h;
            if (f.recurrent_dropout) f.h_kept[r * output_wide + k] = h;
        }
        for (int s = 0; s < d.inner_states(); ++s)
            for (int64_t k = 0; k < d.units; ++k)
                f.inner[s][r * wide + k] = arrays.initial[1 + s] ? arrays.initial[1 + s][k] : T(0);
    }
}

template <class T>
INLINE void swap_states(Forward<T>& f) {
    T* h = f.h;
    f.h = f.h_next, f.h_next = h;
}

// ── the plain LSTM, by blocks ────────────────────────────────────────────────────────────────────────────────────────

// The rows of x in a chunk, step by step; and rows in the format that narrow weights need.
template <class T>
INLINE Rows<T> rows_of_x(const Forward<T>& f) {
    return {f.x + time_of(f, f.first) * f.x_time, f.x_row, f.reverse ? -f.x_time : f.x_time, f.rows};
}
template <class T>
INLINE Rows<T> narrow_rows(const Forward<T>& f, const T* at, int64_t depth, int64_t count) {
    return {at, narrow_stride(f.w.element, depth), 0, count};
}

// A tile over all gates of a block, for a panel of this depth; and over the vectors that the gates of the tail share.
template <class T>
INLINE Tile<T> block_tile(int64_t words) {
    constexpr int W = Vec<T>::W;
    Tile<T> t = tile_over<T>(words);
    t.panel_step = 4 * W, t.panel_vector = t.from_vector = t.to_vector = W, t.to_row = 4 * W;
    return t;
}

// Whether the mask uses any of the rows m … m+R of a chunk, which are the rows of the batch at one step after the
// other.
template <class T>
INLINE bool any_used(const Forward<T>& f, int64_t m, int R) {
    bool used = !f.mask;
    for (int64_t k = m; !used && k < m + R; ++k) used = f.mask[k % f.rows * f.steps + time_of(f, f.first + k / f.rows)];
    return used;
}

// The number of vectors of a block's panel.
template <class T>
INLINE int vectors_of(const Forward<T>& f, int64_t block) {
    return f.w.is_tail(block) ? f.w.tail.vectors : 4;
}

// Moves the sums of the tail to one vector per gate, in rows of [4][W].
template <class T>
NOINLINE void spread(const Tail& tail, T* sums, int64_t rows) {
    constexpr int W = Vec<T>::W;
    for (int64_t r = 0; r < rows; ++r, sums += 4 * W) {
        V<T> z[4];
        UNROLL
        for (int v = 0; v < 4; ++v) z[v] = gate_of(sums, tail, v);
        UNROLL
        for (int v = 0; v < 4; ++v) store(sums + v * W, z[v]);
    }
}

// z[block][m] = bias + x·kernel for the rows m = (n - first)·rows + r of a chunk: one matrix product.
template <class T>
void project(const Forward<T>& f) {
    constexpr int W = Vec<T>::W;
    const int64_t total = (f.last - f.first) * f.rows, I = f.w.d->input, panel = words_of(f.w.element, I) * 4 * W;
    const Rows<T> rows = narrow(f.w.element) ? narrow_rows(f, f.narrow_x, I, total) : rows_of_x(f);
    Tile<T> t = block_tile<T>(words_of(f.w.element, I));
    for (int64_t block = f.block; block < f.end_block; ++block) {
        T* z = f.z + block * total * 4 * W;
        const int vectors = vectors_of(f, block);
        t.panel = f.w.kernel + block * panel, t.panel_step = vectors * W;
        t.from = f.w.bias + block * 4 * W, t.to = z;
        if (widens_once(f.w, total)) {
            widened_product(*f.w.plain, t, vectors, rows, total);
        } else {
            each_tile(total, [&](int64_t m, int R) {
                if (!any_used(f, m, R)) return;
                rows.point(t, m, R);
                t.to = z + m * t.to_row;
                f.w.tiles->of[R - 1][vectors - 1](t);
            });
        }
        if (vectors < 4) spread(f.w.tail, z, total);
    }
}

// Computes rows row … row+R of a block at step n from their sums over x and over h, [R][4][W] each.
template <class T>
NOINLINE void finish_rows(const Forward<T>& f, const T* over_x, const T* sums, int64_t n, int64_t block, int64_t row,
                          int R, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W;
    for (int r = 0; r < R; ++r, over_x += 4 * W, sums += 4 * W) {
        V<T> z[4];
        UNROLL
        for (int v = 0; v < 4; ++v) z[v] = load(over_x + v * W) + load(sums + v * W);
        finish<T>(f, z, block, row + r, time_of(f, n), h, h_next);
    }
}

// The number of rows whose sums are computed before their activations.
constexpr int64_t kStepRows = 4 * kRows;

// One of the two products of a step: with rows of x or with rows of h.
template <class T>
struct Side {
    const T* matrix;
    Tile<T> t;
    int64_t panel;   // numbers per block
    const T* first;  // the first row of the step; rows are t.a_row apart
    T* sums;         // [kWideRows][4][W]
    Side(const T* matrix, int64_t words, T* sums)
        : matrix(matrix), t(block_tile<T>(words)), panel(t.depth * t.panel_step), sums(sums) {}

    // Computes the sums of some rows; tiles of h also prefetch part of `ahead`.
    INLINE void add_up(const Forward<T>& f, int vectors, int64_t row, int64_t count, const T*& ahead) {
        t.to = sums;
        if (widens_once(f.w, f.rows)) {
            widened_product(*f.w.plain, t, vectors, {first + row * t.a_row, t.a_row, 0, count}, count);
        } else {
            each_tile(count, [&](int64_t r, int R) INLINED {
                t.a[0] = first + (row + r) * t.a_row, t.to = sums + r * t.to_row;
                if (t.from || vectors < 4) {
                    for (int k = 1; k < R; ++k) t.a[k] = t.a[k - 1] + t.a_row;
                    return f.w.tiles->of[R - 1][vectors - 1](t);
                }
                t.ahead = ahead, ahead += t.depth * kLine<T>;
                f.w.tiles->recurrent[R - 1][3](t);
            });
        }
        if (vectors < 4) spread(f.w.tail, sums, count);
    }
};

// All rows of a block at step n. The sums pass through memory, because the activations of a row need registers too. The
// sums over x are computed here unless they were computed for the whole chunk. Tiles prefetch part of `ahead`, the next
// panel: if the weights don't fit into a near cache, its first tile would wait for it.
template <class T>
void step_rows(const Forward<T>& f, Side<T>& x, Side<T>& h, int64_t n, int64_t block, const T* ahead, T* h_next) {
    constexpr int W = Vec<T>::W;
    const int64_t before = (n - f.first) * f.rows, total = (f.last - f.first) * f.rows;
    const int64_t most = widens_once(f.w, f.rows) ? kWideRows : kStepRows;
    const int vectors = vectors_of(f, block);
    x.t.panel_step = h.t.panel_step = vectors * W;
    x.t.panel = x.matrix + block * x.panel, x.t.from = f.w.bias + block * 4 * W;
    h.t.panel = h.matrix + block * h.panel;
    for (int64_t row = 0, some; row < f.rows; row += some) {
        some = f.rows - row < most ? f.rows - row : most;
        // Groups of rows that are all masked, such as rows of a packed sequence that have ended, are skipped.
        if (any_used(f, before + row, int(some))) {
            if (!f.z) x.add_up(f, vectors, row, some, ahead);
            h.add_up(f, vectors, row, some, ahead);
        }
        const T* over_x = f.z ? f.z + (block * total + before + row) * 4 * W : x.sums;
        finish_rows(f, over_x, h.sums, n, block, row, int(some), f.h, h_next);
    }
}

template <class T>
void run_blocks(Forward<T>& f) {
    constexpr int W = Vec<T>::W;
    const int64_t I = f.w.d->input, H = f.w.d->units, end = f.end_block;
    const bool rounds = narrow(f.w.element);
    const auto round = [&](T* to, const Rows<T>& rows, int64_t count, int64_t depth) {
        if constexpr (sizeof(T) == 4)
            if (rounds) round_rows(*f.w.tiles, to, rows, count, depth);
    };
    if (f.project) round(f.narrow_x, rows_of_x(f), (f.last - f.first) * f.rows, f.w.d->input);
    if (f.z && f.project) project<T>(f);
    // The blocks before this one are computed as those of a single row; with the tail, if the block before it is there
    // too and multiplies the same part of h.
    int64_t alone = f.rows == 1 ? end : f.block;
    if (f.rows == 1 && f.w.is_tail(end - 1)) alone -= end - f.block == 1 || f.w.start(end - 1) != f.w.start(end - 2);
    const auto each_step = [&](auto&& body) INLINED {
        for (int64_t n = f.from; n < f.to; ++n) {
            if (f.reset) restart(f, n);
            T* h_next = f.h_next;
            const Rows<T> own{f.h, f.w.blocks * W, 0, f.rows};
            round(f.narrow_h, own, f.rows, H);
            // Blocks in ascending order at even steps, descending at odd ones: the last ones are still in the cache.
            const bool down = n & 1;
            if (alone > f.block) f.w.tiles->alone(f, n, down, alone, f.h, h_next);
            body(n, down, h_next);
            swap_states(f);
        }
    };
    if (alone == end) return each_step([](int64_t, bool, T*) {});
    alignas(kVectorBytes) T over_x[kWideRows * 4 * W], over_h[kWideRows * 4 * W];
    Side<T> x(f.w.kernel, words_of(f.w.element, I), over_x), h(f.w.recurrent, f.w.band.depth, over_h);
    x.t.a_row = rounds ? narrow_stride(f.w.element, I) : f.x_row;
    h.t.a_row = rounds ? narrow_stride(f.w.element, H) : f.w.blocks * W;
    each_step([&](int64_t n, bool down, T* h_next) INLINED {
        x.first = rounds ? f.narrow_x : f.x + time_of(f, n) * f.x_time;
        for (int64_t left = end - alone; left > 0; --left) {
            const int64_t block = down ? alone + left - 1 : end - left;
            h.first = (rounds ? f.narrow_h : f.h) + f.w.start(block);
            const int64_t after = left == 1 ? block : down ? block - 1 : block + 1;
            step_rows(f, x, h, n, block, f.w.recurrent + after * h.panel, h_next);
        }
    });
}

// Without a kernel, the sums over x are x itself, and the bias.
template <class T>
NOINLINE void take_sums(const Forward<T>& f, const T* bias, int64_t stride) {
    const int64_t H = f.w.d->units;
    const int G = f.w.d->gates();
    const Rows<T> rows = rows_of_x(f);
    for (int64_t m = 0; m < (f.last - f.first) * f.rows; ++m)
        for (int gate = 0; gate < G; ++gate) {
            const T* x = rows.at(m) + gate * H;
            T* z = f.z + (m * G + gate) * stride;
            each_block(f, 0, 0, [&](const Place& at) INLINED {
                const V<T> sum = load_lanes(x + at.unit, at.lanes) + bias_at(f.w, bias, gate, at);
                store_lanes(z + at.unit, sum, at.lanes);
            });
        }
}

// ── every cell, by rows ──────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
void run_rows(Forward<T>& f) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    const ForwardRoutines<T>& kind = forward_routines<T>(d.kind, w.usual);
    f.altered = f.patches.lines || f.recurrent_dropout || d.zoneout > 0;
    const int64_t H = d.units, wide = w.blocks * Vec<T>::W, output_wide = w.output_blocks * Vec<T>::W;
    const int sum_gates = d.sum_gates();
    const int64_t stride = w.unpacked ? H : wide;
    // Of the sums over x and h: of the gates, or of the backbone.
    const int64_t sum_stride = w.unpacked ? d.sum_units() : w.sum_blocks * Vec<T>::W, sum_row = sum_gates * sum_stride;
    Product<T> product(w, sum_gates, d.sum_units(), w.sum_blocks, f.block,
                       d.backbone_units ? w.sum_blocks : f.end_block, sum_stride, f.scales);
    // Layer normalisation is applied between the product and its bias.
    const T* bias = d.layer_norm ? nullptr : w.bias;
    if (f.project && !d.use_kernel) {
        take_sums(f, bias, stride);
    } else if (f.project) {
        product.set(w.kernel, bias, d.input, f.narrow_x);
        multiply(product, rows_of_x(f), (f.last - f.first) * f.rows, f.z);
    }
    if (d.kind->recurrent)
        product.set(w.recurrent, d.layer_norm ? nullptr : w.recurrent_bias, d.output, f.narrow_h, d.heads);
    for (int64_t n = f.from; n < f.to; ++n) {
        if (f.reset) restart(f, n);
        const int64_t t = time_of(f, n);
        T* z = f.z + (n - f.first) * f.rows * sum_row;
        T* sums = d.apart() ? f.q : z;
        const Rows<T> h{f.h, output_wide, 0, f.rows};
        const bool add = !d.apart(), down = n & 1;
        if (d.resets_before()) {
            multiply(product, h, f.rows, sums, add, down, 0, 2);
            kind.reset(f, t, z, stride);
            multiply(product, {f.m, wide, 0, f.rows}, f.rows, sums, add, down, 2, 1);
        } else if (d.kind->recurrent) {
            multiply(product, h, f.rows, sums, add, down);
        }
        if (d.backbone_units) {
            run_backbone(f, t, z, sum_row, stride);
            z = sums = f.q;
        }
        kind.rows(f, t, z, sums, stride);
        if (d.projects()) {
            Product<T> projected(w, 1, d.output, w.output_blocks, 0, w.output_blocks,
                                 w.unpacked ? d.output : output_wide, f.scales);
            projected.set(w.projection, nullptr, H, f.narrow_h);
            multiply(projected, {f.m, wide, 0, f.rows}, f.rows, f.p);
            for (int64_t r = 0; r < f.rows; ++r) {
                if (!is_used(f, r, t)) continue;
                each_block<T>(r, t, w.output_blocks, d.output, [&](const Place& at) INLINED {
                    write_output<T, false>(f, at, load_lanes(f.p + r * projected.stride + at.unit, at.lanes), f.h,
                                           f.h_next);
                });
            }
        }
        swap_states(f);
    }
}

// A layer without a state: a product and its activation.
template <class T>
void run_dense(const Forward<T>& f) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    const int64_t wide = w.blocks * Vec<T>::W;
    Product<T> over_x(w, 1, d.units, w.blocks, f.block, f.end_block, wide, f.scales);
    over_x.set(w.kernel, w.bias, d.input, f.narrow_x);
    multiply(over_x, rows_of_x(f), (f.last - f.first) * f.rows, f.z);
    for (int64_t n = f.first; n < f.last; ++n)
        for (int64_t r = 0; r < f.rows; ++r)
            each_block(f, r, time_of(f, n), [&](const Place& at) INLINED {
                const V<T> z = load(f.z + ((n - f.first) * f.rows + r) * wide + at.unit);
                T* y = f.y + r * f.y_row + at.t * f.y_time + at.unit;
                store_lanes(y, every_activation<T>(d.activations[0], z), at.lanes);
            });
}

template <class T>
void forward(Forward<T>& f) {
    if (!f.w.d->keeps_state()) return run_dense<T>(f);
    if constexpr (Panels<T>::kBlocks)
        if (f.w.by_blocks()) return run_blocks<T>(f);
    run_rows<T>(f);
}

}  // namespace
}  // namespace cellstack
