// Products of rows with matrices in panels: the one loop over k, and the tiles of rows and blocks around it.
#pragma once
#include "leaf.h"
#include "vec.h"

namespace cellstack {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6;  // of a tile: 6·4 sums, 6 broadcasts and a weight fill 32 registers
#else
constexpr int kRows = 3;  // 3·4 sums, 3 broadcasts and a weight fill 16
#endif

// Whether there is a way of pairs for T at all.
template <class T>
constexpr bool kPairs = kMultipliesPairs && sizeof(T) == 4;

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // numbers in a line of a cache

// sums[b][r][v] += a[r][k] · panel_b[k][v] for k < n and C of a panel's G columns: the loop that all of this is about.
// With `Ahead`, n lines from `ahead` on come into the second-level cache meanwhile. With `Pairs`, a k is a pair of
// bfloat16 in the bits of a float, in the rows and in the panels.
template <class T, int R, int N, int C, int G, bool Ahead = false, bool Pairs = false>
INLINE void accumulate(V<T> (&sums)[N][R][C], const T* const (&a)[R], const T* panel, int64_t panel_stride, int64_t n,
                       const T* ahead = nullptr) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; ++k) {
        const T* p = panel + k * G * W;
        if (Ahead) __builtin_prefetch(ahead + k * kLine<T>, 0, 2);
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r][k]); });
        unroll<N>([&](auto b) INLINED {
            unroll<C>([&](auto v) INLINED {
                const V<T> w = load_for<T, R>(p + b * panel_stride + v * W);
                unroll<R>([&](auto r) INLINED {
                    if constexpr (Pairs)
                        sums[b][r][v] = add_pairs(s[r], w, sums[b][r][v]);
                    else
                        sums[b][r][v] = fma(s[r], w, sums[b][r][v]);
                });
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
            case 1:
                body(Int<1>{}, r);
                break;
            case 2:
                body(Int<2>{}, r);
                break;
            case 3:
                if constexpr (kRows >= 3) body(Int<3>{}, r);
                break;
            case 4:
                if constexpr (kRows >= 4) body(Int<4>{}, r);
                break;
            case 5:
                if constexpr (kRows >= 5) body(Int<5>{}, r);
                break;
            default:
                if constexpr (kRows >= 6) body(Int<6>{}, r);
                break;
        }
        r += size;
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

// What a product of rows is made of: to[m] = bias + a[m]·matrix, or to[m] += a[m]·matrix, gate by gate. Each is summed
// as a chain of its own.
template <class T>
struct Product {
    const T* matrix;  // panels [blocks][depth][gates][W]; unpacked: [depth, gates·units]
    const T* bias;    // [blocks][gates][W]; unpacked: [gates·units]; null: zeros
    bool add;         // to what lies in `to`; without bias
    bool unpacked;
    int64_t depth, units, blocks;
    int64_t block, end_block;  // those that are made
    T* to;                     // [rows][gates][stride]
    int64_t stride;
    bool down;        // blocks from the last to the first
    Element element;  // of a weight; narrow ones: quantised.h
    T* narrow;        // scratch for narrow weights: the rows as these take them, [rows][narrow_stride(element, depth)]
    T* scales;        // and of int8 the size of a row's steps
    bool pairs;       // see Panels
};

template <class T, int G, int First, int C, int R, int N, bool Pairs>
INLINE void product_tile(const Product<T>& p, const Rows<T>& rows, int64_t block, int64_t m) {
    constexpr int W = Vec<T>::W;
    V<T> sums[N][R][C];
    T* to = p.to + m * G * p.stride + First * p.stride + block * W;
    const T* bias = p.bias ? p.bias + (block * G + First) * W : nullptr;
    unroll<N>([&](auto b) INLINED {
        unroll<R>([&](auto r) INLINED {
            unroll<C>([&](auto v) INLINED { sums[b][r][v] = bias ? load(bias + (b * G + v) * W) : splat(T(0)); });
        });
    });
    const T* a[R];
    unroll<R>([&](auto r) INLINED { a[r] = rows.at(m + r); });
    const int64_t depth = Pairs ? narrow_words(p.depth, 16) : p.depth;
    accumulate<T, R, N, C, G, false, Pairs>(sums, a, p.matrix + (block * depth * G + First) * W, depth * G * W, depth);
    unroll<N>([&](auto b) INLINED {
        unroll<R>([&](auto r) INLINED {
            unroll<C>([&](auto v) INLINED {
                T* at = to + (r * G + v) * p.stride + b * W;
                store(at, p.add ? load(at) + sums[b][r][v] : sums[b][r][v]);
            });
        });
    });
}

// N vectors of columns of an unpacked product, in the order of `accumulate`; the last may have fewer lanes.
template <class T, int N>
INLINE void unpacked_columns(T* to, const T* bias, bool add, const T* a, const T* matrix, int64_t stride, int64_t n,
                             int lanes = Vec<T>::W) {
    constexpr int W = Vec<T>::W;
    V<T> sums[N];
    unroll<N>([&](auto v) INLINED { sums[v] = bias ? load_lanes(bias + v * W, lanes) : splat(T(0)); });
    for (int64_t k = 0; k < n; ++k, matrix += stride) {
        const V<T> s = splat(a[k]);
        unroll<N>([&](auto v) INLINED { sums[v] = fma(s, load_lanes(matrix + v * W, lanes), sums[v]); });
    }
    unroll<N>([&](auto v) INLINED {
        T* at = to + v * W;
        store_lanes(at, add ? load_lanes(at, lanes) + sums[v] : sums[v], lanes);
    });
}

// to [columns] = bias + a [n] · matrix [n, columns], or added to it; the rows of the matrix lie `stride` apart
template <class T>
void unpacked_product(T* to, const T* bias, bool add, const T* a, const T* matrix, int64_t columns, int64_t stride,
                      int64_t n) {
    constexpr int W = Vec<T>::W;
    int64_t at = 0;
    const auto columns_at = [&](auto N, int lanes) INLINED {
        unpacked_columns<T, N>(to + at, bias ? bias + at : nullptr, add, a, matrix + at, stride, n, lanes);
    };
    for (; at + 16 * W <= columns; at += 16 * W) columns_at(Int<16>{}, W);
    for (; at + 4 * W <= columns; at += 4 * W) columns_at(Int<4>{}, W);
    for (; at + W <= columns; at += W) columns_at(Int<1>{}, W);
    if (const int lanes = int(columns - at)) columns_at(Int<1>{}, lanes);
}

// Goes over the blocks of a call, or of a product, of which C gates are wanted, some together: enough chains to hide
// the latency of one, as a tile of rows has them anyway. single(Int<blocks>, first block) of one row, else several(…).
template <int C, class Single, class Several>
INLINE void blocks_together(int64_t first, int64_t end, int64_t rows, bool down, Single&& single, Several&& several) {
    constexpr int alone = C >= 3 ? 2 : C == 2 ? 4 : 8, tiled = C >= 3 ? 1 : C == 2 ? 2 : 4;
    const int64_t wide = rows == 1 ? alone : tiled, whole = (end - first) / wide, left = (end - first) % wide;
    const auto many = [&](int64_t k) INLINED {
        if (rows == 1)
            single(Int<alone>{}, first + k * wide);
        else
            several(Int<tiled>{}, first + k * wide);
    };
    const auto one = [&](int64_t k) INLINED {
        if (rows == 1)
            single(Int<1>{}, first + whole * wide + k);
        else if constexpr (tiled > 1)
            several(Int<1>{}, first + whole * wide + k);
    };
    for (int64_t k = 0; down && k < left; ++k) one(left - 1 - k);
    for (int64_t k = 0; k < whole; ++k) many(down ? whole - 1 - k : k);
    for (int64_t k = 0; !down && k < left; ++k) one(k);
}
template <int C, class T, class Single, class Several>
INLINE void blocks_together(const Product<T>& p, int64_t rows, Single&& single, Several&& several) {
    blocks_together<C>(p.block, p.end_block, rows, p.down, single, several);
}

// C of the G gates, from gate First on, of the product over all rows.
template <class T, int G, int First, int C, bool Pairs = false>
__attribute__((noinline)) void product(const Product<T>& p, const Rows<T>& rows, int64_t count) {
    if (p.unpacked) {
        for (int64_t m = 0; m < count; ++m) {
            T* to = p.to + m * G * p.stride + First * p.stride;
            const T* bias = p.bias ? p.bias + First * p.units : nullptr;
            unpacked_product(to, bias, p.add, rows.at(m), p.matrix + First * p.units, C * p.units, G * p.units,
                             p.depth);
        }
        return;
    }
    blocks_together<C>(
        p, count, [&](auto N, int64_t block) INLINED { product_tile<T, G, First, C, 1, N, Pairs>(p, rows, block, 0); },
        [&](auto N, int64_t block) INLINED {
            tiles(count,
                  [&](auto R, int64_t m) INLINED { product_tile<T, G, First, C, R, N, Pairs>(p, rows, block, m); });
        });
}

// sums[r][v] = dz[m+r]·panel over all blocks, for R rows of G gates that lie side by side in each block of dz, and C of
// a panel's vectors. A tile of several rows fetches lines from `ahead` on.
template <class T, int R, int C, int G, bool Pairs>
INLINE void times_transposed(V<T> (&sums)[1][R][C], const T* dz, int64_t blocks, int64_t dz_rows, const T* panel,
                             const T* ahead) {
    constexpr int W = Vec<T>::W, wide = 4 * W, deep = Pairs ? G * W / 2 : G * W;
    unroll<R>([&](auto r) INLINED { unroll<C>([&](auto v) INLINED { sums[0][r][v] = splat(T(0)); }); });
    for (int64_t block = 0; block < blocks; ++block) {
        const T* a[R];
        unroll<R>([&](auto r) INLINED { a[r] = dz + (block * dz_rows + r) * deep; });
        accumulate<T, R, 1, C, 4, (R > 1), Pairs>(sums, a, panel + block * deep * wide, 0, deep,
                                                  ahead + block * deep * kLine<T>);
    }
}

template <class T, int G, bool Pairs, class F>
INLINE void product_transposed_of(const T* dz, int64_t count, int64_t blocks, int64_t dz_rows, const T* panels,
                                  int64_t columns, int64_t first, int64_t last, bool down, F&& body) {
    constexpr int W = Vec<T>::W, wide = 4 * W, deep = Pairs ? G * W / 2 : G * W;
    for (int64_t n = first; n < last; ++n) {
        const int64_t panel = down ? first + last - 1 - n : n, after = n + 1 == last ? panel
                                                                       : down        ? panel - 1
                                                                                     : panel + 1;
        const T* ahead = panels + after * blocks * deep * wide;
        const auto vectors = [&](auto C) INLINED {
            tiles(count, [&](auto R, int64_t row) INLINED {
                V<T> sums[1][R][C];
                times_transposed<T, R, C, G, Pairs>(sums, dz + row * deep, blocks, dz_rows,
                                                    panels + panel * blocks * deep * wide, ahead);
                ahead += blocks * deep * kLine<T>;
                unroll<R>([&](auto r) INLINED {
                    unroll<C>([&](auto v) INLINED { body(row + r, panel * wide + v * W, sums[0][r][v]); });
                });
            });
        };
        const int64_t left = columns - panel * wide;
        if (left > 2 * W)
            vectors(Int<4>{});
        else if (left > W)
            vectors(Int<2>{});
        else
            vectors(Int<1>{});
    }
}

// body(row, column, vector): dz·matrixᵀ, for `count` rows from row m of dz on, by vectors of the matrix's `columns`
// rows: of its panels first … last, upwards or `down`. Of a panel that isn't full only the vectors that are used. With
// `pairs`, scratch [blocks][count][G·W / 2], rows and panels are in pairs of bfloat16.
template <class T, int G, class F>
INLINE void product_transposed(const T* dz, int64_t m, int64_t count, int64_t blocks, int64_t dz_rows, const T* panels,
                               int64_t columns, int64_t first, int64_t last, bool down, T* pairs, F&& body) {
    constexpr int W = Vec<T>::W, deep = G * W;
    if constexpr (kPairs<T>)
        if (pairs) {
            T* to = pairs;
            for (int64_t block = 0; block < blocks; ++block) {
                const T* from = dz + (block * dz_rows + m) * deep;
                for (int64_t k = 0; k < count * G; ++k, to += W / 2) {
                    const HalfOfWords two = pairs_of(load(from + k * W));
                    memcpy(to, &two, sizeof two);
                }
            }
            product_transposed_of<T, G, true>(pairs, count, blocks, count, panels, columns, first, last, down, body);
            return;
        }
    product_transposed_of<T, G, false>(dz + m * deep, count, blocks, dz_rows, panels, columns, first, last, down, body);
}

}  // namespace
}  // namespace cellstack
