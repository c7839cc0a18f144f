// Vectors of one instruction set, as wide as the compiler flags of this translation unit allow, for float and double.
//
// Only what the kernel needs. The compiler's vector extension provides arithmetic and comparison; intrinsics provide
// the rest: fused multiply-add, broadcasts, minimum and maximum that keep NaN, the partial last block.
#pragma once
#include "platform.h"

namespace cellstack {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int W = kVectorBytes / 4;
    typedef int32_t Lane;
    typedef float V __attribute__((vector_size(kVectorBytes)));
    typedef int32_t I __attribute__((vector_size(kVectorBytes)));
    typedef float U __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Vec<double> {
    static constexpr int W = kVectorBytes / 8;
    typedef int64_t Lane;
    typedef double V __attribute__((vector_size(kVectorBytes)));
    typedef int64_t I __attribute__((vector_size(kVectorBytes)));
    typedef double U __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
using V = typename Vec<T>::V;

template <class T>
INLINE V<T> load(const T* p) {
#if defined(__aarch64__)  // there GCC 14 fails to pass a value of type U to a function
    V<T> v;
    memcpy(&v, p, sizeof v);
    return v;
#else
    return *reinterpret_cast<const typename Vec<T>::U*>(p);
#endif
}
template <class T>
INLINE void store(T* p, V<T> v) {
    *reinterpret_cast<typename Vec<T>::U*>(p) = v;
}

#if defined(__AVX512F__)
INLINE V<float> splat(float x) { return (V<float>)_mm512_set1_ps(x); }
INLINE V<double> splat(double x) { return (V<double>)_mm512_set1_pd(x); }
INLINE V<float> fma(V<float> a, V<float> b, V<float> c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V<double> fma(V<double> a, V<double> b, V<double> c) { return _mm512_fmadd_pd(a, b, c); }
// The smaller one of |x| and hi; for NaN, either of them.
INLINE V<float> magnitude_at_most(V<float> x, float hi) { return _mm512_range_ps(x, splat(hi), 0b1010); }
INLINE V<float> one_signed_as(V<float> x) { return _mm512_or_ps(_mm512_and_ps(x, splat(-0.0f)), splat(1.0f)); }
// min and max return their second operand if one is NaN, so a NaN in x passes through a clamp
INLINE V<float> clamp(V<float> x, float lo, float hi) { return _mm512_max_ps(splat(lo), _mm512_min_ps(splat(hi), x)); }
INLINE V<double> clamp(V<double> x, double lo, double hi) {
    return _mm512_max_pd(splat(lo), _mm512_min_pd(splat(hi), x));
}
INLINE V<float> load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
INLINE V<double> load_n(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
INLINE void store_n(float* p, V<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
INLINE void store_n(double* p, V<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
#else
#if defined(__AVX2__)
INLINE V<float> splat(float x) { return (V<float>)_mm256_set1_ps(x); }
INLINE V<double> splat(double x) { return (V<double>)_mm256_set1_pd(x); }
INLINE V<float> fma(V<float> a, V<float> b, V<float> c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V<double> fma(V<double> a, V<double> b, V<double> c) { return _mm256_fmadd_pd(a, b, c); }
INLINE V<float> magnitude_at_most(V<float> x, float hi) {
    return _mm256_min_ps(splat(hi), _mm256_andnot_ps(splat(-0.0f), x));
}
INLINE V<float> clamp(V<float> x, float lo, float hi) { return _mm256_max_ps(splat(lo), _mm256_min_ps(splat(hi), x)); }
INLINE V<double> clamp(V<double> x, double lo, double hi) {
    return _mm256_max_pd(splat(lo), _mm256_min_pd(splat(hi), x));
}
#else
INLINE V<float> splat(float x) { return V<float>{x, x, x, x}; }
INLINE V<double> splat(double x) { return V<double>{x, x}; }
#if defined(__aarch64__)
INLINE V<float> fma(V<float> a, V<float> b, V<float> c) { return vfmaq_f32(c, a, b); }
INLINE V<double> fma(V<double> a, V<double> b, V<double> c) { return vfmaq_f64(c, a, b); }
#else
template <class X>
INLINE X fma(X a, X b, X c) {
    return a * b + c;
}
#endif
INLINE V<float> magnitude_at_most(V<float> x, float hi) {
    const V<float> m = (V<float>)((Vec<float>::I)x & INT32_MAX), h = splat(hi);
    return m > h ? h : m;
}
template <class X, class T>
INLINE X clamp(X x, T lo, T hi) {
    const X l = splat(lo), h = splat(hi);
    x = x > h ? h : x;
    return x < l ? l : x;
}
#endif
INLINE V<float> one_signed_as(V<float> x) {
    return (V<float>)(((Vec<float>::I)x & INT32_MIN) | (Vec<float>::I)splat(1.0f));
}
template <class T>
INLINE V<T> load_n(const T* p, int n) {
    V<T> v{};
    memcpy(&v, p, size_t(n) * sizeof(T));
    return v;
}
template <class T, class X>
INLINE void store_n(T* p, X v, int n) {
    memcpy(p, &v, size_t(n) * sizeof(T));
}
#endif

// The first n lanes; n = W except in a layer's last block.
template <class T>
INLINE V<T> load_lanes(const T* p, int n) {
    return n == Vec<T>::W ? load(p) : load_n(p, n);
}
// The first n lanes of a vector, and zeros.
template <class T>
struct Indices {
    alignas(kVectorBytes) typename Vec<T>::Lane at[Vec<T>::W];
    constexpr Indices() : at() {
        for (int l = 0; l < Vec<T>::W; ++l) at[l] = l;
    }
};
template <class T>
INLINE V<T> first_lanes(V<T> v, int n) {
    static constexpr Indices<T> indices;
    typename Vec<T>::I lanes;
    memcpy(&lanes, indices.at, sizeof lanes);
    return (V<T>)((typename Vec<T>::I)v & (lanes < n));
}
template <class T>
INLINE void store_lanes(T* p, V<T> v, int n) {
    if (n == Vec<T>::W)
        store(p, v);
    else
        store_n(p, v, n);
}

// ── weights with fewer bits, for float only ──────────────────────────────────────────────────────────────────────────
typedef Vec<float>::I Words;  // 32 bits per lane: two bfloat16 or four int8, of adjacent k
typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));  // the same bits, for sums that may wrap around
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));  // one per lane

INLINE Words load_words(const uint32_t* p) {
    Words v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_words(uint32_t* p, Words v) { memcpy(p, &v, sizeof v); }
INLINE Words splat(int32_t x) { return Words{} + x; }

// sums + Σ a[j]·w[j] over the four bytes of a lane; those of a are unsigned.
INLINE Words add_dot(Words sums, Words a, Words w) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)w);
#else
    for (int shift = 24; shift >= 0; shift -= 8) sums += ((a >> (24 - shift)) & 255) * ((w << shift) >> 24);
    return sums;
#endif
}

INLINE V<float> lower_float(Words w) { return (V<float>)(w << 16); }
INLINE V<float> upper_float(Words w) { return (V<float>)(w & int32_t(0xffff0000)); }

#if defined(__AVX512BF16__)
// sums + a[0]·w[0] + a[1]·w[1] over the two bfloat16 of a lane, upper 16 bits first; the bits are those of two fused
// multiply-adds of the numbers as floats, with denormals as zeros.
INLINE V<float> add_pairs(V<float> a, V<float> w, V<float> sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)w);
}
// Pairs of adjacent numbers in x, and pairs of the numbers that a and b have in the same lane.
INLINE __m256i bfloat16_of(V<float> x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m256i pairs_of(V<float> x) { return _mm256_rol_epi32(bfloat16_of(x), 16); }
INLINE V<float> pairs_of(V<float> a, V<float> b) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16_of(a)), 16);
    return (V<float>)_mm512_or_si512(upper, _mm512_cvtepu16_epi32(bfloat16_of(b)));
}
#endif

