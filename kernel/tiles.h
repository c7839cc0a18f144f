// Tiles of a product, for every size and every kind of number: the loops over k where the kernel spends its time.
#pragma once
#include "leaf.h"
#include "vec.h"

namespace cellstack {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#if defined(__wasm__)
constexpr int kRows = 2;  // as browsers keep one of 16 registers for themselves, and a product takes one
#else
constexpr int kRows = kMostRows;  // per tile: 6·4 sums, 6 broadcasts and a weight fill 32 registers
#endif
constexpr bool kFewRegisters = kRegisters == 16 && kRows > 2;  // for tiles of so many rows
// Whether a tile's sums fit into the registers, with one operand of each row or of each vector and one of the others. A
// larger one takes two passes over k, the first one with two vectors. So six rows read half of the panel in a pass,
// where two tiles of three rows would read all of it twice, from a cache that can't deliver it as fast as it is
// multiplied.
template <int R, int C, bool Widens = false>
constexpr bool kFits = R * C + (Widens || C < R ? C : R) + 1 <= kRegisters;
// The most rows of a tile, for which most sums fit; and of a tile of weight gradients, whose panels are in the
// first-level cache, so that passes gain nothing.
constexpr int most_rows(int vectors) { return kFewRegisters && vectors == 3 ? 4 : kRows; }
constexpr int kGradientColumns = kFewRegisters ? 3 : kRows;

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // numbers per cache line

// Pointers to the rows and the panel at the current k.
template <class T, int R>
struct Cursor {
    const T* a[R];
    int64_t a_step;
    const T* panel;
    int64_t step, vector, block;
    const T* ahead = nullptr;
    const T* tail = nullptr;

