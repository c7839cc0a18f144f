// Norms and convolutions of each feature, for one instruction set.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

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
            store_lanes(y + k, every_activation<T>(c.activation, z), lanes);
        });
    }
}

}  // namespace
}  // namespace cellstack
