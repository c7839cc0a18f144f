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
INLINE Words rounded_halves(V<float> x) {
    const Words bits = (Words)x, nearest = (Words)((Unsigned)bits + 0x7fff + ((Unsigned)bits >> 16 & 1));
    const Words quiet = bits | 0x400000;
    return (x == x ? nearest : quiet) & int32_t(0xffff0000);
}

// A block's panel of floats, [depth][gates][W], as words of bfloat16.
INLINE void pack_halves(uint32_t* to, const float* panel, int64_t depth, int gates) {
    constexpr int W = Vec<float>::W;
    const int64_t row = gates * W;
    for (int64_t k = 0; k < depth; k += 2, to += row)
        for (int v = 0; v < gates; ++v) {
            const float* at = panel + k * row + v * W;
            const Words even = rounded_halves(load(at));
            const Words odd = k + 1 < depth ? rounded_halves(load(at + row)) : splat(0);
            store_words(to + v * W, even | (Words)((Unsigned)odd >> 16));
        }
}

// Rows rounded to bfloat16, as floats or in pairs as in a panel; zeros beyond `depth`. They go `stride` words apart.
template <bool Pairs>
__attribute__((noinline)) void halve_rows(float* to, const Rows<float>& rows, int64_t count, int64_t depth) {
    constexpr int W = Vec<float>::W;
    const int64_t stride = narrow_stride(Element::kBfloat16, depth);
    for (int64_t m = 0; m < count; ++m, to += stride) {
        const float* row = rows.at(m);
        for (int64_t k = 0; k < depth; k += W) {
            const V<float> x = load_lanes(row + k, depth - k < W ? int(depth - k) : W);
            if constexpr (Pairs) {
                const HalfOfWords pairs = pairs_of(x);
                memcpy(to + k / 2, &pairs, sizeof pairs);
            } else {
                store(to + k, (V<float>)rounded_halves(x));
            }
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

INLINE V<float> low_half(Words w) { return (V<float>)(w << 16); }
INLINE V<float> high_half(Words w) { return (V<float>)(w & int32_t(0xffff0000)); }

// `accumulate` over words of bfloat16, for an even n. With many rows the two halves of a word are read apart, which
// leaves registers for the sums. With Keep, the weights are left at `floats` on the way, [k][N][C][W], for the tiles
// that follow.
template <int R, int N, int C, int G, bool Keep>
INLINE void accumulate_halves(V<float> (&sums)[N][R][C], const float* const (&a)[R], const uint32_t* panel,
                              int64_t panel_stride, int64_t n, float* floats) {
    constexpr int W = Vec<float>::W;
    const auto each = [&](int64_t k, auto&& body) INLINED {
        const uint32_t* p = panel + k / 2 * G * W;
        unroll<N>([&](auto b) INLINED {
            unroll<C>([&](auto v) INLINED { body(b, v, load_words(p + b * panel_stride + v * W)); });
        });
    };
    const auto half = [&](int64_t k, auto&& of) INLINED {
        V<float> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r][k]); });
        each(k, [&](auto b, auto v, Words w) INLINED {
            const V<float> weight = of(w);
            if constexpr (Keep) store(floats + ((k * N + b) * C + v) * W, weight);
            unroll<R>([&](auto r) INLINED { sums[b][r][v] = fma(s[r], weight, sums[b][r][v]); });
        });
    };
    const auto low = [](Words w) INLINED { return low_half(w); };
    const auto high = [](Words w) INLINED { return high_half(w); };
    for (int64_t k = 0; k < n; k += 2) {
        if constexpr (Keep || R * N * C > (kRows == 6 ? 16 : 8)) {
            half(k, high), half(k + 1, low);
        } else {
            V<float> even[R], odd[R];
            unroll<R>([&](auto r) INLINED { even[r] = splat(a[r][k]), odd[r] = splat(a[r][k + 1]); });
            each(k, [&](auto b, auto v, Words w) INLINED {
                const V<float> first = high_half(w), second = low_half(w);
                unroll<R>([&](auto r)
                              INLINED { sums[b][r][v] = fma(odd[r], second, fma(even[r], first, sums[b][r][v])); });
            });
        }
    }
}

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

// body(Int<block>, Int<row>, Int<column>) for every vector of a tile's sums.
template <int N, int R, int C, class F>
INLINE void each_sum(F&& body) {
    unroll<N>([&](auto b)
                  INLINED { unroll<R>([&](auto r) INLINED { unroll<C>([&](auto v) INLINED { body(b, r, v); }); }); });
}

