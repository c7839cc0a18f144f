// Streams and stacks from Python: calls with little overhead, from NumPy array to NumPy array.
#pragma once
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "bind_calls.h"

namespace {

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

// Reserves a stream for one call: a second thread would read a state that is being written.
class InUse {
  public:
    explicit InUse(std::atomic_flag& busy) : busy_(busy) {
        if (busy_.test_and_set(std::memory_order_acquire))
            throw std::runtime_error(
                "Stream: only one thread at a time can use a stream, and another call is running: "
                "fork() makes a stream for each thread");
    }
    ~InUse() { busy_.clear(std::memory_order_release); }
    InUse(const InUse&) = delete;

  private:
    std::atomic_flag& busy_;
};

// A stream that keeps the Python objects of its weights alive.
template <class T>
class BoundStream {
  public:
    BoundStream(const nb::list& weights, int64_t batch, int threads)
        : kept_(nb::tuple(weights)), stream_(pointers(weights), batch, threads) {}

    nb::object step(nb::handle x) { return advance<2>(x); }
    nb::object run(nb::handle x) { return advance<3>(x); }
    void reset() {
        const InUse in_use(busy_);
        stream_.reset();
    }
    void keep() {
        const InUse in_use(busy_);
        stream_.keep();
    }
    void undo() {
        const InUse in_use(busy_);
        stream_.undo();
    }
    nb::list get_state() {
        const InUse in_use(busy_);
        nb::list states;
        for (size_t l = 0; l < stream_.weights().size(); ++l) {
            const Description& d = description(l);
            nb::list arrays;
            T* to[kStates] = {};
            for (int s = 0; s < d.kind->states; ++s) {
                Array<T> state = new_array<T>({size_t(stream_.batch()), size_t(d.width(s))});
                to[s] = state.data();
                arrays.append(state);
            }
            stream_.get_state(int(l), to);
            states.append(nb::tuple(arrays));
        }
        return states;
    }
    using State = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    void set_state(size_t layer, const std::vector<State>& states) {
        if (layer >= stream_.weights().size())
            throw nb::index_error(("Stream: there is no layer " + std::to_string(layer)).c_str());
        const Description& d = description(layer);
        const T* from[kStates] = {};
        bool fits = d.keeps_state() && int(states.size()) == d.kind->states;
        for (int s = 0; fits && s < d.kind->states; ++s) {
            from[s] = states[s].data();
            fits = int64_t(states[s].shape(0)) == stream_.batch() && int64_t(states[s].shape(1)) == d.width(s);
        }
        if (!fits) throw nb::value_error("Stream: the state has the wrong shape");
        const InUse in_use(busy_);
        stream_.set_state(int(layer), from);
    }

  private:
    static std::vector<const Weights<T>*> pointers(const nb::list& weights) {
        std::vector<const Weights<T>*> all;
        for (nb::handle w : weights) all.push_back(nb::cast<const Weights<T>*>(w));
        if (all.empty()) throw nb::value_error("Stream: expected at least one layer");
        return all;
    }
    // NumPy's C API, not nanobind's arrays: two arrays through DLPack cost more than a step of a small cell.
    template <int Dims>
    nb::object advance(nb::handle given) {
        const Description &first = description(0), &last = description(stream_.weights().size() - 1);
        auto* x = reinterpret_cast<PyArrayObject*>(given.ptr());
        constexpr int type = sizeof(T) == 8 ? NPY_DOUBLE : NPY_FLOAT;
        if (!PyArray_CheckExact(given.ptr()) || PyArray_NDIM(x) != Dims || PyArray_TYPE(x) != type ||
            !PyArray_ISCARRAY_RO(x) || PyArray_DIM(x, 0) != stream_.batch() ||
            PyArray_DIM(x, Dims - 1) != first.x_width())
            return nb::none();
        npy_intp shape[Dims] = {PyArray_DIM(x, 0), PyArray_DIM(x, 1)};
        shape[Dims - 1] = last.output;
        nb::object y = nb::steal(PyArray_SimpleNew(Dims, shape, type));
        if (!y.is_valid()) nb::raise_python_error();
        auto* to = static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(y.ptr())));
        const InUse in_use(busy_);
        nb::gil_scoped_release released;
        stream_.run(static_cast<const T*>(PyArray_DATA(x)), to, Dims == 2 ? 1 : int64_t(shape[1]));
        return y;
    }
    const Description& description(size_t layer) const { return stream_.weights()[layer]->description(); }
    nb::tuple kept_;
    Stream<T> stream_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

// Layers over whole sequences, from their cells' initial states. The layers after the first `timed` have no state and
// only process the last h. It computes a network of cells and dense layers in one call with little overhead.
template <class T>
class BoundStack {
  public:
    BoundStack(const nb::list& weights, size_t timed, bool last)
        : kept_(nb::tuple(weights)), timed_(timed), last_(last) {
        for (nb::handle w : weights) weights_.push_back(nb::cast<const Weights<T>*>(w));
        if (!timed || timed > weights_.size() || (timed < weights_.size() && !last))
            throw nb::value_error(
                "Stack: expected at least one layer over time, and last=True if layers follow that process the last h");
        if (last && !weights_[timed - 1]->description().keeps_state())
            throw nb::value_error("Stack: the layer whose last h is used must be a cell");
    }