    // Vector v of N blocks of C vectors each, and the vectors of the tail after them.
    template <int N, int C>
    INLINE V<T> read(int v) const {
        return load(v < N * C ? panel + v / C * block + v % C * vector : tail + (v - N * C) * Vec<T>::W);
    }
    // Forces the vector into a register: R operations use it, and for two or three of them a compiler may load it again
    // each time, which waits as many times for a line that isn't in the first-level cache.
    template <int N, int C>
    INLINE V<T> weights(int v) const {
        V<T> w = read<N, C>(v);
#if defined(__SSE2__)
        if (R > 1) asm("" : "+v"(w));
#endif
        return w;
    }
    template <bool Ahead, int E>
    INLINE void next() {
        if (Ahead) prefetch(ahead), ahead += kLine<T>;
        panel += step;
        if (E) tail += E * Vec<T>::W;
    }
};

// kRecurrent: which recurrent tiles exist: those of four vectors (1), for steps; and those of fewer too (2), for the
// backward pass.

// Numbers of T, each product rounded once, with its sum.
template <class T>
struct Plain {
    using Number = T;
    using Sum = V<T>;
    static constexpr bool kWidens = false;
    static constexpr int kRecurrent = 2;
    static INLINE Sum multiply_add(V<T> a, V<T> w, Sum sum) { return fma(a, w, sum); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 of adjacent k in the bits of a float, in the rows and in the panel, multiplied by one instruction.
struct Pairs {
    using Number = float;
    using Sum = V<float>;
    static constexpr bool kWidens = false;
    static constexpr int kRecurrent = 2;
    static INLINE Sum multiply_add(V<float> a, V<float> w, Sum sum) { return add_pairs(a, w, sum); }
};
#endif

// Four int8 of adjacent k, those of the rows with an offset of 128; the sums are integers and exact.
struct Int8 {
    using Number = float;
    using Sum = Words;
    static constexpr bool kWidens = false;
    static constexpr int kRecurrent = 0;
    static INLINE Sum multiply_add(V<float> a, V<float> w, Sum sum) { return add_dot(sum, (Words)a, (Words)w); }
};

// Two bfloat16 of adjacent k in each word of the panel, widened to floats after loading; rows of floats that are
// rounded to bfloat16. A product of two bfloat16 is exact in a float and k rises, so the bits are those of Pairs.
struct Widened {
    using Number = float;
    using Sum = V<float>;
    static constexpr bool kWidens = true;
    static constexpr int kRecurrent = 1;
    static INLINE Sum multiply_add(V<float>, V<float>, Sum sum) { return sum; }  // never called
};
// Adds the products of vectors of weights with the numbers at `a` of all rows, of which one is in a register at a time.
template <class Kind, int R, int C, class T>
INLINE void add_products(typename Kind::Sum (&sums)[R][C], const V<T> (&w)[C], const Cursor<T, R>& at, int64_t a) {
    UNROLL
    for (int r = 0; r < R; ++r) {
        const V<T> s = splat(at.a[r][a]);
        UNROLL
        for (int v = 0; v < C; ++v) sums[r][v] = Kind::multiply_add(s, w[v], sums[r][v]);
    }
}
template <int R, int N, int C, bool Ahead, int E>
INLINE void accumulate_widened(V<float> (&sums)[R][N * C + E], Cursor<float, R>& at, int64_t depth) {
    // With many sums the two numbers of a word are processed one after the other, which leaves registers for the sums.
    constexpr bool apart = R * (N * C + E) > kRegisters / 2;
    for (int64_t k = 0; k < depth; ++k, at.template next<Ahead, E>()) {
        if constexpr (kFewRegisters && R > 2) {
            UNROLL
            for (int part = 0; part < 2; ++part) {
                V<float> w[N * C];
                UNROLL
                for (int v = 0; v < N * C; ++v) {
                    const Words both = (Words)at.template read<N, C>(v);
                    w[v] = part ? lower_float(both) : upper_float(both);
                }
                add_products<Plain<float>>(sums, w, at, 2 * k + part);
            }
            continue;
        }
        V<float> even[R], odd[R];
        UNROLL
        for (int r = 0; r < R; ++r) even[r] = splat(at.a[r][2 * k]);
        if (!apart) {
            UNROLL
            for (int r = 0; r < R; ++r) odd[r] = splat(at.a[r][2 * k + 1]);
        }
        UNROLL
        for (int v = 0; v < N * C + E; ++v) {
            const Words w = (Words)at.template read<N, C>(v);
            const V<float> first = upper_float(w), second = lower_float(w);
            UNROLL
            for (int r = 0; r < R; ++r) sums[r][v] = fma(even[r], first, sums[r][v]);
            if (apart) continue;
            UNROLL
            for (int r = 0; r < R; ++r) sums[r][v] = fma(odd[r], second, sums[r][v]);
        }
        if (!apart) continue;
        UNROLL
        for (int r = 0; r < R; ++r) odd[r] = splat(at.a[r][2 * k + 1]);
        UNROLL
        for (int v = 0; v < N * C + E; ++v) {
            const V<float> second = lower_float((Words)at.template read<N, C>(v));
            UNROLL
            for (int r = 0; r < R; ++r) sums[r][v] = fma(odd[r], second, sums[r][v]);
        }
    }
}

// N blocks of C vectors, and E vectors of the tail.
template <class Kind, int R, int N, int C, bool Ahead = false, int E = 0>
INLINE void accumulate(typename Kind::Sum (&sums)[R][N * C + E], Cursor<typename Kind::Number, R>& at, int64_t depth) {
    using T = typename Kind::Number;
    if constexpr (Kind::kWidens) return accumulate_widened<R, N, C, Ahead, E>(sums, at, depth);
    for (int64_t k = 0, a = 0; k < depth; ++k, a += at.a_step, at.template next<Ahead, E>()) {
        if constexpr (kFewRegisters && C < R) {  // no registers for broadcasts of all rows
            V<T> w[N * C];
            UNROLL
            for (int v = 0; v < N * C; ++v) w[v] = at.template weights<N, C>(v);
            add_products<Kind>(sums, w, at, a);
            continue;
        }
        V<T> s[R];
        UNROLL
        for (int r = 0; r < R; ++r) s[r] = splat(at.a[r][a]);
        UNROLL
        for (int v = 0; v < N * C + E; ++v) {
            const V<T> w = at.template weights<N, C>(v);
            UNROLL
            for (int r = 0; r < R; ++r) sums[r][v] = Kind::multiply_add(s[r], w, sums[r][v]);
        }
    }
}

// Sums of a block whose gates share vectors, to one vector per gate, with zeros beyond its units. It reads whole
// vectors.
template <class T>
INLINE V<T> gate_of(const T* shared, const Tail& tail, int gate) {
    return first_lanes<T>(load(shared + gate * tail.units), tail.units);
}

// ── a whole tile ─────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T, int R, int N, int C>
INLINE void begin(const Tile<T>& t, V<T> (&sums)[R][N * C]) {
    if (t.from) {
        UNROLL
        for (int r = 0; r < R; ++r) UNROLL
        for (int v = 0; v < N * C; ++v)
            sums[r][v] = load(t.from + r * t.from_row + v / C * t.from_block + v % C * t.from_vector);
    } else {
        UNROLL
        for (int r = 0; r < R; ++r) UNROLL
        for (int v = 0; v < N * C; ++v) sums[r][v] = splat(T(0));
    }
}
// All fields of the tile that are needed here are read before the first sum is written: the compiler can't know that
// they don't alias.
template <class T, int R, int N, int C>
INLINE void end(const Tile<T>& t, const V<T> (&sums)[R][N * C]) {
    T* row = t.to;
    const int64_t to_row = t.to_row, vector = t.to_vector, block = t.to_block;
    if (t.add) {
        UNROLL
        for (int r = 0; r < R; ++r, row += to_row) UNROLL
        for (int v = 0; v < N * C; ++v) {
            T* at = row + v / C * block + v % C * vector;
            store(at, load(at) + sums[r][v]);
        }
    } else {
        UNROLL
        for (int r = 0; r < R; ++r, row += to_row) UNROLL
        for (int v = 0; v < N * C; ++v) store(row + v / C * block + v % C * vector, sums[r][v]);
    }
}

// int8 starts from zero; at the end the effect of the rows' offset of 128 is subtracted and the scales are applied.
template <class T, int R, int N, int C>
INLINE void begin(const Tile<T>&, Words (&sums)[R][N * C]) {
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < N * C; ++v) sums[r][v] = Words{};
}
template <class T, int R, int N, int C>
INLINE void end(const Tile<T>& t, const Words (&sums)[R][N * C]) {
    T* to = t.to;
    const bool add = t.add;
    const int64_t to_row = t.to_row, to_vector = t.to_vector, to_block = t.to_block;
    const T *row_scales = t.row_scales, *from = t.from, *scales = t.scales, *shifts = t.shifts;
    const int64_t vector = t.from_vector, block = t.from_block;
    UNROLL
    for (int v = 0; v < N * C; ++v) {
        const int64_t column = v / C * block + v % C * vector;
        const V<T> scale = load(scales + column), bias = from ? load(from + column) : splat(T(0));
        const Words shift = (Words)load(shifts + column);
        UNROLL
        for (int r = 0; r < R; ++r) {
            const V<T> exact = __builtin_convertvector(sums[r][v] - shift, V<T>);
            const V<T> sum = fma(exact, splat(row_scales[r]) * scale, bias);
            T* at = to + r * to_row + v / C * to_block + v % C * to_vector;
            store(at, add ? load(at) + sum : sum);
        }
    }
}

template <class T>
Tile<T> after_two_vectors(const Tile<T>& t) {
    Tile<T> rest = t;
    rest.panel += 2 * t.panel_vector, rest.to += 2 * t.to_vector;
    if (t.from) rest.from += 2 * t.from_vector;
    if (t.scales) rest.scales += 2 * t.from_vector, rest.shifts += 2 * t.from_vector;
    return rest;
}

template <class Kind, int R, int N, int C, int E = 0>
NOINLINE void tile(const Tile<typename Kind::Number>& t) {
    using T = typename Kind::Number;
    constexpr int W = Vec<T>::W, all = C + E;  // a tail has one block before it
    if constexpr (R > 2 && C > 2 && !kFits<R, C, Kind::kWidens>) {
        tile<Kind, R, N, 2>(t);
        return tile<Kind, R, N, C - 2>(after_two_vectors(t));
    }
    typename Kind::Sum sums[R][N * all];
    begin<T, R, N, all>(t, sums);
    Cursor<T, R> at{{}, t.a_step, t.panel, t.panel_step, N == 1 ? t.panel_vector : W, t.panel_block};
    if (E) at.tail = t.tail;
    UNROLL
    for (int r = 0; r < R; ++r) at.a[r] = t.a[r];
    accumulate<Kind, R, N, C, false, E>(sums, at, t.depth);
    end<T, R, N, all>(t, sums);
}

template <class Kind, int R, int C, bool Ahead = (R > 1)>
NOINLINE void recurrent_tile(const Tile<typename Kind::Number>& t) {
    using T = typename Kind::Number;
    constexpr int W = Vec<T>::W;
    if constexpr (R > 2 && C > 2 && !kFits<R, C, Kind::kWidens>) {
        recurrent_tile<Kind, R, 2>(t);
        Tile<T> rest = t;
        rest.panel += 2 * W, rest.to += 2 * W;
        return recurrent_tile<Kind, R, C - 2, false>(rest);
    }
    typename Kind::Sum sums[R][C];
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < C; ++v) sums[r][v] = typename Kind::Sum{};
    Cursor<T, R> at{{}, 1, t.panel, 4 * W, W, 0, t.ahead};
    UNROLL
    for (int r = 0; r < R; ++r) at.a[r] = t.a[0] + r * t.a_row;
    for (int64_t segment = 0; segment < t.segments; ++segment) {
        accumulate<Kind, R, 1, C, Ahead>(sums, at, t.depth);
        UNROLL
        for (int r = 0; r < R; ++r) at.a[r] += t.a_segment;
    }
    T* to = t.to;
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < C; ++v) store(to + (r * 4 + v) * W, sums[r][v]);
}

