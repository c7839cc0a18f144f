// What nodes without a state compute at each step, apart from products: norms, and convolutions of each feature by
// itself. Products of groups of features are here too, as one call.
#pragma once
#include <cstdint>

#include "description.h"

namespace cellstack {

// y = (x - mean) / √(variance + epsilon)·gain + bias, with the mean and the variance of each group of a row; or, if it
// isn't centred, x / √(mean of x² + epsilon)·gain + bias. Rows are contiguous.
template <class T>
struct Norm {
    int64_t rows, groups, size;  // numbers per group
    const T *x, *gain, *bias;    // gain and bias [groups·size]; null: ones, zeros
    T* y;
    double epsilon;
    bool centred;
};
template <class T>
void normalise(const Norm<T>& norm);

// y[t] = φ(bias + x[t]·kernel[0] + x[t + dilation]·kernel[1] + …), for each feature by itself.
template <class T>
struct Convolution {
    int64_t batch, steps, width;    // of y [batch][steps][width]
    int64_t taps, dilation, x_row;  // x of row b at step t: x + b·x_row + t·width
    const T *x, *kernel, *bias;     // kernel [taps][width], bias [width] or null
    T* y;
    Activation activation;
};
template <class T>
void convolve(const Convolution<T>& convolution);

// `count` equal layers without a state: each takes its part of a row of x, and writes its part of a row of y.
template <class T>
class Weights;
template <class T>
void multiply_groups(const Weights<T>* const* layers, int64_t count, const T* x, T* y, int64_t rows, int threads);

}  // namespace cellstack