// Transposes a square matrix of W vectors: for each bit of the index, numbers whose row and lane differ in that bit are
// exchanged. Lane l of choose_lanes is lane l + First of a or, if l has the bit Step, lane l + First - Step of b.
template <class T, int First, int Step>
struct Lanes {
    static constexpr int W = Vec<T>::W;
    alignas(kVectorBytes) typename Vec<T>::Lane from[W];
    constexpr Lanes() : from() {
        for (int l = 0; l < W; ++l) from[l] = l & Step ? W + l - Step + First : l + First;
    }
};
template <class T, int First, int Step>
INLINE V<T> choose_lanes(V<T> a, V<T> b) {
    constexpr Lanes<T, First, Step> lanes;
#if defined(__clang__)
    V<T> chosen{};
    UNROLL
    for (int l = 0; l < lanes.W; ++l)
        chosen[l] = lanes.from[l] < lanes.W ? a[lanes.from[l]] : b[lanes.from[l] - lanes.W];
    return chosen;
#else
    typename Vec<T>::I from;
    memcpy(&from, lanes.from, sizeof from);
    return __builtin_shuffle(a, b, from);
#endif
}
template <class T, int Step = Vec<T>::W / 2>
INLINE void transpose(V<T> (&v)[Vec<T>::W]) {
    UNROLL
    for (int r = 0; r < Vec<T>::W; ++r)
        if (!(r & Step)) {
            const V<T> a = v[r], b = v[r + Step];
            v[r] = choose_lanes<T, 0, Step>(a, b);
            v[r + Step] = choose_lanes<T, Step, Step>(a, b);
        }
    if constexpr (Step > 1) transpose<T, Step / 2>(v);
}