template <class Kind, int R = 1>
constexpr void fill(Tiles<typename Kind::Number>& tiles) {
    if constexpr (R <= kRows) {
        auto &any = tiles.of[R - 1], &recurrent = tiles.recurrent[R - 1];
        any[0] = tile<Kind, R, 1, 1>, any[1] = tile<Kind, R, 1, 2>;
        any[2] = tile<Kind, R, 1, 3>, any[3] = tile<Kind, R, 1, 4>;
        if constexpr (Kind::kRecurrent > 1)
            recurrent[0] = recurrent_tile<Kind, R, 1>, recurrent[1] = recurrent_tile<Kind, R, 2>,
            recurrent[2] = recurrent_tile<Kind, R, 3>;
        if constexpr (Kind::kRecurrent > 0) recurrent[3] = recurrent_tile<Kind, R, 4>;
        fill<Kind, R + 1>(tiles);
    }
}
template <class Kind>
constexpr Tiles<typename Kind::Number> tiles_of() {
    Tiles<typename Kind::Number> tiles{};
    fill<Kind>(tiles);
    tiles.two_blocks[0] = tile<Kind, 1, 2, 3>, tiles.two_blocks[1] = tile<Kind, 1, 2, 4>;
    tiles.eight_blocks = tile<Kind, 1, 1, 8>;
    auto& with_tail = tiles.with_tail;
    with_tail[0][0] = tile<Kind, 1, 1, 3, 1>, with_tail[0][1] = tile<Kind, 1, 1, 3, 2>;
    with_tail[1][0] = tile<Kind, 1, 1, 4, 1>, with_tail[1][1] = tile<Kind, 1, 1, 4, 2>;
    with_tail[1][2] = tile<Kind, 1, 1, 4, 3>;
    return tiles;
}

}  // namespace
}  // namespace cellstack