    // Returns y [B, T, P] for x [B, T, I], or [B, P] for the last step; None if x isn't an array that the kernel
    // accepts.
    nb::object run(nb::handle given, int threads) const {
        auto* x = reinterpret_cast<PyArrayObject*>(given.ptr());
        constexpr int type = sizeof(T) == 8 ? NPY_DOUBLE : NPY_FLOAT;
        if (!PyArray_CheckExact(given.ptr()) || PyArray_NDIM(x) != 3 || PyArray_TYPE(x) != type ||
            !PyArray_ISCARRAY_RO(x) || PyArray_DIM(x, 2) != weights_[0]->description().x_width() || !PyArray_SIZE(x))
            return nb::none();
        const npy_intp batch = PyArray_DIM(x, 0), steps = PyArray_DIM(x, 1), width = PyArray_DIM(x, 2);
        npy_intp shape[3] = {batch, steps, npy_intp(weights_.back()->description().output)};
        if (last_) shape[1] = shape[2];
        nb::object y = nb::steal(PyArray_SimpleNew(last_ ? 2 : 3, shape, type));
        if (!y.is_valid()) nb::raise_python_error();
        auto* to = static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(y.ptr())));
        const auto* from = static_cast<const T*>(PyArray_DATA(x));
        nb::gil_scoped_release released;
        const int64_t h = weights_[timed_ - 1]->description().output;
        const bool head = timed_ < weights_.size();
        std::vector<T> between(head ? size_t(batch * h) : 0);
        std::vector<Layer<T>> layers = layers_of(0, timed_);
        (last_ ? layers.back().after[0] : layers.back().y) = head ? between.data() : to;
        forward<T>({batch, steps, from, steps * width, width, nullptr, nullptr, false}, layers, threads);
        if (!head) return y;
        layers = layers_of(timed_, weights_.size());
        layers.back().y = to;
        forward<T>({batch, 1, between.data(), h, h, nullptr, nullptr, false}, layers, threads);
        return y;
    }

  private:
    std::vector<Layer<T>> layers_of(size_t first, size_t end) const {
        std::vector<Layer<T>> layers(end - first, Layer<T>{});
        for (size_t l = first; l < end; ++l) layers[l - first].weights = weights_[l];
        return layers;
    }
    nb::tuple kept_;
    std::vector<const Weights<T>*> weights_;
    size_t timed_;
    bool last_;
};

template <class T>
void bind_stream(nb::module_& m, const char* stream, const char* stack) {
    nb::class_<BoundStack<T>>(m, stack).def(
        "run", &BoundStack<T>::run, "x"_a.none(), "threads"_a,
        "y [B, T, P] of x [B, T, I], or [B, P] of the last step; None where x isn't an array as the kernel takes "
        "it, contiguous and not empty.");
    nb::class_<BoundStream<T>>(m, stream)
        .def("step", &BoundStream<T>::step, "x"_a.none(),
             "y [B, P] of x [B, I]; None where x isn't an array as the kernel takes it.")
        .def("run", &BoundStream<T>::run, "x"_a.none(), "y [B, T, P] of x [B, T, I], likewise.")
        .def("reset", &BoundStream<T>::reset)
        .def("keep", &BoundStream<T>::keep, "Keep the state as it is now.")
        .def("undo", &BoundStream<T>::undo, "Go back to what was kept.")
        .def("get_state", &BoundStream<T>::get_state)
        .def("set_state", &BoundStream<T>::set_state, "layer"_a, "states"_a.noconvert());
}

void bind_streams(nb::module_& m) {
    bind_stream<float>(m, "StreamSingle", "StackSingle");
    bind_stream<double>(m, "StreamDouble", "StackDouble");
    m.def(
        "stream",
        [](const nb::list& weights, int64_t batch, int threads) -> nb::object {
            if (weights.size() && nb::isinstance<Weights<double>>(weights[0]))
                return nb::cast(new BoundStream<double>(weights, batch, threads), nb::rv_policy::take_ownership);
            return nb::cast(new BoundStream<float>(weights, batch, threads), nb::rv_policy::take_ownership);
        },
        "weights"_a, "batch"_a, "threads"_a = 1);
    m.def(
        "stack",
        [](const nb::list& weights, size_t timed, bool last) -> nb::object {
            if (weights.size() && nb::isinstance<Weights<double>>(weights[0]))
                return nb::cast(new BoundStack<double>(weights, timed, last), nb::rv_policy::take_ownership);
            return nb::cast(new BoundStack<float>(weights, timed, last), nb::rv_policy::take_ownership);
        },
        "weights"_a, "timed"_a, "last"_a);
}

}  // namespace
