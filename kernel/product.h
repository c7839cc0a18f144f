// Products of rows with matrices in panels: tiles of rows and blocks around the loop over k.
#pragma once
#include "tiles.h"

namespace cellstack {
namespace {

// Calls body(first row, rows) on tiles of at most this many rows, as equal in size as possible, the larger ones first.
// With 16 registers a tile of three rows has more sums at once than one of four, so 7 to 9 rows are three and the rest.
template <class F>
INLINE void each_tile(int64_t rows, F&& body, int64_t most = kRows) {
    if (rows <= most) {
        if (rows > 0) body(int64_t(0), int(rows));
        return;
    }
    const bool by_three = kFewRegisters && most > 4 && rows <= 9;
    const int64_t count = (rows + most - 1) / most, least = by_three ? 3 : rows / count, larger = rows - count * least;
    for (int64_t n = 0, r = 0, size; n < count; ++n, r += size)
        body(r, int(size = least + (by_three ? n == 0 ? larger : 0 : n < larger)));
}

template <class T>
INLINE int64_t time_of(const T& f, int64_t n) {
    return f.reverse ? f.steps - 1 - n : n;
}

// The rows of a product: those of a batch at one step, then those at the next.
template <class T>
struct Rows {
    const T* base;
    int64_t row, time, batch;  // row m is row m mod batch of step m / batch
    INLINE const T* at(int64_t m) const { return base + m % batch * row + m / batch * time; }
    // The rows of a tile, starting at row m.
    INLINE void point(Tile<T>& t, int64_t m, int R) const {
        if (m + R <= batch) {
            const T* first = base + m * row;
            for (int r = 0; r < R; ++r, first += row) t.a[r] = first;
            return;
        }
        int64_t in_batch = m, step = 0;
        if (m >= batch) in_batch = m % batch, step = m / batch;
        for (int r = 0; r < R; ++r) {
            t.a[r] = base + in_batch * row + step * time;
            if (++in_batch == batch) in_batch = 0, ++step;
        }
    }
};

// A tile whose rows are contiguous in k.
template <class T>
INLINE Tile<T> tile_over(int64_t depth) {
    Tile<T> t{};
    t.a_step = t.segments = 1, t.depth = depth;
    return t;
}

// N vectors of columns of an unpacked product, summed in the order of `accumulate`; the last may have fewer lanes.
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

// to [columns] = bias + a [n] · matrix [n, columns], or added to `to`; the rows of the matrix are `stride` apart.
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

// A product of rows: to[m] = bias + a[m]·matrix, or to[m] += a[m]·matrix, gate by gate, each summed in a separate
// chain. It is set up once per call for some blocks, and then for a matrix, and run at every step.
template <class T>
struct Product {
    const Panels<T>& w;
    int gates;
    int64_t units, blocks, block, end_block;  // blocks [block, end_block) are computed
    int64_t stride;                           // of the result, [rows][gates][stride]
    T* row_scales;                            // for int8, scratch: the scale of each row; else null
    Tail tail;
    Tile<T> t;
    // Of the matrix:
    const T* matrix;  // panels [blocks][depth][gates][W]; unpacked: [depth, gates·units]
    const T* bias;    // [blocks][gates][W]; unpacked: [gates·units]; null: zeros
    int64_t depth, heads;
    T* narrow;  // scratch for narrow weights: the rows in their format, [rows][narrow_stride(element, depth)]
    const T *scales, *shifts;  // of columns, for int8
    int64_t panel;
    int64_t start;  // of a group's part of a row

    Product(const Panels<T>& w, int gates, int64_t units, int64_t blocks, int64_t block, int64_t end_block,
            int64_t stride, T* row_scales)
        : w(w),
          gates(gates),
          units(units),
          blocks(blocks),
          block(block),
          end_block(end_block),
          stride(stride),
          row_scales(row_scales),
          t(tile_over<T>(0)) {
        constexpr int W = Vec<T>::W;
        t.panel_step = t.from_block = gates * W, t.to_row = gates * stride, t.to_block = W;
        if (gates > 1 && end_block == blocks) tail = w.tail;
    }

    void set(const T* matrix, const T* bias, int64_t depth, T* narrow, int64_t heads = 1) {
        this->matrix = matrix, this->bias = bias, this->depth = depth, this->narrow = narrow, this->heads = heads;
        t.depth = heads > 1 ? w.band.depth : words_of(w.element, depth);
        t.panel_block = panel = t.depth * t.panel_step, start = 0;
        if (row_scales) scales = matrix + blocks * panel, shifts = scales + blocks * t.panel_step;
    }