// Sums go through memory on their way to whoever takes them; a copy that nobody else sees stays in registers meanwhile.
template <int N, int R, int C, class F>
INLINE void in_registers(V<float> (&sums)[N][R][C], F&& body) {
    V<float> own[N][R][C];
    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED { own[b][r][v] = sums[b][r][v]; });
    body(own);
    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = own[b][r][v]; });
}

// Rows enough to share what a word costs to be made floats of: the first tile of them widens the weights of some k, and
// leaves them for the others in the first-level cache; sums that go on with the next k wait meanwhile.
constexpr int64_t kWideRows = 11 * kRows;
constexpr int64_t kWideFloats = 8192;

// Sums over C of the G gates of N blocks with weights of bfloat16. `panel` is the first block's, at its first gate; row
// m of `count`, rounded, is at rows + m·row_stride; start(sums, m) sets the sums of a tile from row m on,
// V<float>[N][R][C]; end(sums, m) takes them when they are whole. Rows of which used(m, R) is false are handed on as
// they were set. `Alone`: there is one row.
template <int G, int C, int N, bool Alone, class Used, class Start, class End>
INLINE void halves_product(const uint32_t* panel, int64_t depth, const float* rows, int64_t row_stride, int64_t count,
                           Used&& used, Start&& start, End&& end) {
    constexpr int W = Vec<float>::W, wide = N * C * W;
    constexpr int64_t deep = kWideFloats / wide / 2 * 2;
    const int64_t words = narrow_words(depth, 16), stride = words * G * W, even = 2 * words;
    const auto tile = [&](auto R, int64_t m) INLINED {
        V<float> sums[N][R][C];
        const float* a[R];
        unroll<R>([&](auto r) INLINED { a[r] = rows + (m + r) * row_stride; });
        start(sums, m);
        if (used(m, R))
            in_registers(sums, [&](auto& own) INLINED {
                accumulate_halves<R, N, C, G, false>(own, a, panel, stride, even, nullptr);
            });
        end(sums, m);
    };
    if constexpr (Alone) return tile(Int<1>{}, 0);
    if (count <= kRows) return tiles(count, tile);
    alignas(kVectorBytes) float floats[deep * wide], waiting[kWideRows * wide];
    // Parts of the rows as even as they can be: no tile is of fewer than half its rows.
    const int64_t parts = (count + kWideRows - 1) / kWideRows;
    int64_t there = -1;  // from which k on the weights are in `floats`
    for (int64_t row = 0, part = 0, some; part < parts; ++part, row += some) {
        some = (count - row + parts - part - 1) / (parts - part);
        for (int64_t first = 0; first < even; first += deep) {
            const int64_t n = even - first < deep ? even - first : deep;
            tiles(some, [&](auto R, int64_t of) INLINED {
                if constexpr (2 * R < kRows) return;
                const int64_t m = row + of;
                V<float> sums[N][R][C];
                const auto place = [&](auto b, auto r, auto v)
                                       INLINED { return waiting + (of + r) * wide + (b * C + v) * W; };
                if (first)
                    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = load(place(b, r, v)); });
                else
                    start(sums, m);
                const float* a[R];
                unroll<R>([&](auto r) INLINED { a[r] = rows + (m + r) * row_stride + first; });
                if (used(m, R)) {
                    in_registers(sums, [&](auto& own) INLINED {
                        if (there == first)
                            accumulate<float, R, N, C, N * C>(own, a, floats, C * W, n);
                        else
                            accumulate_halves<R, N, C, G, true>(own, a, panel + first / 2 * G * W, stride, n, floats);
                    });
                    there = first;
                }
                if (first + n == even)
                    end(sums, m);
                else
                    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED { store(place(b, r, v), sums[b][r][v]); });
            });
        }
    }
}

