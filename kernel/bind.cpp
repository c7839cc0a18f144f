// The kernel for Python. Addresses are plain integers: a DLPack exchange costs more than a step. Shapes and dtypes are
// checked in Python, before anything here is called; see cell.h for what each pointer means.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cell.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace cellstack;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A layer of lstm_forward: the weights, then eight addresses.
template <class T>
Layer<T> layer_of(const nb::tuple& t) {
    if (t.size() != 9) throw nb::value_error("lstm_forward: a layer is a tuple of nine");
    const auto address = [&](int k) { return nb::cast<uintptr_t>(t[k]); };
    return {nb::cast<const Packed<T>*>(t[0]),
            at<T>(address(1)),
            at<T>(address(2)),
            at<T>(address(3)),
            at<T>(address(4)),
            at<T>(address(5)),
            at<T>(address(6)),
            at<T>(address(7)),
            at<T>(address(8))};
}

template <class T>
void forward(int64_t batch, int64_t steps, const nb::list& layers, uintptr_t x, int64_t stride_batch,
             int64_t stride_time, uintptr_t mask, bool reverse, int threads) {
    std::vector<Layer<T>> all;
    for (nb::handle layer : layers) all.push_back(layer_of<T>(nb::cast<nb::tuple>(layer)));
    nb::gil_scoped_release released;
    lstm_forward<T>({batch, steps, at<T>(x), stride_batch, stride_time, at<uint8_t>(mask), reverse}, all, threads);
}

template <class T>
void backward(int64_t batch, int64_t steps, int64_t input, int64_t units, uintptr_t kernel, uintptr_t recurrent_kernel,
              uintptr_t x, int64_t stride_batch, int64_t stride_time, uintptr_t h0, uintptr_t c0, uintptr_t y,
              uintptr_t gates, uintptr_t cells, uintptr_t recurrent_dropout, uintptr_t mask, uintptr_t dy,
              uintptr_t dhn, uintptr_t dcn, uintptr_t dgates, uintptr_t dcells, uintptr_t dx, uintptr_t dh0,
              uintptr_t dc0, uintptr_t dkernel, uintptr_t drecurrent_kernel, uintptr_t dbias, int activation,
              int recurrent_activation, bool reverse, int threads) {
    nb::gil_scoped_release released;
    lstm_backward<T>({batch, steps, at<T>(x), stride_batch, stride_time, at<uint8_t>(mask), reverse},
                     {input, units, at<T>(kernel), at<T>(recurrent_kernel), at<T>(h0), at<T>(c0), at<T>(y),
                      at<T>(gates), at<T>(cells), at<T>(recurrent_dropout), activation, recurrent_activation},
                     {at<T>(dy), at<T>(dhn), at<T>(dcn), at<T>(dgates), at<T>(dcells), at<T>(dx), at<T>(dh0),
                      at<T>(dc0), at<T>(dkernel), at<T>(drecurrent_kernel), at<T>(dbias)},
                     threads);
}

template <class T>
using Array = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu>;

template <class T>
Array<T> new_array(std::initializer_list<size_t> shape) {
    size_t count = 1;
    for (size_t n : shape) count *= n;
    T* data = new T[count];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Array<T>(data, shape, owner);
}

// Holds a stream for one call: its state is being written, and a second thread would find it half done.
class InUse {
  public:
    explicit InUse(std::atomic_flag& busy) : busy_(busy) {
        if (busy_.test_and_set(std::memory_order_acquire))
            throw std::runtime_error(
                "Stream: expected one thread at a time, got a call while another one runs: fork()");
    }
    ~InUse() { busy_.clear(std::memory_order_release); }
    InUse(const InUse&) = delete;

  private:
    std::atomic_flag& busy_;
};

// A stream with the Python objects of its weights, which it keeps alive.
template <class T>
class BoundStream {
  public:
    BoundStream(const nb::list& weights, int64_t batch) : kept_(weights), stream_(pointers(weights), batch) {}

