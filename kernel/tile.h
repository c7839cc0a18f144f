// What the forward and the backward pass share: the one loop over k, tiles of rows, activations and their slopes.
#pragma once
#include "leaf.h"
#include "vec.h"

extern "C" double log1p(double);
extern "C" float log1pf(float);

namespace cellstack {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6;  // of a tile: 6·4 sums, 6 broadcasts and a weight fill 32 registers
#else
constexpr int kRows = 3;  // 3·4 sums, 3 broadcasts and a weight fill 16
#endif

INLINE float log1p_of(float x) { return log1pf(x); }
INLINE double log1p_of(double x) { return log1p(x); }

template <class T>
INLINE V<T> apply(int activation, V<T> z) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    switch (activation) {
        case kSigmoid:
            return sigmoid<T>(z);
        case kTanh:
            return tanh<T>(z);
        case kRelu:
            return z < zero ? zero : z;
        case kHardSigmoid:
            return clamp(fma(z, splat(T(1) / T(6)), splat(T(0.5))), T(0), T(1));
        case kSoftsign:
            return z / (one + (z < zero ? -z : z));
        case kSoftplus: {  // max(z, 0) + log(1 + e^-|z|)
            V<T> tail = exp<T>(z < zero ? z : -z);
            for (int k = 0; k < Vec<T>::W; ++k) tail[k] = log1p_of(tail[k]);
            return (z < zero ? zero : z) + tail;
        }
        case kElu:
            return z > zero ? z : exp_minus_one<T>(z);
        default:
            return z;
    }
}

// Derivative of an activation, from its value.
template <class T>
INLINE V<T> slope(int activation, V<T> y) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    switch (activation) {
        case kSigmoid:
            return y * (one - y);
        case kTanh:
            return one - y * y;
        case kRelu:
            return y > zero ? one : zero;
        case kHardSigmoid:
            return (y > zero) & (y < one) ? splat(T(1) / T(6)) : zero;
        case kSoftsign: {
            V<T> rest = one - (y < zero ? -y : y);
            return rest * rest;
        }
        case kSoftplus:
            return -exp_minus_one<T>(-y);
        case kElu:
            return y > zero ? one : y + one;
        default:
            return one;
    }
}

// The usual activations are constants in a copy of each routine, so their switch costs nothing there.
template <bool Usual>
INLINE int choose(int activation, int usual) {
    return Usual ? usual : activation;
}

// sums[b][r][v] += a[r][k] · panel_b[k][v] for k < n: the one loop that all of this is about.
template <class T, int R, int N>
INLINE void accumulate(V<T> (&sums)[N][R][4], const T* const (&a)[R], const T* panel, int64_t panel_stride, int64_t n) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; ++k) {
        const T* p = panel + k * 4 * W;
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r][k]); });
        unroll<N>([&](auto b) INLINED {
            unroll<4>([&](auto v) INLINED {
                V<T> w = load(p + b * panel_stride + v * W);
                unroll<R>([&](auto r) INLINED { sums[b][r][v] = fma(s[r], w, sums[b][r][v]); });
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

}  // namespace
}  // namespace cellstack