    // Calls body(routine for a single row, vectors, first row, rows) for each group of vectors, after setting
    // everything in the tile except its rows. A group is the gates of a block (of two blocks if there is one row), or,
    // if one or two gates are requested, one gate of several blocks; all of them multiply the same part of a row.
    // Computes `wanted` gates, starting at `first`; blocks in descending order if `down`.
    template <class F>
    INLINE void each_group(T* to, bool add, bool down, int64_t count, int first, int wanted, F&& body) {
        int64_t end_block = this->end_block;
        if (tail.vectors) end_block -= each_tail(to, add, count, body);
        constexpr int W = Vec<T>::W;
        const Tiles<T>& tiles = *w.tiles;
        const bool across = wanted < 3;
        const int64_t most = across ? (count == 1 ? 8 : 4) : count == 1 ? 2 : 1;
        t.panel_vector = across ? panel : W, t.from_vector = across ? t.from_block : W;
        t.to_vector = across ? W : stride, t.add = add;
        for (int gate = first; gate < first + wanted; gate += across ? 1 : wanted)
            for (int64_t left = end_block - block, some; left; left -= some) {
                some = left >= most ? most : across && left < 4 ? left : across ? 4 : 1;
                int64_t of = down ? block + left - some : end_block - left;
                if (heads > 1) {
                    while (w.start(of) != w.start(of + some - 1)) {
                        const int64_t fewer = some == 8 ? 4 : some - 1;
                        of += down ? some - fewer : 0, some = fewer;
                    }
                    start = w.start(of);
                }
                const int64_t at = of * t.from_block + gate * W;
                t.panel = matrix + of * panel + gate * W, t.from = bias ? bias + at : nullptr;
                if (row_scales) t.scales = scales + at, t.shifts = shifts + at;
                t.to = to + gate * stride + of * W;
                if (across)
                    body(some == 8 ? tiles.eight_blocks : tiles.of[0][some - 1], int(some), 0, count);
                else
                    body(some == 2 ? tiles.two_blocks[wanted - 3] : tiles.of[0][wanted - 1], wanted, 0, count);
            }
    }

    // The same for the tail, and with a single row for the block before it too, in one group; returns how many blocks
    // these are. Their sums are moved to the result from a buffer.
    template <class F>
    NOINLINE int64_t each_tail(T* to, bool add, int64_t count, F&& body) {
        constexpr int W = Vec<T>::W;
        constexpr int64_t most = 4 * kRows;
        alignas(kVectorBytes) T sums[most * kMostGates * W + W];
        const int64_t last = end_block - 1, at = last * t.from_block, step = t.panel_step, to_row = t.to_row;
        const bool both = count == 1 && last > block && (heads == 1 || w.start(last) == w.start(last - 1));
        const int before = both ? gates : 0, vectors = before + tail.vectors;
        start = heads > 1 ? w.start(last) : 0;
        t.tail = matrix + last * panel, t.panel = both ? t.tail - panel : t.tail;
        t.panel_step = both ? step : tail.vectors * W, t.to_row = vectors * W;
        t.panel_vector = t.from_vector = t.to_vector = W, t.add = false;
        t.from = bias ? bias + at - before * W : nullptr;
        if (row_scales) t.scales = scales + at - before * W, t.shifts = shifts + at - before * W;
        const auto routine = both ? w.tiles->with_tail[gates - 3][tail.vectors - 1] : w.tiles->of[0][vectors - 1];
        const auto move = [&](T* own, V<T> sum) INLINED { store(own, add ? load(own) + sum : sum); };
        for (int64_t m = 0, some; m < count; m += some) {
            some = count - m < most ? count - m : most;
            t.to = sums;
            body(routine, vectors, m, some);
            for (int64_t r = 0; r < some; ++r)
                for (int gate = 0; gate < gates; ++gate) {
                    const T* from = sums + r * vectors * W;
                    T* own = to + (m + r) * to_row + gate * stride + last * W;
                    move(own, gate_of(from + before * W, tail, gate));
                    if (both) move(own - W, load(from + gate * W));
                }
        }
        t.panel_step = step, t.to_row = to_row;
        return 1 + both;
    }

    NOINLINE void run(const Rows<T>& rows, int64_t count, T* to, bool add = false, bool down = false, int first = 0,
                      int wanted = 0) {
        if (!wanted) wanted = gates;
        if (w.unpacked) {
            for (int64_t m = 0; m < count; ++m, to += gates * stride) {
                if (heads > 1) {
                    unpacked_heads(to, add, rows.at(m), first, wanted);
                    continue;
                }
                unpacked_product(to + first * stride, bias ? bias + first * units : nullptr, add, rows.at(m),
                                 matrix + first * units, wanted * units, gates * units, depth);
            }
            return;
        }
        if (heads > 1 && w.band.diagonal) return diagonal(rows, count, to, add, first, wanted);
        if (count == 1) {
            t.row_scales = row_scales;
            const auto tile = [&](TileRoutine<T> alone, int, int64_t, int64_t) INLINED {
                t.a[0] = rows.base + start;
                alone(t);
            };
            return each_group(to, add, down, 1, first, wanted, tile);
        }
        const auto tiles = [&](TileRoutine<T>, int vectors, int64_t from, int64_t some) INLINED {
            T* first_row = t.to;
            const Rows<T> own{rows.base + start, rows.row, rows.time, rows.batch};
            const auto tile = [&](int64_t m, int R) INLINED {
                own.point(t, from + m, R);
                t.to = first_row + m * t.to_row, t.row_scales = row_scales + from + m;
                w.tiles->of[R - 1][vectors - 1](t);
            };
            each_tile(some, tile, most_rows(vectors));
        };
        each_group(to, add, down, count, first, wanted, tiles);
    }

