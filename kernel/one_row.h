// A step of a plain LSTM for a batch of one row, from the sums of each block to its h in registers; in float32 only.
#pragma once
#include "lstm.h"
#include "tiles.h"

namespace cellstack {
namespace {

// Computes c and h, and all requested outputs, from the four sums of one row and block.
template <class T>
INLINE void finish(const Forward<T>& f, V<T> (&z)[4], int64_t block, int64_t r, int64_t t, const T* h, T* h_next) {
    const Place at = place<T>(r, t, block, f.w.d->units);
    if (!f.mask || f.mask[r * f.steps + t]) {
        const V<T> c_prev = load(cell_state(f, at));
        const V<T> c = lstm_output<T, true, true>(f, at, z[3], c_prev, lstm_cell<T, true, true>(f, at, z, c_prev));
        write_output<T, true>(f, at, z[3] * tanh<T>(c), h, h_next);
    } else {
        write_h(f, at, h_before(f, at, h), load(h + r * f.w.blocks * Vec<T>::W + at.unit), h_next);
        UNROLL
        for (int v = 0; v < 4; ++v) z[v] = splat(T(0));
    }
    keep_gates(f, at, z);
    keep_inner(f, at, kC);
}

// N blocks, and if its gates share E vectors the tail after them, at step n of a batch of one row, whose sums stay in
// registers. They multiply the same part of h.
template <class Kind, int N, int E = 0, class T>
INLINE void step_alone(const Forward<T>& f, int64_t n, int64_t block, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W, blocks = N + (E > 0);
    const int64_t t = time_of(f, n), step = 4 * W, total = f.last - f.first;
    V<T> sums[1][N * 4 + E];
    const auto add_up = [&](const T* row, const T* matrix, int64_t words) INLINED {
        Cursor<T, 1> at{{row}, 1, matrix + block * words * step, step, W, words * step};
        if (E) at.tail = matrix + (block + N) * words * step;
        accumulate<Kind, 1, N, 4, false, E>(sums, at, words);
    };
    alignas(kVectorBytes) T shared[(E + 1) * W];  // the sums of the tail, whose gates are not at multiples of W
    const auto spread = [&](int v) INLINED {
        if (v == 0) {
            UNROLL
            for (int k = 0; k < E; ++k) store(shared + k * W, sums[0][N * 4 + k]);
        }
        return gate_of(shared, f.w.tail, v);
    };
    alignas(kVectorBytes) V<T> here[blocks * 4];  // the sums over x, on the stack, unless z contains them already
    if (!f.z) {
        UNROLL
        for (int v = 0; v < N * 4 + E; ++v) sums[0][v] = load(f.w.bias + block * step + v * W);
        add_up(narrow(f.w.element) ? f.narrow_x : f.x + t * f.x_time, f.w.kernel, words_of(f.w.element, f.w.d->input));
        UNROLL
        for (int v = 0; v < blocks * 4; ++v) here[v] = v < N * 4 ? sums[0][v] : spread(v - N * 4);
    }
    UNROLL
    for (int v = 0; v < N * 4 + E; ++v) sums[0][v] = splat(T(0));
    add_up((narrow(f.w.element) ? f.narrow_h : h) + f.w.start(block), f.w.recurrent, f.w.band.depth);
    const T* over_x = f.z ? f.z + (block * total + n - f.first) * step : reinterpret_cast<const T*>(here);
    UNROLL
    for (int b = 0; b < blocks; ++b) {
        V<T> z[4];
        UNROLL
        for (int v = 0; v < 4; ++v)
            z[v] = load(over_x + b * (f.z ? total : 1) * step + v * W) + (b < N ? sums[0][b * 4 + v] : spread(v));
        finish<T>(f, z, block + b, 0, t, h, h_next);
    }
}

// Blocks up to end_block at step n of a batch of one row. Two at a time: eight chains hide the latency of one.
template <class Kind, class T>
NOINLINE void row_alone(const Forward<T>& f, int64_t n, bool down, int64_t end_block, const T* h, T* h_next) {
    if (f.mask && !f.mask[time_of(f, n)]) {
        V<T> none[4] = {};
        for (int64_t block = f.block; block < end_block; ++block)
            finish<T>(f, none, block, 0, time_of(f, n), h, h_next);
        return;
    }
    for (int64_t left = end_block - f.block; left > 0;) {
        const int64_t block = down ? f.block + left - 2 : end_block - left;  // the first of two
        if (left > 1 && f.w.start(block) == f.w.start(block + 1)) {
            step_alone<Kind, 2>(f, n, block, h, h_next);
            left -= 2;
        } else {
            step_alone<Kind, 1>(f, n, block + down, h, h_next);
            left -= 1;
        }
    }
}

// The tail at step n of a batch of one row, and the block before it, whose chains hide the latency of its few.
template <class Kind, class T>
NOINLINE void tail_alone(const Forward<T>& f, int64_t n, const T* h, T* h_next) {
    const int64_t block = f.w.blocks - 2;
    if (f.w.tail.vectors == 1) return step_alone<Kind, 1, 1>(f, n, block, h, h_next);
    if (f.w.tail.vectors == 2) return step_alone<Kind, 1, 2>(f, n, block, h, h_next);
    step_alone<Kind, 1, 3>(f, n, block, h, h_next);
}

// Both, if the last block is the tail.
template <class Kind>
void all_alone(const Forward<float>& f, int64_t n, bool down, int64_t end_block, const float* h, float* h_next) {
    const bool tail = f.w.is_tail(end_block - 1) && (!f.mask || f.mask[time_of(f, n)]);
    if (tail && down) tail_alone<Kind>(f, n, h, h_next);
    row_alone<Kind>(f, n, down, end_block - 2 * tail, h, h_next);
    if (tail && !down) tail_alone<Kind>(f, n, h, h_next);
}
template <class Kind>
constexpr Tiles<float> plain_lstm_tiles() {
    Tiles<float> tiles = tiles_of<Kind>();
    tiles.alone = all_alone<Kind>;
    return tiles;
}

}  // namespace
}  // namespace cellstack