    void step(const nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>& x,
              const nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>& y) {
        check(x.shape(0), x.shape(1), y.shape(0), y.shape(1));
        const InUse in_use(busy_);
        nb::gil_scoped_release released;
        stream_.run(x.data(), y.data(), 1);
    }
    void run(const nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>& x,
             const nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>& y) {
        check(x.shape(0), x.shape(2), y.shape(0), y.shape(2));
        if (x.shape(1) != y.shape(1)) throw nb::value_error("Stream: x and y differ in their steps");
        const InUse in_use(busy_);
        nb::gil_scoped_release released;
        stream_.run(x.data(), y.data(), int64_t(x.shape(1)));
    }
    nb::list get_state() {
        const InUse in_use(busy_);
        nb::list states;
        for (size_t l = 0; l < stream_.weights().size(); ++l) {
            const size_t shape[2] = {size_t(stream_.batch()), size_t(stream_.weights()[l]->units())};
            Array<T> h = new_array<T>({shape[0], shape[1]}), c = new_array<T>({shape[0], shape[1]});
            stream_.get_state(int(l), h.data(), c.data());
            states.append(nb::make_tuple(h, c));
        }
        return states;
    }
    void set_state(size_t layer, const nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>& h,
                   const nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>& c) {
        if (layer >= stream_.weights().size()) throw nb::index_error("Stream: no such layer");
        for (const auto* array : {&h, &c})
            if (int64_t(array->shape(0)) != stream_.batch() ||
                int64_t(array->shape(1)) != stream_.weights()[layer]->units())
                throw nb::value_error("Stream: a state has the wrong shape");
        const InUse in_use(busy_);
        stream_.set_state(int(layer), h.data(), c.data());
    }

  private:
    static std::vector<const Packed<T>*> pointers(const nb::list& weights) {
        std::vector<const Packed<T>*> all;
        for (nb::handle w : weights) all.push_back(nb::cast<const Packed<T>*>(w));
        if (all.empty()) throw nb::value_error("Stream: no layers");
        return all;
    }
    void check(size_t x_batch, size_t x_width, size_t y_batch, size_t y_width) const {
        const auto& w = stream_.weights();
        if (int64_t(x_batch) != stream_.batch() || int64_t(y_batch) != stream_.batch() ||
            int64_t(x_width) != w.front()->input() || int64_t(y_width) != w.back()->units())
            throw nb::value_error("Stream: x or y has the wrong shape");
    }
    nb::list kept_;
    Stream<T> stream_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

template <class T>
void bind(nb::module_& m, const char* packed, const char* stream) {
    nb::class_<Packed<T>>(m, packed)
        .def_prop_ro("input_size", &Packed<T>::input)
        .def_prop_ro("units", &Packed<T>::units)
        .def_prop_ro("double", [](const Packed<T>&) { return sizeof(T) == 8; });
    nb::class_<BoundStream<T>>(m, stream)
        .def("step", &BoundStream<T>::step, "x"_a.noconvert(), "y"_a.noconvert())
        .def("run", &BoundStream<T>::run, "x"_a.noconvert(), "y"_a.noconvert())
        .def("get_state", &BoundStream<T>::get_state)
        .def("set_state", &BoundStream<T>::set_state, "layer"_a, "h"_a.noconvert(), "c"_a.noconvert());
}

bool is_double(const nb::handle& packed) { return nb::isinstance<Packed<double>>(packed); }

}  // namespace

