// What the chunkwise form of an mLSTM consists of: a chunk's arrays, products of matrices, and rows of the caller.
#pragma once
#include "mlstm.h"
#include "product.h"

namespace cellstack {
namespace {

template <class T>
INLINE int64_t whole_vectors(int64_t n) {
    return (n + Vec<T>::W - 1) / Vec<T>::W * Vec<T>::W;
}
template <class T>
INLINE T sum_of_lanes(V<T> v) {
    T sum = 0;
    UNROLL
    for (int l = 0; l < Vec<T>::W; ++l) sum += v[l];
    return sum;
}

// Takes arrays from scratch memory, each at a cache line; without memory it counts.
template <class T>
struct Carve {
    T* memory;
    int64_t taken = 0;
    T* operator()(int64_t count) {
        T* at = memory ? memory + taken : nullptr;
        taken += (count + 15) / 16 * 16;
        return at;
    }
};

// The products with the columns of K and V run over blocks of rows, which share the columns in the second-level cache.
constexpr int64_t kBlock = 64;

// A chunk's arrays, with rows of whole vectors: `keys`, `values` and `steps` numbers. Rows are a line further apart,
// for the reason of score_row().
template <class T>
struct Chunk {
    int64_t keys, values, steps, key_row, value_row, step_row;
    T *K_columns, *V, *S, *H, *shares, *weights, *weighted, *e, *C, *n;
    Chunk(const MemoryHead<T>& d, Carve<T>& carve)
        : keys(whole_vectors<T>(d.keys)),
          values(whole_vectors<T>(d.values)),
          steps(whole_vectors<T>(d.chunk)),
          key_row(keys + 16),
          value_row(values + 16),
          step_row(score_row(d.chunk)) {
        K_columns = carve(keys * step_row), V = carve(steps * value_row), S = carve(steps * step_row);
        H = carve(steps * value_row), shares = carve(steps), weights = carve(steps), weighted = carve(keys);
        e = carve(steps), C = carve(keys * value_row), n = carve(keys);
    }
};

// Rows of a result: in the caller's array, if its rows are whole vectors, or in a chunk's.
template <class T>
struct Result {
    T* at;
    int64_t row;
    bool direct;
    Result(T* to, int64_t to_row, int64_t columns, T* own, int64_t own_row) : direct(columns % Vec<T>::W == 0) {
        at = direct ? to : own, row = direct ? to_row : own_row;
    }
    void finish(T* to, int64_t to_row, int64_t columns, int64_t steps) const {
        for (int64_t t = 0; t < steps && !direct; ++t)
            memcpy(to + t * to_row, at + t * row, size_t(columns) * sizeof(T));
    }
};

// A product of matrices: a[r][k] = a[r·a_row + k·a_step]; the panel has rows of whole vectors.
template <class T>
struct Factors {
    const T* a;
    int64_t a_row, a_step;
    const T* panel;
    int64_t panel_step;
};

// R rows of a product, from row r: to [R][columns] = or += a·panel over k in [first, depth).
template <class T>
INLINE void multiply_rows(T* to, int64_t to_row, bool add, const Factors<T>& f, int64_t r, int R, int64_t column,
                          int64_t columns, int64_t first, int64_t depth) {
    constexpr int W = Vec<T>::W;
    static constexpr Tiles<T> tiles = tiles_of<Plain<T>>();
    Tile<T> t{};
    t.a_step = f.a_step, t.panel_step = f.panel_step, t.panel_vector = t.to_vector = W, t.to_row = to_row, t.add = add;
    t.depth = depth - first;
    for (int k = 0; k < R; ++k) t.a[k] = f.a + (r + k) * f.a_row + first * f.a_step;
    for (int64_t c = column; c < columns; c += 4 * W) {
        const int64_t vectors = (columns - c + W - 1) / W;
        t.panel = f.panel + first * f.panel_step + c, t.to = to + r * to_row + c;
        tiles.of[R - 1][(vectors < 4 ? vectors : 4) - 1](t);
    }
}

// Which k contribute to a row r of a product: all of `depth`, those up to r, or those from r on. In the last two cases
// a is zero at the other ones.
enum class Range { kAll, kUpToRow, kFromRow };

// to [rows][columns] = or += a·panel. While some columns are computed, the panel's next ones are read into the cache.
template <Range range, class T>
void multiply(T* to, int64_t to_row, bool add, const Factors<T>& f, int64_t rows, int64_t columns, int64_t depth) {
    constexpr int64_t width = 4 * Vec<T>::W;
    for (int64_t c = 0, next = width; c < columns; c = next, next += width)
        each_tile(rows, [&](int64_t r, int R) INLINED {
            for (int64_t k = r * depth / rows, end = (r + R) * depth / rows; k < end && next < columns; ++k)
                for (int64_t v = next; v < next + width; v += kLine<T>) prefetch(f.panel + k * f.panel_step + v);
            multiply_rows(to, to_row, add, f, r, R, c, next < columns ? next : columns,
                          range == Range::kFromRow ? r : 0, range == Range::kUpToRow ? r + R : depth);
        });
}

// The lower triangle of to [steps][steps] = a·panel in rows [from, end).
template <class T>
void multiply_triangle(T* to, int64_t to_row, const Factors<T>& f, int64_t from, int64_t end, int64_t depth) {
    constexpr int64_t width = 4 * Vec<T>::W;
    for (int64_t c = 0; c < end; c += width)
        each_tile(end - from, [&](int64_t row, int R) INLINED {
            const int64_t r = from + row, last = r + R < c + width ? r + R : c + width;
            if (c < last) multiply_rows(to, to_row, false, f, r, R, c, last, 0, depth);
        });
}

template <class T>
INLINE void scale_row(T* row, T factor, int64_t columns) {
    for (int64_t c = 0; c < columns; c += Vec<T>::W) store(row + c, splat(factor) * load(row + c));
}

// to [columns][to_row] = the transpose of from [rows][from_row]; whole squares of W.
template <class T>
void transposed(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns) {
    constexpr int W = Vec<T>::W;
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            V<T> square[W];
            UNROLL
            for (int k = 0; k < W; ++k) square[k] = load(from + (r + k) * from_row + c);
            transpose<T>(square);
            UNROLL
            for (int k = 0; k < W; ++k) store(to + (c + k) * to_row + r, square[k]);
        }
}

// A chunk's rows of whole vectors, with zeros at masked steps: the caller's own, or copies.
template <class T>
struct Source {
    const T* at;
    int64_t row;
    Source(const T* from, int64_t from_row, int64_t columns, int64_t steps, const uint8_t* mask, T* own,
           int64_t own_row)
        : at(from), row(from_row) {
        constexpr int W = Vec<T>::W;
        if (!mask && columns % W == 0) return;
        at = own, row = own_row;
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < columns; c += W) {
                const int lanes = columns - c < W ? int(columns - c) : W;
                store(own + t * own_row + c,
                      mask && !mask[t] ? splat(T(0)) : load_lanes(from + t * from_row + c, lanes));
            }
    }
    bool finite(int64_t columns, int64_t steps) const {
        V<T> any = splat(T(0));
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < columns; c += Vec<T>::W) any = fma(load(at + t * row + c), splat(T(0)), any);
        return sum_of_lanes<T>(any) == 0;
    }
};

// Transposes rows of a chunk, with zeros at masked steps and beyond the last step and number. `weighted`: if not null,
// the sum of the rows times `weights`.
template <class T>
void read_columns(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t columns, int64_t steps,
                  const uint8_t* mask, const T* weights = nullptr, T* weighted = nullptr) {
    constexpr int W = Vec<T>::W;
    for (int64_t r = 0; r < steps; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            const int lanes = columns - c < W ? int(columns - c) : W;
            V<T> square[W];
            UNROLL
            for (int k = 0; k < W; ++k) {
                const int64_t t = r + k;
                square[k] = t < steps && (!mask || mask[t]) ? load_lanes(from + t * from_row + c, lanes) : splat(T(0));
                if (t + W < steps) prefetch(from + (t + W) * from_row + c);
            }
            if (weighted) {
                V<T> sum = r ? load(weighted + c) : splat(T(0));
                UNROLL
                for (int k = 0; k < W; ++k) sum = fma(splat(weights[r + k]), square[k], sum);
                store(weighted + c, sum);
            }
            transpose<T>(square);
            UNROLL
            for (int k = 0; k < W; ++k) store(to + (c + k) * to_row + r, square[k]);
        }
}

}  // namespace
}  // namespace cellstack