    // The product with a diagonal matrix: the sums of a unit only include its own h.
    NOINLINE void diagonal(const Rows<T>& rows, int64_t count, T* to, bool add, int first, int wanted) const {
        constexpr int W = Vec<T>::W;
        for (int64_t m = 0; m < count; ++m, to += gates * stride) {
            const T* row = rows.at(m);
            for (int64_t of = block; of < end_block; ++of)
                for (int gate = first; gate < first + wanted; ++gate) {
                    const T* own_bias = bias ? bias + of * t.from_block : nullptr;
                    V<T> sum = !bias                                 ? splat(T(0))
                               : tail.vectors && of == end_block - 1 ? gate_of(own_bias, tail, gate)
                                                                     : load(own_bias + gate * W);
                    sum = fma(load(row + of * W), load(matrix + of * panel + gate * W), sum);
                    T* at = to + gate * stride + of * W;
                    store(at, add ? load(at) + sum : sum);
                }
        }
    }

    // A row's product with an unpacked matrix of heads.
    NOINLINE void unpacked_heads(T* to, bool add, const T* a, int first, int wanted) const {
        const int64_t size = units / heads;
        for (int64_t unit = 0; unit < units; unit += size)
            for (int gate = first; gate < first + wanted; ++gate) {
                const int64_t at = gate * units + unit;
                unpacked_product(to + gate * stride + unit, bias ? bias + at : nullptr, add, a + unit,
                                 matrix + (unit * gates + gate) * size, size, gates * size, size);
            }
    }
};

// dz·matrixᵀ, for `count` rows of dz, starting at row m, with G adjacent gates in each block.
template <class T>
struct Transposed {
    const Tiles<T>& tiles;
    const T* dz;  // [blocks][dz_rows][G][W]
    int gates;
    int64_t m, count, blocks, dz_rows;
    const T* panels;               // see pack_transposed
    Band band;                     // the blocks that a panel multiplies
    int64_t columns, first, last;  // rows of the matrix; panels [first, last) are computed
    bool down;                     // in descending order
    T* pairs;                      // scratch [blocks][count][G·W / 2]: products of pairs of bfloat16; or null
};

// Calls body(row, column, vector) for each vector of the result. Tiles of several rows prefetch part of the next panel.
template <class T, class F>
INLINE void product_transposed(const Transposed<T>& p, F&& body) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const T* dz = p.dz + p.m * p.gates * W;
    if (p.band.diagonal) {
        for (int64_t block = 4 * p.first; block < 4 * p.last && block < p.blocks; ++block)
            for (int64_t r = 0; r < p.count; ++r) {
                V<T> sum = splat(T(0));
                for (int64_t at = 0; at < p.gates * W; at += W)
                    sum = fma(load(dz + (block * p.dz_rows + r) * p.gates * W + at),
                              load(p.panels + block * p.gates * W + at), sum);
                body(r, block * W, sum);
            }
        return;
    }
    int64_t dz_rows = p.dz_rows, deep = p.gates * W;
    if (p.pairs) {
        for (int64_t block = 0, size = p.count * deep; block < p.blocks; ++block)
            p.tiles.pair_lanes(p.pairs + block * size / 2, dz + block * dz_rows * deep, size);
        dz = p.pairs, dz_rows = p.count, deep /= 2;
    }
    alignas(kVectorBytes) T sums[kRows * wide];
    Tile<T> t = tile_over<T>(deep);
    t.segments = p.band.depth, t.a_segment = dz_rows * deep, t.a_row = deep;
    t.to = sums;
    for (int64_t n = p.first; n < p.last; ++n) {
        const int64_t panel = p.down ? p.first + p.last - 1 - n : n, left = p.columns - panel * wide;
        const int64_t after = n + 1 == p.last ? panel : p.down ? panel - 1 : panel + 1, size = p.band.depth * deep;
        const int vectors = left >= wide ? 4 : int((left + W - 1) / W);
        const T* ahead = p.panels + after * size * wide;
        t.panel = p.panels + panel * size * wide;
        const T* from = dz + p.band.start(panel) * t.a_segment;
        each_tile(p.count, [&](int64_t row, int R) {
            t.a[0] = from + row * deep, t.ahead = ahead;
            ahead += size * kLine<T>;
            p.tiles.recurrent[R - 1][vectors - 1](t);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < vectors; ++v) body(row + r, panel * wide + v * W, load(sums + r * wide + v * W));
        });
    }
}

}  // namespace
}  // namespace cellstack
