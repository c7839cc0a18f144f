// Norms and convolutions of each feature, for one instruction set; and the activations that only nodes have.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

// The error function: x·P(x²)/Q(x²) up to 4, where it is 1 in float32; a least-squares fit with an error below 4e-7.
INLINE V<float> error_function(V<float> x) {
    constexpr float p[6] = {2.1338163e-6f, 2.8317387e-4f, 3.5431882e-3f, 5.2062345e-2f, 0.18476328f, 1.1283792f};
    constexpr float q[6] = {3.8877312e-5f, 1.115021477e-3f, 1.4517086e-2f, 0.11183173f, 0.49707541f, 1.0f};
    x = clamp(x, -4.0f, 4.0f);
    const V<float> square = x * x;
    return clamp(x * polynomial(p, square) / polynomial(q, square), -1.0f, 1.0f);
}

// An activation of a node.
template <class T>
NOINLINE V<T> node_activation(const Activation& activation, V<T> z) {
    switch (activation.code) {
        case kSilu:
            return z * sigmoid<T>(z);
        case kGeluTanh:  // z·(1 + tanh u)/2 with u = √(2/π)·(z + 0.044715·z³); (1 + tanh u)/2 is σ(2u)
            return z * sigmoid<T>(splat(T(1.5957691216057308)) * fma(splat(T(0.044715)) * z * z, z, z));
        case kGelu:
            if constexpr (sizeof(T) == 4)
                return z * fma(error_function(z * splat(0.70710678f)), splat(0.5f), splat(0.5f));
            return z;  // not in float64, see kNodeActivations
        default:
            return apply<T>(activation, z);
    }
}

// Calls body(column, lanes) for each vector of `count` columns.
template <class T, class F>
INLINE void each_vector(int64_t count, F&& body) {
    constexpr int W = Vec<T>::W;
    int64_t k = 0;
    for (; k + W <= count; k += W) body(k, W);
    if (k < count) body(k, int(count - k));
}

template <class T>
void norm_rows(const Norm<T>& n) {
    const int64_t width = n.groups * n.size;
    for (int64_t part = 0; part < n.rows * n.groups; ++part) {
        const int64_t column = part % n.groups * n.size;
        const T* x = n.x + part / n.groups * width + column;
        T* y = n.y + part / n.groups * width + column;
        V<T> sum = splat(T(0)), squares = splat(T(0));
        if (n.centred) each_vector<T>(n.size, [&](int64_t k, int lanes) INLINED { sum += load_lanes(x + k, lanes); });
        const V<T> mean = splat(total<T>(sum) / T(n.size));
        each_vector<T>(n.size, [&](int64_t k, int lanes) INLINED {
            V<T> d = load_lanes(x + k, lanes) - mean;
            if (lanes < Vec<T>::W) d = first_lanes<T>(d, lanes);
            squares = fma(d, d, squares);
        });
        const T variance = total<T>(squares) / T(n.size);
        const V<T> reciprocal = splat(T(1) / T(__builtin_sqrt(double(variance) + n.epsilon)));
        each_vector<T>(n.size, [&](int64_t k, int lanes) INLINED {
            V<T> z = (load_lanes(x + k, lanes) - mean) * reciprocal;
            if (n.gain) z *= load_lanes(n.gain + column + k, lanes);
            if (n.bias) z += load_lanes(n.bias + column + k, lanes);
            store_lanes(y + k, z, lanes);
        });
    }
}

template <class T>
void convolve_rows(const Convolution<T>& c) {
    for (int64_t step = 0; step < c.batch * c.steps; ++step) {
        const T* x = c.x + step / c.steps * c.x_row + step % c.steps * c.width;
        T* y = c.y + step * c.width;
        each_vector<T>(c.width, [&](int64_t k, int lanes) INLINED {
            V<T> z = c.bias ? load_lanes(c.bias + k, lanes) : splat(T(0));
            for (int64_t tap = 0; tap < c.taps; ++tap)
                z = fma(load_lanes(x + tap * c.dilation * c.width + k, lanes),
                        load_lanes(c.kernel + tap * c.width + k, lanes), z);
            store_lanes(y + k, node_activation<T>(c.activation, z), lanes);
        });
    }
}

}  // namespace
}  // namespace cellstack
