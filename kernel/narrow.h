// Products with weights of 16 or 8 bits, for float: panels whose k go two or four to a lane of 32 bits.
//
// bfloat16: weights and the rows that they are multiplied with are rounded, sums stay floats. A product of two such
// numbers is exact in a float, and k follow each other; so sums have the same bits whether the processor multiplies
// pairs (`Panels::pairs`) or a shift and a mask make floats of a word's halves.
// int8: weights times a scale a column; a row is cut to steps of its largest magnitude / 127 when it comes, so that
// sums are of whole numbers, exact on every machine, up to a depth of 133,144 (127·127·depth < 2^31). Ref: Jacob et al.
// 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", eq. 1; ONNX's
// DynamicQuantizeLinear, here symmetric.
#pragma once
#include "product.h"

namespace cellstack {
namespace {

// ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// The float nearest to each lane among those whose lower half is zero, ties to even; a NaN stays one.
INLINE Words rounded(V<float> x) {
    const Words bits = (Words)x, nearest = (Words)((Unsigned)bits + 0x7fff + ((Unsigned)bits >> 16 & 1));
    const Words quiet = bits | 0x400000;
    return (x == x ? nearest : quiet) & int32_t(0xffff0000);
}

// A block's panel of floats, [depth][gates][W], as words of bfloat16.
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

// Rows rounded to bfloat16, as floats or in pairs as in a panel; zeros beyond `depth`. They go `stride` words apart.
__attribute__((noinline)) void round_rows(bool pairs, float* to, const Rows<float>& rows, int64_t count,
                                          int64_t depth) {
    constexpr int W = Vec<float>::W;
    const int64_t stride = narrow_stride(Element::kBfloat16, depth);
    for (int64_t m = 0; m < count; ++m, to += stride) {
        const float* row = rows.at(m);
        for (int64_t k = 0; k < depth; k += W) {
            const V<float> x = load_lanes(row + k, depth - k < W ? int(depth - k) : W);
            if constexpr (kHasPairs)
                if (pairs) {
                    const HalfOfWords two = pairs_of(x);
                    memcpy(to + k / 2, &two, sizeof two);
                    continue;
                }
            store(to + k, (V<float>)rounded(x));
        }
    }
}

// The same as words of int8, with the scale of each column, and what 128 in place of each of a row's zeros adds to it.
INLINE void pack_bytes(uint32_t* to, const float* panel, int64_t depth, int gates, float* scales, uint32_t* shifts) {
    constexpr int W = Vec<float>::W;
    constexpr float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number, which the low bits hold
    const int64_t row = gates * W;
    for (int v = 0; v < gates; ++v) {
        const float* column = panel + v * W;
        V<float> most = splat(0.0f), check = splat(0.0f);
        for (int64_t k = 0; k < depth; ++k) {
            const V<float> w = load(column + k * row), size = w < splat(0.0f) ? -w : w;
            most = size > most ? size : most;
            check += w * splat(0.0f);  // NaN where a weight is no number
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

// A row in steps of `scale`, 128 up, so that it has no sign; NaN where a value is no number, or none that has steps.
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

// Rows enough to share what it costs to make floats of a word, and room for the floats in the first-level cache.
constexpr int64_t kWideRows = 11 * kRows;
constexpr int64_t kWideFloats = 8192;

// A product of more rows than a tile has, with weights of bfloat16 that are made floats once for all of them, some k at
// a time; meanwhile the sums of the other k wait. `t` as for Widened, with all but its rows.
void widened_product(const Tiles<float>& plain, const Tile<float>& t, int vectors, const Rows<float>& rows,
                     int64_t count) {
    constexpr int W = Vec<float>::W;
    alignas(kVectorBytes) float floats[kWideFloats], waiting[kWideRows * 4 * W];
    const int64_t row = vectors * W, deep = kWideFloats / row / 2;
    // Parts of the rows as even as they can be, so that no tile is of fewer than half its rows.
    const int64_t parts = (count + kWideRows - 1) / kWideRows;
    int64_t there = -1;  // from which word on the weights are in `floats`
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

// Whether it is faster than making floats of a word for each tile: where the sums of one leave no registers for that
// (12 of 16), and where rows are many.
INLINE bool widens_once(const Panels<float>& w, int64_t count, int vectors) {
    const int64_t few = kRows == 3 && vectors == 4 ? 4 : 12;
    return w.element == Element::kBfloat16 && !w.pairs && count > few;
}
INLINE bool widens_once(const Panels<double>&, int64_t, int) { return false; }
INLINE void widened_product(const Tiles<double>&, const Tile<double>&, int, const Rows<double>&, int64_t) {}

// Runs a product with weights of any width.
template <class T>
INLINE void multiply(Product<T>& p, const Rows<T>& rows, int64_t count, T* to, bool add = false, bool down = false,
                     int first = 0, int wanted = 0) {
    if constexpr (sizeof(T) == 4) {
        const Rows<T> own{p.narrow, narrow_stride(p.w.element, p.depth), 0, count};
        if (p.w.element == Element::kBfloat16) {
            round_rows(p.w.pairs, p.narrow, rows, count, p.depth);
            const int vectors = p.gates < 3 || wanted == 1 || wanted == 2 ? 4 : p.gates;
            if (!widens_once(p.w, count, vectors)) return p.run(own, count, to, add, down, first, wanted);
            return p.each_group(to, add, down, count, first, wanted ? wanted : p.gates,
                                [&](auto, int some) { widened_product(*p.w.plain, p.t, some, own, count); });
        }
        if (p.w.element == Element::kInt8) {
            for (int64_t m = 0; m < count; ++m)
                p.row_scales[m] = quantise(reinterpret_cast<uint8_t*>(p.narrow + m * own.row), rows.at(m), p.depth);
            return p.run(own, count, to, add, down, first, wanted);
        }
    }
    p.run(rows, count, to, add, down, first, wanted);
}

}  // namespace
}  // namespace cellstack
