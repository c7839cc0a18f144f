// Activations and their derivatives. The default ones, tanh and sigmoid, are constants in a specialised copy of each
// routine, where the switch costs nothing.
#pragma once
#include "description.h"
#include "vec.h"

namespace cellstack {
namespace {

template <class T>
INLINE V<T> apply(const Activation& activation, V<T> z) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    const V<T> alpha = splat(T(activation.alpha)), beta = splat(T(activation.beta));
    switch (activation.code) {
        case kSigmoid:
            return sigmoid<T>(z);
        case kTanh:
            return tanh<T>(z);
        case kRelu:
            return z < zero ? zero : z;
        case kHardSigmoid:
            return clamp(fma(z, alpha, beta), T(0), T(1));
        case kSoftsign:
            return z / (one + (z < zero ? -z : z));
        case kSoftplus:
            return softplus<T>(z);
        case kElu:
            return z > zero ? z : alpha * exp_minus_one<T>(z);
        case kAffine:
            return fma(z, alpha, beta);
        case kLeakyRelu:
            return z < zero ? alpha * z : z;
        case kThresholdedRelu:
            return z <= alpha ? zero : z;
        case kScaledTanh:
            return alpha * tanh<T>(beta * z);
        case kPositive:  // continuous, with values above 0
            return z < zero ? sigmoid<T>(z) : z + splat(T(0.5));
        default:
            return z;
    }
}

// The derivative of an activation, as a function of its value.
template <class T>
INLINE V<T> slope(const Activation& activation, V<T> y) {
    const V<T> zero = splat(T(0)), one = splat(T(1));
    const V<T> alpha = splat(T(activation.alpha)), beta = splat(T(activation.beta));
    switch (activation.code) {
        case kSigmoid:
            return y * (one - y);
        case kTanh:
            return one - y * y;
        case kRelu:
            return y > zero ? one : zero;
        case kHardSigmoid:
            return ((y > zero) & (y < one)) ? alpha : zero;
        case kSoftsign: {
            V<T> rest = one - (y < zero ? -y : y);
            return rest * rest;
        }
        case kSoftplus:
            return -exp_minus_one<T>(-y);
        case kElu:
            return y > zero ? one : y + alpha;
        case kAffine:
            return alpha;
        case kLeakyRelu:
            return y > zero ? one : alpha;
        case kThresholdedRelu:
            return y == zero ? zero : one;
        case kScaledTanh:
            return beta * (alpha - y * y / alpha);
        case kPositive:
            return y > splat(T(0.5)) ? one : y * (one - y);
        default:
            return one;
    }
}

constexpr Activation kUsualTanh = {kTanh, 0, 0}, kUsualSigmoid = {kSigmoid, 0, 0};

// For a gate without a default: one copy for all kinds, as the switch has a branch for every activation.
template <class T>
NOINLINE V<T> any_activation(const Activation& activation, V<T> z) {
    return apply<T>(activation, z);
}

// Whether gates with a default have copies of that switch in the forward pass, which saves a call per vector: not in
// float64, which is seldom used where speed matters.
template <class T>
constexpr bool kInlined = sizeof(T) == 4;

// The activation of a gate whose default is tanh (`Tanh`) or sigmoid.
template <class T, bool Usual, bool Tanh>
INLINE V<T> act(const Activation& activation, V<T> z) {
    if constexpr (Usual)
        return apply<T>(Tanh ? kUsualTanh : kUsualSigmoid, z);
    else if constexpr (kInlined<T>)
        return apply<T>(activation, z);
    else
        return any_activation<T>(activation, z);
}

// The values of the activations at the bounds of a clip: at or beyond them the derivative of a gate is 0.
template <class T>
struct Limits {
    bool on;
    V<T> low[kMostGates], high[kMostGates];
    explicit Limits(const Description& d) : on(d.clip < __builtin_inf()) {
        if (!on) return;
        const V<T> end = splat(T(d.clip));
        for (int k = 0; k < kMostGates; ++k) {
            // a thresholded ReLU is 0 in between, so its bounds are those of z
            const Activation a =
                d.activations[k].code == kThresholdedRelu ? Activation{kLinear, 0, 0} : d.activations[k];
            const V<T> first = any_activation<T>(a, -end), second = any_activation<T>(a, end);
            low[k] = first < second ? first : second, high[k] = first < second ? second : first;
        }
    }
};

template <class T>
INLINE V<T> within(const Limits<T>& limits, int gate, V<T> y, V<T> slope) {
    if (!limits.on) return slope;
    return ((y > limits.low[gate]) & (y < limits.high[gate])) ? slope : splat(T(0));
}

// The derivative of any activation.
template <class T>
NOINLINE V<T> slope_of(const Activation& activation, V<T> y) {
    return slope<T>(activation, y);
}

template <class T>
NOINLINE V<T> any_slope(const Description& d, const Limits<T>& limits, int gate, V<T> y) {
    return within(limits, gate, y, slope<T>(d.activations[gate], y));
}

template <class T, bool Plain, bool Usual, bool Tanh>
INLINE V<T> gate_slope(const Description& d, const Limits<T>& limits, int gate, V<T> y) {
    if constexpr (!Usual) return any_slope<T>(d, limits, gate, y);
    const V<T> s = slope<T>(Tanh ? kUsualTanh : kUsualSigmoid, y);
    return Plain ? s : within(limits, gate, y, s);
}

// ── activations whose derivative isn't a function of their value ─────────────────────────────────────────────────────

// The error function: x·P(x²)/Q(x²) up to 4, where it is 1 in float32; a least-squares fit with an error below 4e-7.
INLINE V<float> error_function(V<float> x) {
    constexpr float p[6] = {2.1338163e-6f, 2.8317387e-4f, 3.5431882e-3f, 5.2062345e-2f, 0.18476328f, 1.1283792f};
    constexpr float q[6] = {3.8877312e-5f, 1.115021477e-3f, 1.4517086e-2f, 0.11183173f, 0.49707541f, 1.0f};
    x = clamp(x, -4.0f, 4.0f);
    const V<float> square = x * x;
    return clamp(x * polynomial(p, square) / polynomial(q, square), -1.0f, 1.0f);
}
INLINE V<double> error_function(V<double> x) {
    for (int k = 0; k < Vec<double>::W; ++k) x[k] = __builtin_erf(x[k]);
    return x;
}

// The factor of z in gelu(z), the normal distribution: (1 + erf(z/√2))/2.
template <class T>
INLINE V<T> normal_share(V<T> z) {
    return fma(error_function(z * splat(T(0.70710678118654752))), splat(T(0.5)), splat(T(0.5)));
}

// An activation of a backbone or a layer without a state.
template <class T>
NOINLINE V<T> every_activation(const Activation& activation, V<T> z) {
    switch (activation.code) {
        case kSilu:
            return z * sigmoid<T>(z);
        case kGelu:
            return z * normal_share<T>(z);
        case kGeluTanh:  // z·(1 + tanh u)/2 with u = √(2/π)·(z + 0.044715·z³); (1 + tanh u)/2 is σ(2u)
            return z * sigmoid<T>(splat(T(1.5957691216057308)) * fma(splat(T(0.044715)) * z * z, z, z));
        default:
            return apply<T>(activation, z);
    }
}

// The derivative of kSilu or kGelu, as a function of z.
template <class T>
NOINLINE V<T> slope_at(const Activation& activation, V<T> z) {
    if (activation.code == kSilu) {
        const V<T> s = sigmoid<T>(z);
        return fma(z * s, splat(T(1)) - s, s);
    }
    return fma(z * splat(T(0.39894228040143268)), exp<T>(splat(T(-0.5)) * z * z), normal_share<T>(z));
}

}  // namespace
}  // namespace cellstack
