// Nodes without a state from Python: objects that are made once, with a method `run` from NumPy array to NumPy array.
// It returns None for an array that isn't contiguous, aligned, and of the object's type and width.
#pragma once
#include "bind_calls.h"
#include "nodes.h"

namespace {

// Calls body(x, y, rows) on an array [..., width] of this type and on a new one [..., out], each as `rows` rows. `more`
// is how many steps, on the second last axis, x has more than y.
template <class T, class F>
nb::object rows_to_rows(nb::handle given, int64_t width, int64_t out, F&& body, int64_t more = 0, int least_dims = 1) {
    auto* x = reinterpret_cast<PyArrayObject*>(given.ptr());
    constexpr int type = sizeof(T) == 8 ? NPY_DOUBLE : NPY_FLOAT, most = 8;
    if (!PyArray_CheckExact(given.ptr()) || PyArray_TYPE(x) != type || !PyArray_ISCARRAY_RO(x)) return nb::none();
    const int dims = PyArray_NDIM(x);
    if (dims < least_dims || dims > most || (width && PyArray_DIM(x, dims - 1) != width)) return nb::none();
    npy_intp shape[most];
    int64_t rows = 1;
    for (int k = 0; k < dims; ++k) shape[k] = PyArray_DIM(x, k);
    if (out) shape[dims - 1] = out;
    if (more && (shape[dims - 2] -= more) < 1) return nb::none();
    for (int k = 0; k + 1 < dims; ++k) rows *= shape[k];
    nb::object y = nb::steal(PyArray_SimpleNew(dims, shape, type));
    if (!y.is_valid()) nb::raise_python_error();
    auto* to = static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(y.ptr())));
    const auto* from = static_cast<const T*>(PyArray_DATA(x));
    nb::gil_scoped_release released;
    if (rows) body(from, to, rows, shape);
    return y;
}

template <class T>
class BoundProducts {
  public:
    explicit BoundProducts(const nb::list& weights) : kept_(nb::tuple(weights)) {
        for (nb::handle w : weights) layers_.push_back(nb::cast<const Weights<T>*>(w));
        if (layers_.empty()) throw nb::value_error("Products: expected at least one layer");
    }
    nb::object run(nb::handle x, int threads) const {
        const Description& d = layers_[0]->description();
        const auto count = int64_t(layers_.size());
        return rows_to_rows<T>(x, count * d.input, count * d.output,
                               [&](const T* from, T* to, int64_t rows, npy_intp*) {
                                   multiply_groups<T>(layers_.data(), count, from, to, rows, threads);
                               });
    }

  private:
    nb::tuple kept_;
    std::vector<const Weights<T>*> layers_;
};

struct NormOf {
    int64_t groups;
    bool centred;
    double epsilon;
    Read gain, bias;

    template <class T>
    nb::object run(nb::handle x) const {
        auto* array = reinterpret_cast<PyArrayObject*>(x.ptr());
        const int64_t width = PyArray_NDIM(array) ? PyArray_DIM(array, PyArray_NDIM(array) - 1) : 0;
        if (!width || width % groups) return nb::none();
        return rows_to_rows<T>(x, width, width, [&](const T* from, T* to, int64_t rows, npy_intp*) {
            normalise<T>(
                {rows, groups, width / groups, from, gain.as<const T>(), bias.as<const T>(), to, epsilon, centred});
        });
    }
};

struct ConvolutionOf {
    int64_t taps, width, dilation;
    Read kernel, bias;
    Activation activation;

    template <class T>
    nb::object run(nb::handle x) const {
        const int64_t more = (taps - 1) * dilation;
        return rows_to_rows<T>(
            x, width, width,
            [&](const T* from, T* to, int64_t rows, npy_intp* shape) {
                const int64_t steps = shape[1];
                convolve<T>({rows / steps, steps, width, taps, dilation, (steps + more) * width, from,
                             kernel.as<const T>(), bias.as<const T>(), to, activation});
            },
            more, 3);
    }
};

// The same for either type of number.
template <class Of>
nb::object run_any(const Of& of, nb::handle x) {
    if (!PyArray_CheckExact(x.ptr())) return nb::none();
    const bool twice = PyArray_TYPE(reinterpret_cast<PyArrayObject*>(x.ptr())) == NPY_DOUBLE;
    return twice ? of.template run<double>(x) : of.template run<float>(x);
}

template <class T>
void bind_products(nb::module_& m, const char* name) {
    nb::class_<BoundProducts<T>>(m, name).def("run", &BoundProducts<T>::run, "x"_a.none(), "threads"_a,
                                              "y [..., O] of x [..., I], or None.");
}

void bind_nodes(nb::module_& m) {
    nb::list names;
    for (const char* name : kNodeActivations) names.append(name);
    m.attr("NODE_ACTIVATIONS") = nb::tuple(names);
    bind_products<float>(m, "ProductsSingle");
    bind_products<double>(m, "ProductsDouble");
    m.def(
        "products",
        [](const nb::list& weights) -> nb::object {
            if (weights.size() && nb::isinstance<Weights<double>>(weights[0]))
                return nb::cast(new BoundProducts<double>(weights), nb::rv_policy::take_ownership);
            return nb::cast(new BoundProducts<float>(weights), nb::rv_policy::take_ownership);
        },
        "weights"_a, "Layers without a state, which take equal parts of x, and return their y side by side.");
    nb::class_<NormOf>(m, "Norm")
        .def(
            "__init__",
            [](NormOf* self, int64_t groups, bool centred, double epsilon, Read gain, Read bias) {
                new (self) NormOf{groups, centred, epsilon, std::move(gain), std::move(bias)};
            },
            "groups"_a, "centred"_a, "epsilon"_a, "gain"_a.none(), "bias"_a.none())
        .def("run", &run_any<NormOf>, "x"_a.none(), "y of x [..., W], or None.");
    nb::class_<ConvolutionOf>(m, "Convolution")
        .def(
            "__init__",
            [](ConvolutionOf* self, int64_t taps, int64_t width, int64_t dilation, Read kernel, Read bias, int code,
               double alpha, double beta) {
                new (self)
                    ConvolutionOf{taps, width, dilation, std::move(kernel), std::move(bias), {code, alpha, beta}};
            },
            "taps"_a, "width"_a, "dilation"_a, "kernel"_a, "bias"_a.none(), "code"_a, "alpha"_a, "beta"_a)
        .def("run", &run_any<ConvolutionOf>, "x"_a.none(), "y [B, T', C] of a padded x [B, T, C], or None.");
}

}  // namespace
