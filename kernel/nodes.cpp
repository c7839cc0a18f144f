// The nodes of nodes.h, in the instruction set in use.
#include "nodes.h"

#include <algorithm>

#include "runner.h"

namespace cellstack {
namespace {

// Rows of x through one of the layers, which takes a part of each row; `x_width` and `y_width` are those of whole rows.
template <class T>
void run_part(const Weights<T>& layer, const T* x, T* y, int64_t x_width, int64_t y_width, int64_t rows) {
    const int64_t chunk = chunk_steps(1, rows);
    const Scratch<T> scratch(typename Runner<T>::Sizes(layer, 1, chunk, false, false).sum(1));
    Parts<T> parts(scratch.get());
    Runner<T> runner;
    runner.open(layer, 1, chunk, 1, false, false, parts);
    runner.f.x = x, runner.f.x_time = x_width, runner.f.y = y, runner.f.y_time = y_width, runner.f.steps = rows;
    for (int64_t n = 0; n < rows; n += chunk) runner.steps(n, std::min(rows, n + chunk));
}

}  // namespace

template <class T>
void normalise(const Norm<T>& norm) {
    const FlushDenormals flush;
    leaf_of<T>(current()).norm(norm);
}

template <class T>
void convolve(const Convolution<T>& convolution) {
    const FlushDenormals flush;
    leaf_of<T>(current()).convolve(convolution);
}

template <class T>
void multiply_groups(const Weights<T>* const* layers, int64_t count, const T* x, T* y, int64_t rows, int threads) {
    const Description& d = layers[0]->description();
    const int64_t x_width = count * d.input, y_width = count * d.output;
    threads = useful_threads(threads, rows * count * multiplications(d));
    if (count == 1 && threads > 1) {  // also divides the columns
        Layer<T> layer{};
        layer.weights = layers[0], layer.y = y;
        return forward<T>({1, rows, x, 0, x_width, nullptr, nullptr, false}, {layer}, threads);
    }
    threads = int(std::min<int64_t>(threads, ceil_div(rows, kProductRows)));
    parallel(threads, [&](int thread) {
        const FlushDenormals flush;
        const int64_t first = rows * thread / threads, some = rows * (thread + 1) / threads - first;
        for (int64_t part = 0; part < count; ++part)
            run_part(*layers[part], x + first * x_width + part * d.input, y + first * y_width + part * d.output,
                     x_width, y_width, some);
    });
}

template void normalise(const Norm<float>&);
template void normalise(const Norm<double>&);
template void convolve(const Convolution<float>&);
template void convolve(const Convolution<double>&);
template void multiply_groups(const Weights<float>* const*, int64_t, const float*, float*, int64_t, int);
template void multiply_groups(const Weights<double>* const*, int64_t, const double*, double*, int64_t, int);

}  // namespace cellstack
