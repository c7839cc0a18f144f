// Products with weights of 16 or 8 bits, for float only: panels with two or four k in each lane of 32 bits.
//
// bfloat16: the weights and the rows that they are multiplied with are rounded, the sums stay floats. A product of two
// bfloat16 is exact in a float, and k rises; so the sums have the same bits whether the processor multiplies pairs
// (bfloat16.cpp), or a shift and a mask convert the two parts of a word to floats.
// int8: weights have one scale per column; a row is quantised before its product, in steps of its largest magnitude /
// 127. The sums are integers, exact on every machine, up to a depth of 133,144 (127·127·depth < 2^31). Ref: Jacob et
// al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", eq. 1;
// ONNX's DynamicQuantizeLinear, but symmetric.
#pragma once
#include "product.h"

namespace cellstack {
namespace {

// ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// Rounds each lane to the nearest float whose lower 16 bits are zero, ties to even; NaN stays NaN.
INLINE Words rounded(V<float> x) {
    const Words bits = (Words)x, nearest = (Words)((Unsigned)bits + 0x7fff + ((Unsigned)bits >> 16 & 1));
    const Words quiet = bits | 0x400000;
    return (x == x ? nearest : quiet) & int32_t(0xffff0000);
}

// Packs a block's panel of floats, [depth][gates][W], as words of two bfloat16.
INLINE void pack_bfloat16(uint32_t* to, const float* panel, int64_t depth, int gates) {
    constexpr int W = Vec<float>::W;
    const int64_t row = gates * W;
    for (int64_t k = 0; k < depth; k += 2, to += row)
        for (int v = 0; v < gates; ++v) {
            const float* at = panel + k * row + v * W;
            const Words even = rounded(load(at));
            const Words odd = k + 1 < depth ? rounded(load(at + row)) : splat(0);
            store_words(to + v * W, even | (Words)((Unsigned)odd >> 16));
        }
}

// Rounds rows to bfloat16, as floats or in pairs as in a panel; zeros beyond `depth`. The results are narrow_stride
// apart.
NOINLINE void round_rows(const Tiles<float>& tiles, float* to, const Rows<float>& rows, int64_t count, int64_t depth) {
    constexpr int W = Vec<float>::W;
    const int64_t stride = narrow_stride(Element::kBfloat16, depth);
    for (int64_t m = 0; m < count; ++m, to += stride) {
        const float* row = rows.at(m);
        if (tiles.pairs()) {
            tiles.pair_lanes(to, row, depth);
            continue;
        }
        for (int64_t k = 0; k < depth; k += W)
            store(to + k, (V<float>)rounded(load_lanes(row + k, depth - k < W ? int(depth - k) : W)));
    }
}

// Packs a block's panel as words of four int8, with the scale of each column and the amount that the rows' offset of
// 128 adds to its sum.
INLINE void pack_bytes(uint32_t* to, const float* panel, int64_t depth, int gates, float* scales, uint32_t* shifts) {
    constexpr int W = Vec<float>::W;
    constexpr float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer, in the low bits
    const int64_t row = gates * W;
    for (int v = 0; v < gates; ++v) {
        const float* column = panel + v * W;
        V<float> most = splat(0.0f), check = splat(0.0f);
        for (int64_t k = 0; k < depth; ++k) {
            const V<float> w = load(column + k * row), size = w < splat(0.0f) ? -w : w;
            most = size > most ? size : most;
            check += w * splat(0.0f);  // NaN if a weight isn't finite
        }
        const V<float> scale = most / splat(127.0f);
        const Words some = (scale > splat(0.0f)) & (check == splat(0.0f));
        Words sum = splat(0);
        for (int64_t k = 0; k < depth; k += 4) {
            Words word = splat(0);
            for (int j = 0; j < 4 && k + j < depth; ++j) {
                const V<float> steps = load(column + (k + j) * row) / scale + splat(magic);
                const Words q = ((Words)steps - (Words)splat(magic)) & some;
                sum += q, word |= (q & 255) << (8 * j);
            }
            store_words(to + k / 4 * row + v * W, word);
        }
        store(scales + v * W, scale + check);
        store_words(shifts + v * W, sum * 128);
    }
}

// ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// Quantises a row in steps of the scale that it returns, with an offset of 128, so that the bytes are unsigned; returns
// NaN if a value isn't finite.
INLINE float quantise(uint8_t* to, const float* a, int64_t n) {
    constexpr int W = Vec<float>::W;
    V<float> most = splat(0.0f), check = splat(0.0f);
    const auto each = [&](auto&& body) INLINED {
        int64_t k = 0;
        for (; k + W <= n; k += W) body(k, load(a + k), W);
        if (k < n) body(k, load_n(a + k, int(n - k)), int(n - k));
    };
    each([&](int64_t, V<float> x, int) INLINED {
        const V<float> size = x < splat(0.0f) ? -x : x;
        most = size > most ? size : most;
        check += x * splat(0.0f);
    });
    float largest = 0, sum = 0;
    for (int l = 0; l < W; ++l) largest = most[l] > largest ? most[l] : largest, sum += check[l];
    const V<float> inverse = splat(largest > 0 ? 127 / largest : 0.0f);
    each([&](int64_t k, V<float> x, int lanes) INLINED {
        const V<float> step = x * inverse + splat(128.5f);
        const Words there = (step >= splat(1.0f)) & (step < splat(256.0f));
        const V<float> used = there ? step : splat(128.0f);
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(used, Words), Bytes);
        memcpy(to + k, &bytes, size_t(lanes));
    });
    for (int64_t k = n; k % 4; ++k) to[k] = 0;
    return largest / 127 + sum;
}

// Enough rows to share the cost of widening a word, and space for the floats in the first-level cache.
constexpr int64_t kWideRows = 11 * kRows;
constexpr int64_t kWideFloats = 8192;

// A product of more rows than a tile has, with bfloat16 weights that are widened once for all of them, some k at a
// time; meanwhile the sums over earlier k are stored. `t` as for Widened, without its rows.
void widened_product(const Tiles<float>& plain, const Tile<float>& t, int vectors, const Rows<float>& rows,
                     int64_t count) {
    constexpr int W = Vec<float>::W;
    alignas(kVectorBytes) float floats[kWideFloats], waiting[kWideRows * 4 * W];
    const int64_t row = vectors * W, deep = kWideFloats / row / 2;
    // The rows in parts of nearly equal size, so that no tile has fewer than half its rows.
    const int64_t parts = (count + kWideRows - 1) / kWideRows;
    int64_t there = -1;  // the first of the words that are in `floats`
    for (int64_t part = 0, at = 0, some; part < parts; ++part, at += some) {
        some = (count - at + parts - part - 1) / (parts - part);
        for (int64_t first = 0; first < t.depth; first += deep) {
            const int64_t n = t.depth - first < deep ? t.depth - first : deep;
            const bool begins = first == 0, ends = first + n == t.depth;
            for (int64_t k = 0; there != first && k < n; ++k)
                for (int v = 0; v < vectors; ++v) {
                    const Words w = (Words)load(t.panel + (first + k) * t.panel_step + v * t.panel_vector);
                    store(floats + 2 * k * row + v * W, upper_float(w));
                    store(floats + (2 * k + 1) * row + v * W, lower_float(w));
                }
            there = first;
            Tile<float> own = t;
            own.panel = floats, own.panel_step = row, own.panel_vector = W, own.depth = 2 * n;
            if (!begins) own.from_row = row, own.from_vector = W;
            if (!ends) own.to_row = row, own.to_vector = W, own.add = false;
            each_tile(some, [&](int64_t m, int R) {
                for (int r = 0; r < R; ++r) own.a[r] = rows.at(at + m + r) + 2 * first;
                own.from = begins ? t.from : waiting + m * row;
                own.to = ends ? t.to + (at + m) * t.to_row : waiting + m * row;
                plain.of[R - 1][vectors - 1](own);
            });
        }
    }
}

// Whether that is faster than widening words in each tile: with more rows than these, as measured.
INLINE bool widens_once(const Panels<float>& w, int64_t count) {
    return w.element == Element::kBfloat16 && !w.tiles->pairs() && count > (kRegisters == 16 ? 9 : 12);
}
INLINE bool widens_once(const Panels<double>&, int64_t) { return false; }
INLINE void widened_product(const Tiles<double>&, const Tile<double>&, int, const Rows<double>&, int64_t) {}

// Runs a product with narrow weights. One copy serves all kinds of cell.
NOINLINE void multiply_narrow(Product<float>& p, const Rows<float>& rows, int64_t count, float* to, bool add, bool down,
                              int first, int wanted) {
    const Rows<float> own{p.narrow, narrow_stride(p.w.element, p.depth), 0, count};
    if (p.w.element == Element::kInt8) {
        for (int64_t m = 0; m < count; ++m)
            p.row_scales[m] = quantise(reinterpret_cast<uint8_t*>(p.narrow + m * own.row), rows.at(m), p.depth);
        return p.run(own, count, to, add, down, first, wanted);
    }
    round_rows(*p.w.tiles, p.narrow, rows, count, p.depth);
    if (!widens_once(p.w, count)) return p.run(own, count, to, add, down, first, wanted);
    const auto product = [&](auto, int vectors, int64_t from, int64_t some) {
        const Rows<float> part{own.base + p.start + from * own.row, own.row, 0, some};
        widened_product(*p.w.plain, p.t, vectors, part, some);
    };
    p.each_group(to, add, down, count, first, wanted ? wanted : p.gates, product);
}

// Runs a product with weights in any format.
template <class T>
INLINE void multiply(Product<T>& p, const Rows<T>& rows, int64_t count, T* to, bool add = false, bool down = false,
                     int first = 0, int wanted = 0) {
    if constexpr (sizeof(T) == 4)
        if (narrow(p.w.element)) return multiply_narrow(p, rows, count, to, add, down, first, wanted);
    p.run(rows, count, to, add, down, first, wanted);
}

}  // namespace
}  // namespace cellstack
