// Weights: packed into the layout of an instruction set, or read in place.
#include <algorithm>

#include "dispatch.h"
#include "runner.h"

namespace cellstack {
namespace {

// The size of a matrix with 16 or 8 bits per weight, in the layout of narrow.h: [blocks][words of all k][gates][W]; for
// int8 the columns' scales follow, and the amounts that the rows' offset of 128 adds to their sums. In floats, or words
// of the same size.
int64_t narrow_size(Element element, int64_t blocks, int64_t rows, int gates, int64_t width) {
    return blocks * gates * width * (narrow_words(rows, bits_of(element)) + (element == Element::kInt8 ? 2 : 0));
}

}  // namespace

Bands bands_of(const Description& d, int64_t wide, int64_t total, int64_t step, Element element) {
    if (!d.kind->recurrent || d.heads == 1) return {d.kind->recurrent ? ceil_div(total, step) : 0, {}};
    const int64_t head = d.units / d.heads, whole = ceil_div(total, step);
    if (head == 1 && !narrow(element)) return {1, {}, true};
    Bands bands{0, {}};
    for (int64_t from = 0; from < d.units; from += wide) {
        const int64_t last = std::min(from + wide, d.units) - 1, end = ceil_div((last / head + 1) * head, step);
        bands.first.push_back(from / head * head / step);
        bands.depth = std::max(bands.depth, end - bands.first.back());
    }
    for (int64_t& first : bands.first) first = std::min(first, whole - bands.depth);
    return bands;
}

// Numbers of a matrix per thread that packs it.
constexpr int64_t kPackedNumbers = int64_t(1) << 16;

template <class T>
Weights<T>::Weights(const Description& d, const Arrays<const T>& arrays, bool copy, Element element, int threads) {
    const Leaf<T>& leaf = narrow(element) ? leaf_of<T>(current()) : leaf_for<T>(d.units);
    const int64_t blocks = ceil_div(d.units, leaf.width), output_blocks = ceil_div(d.output, leaf.width),
                  sum_blocks = ceil_div(d.sum_units(), leaf.width);
    const int64_t columns = d.gates() * d.units, row = blocks * d.gates() * leaf.width,
                  sum_row = sum_blocks * d.sum_gates() * leaf.width;
    // How many numbers a matrix takes.
    const auto size = [&](int64_t rows, int64_t units, int gates, Element held) {
        const int64_t of = ceil_div(units, leaf.width);
        return narrow(held) ? narrow_size(held, of, rows, gates, leaf.width) : rows * of * gates * leaf.width;
    };
    const int64_t step = narrow(element) ? 32 / bits_of(element) : 1;
    Bands bands = bands_of(d, leaf.width, d.output, step, element);
    const int64_t recurrent = bands.depth * step;  // rows of a panel
    const int64_t U = d.backbone_units, layers = d.more_layers();
    const int64_t step_of_layers = Parts<T>::size(size(U, U, 1, element)), step_of_biases = Parts<T>::size(sum_row);
    const int64_t matrices[] = {size(d.multiplied(), d.sum_units(), d.sum_gates(), element),
                                size(recurrent, d.sum_units(), d.sum_gates(), element),
                                sum_row,
                                sum_row,
                                U ? size(U, d.units, d.gates(), element) : 0,
                                U ? row : 0,
                                layers * step_of_layers,
                                layers * step_of_biases,
                                d.projects() ? size(d.units, d.output, 1, element) : 0};
    int64_t count = 0;
    for (int64_t matrix : matrices) count += Parts<T>::size(matrix);
    each_array(arrays, d, [&](const T* array, const Layout& layout) {
        if (array && layout.form == Form::kVectors) count += Parts<T>::size(layout.numbers);
    });
    for (int s = 0; s < d.kind->states; ++s) count += Parts<T>::size(d.width(s));
    impl_.reset(new Impl{&leaf, d, Scratch<T>(copy ? count : 0), std::move(bands), {}});
    Panels<T>& p = impl_->panels;
    p.d = &impl_->d, p.usual = d.usual(), p.flagless = d.plain(), p.blocks = blocks, p.output_blocks = output_blocks,
    p.sum_blocks = sum_blocks, p.unpacked = !copy, p.element = element;
    p.tiles = &leaf.tiles_of(element), p.plain = &leaf.plain, p.band = impl_->bands.band();
    if (copy) p.tail = tail_of(d, leaf.width);
    p.kernel = arrays.kernel, p.recurrent = arrays.recurrent_kernel, p.bias = arrays.bias;
    p.recurrent_bias = d.two_biases() ? arrays.bias + columns : nullptr;
    p.gate_kernel = arrays.gate_kernel, p.gate_bias = arrays.gate_bias;
    p.backbone_kernel = arrays.backbone_kernel, p.backbone_bias = arrays.backbone_bias;
    p.backbone_step = copy ? step_of_layers : U * U, p.backbone_bias_step = copy ? step_of_biases : U;
    p.projection = arrays.projection, p.arrays = arrays;
    if (!copy) return;
    Parts<T> parts(impl_->memory.get());
    // Packs a matrix, in panels of this many rows.
    const auto packed = [&](Matrix<T> from, int64_t rows, Element held) {
        if (from.gates > 1 && !from.band.diagonal) from.tail = p.tail;
        const int64_t numbers = size(rows, from.units, from.gates, held), of = ceil_div(from.units, leaf.width);
        T* to = parts.take(numbers);
        if (!from.at) {
            std::fill_n(to, numbers, T(0));
            return to;
        }
        const int shares = int(std::max<int64_t>(1, std::min<int64_t>({threads, numbers / kPackedNumbers, of})));
        parallel(shares, [&](int k) {
            const int64_t block = of * k / shares, end_block = of * (k + 1) / shares;
            if (!narrow(held)) return leaf.pack(to, from, block, end_block);
            const Scratch<T> panel(rows * from.gates * leaf.width);
            leaf.pack_narrow(to, from, block, end_block, held, panel.get());
        });
        return to;
    };
    const auto bias = [&](const T* from, int64_t units, int gates) {
        return packed(matrix_of(d, from, 1, units, gates), 1, element_of<T>());
    };
    if (d.use_kernel)
        p.kernel = packed(matrix_of(d, p.kernel, d.input, d.sum_units(), d.sum_gates()), d.input, element);
    if (d.kind->recurrent) p.recurrent = packed(recurrent_of(d, p.recurrent, p.band), recurrent, element);
    p.bias = bias(p.bias, d.sum_units(), d.sum_gates());
    if (d.two_biases()) p.recurrent_bias = bias(p.recurrent_bias, d.units, d.gates());
    if (U) {
        p.gate_kernel = packed(matrix_of(d, p.gate_kernel, U, d.units, d.gates()), U, element);
        p.gate_bias = bias(p.gate_bias, d.units, d.gates());
    }
    const auto each_layer = [&](const T*& all, int64_t depth, Element held) {
        const T* from = all;
        for (int64_t k = 0; k < layers; ++k) {
            const T* own = packed(matrix_of(d, from ? from + k * depth * U : from, depth, U, 1), depth, held);
            if (!k) all = own;
        }
    };
    each_layer(p.backbone_kernel, U, element);
    each_layer(p.backbone_bias, 1, element_of<T>());
    if (d.projects()) p.projection = packed(matrix_of(d, p.projection, d.units, d.output, 1), d.units, element);
    each_array(p.arrays, d, [&](const T*& array, const Layout& layout) {
        if (!array || layout.form != Form::kVectors) return;
        T* to = parts.take(layout.numbers);
        std::copy_n(array, layout.numbers, to);
        array = to;
    });
    for (int s = 0; s < d.kind->states; ++s) {
        const T*& initial = p.arrays.initial[s];
        if (!initial) continue;
        T* to = parts.take(d.width(s));
        std::copy_n(initial, d.width(s), to);
        initial = to;
    }
}
template <class T>
Weights<T>::~Weights() = default;
template <class T>
const Description& Weights<T>::description() const {
    return impl_->d;
}
template <class T>
Element Weights<T>::element() const {
    return impl_->panels.element;
}
template <class T>
bool Weights<T>::copied() const {
    return !impl_->panels.unpacked;
}
template <class T>
const Arrays<const T>& Weights<T>::arrays() const {
    return impl_->panels.arrays;
}

template class Weights<float>;
template class Weights<double>;

}  // namespace cellstack