NB_MODULE(_kernel, m) {
    nb::set_leak_warnings(false);  // weights that a module of the user's still holds at exit are no leak
    m.doc() = "The kernel: LSTM steps and sequences on the CPU. Addresses are integers; nothing checks shapes here.";
    if (const char* asked = std::getenv("CELLSTACK_ISA"); asked && !set_instruction_set(asked)) {
        std::string message = std::string("CELLSTACK_ISA: expected one of this machine's instruction sets (");
        for (const char* name : instruction_sets()) message += std::string(name) + ", ";
        message.resize(message.size() - 2);
        throw nb::import_error((message + "), got '" + asked + "'").c_str());
    }
    bind<float>(m, "PackedSingle", "StreamSingle");
    bind<double>(m, "PackedDouble", "StreamDouble");

    m.def(
        "isas",
        [] {
            nb::list names;
            for (const char* name : instruction_sets()) names.append(name);
            return names;
        },
        "Instruction sets that this machine runs, best first.");
    m.def("isa", &instruction_set, "The instruction set in use.");
    m.def(
        "set_isa",
        [](const char* name) {
            if (!set_instruction_set(name)) throw nb::value_error("set_isa: this machine has no such instruction set");
        },
        "name"_a, "Use another instruction set for weights packed from now on.");

    m.def(
        "Packed",
        [](bool twice, int64_t input, int64_t units, uintptr_t kernel, uintptr_t recurrent_kernel, uintptr_t bias,
           int activation, int recurrent_activation, bool copy) -> nb::object {
            if (twice)
                return nb::cast(new Packed<double>(input, units, at<double>(kernel), at<double>(recurrent_kernel),
                                                   at<double>(bias), activation, recurrent_activation, copy),
                                nb::rv_policy::take_ownership);
            return nb::cast(new Packed<float>(input, units, at<float>(kernel), at<float>(recurrent_kernel),
                                              at<float>(bias), activation, recurrent_activation, copy),
                            nb::rv_policy::take_ownership);
        },
        "double"_a, "input_size"_a, "units"_a, "kernel"_a, "recurrent_kernel"_a, "bias"_a, "activation"_a,
        "recurrent_activation"_a, "copy"_a = true);
    m.def(
        "Stream",
        [](const nb::list& packed, int64_t batch) -> nb::object {
            if (packed.size() && is_double(packed[0]))
                return nb::cast(new BoundStream<double>(packed, batch), nb::rv_policy::take_ownership);
            return nb::cast(new BoundStream<float>(packed, batch), nb::rv_policy::take_ownership);
        },
        "packed_list"_a, "batch"_a);
    m.def(
        "lstm_forward",
        [](int64_t batch, int64_t steps, const nb::list& layers, uintptr_t x, int64_t stride_batch, int64_t stride_time,
           uintptr_t mask, bool reverse, int threads) {
            if (!layers.size()) throw nb::value_error("lstm_forward: no layers");
            const bool twice = is_double(nb::cast<nb::tuple>(layers[0])[0]);
            (twice ? forward<double> : forward<float>)(batch, steps, layers, x, stride_batch, stride_time, mask,
                                                       reverse, threads);
        },
        "batch"_a, "steps"_a, "layers"_a, "x"_a, "x_stride_b"_a, "x_stride_t"_a, "mask"_a, "reverse"_a, "threads"_a);
    m.def(
        "lstm_backward",
        [](bool twice, int64_t batch, int64_t steps, int64_t input, int64_t units, uintptr_t kernel,
           uintptr_t recurrent_kernel, uintptr_t x, int64_t stride_batch, int64_t stride_time, uintptr_t h0,
           uintptr_t c0, uintptr_t y, uintptr_t gates, uintptr_t cells, uintptr_t recurrent_dropout, uintptr_t mask,
           uintptr_t dy, uintptr_t dhn, uintptr_t dcn, uintptr_t dgates, uintptr_t dcells, uintptr_t dx, uintptr_t dh0,
           uintptr_t dc0, uintptr_t dkernel, uintptr_t drecurrent_kernel, uintptr_t dbias, int activation,
           int recurrent_activation, bool reverse, int threads) {
            (twice ? backward<double> : backward<float>)(batch, steps, input, units, kernel, recurrent_kernel, x,
                                                         stride_batch, stride_time, h0, c0, y, gates, cells,
                                                         recurrent_dropout, mask, dy, dhn, dcn, dgates, dcells, dx, dh0,
                                                         dc0, dkernel, drecurrent_kernel, dbias, activation,
                                                         recurrent_activation, reverse, threads);
        },
        "double"_a, "batch"_a, "steps"_a, "input_size"_a, "units"_a, "kernel"_a, "recurrent_kernel"_a, "x"_a,
        "x_stride_b"_a, "x_stride_t"_a, "h0"_a, "c0"_a, "y"_a, "gates"_a, "cells"_a, "recurrent_dropout"_a, "mask"_a,
        "dy"_a, "dhn"_a, "dcn"_a, "dgates"_a, "dcells"_a, "dx"_a, "dh0"_a, "dc0"_a, "dkernel"_a, "drecurrent_kernel"_a,
        "dbias"_a, "activation"_a, "recurrent_activation"_a, "reverse"_a, "threads"_a);
    m.def(
        "activate",
        [](int activation, const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& x,
           const nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& y) {
            activate(activation, x.data(), y.data(), int64_t(std::min(x.size(), y.size())));
        },
        "activation"_a, "x"_a.noconvert(), "y"_a.noconvert(), "One activation over an array, for tests.");
    m.def(
        "activate",
        [](int activation, const nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>& x,
           const nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>& y) {
            activate(activation, x.data(), y.data(), int64_t(std::min(x.size(), y.size())));
        },
        "activation"_a, "x"_a.noconvert(), "y"_a.noconvert());
}
