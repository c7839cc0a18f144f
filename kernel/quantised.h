// Products with weights of 16 or 8 bits, for float: panels whose k go two or four to a lane of 32 bits.
//
// bfloat16: a weight is the upper half of a float, so a shift or a mask makes a float of it; sums and rows stay floats.
// int8: weights times a scale a column; a row is cut to steps of its largest magnitude / 127 when it comes, so that
// sums are of whole numbers, exact on every machine, up to a depth of 133,144 (127·127·depth < 2^31). Ref: Jacob et al.
// 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", eq. 1; ONNX's
// DynamicQuantizeLinear, here symmetric.
#pragma once
#include "product.h"

namespace cellstack {
namespace {

template <int R, int N, int C, int G>
INLINE void accumulate_halves(V<float> (&sums)[N][R][C], const float* const (&a)[R], const uint32_t* panel,
                              int64_t panel_stride, int64_t n) {
    constexpr int W = Vec<float>::W;
    const auto pair = [&](int64_t k, bool both) INLINED {
        const uint32_t* p = panel + k / 2 * G * W;
        V<float> even[R], odd[R];
        unroll<R>([&](auto r) INLINED {
            even[r] = splat(a[r][k]);
            odd[r] = both ? splat(a[r][k + 1]) : splat(0.0f);
        });
        unroll<N>([&](auto b) INLINED {
            unroll<C>([&](auto v) INLINED {
                const Words w = load_words(p + b * panel_stride + v * W);
                const V<float> low = (V<float>)(w << 16), high = (V<float>)(w & int32_t(0xffff0000));
                unroll<R>([&](auto r) INLINED { sums[b][r][v] = fma(odd[r], high, fma(even[r], low, sums[b][r][v])); });
            });
        });
    };
    int64_t k = 0;
    for (; k + 1 < n; k += 2) pair(k, true);
    if (k < n) pair(k, false);
}

// A row in steps of `scale`, 128 up, so that it has no sign.
INLINE float quantise(uint8_t* to, const float* a, int64_t n) {
    float most = 0, check = 0;
    for (int64_t k = 0; k < n; ++k) {
        const float size = a[k] < 0 ? -a[k] : a[k];
        most = size > most ? size : most;
        check += a[k] * 0;  // NaN where a value is no number, or none that has steps: then so is the scale
    }
    const float inverse = most > 0 ? 127 / most : 0;
    for (int64_t k = 0; k < n; ++k) {
        const float step = a[k] * inverse + 128.5f;
        to[k] = step >= 1 && step < 256 ? uint8_t(int32_t(step)) : 128;
    }
    for (int64_t k = n; k % 4; ++k) to[k] = 0;
    return most / 127 + check;
}

// What `product` is for weights of 32 bits.
template <int Bits, int G, int First, int C, int R, int N>
INLINE void narrow_tile(const Product<float>& p, const Rows<float>& rows, int64_t block, int64_t m) {
    constexpr int W = Vec<float>::W;
    const int64_t words = (p.depth * Bits + 31) / 32, columns = p.blocks * G * W;
    const auto* matrix = reinterpret_cast<const uint32_t*>(p.matrix);
    const uint32_t* panel = matrix + (block * words * G + First) * W;
    V<float> sums[N][R][C];
    const auto each = [&](auto&& body) INLINED {
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED { unroll<C>([&](auto v) INLINED { body(b, r, v); }); });
        });
    };
    float* to = p.to + m * G * p.stride + First * p.stride + block * W;
    const auto column = [&](auto b, auto v) INLINED { return ((block + b) * G + First + v) * W; };
    each([&](auto b, auto r, auto v) INLINED { sums[b][r][v] = p.bias ? load(p.bias + column(b, v)) : splat(0.0f); });
    if constexpr (Bits == 16) {
        const float* a[R];
        unroll<R>([&](auto r) INLINED { a[r] = rows.at(m + r); });
        accumulate_halves<R, N, C, G>(sums, a, panel, words * G * W, p.depth);
    } else {
        Words whole[N][R][C];
        each([&](auto b, auto r, auto v) INLINED { whole[b][r][v] = splat(0); });
        const uint8_t* a[R];
        unroll<R>([&](auto r) INLINED { a[r] = p.bytes + (m + r) * words * 4; });
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
                    unroll<R>([&](auto r) INLINED { whole[b][r][v] = add_dot(whole[b][r][v], four[r], w); });
                });
            });
        }
        const auto* scales = reinterpret_cast<const float*>(matrix + p.blocks * words * G * W);
        const auto* shifts = reinterpret_cast<const uint32_t*>(scales + columns);
        each([&](auto b, auto r, auto v) INLINED {
            const Words exact = whole[b][r][v] - load_words(shifts + column(b, v));
            const V<float> scale = splat(p.scales[m + r]) * load(scales + column(b, v));
            sums[b][r][v] = fma(__builtin_convertvector(exact, V<float>), scale, sums[b][r][v]);
        });
    }
    each([&](auto b, auto r, auto v) INLINED {
        float* at = to + (r * G + v) * p.stride + b * W;
        store(at, p.add ? load(at) + sums[b][r][v] : sums[b][r][v]);
    });
}

template <int Bits, int G, int First, int C>
__attribute__((noinline)) void narrow_product(const Product<float>& p, const Rows<float>& rows, int64_t count) {
    if constexpr (Bits == 8) {
        const int64_t wide = (p.depth + 3) / 4 * 4;
        for (int64_t m = 0; m < count; ++m) p.scales[m] = quantise(p.bytes + m * wide, rows.at(m), p.depth);
    }
    constexpr int alone = C >= 3 ? 2 : C == 2 ? 4 : 8;
    int64_t block = p.block;
    for (; count == 1 && block + alone <= p.end_block; block += alone)
        narrow_tile<Bits, G, First, C, 1, alone>(p, rows, block, 0);
    for (; block < p.end_block; ++block)
        tiles(count, [&](auto R, int64_t m) INLINED { narrow_tile<Bits, G, First, C, R, 1>(p, rows, block, m); });
}

// The product with weights of whatever width they have.
template <class T, int G, int First, int C>
INLINE void multiply(const Product<T>& p, const Rows<T>& rows, int64_t count) {
    if constexpr (sizeof(T) == 4) {
        if (p.element == Element::kBfloat16) return narrow_product<16, G, First, C>(p, rows, count);
        if (p.element == Element::kInt8) return narrow_product<8, G, First, C>(p, rows, count);
    }
    product<T, G, First, C>(p, rows, count);
}

}  // namespace
}  // namespace cellstack
