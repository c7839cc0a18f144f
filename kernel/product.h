// Products of rows with matrices in panels: the tiles of rows and blocks around the loop over k.
#pragma once
#include "tiles.h"

namespace cellstack {
namespace {

// Calls body(first row, rows) on tiles of at most kRows rows, as even as they can be.
template <class F>
INLINE void each_tile(int64_t rows, F&& body) {
    const int64_t count = (rows + kRows - 1) / kRows;
    for (int64_t n = 0, r = 0, size; n < count; ++n, r += size) {
        size = (rows - r + count - n - 1) / (count - n);
        body(r, int(size));
    }
}

template <class T>
INLINE int64_t time_of(const T& f, int64_t n) {
    return f.reverse ? f.steps - 1 - n : n;
}

// Rows of a product: those of a batch at one step after the other.
template <class T>
struct Rows {
    const T* base;
    int64_t row, time, batch;  // row m is row m mod batch of step m / batch
    INLINE const T* at(int64_t m) const { return base + m % batch * row + m / batch * time; }
};

// A tile whose rows are read number by number.
template <class T>
INLINE Tile<T> tile_over(int64_t depth) {
    Tile<T> t{};
    t.a_step = 1, t.depth = depth, t.segments = 1;
    return t;
}

// What a product of rows is made of: to[m] = bias + a[m]·matrix, or to[m] += a[m]·matrix, gate by gate. Each is summed
// as a chain of its own.
template <class T>
struct Product {
    const Panels<T>& w;
    const T* matrix;  // panels [blocks][depth][gates][W]; unpacked: [depth, gates·units]
    const T* bias;    // [blocks][gates][W]; unpacked: [gates·units]; null: zeros
    bool add;         // to what is in `to`; without bias
    int gates;
    int64_t depth, units, blocks;
    int64_t block, end_block;  // those that are made
    T* to;                     // [rows][gates][stride]
    int64_t stride;
    bool down;  // blocks from the last to the first
    T* narrow;  // scratch for narrow weights: the rows as these take them, [rows][narrow_stride(element, depth)]
    T* scales;  // and of int8 the size of a row's steps
};

// N vectors of columns of an unpacked product, in the order of `accumulate`; the last may have fewer lanes.
template <class T, int N>
INLINE void unpacked_columns(T* to, const T* bias, bool add, const T* a, const T* matrix, int64_t stride, int64_t n,
                             int lanes = Vec<T>::W) {
    constexpr int W = Vec<T>::W;
    V<T> sums[N];
    UNROLL
    for (int v = 0; v < N; ++v) sums[v] = bias ? load_lanes(bias + v * W, lanes) : splat(T(0));
    for (int64_t k = 0; k < n; ++k, matrix += stride) {
        const V<T> s = splat(a[k]);
        UNROLL
        for (int v = 0; v < N; ++v) sums[v] = fma(s, load_lanes(matrix + v * W, lanes), sums[v]);
    }
    UNROLL
    for (int v = 0; v < N; ++v) {
        T* at = to + v * W;
        store_lanes(at, add ? load_lanes(at, lanes) + sums[v] : sums[v], lanes);
    }
}

// to [columns] = bias + a [n] · matrix [n, columns], or added to it; the rows of the matrix are `stride` apart
template <class T>
void unpacked_product(T* to, const T* bias, bool add, const T* a, const T* matrix, int64_t columns, int64_t stride,
                      int64_t n) {
    constexpr int W = Vec<T>::W;
    int64_t at = 0;
    const auto from = [&](const T* p) { return p ? p + at : nullptr; };
    for (; at + 16 * W <= columns; at += 16 * W)
        unpacked_columns<T, 16>(to + at, from(bias), add, a, matrix + at, stride, n);
    for (; at + 4 * W <= columns; at += 4 * W)
        unpacked_columns<T, 4>(to + at, from(bias), add, a, matrix + at, stride, n);
    for (; at < columns; at += W) {
        const int lanes = columns - at < W ? int(columns - at) : W;
        unpacked_columns<T, 1>(to + at, from(bias), add, a, matrix + at, stride, n, lanes);
    }
}

// Calls body(tile, vectors, blocks) for each group of vectors of a product, with all of the tile but its rows: the
// gates of a block, or of two where a row is alone; where one or two gates are wanted, one gate of several blocks.
template <class T, class F>
INLINE void each_group(const Product<T>& p, int64_t count, int first, int wanted, F&& body) {
    constexpr int W = Vec<T>::W;
    const int64_t words = words_of(p.w.element, p.depth), gates = p.gates * W, panel = words * gates;
    const bool across = wanted < 3, alone = count == 1;
    Tile<T> t = tile_over<T>(words);
    t.panel_step = gates, t.panel_vector = across ? panel : W, t.panel_block = panel;
    t.from_vector = across ? gates : W, t.from_block = gates;
    t.to_row = p.gates * p.stride, t.to_vector = across ? W : p.stride, t.to_block = W, t.add = p.add;
    const T *scales = p.matrix + p.blocks * panel, *shifts = scales + p.blocks * gates;  // of int8
    const int64_t most = across ? (alone ? 8 : 4) : alone ? 2 : 1, total = p.end_block - p.block;
    for (int gate = first; gate < first + wanted; gate += across ? 1 : wanted)
        for (int64_t done = 0, some; done < total; done += some) {
            const int64_t left = total - done;
            some = left >= most ? most : !across ? 1 : left < 4 ? left : 4;
            const int64_t block = p.down ? p.end_block - done - some : p.block + done, at = block * gates + gate * W;
            t.panel = p.matrix + block * panel + gate * W, t.from = p.bias ? p.bias + at : nullptr;
            t.scales = scales + at, t.shifts = shifts + at;
            t.to = p.to + gate * p.stride + block * W;
            body(t, across ? int(some) : wanted, across ? 1 : int(some));
        }
}

template <class T>
INLINE TileRoutine<T> routine_of(const Tiles<T>& tiles, int rows, int vectors, int blocks = 1) {
    return blocks == 2 ? tiles.two_blocks[vectors - 3]
           : vectors == 8 ? tiles.eight_blocks
                          : tiles.of[rows - 1][vectors - 1];
}

// `wanted` of the gates, from gate `first` on, of the product over all rows.
template <class T>
__attribute__((noinline)) void product(const Product<T>& p, const Rows<T>& rows, int64_t count, int first, int wanted) {
    if (p.w.unpacked) {
        for (int64_t m = 0; m < count; ++m) {
            T* to = p.to + m * p.gates * p.stride + first * p.stride;
            const T* bias = p.bias ? p.bias + first * p.units : nullptr;
            unpacked_product(to, bias, p.add, rows.at(m), p.matrix + first * p.units, wanted * p.units,
                             p.gates * p.units, p.depth);
        }
        return;
    }
    each_group(p, count, first, wanted, [&](Tile<T>& t, int vectors, int blocks) {
        T* to = t.to;
        each_tile(count, [&](int64_t m, int R) {
            for (int r = 0; r < R; ++r) t.a[r] = rows.at(m + r);
            t.to = to + m * t.to_row, t.row_scales = p.scales + m;
            routine_of(*p.w.tiles, R, vectors, blocks)(t);
        });
    });
}

// dz·matrixᵀ, for `count` rows of dz from row m on, which has G gates side by side in each block.
template <class T>
struct Transposed {
    const Tiles<T>& tiles;
    const T* dz;  // [blocks][dz_rows][G][W]
    int gates;
    int64_t m, count, blocks, dz_rows;
    const T* panels;                // see pack_transposed
    int64_t columns, first, last;   // the matrix's rows; the panels that are made
    bool down;                      // from the last to the first
    T* pairs;                       // scratch [blocks][count][G·W / 2]: products are of pairs of bfloat16; or null
};

// body(row, column, vector), by vectors of the matrix's rows. A tile of several rows has time to fetch some of the
// panel that comes next.
template <class T, class F>
INLINE void product_transposed(const Transposed<T>& p, F&& body) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const T* dz = p.dz + p.m * p.gates * W;
    int64_t dz_rows = p.dz_rows, deep = p.gates * W;
    if constexpr (kHasPairs && sizeof(T) == 4)
        if (p.pairs) {
            T* to = p.pairs;
            for (int64_t block = 0; block < p.blocks; ++block)
                for (int64_t k = 0; k < p.count * p.gates; ++k, to += W / 2) {
                    const HalfOfWords two = pairs_of(load(dz + block * dz_rows * deep + k * W));
                    memcpy(to, &two, sizeof two);
                }
            dz = p.pairs, dz_rows = p.count, deep /= 2;
        }
    alignas(kVectorBytes) T sums[kRows * wide];
    Tile<T> t = tile_over<T>(deep);
    t.segments = p.blocks, t.a_segment = dz_rows * deep;
    t.panel_step = wide, t.panel_vector = W;
    t.to = sums, t.to_row = wide, t.to_vector = W;
    for (int64_t n = p.first; n < p.last; ++n) {
        const int64_t panel = p.down ? p.first + p.last - 1 - n : n, left = p.columns - panel * wide;
        const int64_t after = n + 1 == p.last ? panel : p.down ? panel - 1 : panel + 1, size = p.blocks * deep;
        const int vectors = left >= wide ? 4 : int((left + W - 1) / W);
        const T* ahead = p.panels + after * size * wide;
        t.panel = p.panels + panel * size * wide;
        each_tile(p.count, [&](int64_t row, int R) {
            for (int r = 0; r < R; ++r) t.a[r] = dz + (row + r) * deep;
            t.ahead = R > 1 ? ahead : nullptr;
            ahead += size * kLine<T>;
            routine_of(p.tiles, R, vectors)(t);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < vectors; ++v)
                    body(row + r, panel * wide + v * W, load(sums + r * wide + v * W));
        });
    }
}

}  // namespace
}  // namespace cellstack