// What `product_tile` is for weights of 8 bits, with rows in steps.
template <int G, int First, int C, int R, int N>
INLINE void bytes_tile(const Product<float>& p, int64_t block, int64_t m) {
    constexpr int W = Vec<float>::W;
    const int64_t words = narrow_words(p.depth, 8), columns = p.blocks * G * W;
    const auto* matrix = reinterpret_cast<const uint32_t*>(p.matrix);
    const uint32_t* panel = matrix + (block * words * G + First) * W;
    Words sums[N][R][C];
    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = splat(0); });
    const uint8_t* a[R];
    unroll<R>([&](auto r) INLINED { a[r] = reinterpret_cast<const uint8_t*>(p.narrow + (m + r) * words); });
    for (int64_t k = 0; k < words; ++k) {
        Words four[R];
        unroll<R>([&](auto r) INLINED {
            int32_t bytes;
            memcpy(&bytes, a[r] + 4 * k, 4);
            four[r] = splat(bytes);
        });
        unroll<N>([&](auto b) INLINED {
            unroll<C>([&](auto v) INLINED {
                const Words w = load_words(panel + b * words * G * W + (k * G + v) * W);
                unroll<R>([&](auto r) INLINED { sums[b][r][v] = add_dot(sums[b][r][v], four[r], w); });
            });
        });
    }
    const auto* scales = reinterpret_cast<const float*>(matrix + p.blocks * words * G * W);
    const auto* shifts = reinterpret_cast<const uint32_t*>(scales + columns);
    float* to = p.to + m * G * p.stride + First * p.stride + block * W;
    each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED {
        const int64_t column = ((block + b) * G + First + v) * W;
        const Words exact = sums[b][r][v] - load_words(shifts + column);
        const V<float> scale = splat(p.scales[m + r]) * load(scales + column);
        const V<float> bias = p.bias ? load(p.bias + column) : splat(0.0f);
        const V<float> sum = fma(__builtin_convertvector(exact, V<float>), scale, bias);
        float* at = to + (r * G + v) * p.stride + b * W;
        store(at, p.add ? load(at) + sum : sum);
    });
}

template <int G, int First, int C, int N, bool Alone>
INLINE void halves_blocks(const Product<float>& p, int64_t block, int64_t count) {
    constexpr int W = Vec<float>::W;
    const auto* panel =
        reinterpret_cast<const uint32_t*>(p.matrix) + (block * narrow_words(p.depth, 16) * G + First) * W;
    halves_product<G, C, N, Alone>(
        panel, p.depth, p.narrow, narrow_stride(p.element, p.depth), count, [](int64_t, int) INLINED { return true; },
        [&](auto& sums, int64_t) INLINED {
            constexpr int R = sizeof sums[0] / sizeof sums[0][0];
            each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED {
                sums[b][r][v] = p.bias ? load(p.bias + ((block + b) * G + First + v) * W) : splat(0.0f);
            });
        },
        [&](auto& sums, int64_t m) INLINED {
            constexpr int R = sizeof sums[0] / sizeof sums[0][0];
            float* to = p.to + m * G * p.stride + First * p.stride + block * W;
            each_sum<N, R, C>([&](auto b, auto r, auto v) INLINED {
                float* at = to + (r * G + v) * p.stride + b * W;
                store(at, p.add ? load(at) + sums[b][r][v] : sums[b][r][v]);
            });
        });
}

template <int Bits, int G, int First, int C>
__attribute__((noinline)) void narrow_product(const Product<float>& p, const Rows<float>& rows, int64_t count) {
    if constexpr (Bits == 8) {
        for (int64_t m = 0; m < count; ++m) {
            float* row = p.narrow + m * narrow_stride(p.element, p.depth);
            p.scales[m] = quantise(reinterpret_cast<uint8_t*>(row), rows.at(m), p.depth);
        }
        blocks_together<C>(
            p, count, [&](auto N, int64_t block) INLINED { bytes_tile<G, First, C, 1, N>(p, block, 0); },
            [&](auto N, int64_t block) INLINED {
                tiles(count, [&](auto R, int64_t m) INLINED { bytes_tile<G, First, C, R, N>(p, block, m); });
            });
    } else {
        halve_rows<false>(p.narrow, rows, count, p.depth);
        blocks_together<C>(
            p, count, [&](auto N, int64_t block) INLINED { halves_blocks<G, First, C, N, true>(p, block, count); },
            [&](auto N, int64_t block) INLINED { halves_blocks<G, First, C, N, false>(p, block, count); });
    }
}

// The product with weights of whatever width they have.
template <class T, int G, int First, int C>
INLINE void multiply(const Product<T>& p, const Rows<T>& rows, int64_t count) {
    if constexpr (sizeof(T) == 4) {
        if constexpr (kMultipliesPairs)
            if (p.pairs) {
                halve_rows<true>(p.narrow, rows, count, p.depth);
                const Rows<T> pairs{p.narrow, narrow_stride(p.element, p.depth), 0, count};
                return product<T, G, First, C, true>(p, pairs, count);
            }
        if (p.element == Element::kBfloat16) return narrow_product<16, G, First, C>(p, rows, count);
        if (p.element == Element::kInt8) return narrow_product<8, G, First, C>(p, rows, count);
    }
    product<T, G, First, C>(p, rows, count);
}

}  // namespace
}  // namespace cellstack