// ── exp, sigmoid, tanh ───────────────────────────────────────────────────────────────────────────────────────────────
// x = n·ln2 + r with |r| <= ln2/2; e^x - 1 = 2^n·(e^r - 1) + (2^n - 1), where e^r - 1 is a polynomial that keeps its
// relative accuracy near 0. Largest errors: tests/kernel/test_kernel.py.

template <class T>
struct Exp;
template <>
struct Exp<float> {
    static constexpr float lo = -87.3f, hi = 88.3f;
    static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f, log2e = 1.44269504088896341f;
    static constexpr float magic = 12582912.0f + 127;  // 1.5·2^23 + bias: adding it rounds to an integer
    static constexpr int mantissa = 23;
    // e^r - 1 = r + r²·p(r) on |r| <= ln2/2, highest power first: a minimax fit of the error relative to e^r, 3.1e-9
    static constexpr float p[5] = {1.3814540e-3f, 8.3687451e-3f, 4.1668391e-2f, 1.6666520e-1f, 4.9999994e-1f};
};
template <>
struct Exp<double> {
    static constexpr double lo = -708.0, hi = 709.0, tanh_limit = 40.0;
    static constexpr double ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723212e-6;
    static constexpr double log2e = 1.44269504088896340736;
    static constexpr double magic = 6755399441055744.0 + 1023;  // 1.5·2^52 + bias
    static constexpr int mantissa = 52;
    // Taylor series: the remainder is below 1e-17 for |r| <= 0.35
    static constexpr double p[12] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                     1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                     1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

// 2^n, given n + bias in the low bits of a number that was rounded by adding `magic`: they are shifted into the
// exponent, and the other bits are shifted out.
template <class T>
INLINE V<T> power_of_two(V<T> shifted) {
    return (V<T>)((typename Vec<T>::I)shifted << Exp<T>::mantissa);
}
template <class T, int N>
INLINE V<T> polynomial(const T (&p)[N], V<T> x) {
    V<T> sum = splat(p[0]);
    UNROLL
    for (int k = 1; k < N; ++k) sum = fma(sum, x, splat(p[k]));
    return sum;
}

// 2^n and e^r - 1 for an x in range, or for -x.
template <class T, int Sign = 1>
INLINE void split_exp(V<T> x, V<T>& power, V<T>& rest) {
    using E = Exp<T>;
    const V<T> shifted = fma(x, splat(Sign * E::log2e), splat(E::magic)), n = shifted - splat(E::magic);
    const V<T> part = fma(n, splat(-E::ln2_hi), Sign < 0 ? -x : x);  // one instruction for either sign
    const V<T> r = fma(n, splat(-E::ln2_lo), part);
    rest = fma(r * r, polynomial(E::p, r), r);
    power = power_of_two<T>(shifted);
}

template <class T>
INLINE V<T> exp_minus_one(V<T> x) {
    V<T> power, rest;
    split_exp<T>(clamp(x, Exp<T>::lo, Exp<T>::hi), power, rest);
    return fma(power, rest, power - splat(T(1)));
}
template <class T>
INLINE V<T> exp(V<T> x) {
    V<T> power, rest;
    split_exp<T>(clamp(x, Exp<T>::lo, Exp<T>::hi), power, rest);
    return fma(power, rest, power);
}
// log(1 + x) for x from 0 to 1, with a small relative error: for floats x + x²·p(x), a minimax fit with the relative
// error 5.1e-9; for doubles 2·atanh(s) with s = x/(2 + x), a series whose remainder is below 1e-17.
INLINE V<float> log_one_plus(V<float> x) {
    constexpr float p[9] = {-3.3184716e-3f, 2.0204580e-2f,  -5.7664432e-2f, 1.0680554e-1f, -1.5355395e-1f,
                            1.9695400e-1f,  -2.4958587e-1f, 3.3330511e-1f,  -4.9999933e-1f};
    return fma(x * x, polynomial(p, x), x);
}
INLINE V<double> log_one_plus(V<double> x) {
    constexpr double p[16] = {2.0 / 33, 2.0 / 31, 2.0 / 29, 2.0 / 27, 2.0 / 25, 2.0 / 23, 2.0 / 21, 2.0 / 19,
                              2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3};
    const V<double> s = x / (splat(2.0) + x), square = s * s;
    return fma(s * square, polynomial(p, square), s + s);
}
template <class T>
INLINE V<T> softplus(V<T> x) {
    const V<T> zero = splat(T(0));
    return (x < zero ? zero : x) + log_one_plus(exp<T>(x < zero ? x : -x));
}
template <class T>
INLINE V<T> log_sigmoid(V<T> x) {
    return -softplus<T>(-x);
}
template <class T>
INLINE V<T> sigmoid(V<T> x) {
    V<T> power, rest;
    split_exp<T, -1>(clamp(x, -Exp<T>::hi, -Exp<T>::lo), power, rest);
    return splat(T(1)) / fma(power, rest, power + splat(T(1)));
}
template <class T>
INLINE V<T> tanh(V<T> x) {
    V<T> power, rest;
    split_exp<T>(clamp(x + x, -Exp<T>::tanh_limit, Exp<T>::tanh_limit), power, rest);
    V<T> e = fma(power, rest, power - splat(T(1)));
    return e / (e + splat(T(2)));
}

// For floats both forms are computed, and each is selected where the rounding of its last operation is most of its
// error:
//     |x| < 0.6:  x + x³·p(x²)              else:  ±(1 - 2/(e^2|x| + 1))
// The first takes little time, as it doesn't wait for the exponential. The relative error of its polynomial is 2.8e-9,
// that of e^2r = 1 + r·q(r) for |r| <= ln2/4 is 2.6e-9. Like those in `Exp`, they are minimax fits by the Remez
// exchange algorithm, computed with 40 digits and rounded.
template <>
INLINE V<float> tanh<float>(V<float> x) {
    using E = Exp<float>;
    constexpr float p[5] = {-5.8951583e-3f, 2.0795971e-2f, -5.3783830e-2f, 1.3331924e-1f, -3.3333299e-1f};
    constexpr float q[6] = {8.9993104e-2f, 2.6812989e-1f, 6.6663635e-1f, 1.3333092f, 2.0000002f, 2.0f};
    const V<float> square = x * x, near = fma(square * x, polynomial(p, square), x);
    const V<float> u = magnitude_at_most(x, 10.0f);  // for |x| > 9.02 the result is ±1
    const V<float> magic = splat(E::magic - 1);      // minus one halves the power
    const V<float> shifted = fma(u, splat(2 * E::log2e), magic);
    const V<float> r = fma(shifted - magic, splat(-0.34657359028f), u);  // ln2/2 as one float: n is small
    const V<float> power = power_of_two<float>(shifted);
    const V<float> half = fma(power * r, polynomial(q, r), power + splat(0.5f));  // (e^2|x| + 1)/2
    const V<float> sign = one_signed_as(x), far = sign - sign / half;
    return square >= splat(0.36f) ? far : near;  // NaN selects `near`
}

}  // namespace
}  // namespace cellstack
