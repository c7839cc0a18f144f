// Calls of forward and backward from Python. Addresses are integers, or NumPy arrays read through NumPy's C API: a
// DLPack exchange costs more than a step. Shapes and dtypes are checked in Python before any call; see cell.h for what
// each pointer means.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include <iterator>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cell.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace cellstack;

namespace {

// How the memory of an argument is used.
enum class Use { kRead, kWrite, kStrided };

// The address of an argument's numbers. Python passes an integer (0 = absent), None (absent) or a NumPy array, which is
// kept alive as long as the object that contains this address. An array must be aligned and, unless it is kStrided,
// contiguous.
template <Use>
struct Address {
    void* at = nullptr;
    nb::object owner;

    template <class T>
    T* as() const {
        return static_cast<T*>(at);
    }
};
using Read = Address<Use::kRead>;
using Write = Address<Use::kWrite>;
using Strided = Address<Use::kStrided>;

// The addresses of an array for each of some states, from a tuple, a list or None.
template <Use use>
struct PerState {
    Address<use> of[kStates];

    template <class T, size_t N>
    void put(T* (&to)[N]) const {
        for (size_t k = 0; k < N; ++k) to[k] = of[k].template as<T>();
    }
};

}  // namespace

template <Use use>
struct nb::detail::type_caster<Address<use>> {
    NB_TYPE_CASTER(Address<use>, const_name("int | numpy.ndarray | None"))

    bool from_python(nb::handle given, uint8_t, nb::detail::cleanup_list*) noexcept {
        if (PyLong_CheckExact(given.ptr())) {
            const size_t address = PyLong_AsSize_t(given.ptr());
            if (address == size_t(-1) && PyErr_Occurred()) return PyErr_Clear(), false;
            value.at = reinterpret_cast<void*>(address);
            return true;
        }
        if (given.is_none()) return true;
        if (!PyArray_Check(given.ptr())) return false;
        auto* array = reinterpret_cast<PyArrayObject*>(given.ptr());
        const int flags = use == Use::kWrite  ? NPY_ARRAY_CARRAY
                          : use == Use::kRead ? NPY_ARRAY_CARRAY_RO
                                              : NPY_ARRAY_ALIGNED;
        if (!PyArray_CHKFLAGS(array, flags) || !PyArray_ISNOTSWAPPED(array)) return false;
        value.at = PyArray_DATA(array), value.owner = nb::borrow(given);
        return true;
    }
};

template <Use use>
struct nb::detail::type_caster<PerState<use>> {
    NB_TYPE_CASTER(PerState<use>, const_name("Sequence[int | numpy.ndarray | None] | None"))

    bool from_python(nb::handle given, uint8_t flags, nb::detail::cleanup_list* cleanup) noexcept {
        if (given.is_none()) return true;
        if (!PyTuple_Check(given.ptr()) && !PyList_Check(given.ptr())) return false;
        const Py_ssize_t count = PySequence_Size(given.ptr());
        if (count > kStates) return false;
        for (Py_ssize_t k = 0; k < count; ++k) {
            nb::detail::make_caster<Address<use>> entry;
            const nb::object of_state = nb::steal(PySequence_GetItem(given.ptr(), k));
            if (!entry.from_python(of_state, flags, cleanup)) return false;
            value.of[k] = std::move(entry.value);
        }
        return true;
    }
};

namespace {

// A call as Python describes it: cell.h's Sequences, Layer and Gradients before their number type is known.
struct SequencesOf {
    int64_t batch, steps;
    Strided x;
    int64_t stride_batch, stride_time;
    Read mask, reset;
    bool reverse;
    Read places;
    bool time_major;

    template <class T>
    Sequences<T> as() const {
        return {batch,
                steps,
                x.as<const T>(),
                stride_batch,
                stride_time,
                mask.as<const uint8_t>(),
                reset.as<const uint8_t>(),
                reverse,
                places.as<const int64_t>(),
                time_major};
    }
};

struct LayerOf {
    nb::object weights;
    PerState<Use::kRead> before;
    PerState<Use::kWrite> after;
    Write y, gates;
    PerState<Use::kWrite> states;
    Write intermediate;
    Read recurrent_dropout, zoneout, zoneout_cell;
    Read patch_lines, patch_table;
    int64_t patch_width;
    Write patch_held;

    template <class T>
    Layer<T> as() const {
        Layer<T> layer{};
        layer.weights = nb::cast<const Weights<T>*>(weights);
        before.put(layer.before), after.put(layer.after), states.put(layer.states);
        layer.y = y.as<T>(), layer.gates = gates.as<T>(), layer.intermediate = intermediate.as<T>();
        layer.drops = {recurrent_dropout.as<const T>(), zoneout.as<const T>(), zoneout_cell.as<const T>()};
        layer.patches = {patch_lines.as<const int32_t>(), patch_table.as<const T>(), patch_width, patch_held.as<T>()};
        return layer;
    }
};

// The arrays of a cell from a tuple, in the order of cellstack.cells.spec.ARRAYS.
template <class T>
Arrays<T> arrays_of(const nb::tuple& tuple) {
    constexpr size_t others = std::size(kArrays);
    if (tuple.size() < others || tuple.size() > others + kStates)
        throw nb::value_error("arrays: expected one entry for each of spec.ARRAYS");
    Arrays<T> arrays{};
    T* Arrays<T>::* const all[] = {
#define CELLSTACK_ARRAY(name, ...) &Arrays<T>::name,
        CELLSTACK_ARRAYS(CELLSTACK_ARRAY)
#undef CELLSTACK_ARRAY
    };
    using Entry = Address<std::is_const_v<T> ? Use::kRead : Use::kWrite>;
    for (size_t k = 0; k < tuple.size(); ++k)
        (k < others ? arrays.*all[k] : arrays.initial[k - others]) = nb::cast<Entry>(tuple[k]).template as<T>();
    return arrays;
}

struct GradientsOf {
    Read dy;
    PerState<Use::kRead> dafter;
    Read dgates;
    PerState<Use::kRead> dstates;
    Write dx;
    PerState<Use::kWrite> dbefore;
    std::optional<nb::tuple> arrays;

    template <class T>
    Gradients<T> as() const {
        Gradients<T> gradients{};
        gradients.dy = dy.as<const T>(), gradients.dgates = dgates.as<const T>(), gradients.dx = dx.as<T>();
        dafter.put(gradients.dafter), dstates.put(gradients.dstates), dbefore.put(gradients.dbefore);
        if (arrays) gradients.arrays = arrays_of<T>(*arrays);
        return gradients;
    }
};

template <class T>
bool holds(const LayerOf& layer) {
    return nb::isinstance<Weights<T>>(layer.weights);
}

template <class To, class From>
std::vector<To> each(const nb::list& entries, To (From::*as)() const) {
    std::vector<To> all;
    all.reserve(entries.size());
    for (nb::handle entry : entries) all.push_back((nb::cast<const From&>(entry).*as)());
    return all;
}

template <class T>
std::vector<Layer<T>> layers_of(const nb::list& entries) {
    std::vector<Layer<T>> layers = each(entries, &LayerOf::as<T>);
    for (const Layer<T>& layer : layers)
        if ((layer.weights->description().rows || narrow(layer.weights->element())) && !layer.weights->copied())
            throw nb::value_error("forward: weights in rows, or with fewer bits, must be copied (copy=True)");
    return layers;
}

template <class T>
void run_forward(const SequencesOf& sequences, const nb::list& entries, int threads) {
    const std::vector<Layer<T>> layers = layers_of<T>(entries);
    const Sequences<T> in = sequences.as<T>();
    nb::gil_scoped_release released;
    forward<T>(in, layers, threads);
}

template <class T>
bool run_forward_each(const std::vector<std::pair<SequencesOf, nb::list>>& given, int threads) {
    std::vector<Run<T>> runs;
    for (const auto& [sequences, entries] : given) runs.push_back({sequences.template as<T>(), layers_of<T>(entries)});
    nb::gil_scoped_release released;
    return forward<T>(runs, threads);
}

template <class T>
void run_backward(const SequencesOf& sequences, const nb::list& entries, const nb::list& wanted, int threads) {
    const std::vector<Layer<T>> layers = each(entries, &LayerOf::as<T>);
    const std::vector<Gradients<T>> gradients = each(wanted, &GradientsOf::as<T>);
    if (layers.size() != gradients.size()) throw nb::value_error("backward: expected one Gradients per layer");
    for (const Layer<T>& layer : layers)
        if (layer.weights->copied()) throw nb::value_error("backward: the weights must not be copied (copy=False)");
    const Sequences<T> in = sequences.as<T>();
    nb::gil_scoped_release released;
    backward<T>(in, layers, gradients, threads);
}

bool is_double(const nb::list& layers, const char* call) {
    if (!layers.size()) throw nb::value_error((std::string(call) + ": expected at least one layer").c_str());
    return holds<double>(nb::cast<const LayerOf&>(layers[0]));
}

void bind_calls(nb::module_& m) {
    const auto none = nb::none();
    nb::class_<SequencesOf>(m, "Sequences")
        .def(
            "__init__",
            [](SequencesOf* self, int64_t batch, int64_t steps, Strided x, int64_t stride_batch, int64_t stride_time,
               Read mask, Read reset, bool reverse, Read places, bool time_major) {
                new (self)
                    SequencesOf{batch, steps, x, stride_batch, stride_time, mask, reset, reverse, places, time_major};
            },
            "batch"_a, "steps"_a, "x"_a, "stride_batch"_a, "stride_time"_a, "mask"_a = none, "reset"_a = none,
            "reverse"_a = false, "places"_a = none, "time_major"_a = false);
    nb::class_<LayerOf>(m, "Layer")
        .def(
            "__init__",
            [](LayerOf* self, nb::object weights, PerState<Use::kRead> before, PerState<Use::kWrite> after, Write y,
               Write gates, PerState<Use::kWrite> states, Write intermediate, Read recurrent_dropout, Read zoneout,
               Read zoneout_cell, Read patch_lines, Read patch_table, int64_t patch_width, Write patch_held) {
                new (self) LayerOf{
                    weights,           before,  after,        y,           gates,       states,      intermediate,
                    recurrent_dropout, zoneout, zoneout_cell, patch_lines, patch_table, patch_width, patch_held};
            },
            "weights"_a, "before"_a = none, "after"_a = none, "y"_a = none, "gates"_a = none, "states"_a = none,
            "intermediate"_a = none, "recurrent_dropout"_a = none, "zoneout"_a = none, "zoneout_cell"_a = none,
            "patch_lines"_a = none, "patch_table"_a = none, "patch_width"_a = 0, "patch_held"_a = none);
    nb::class_<GradientsOf>(m, "Gradients")
        .def(
            "__init__",
            [](GradientsOf* self, Read dy, PerState<Use::kRead> dafter, Read dgates, PerState<Use::kRead> dstates,
               Write dx, PerState<Use::kWrite> dbefore, std::optional<nb::tuple> arrays) {
                new (self) GradientsOf{dy, dafter, dgates, dstates, dx, dbefore, arrays};
            },
            "dy"_a = none, "dafter"_a = none, "dgates"_a = none, "dstates"_a = none, "dx"_a = none, "dbefore"_a = none,
            "arrays"_a = none);
    m.def(
        "forward",
        [](const SequencesOf& sequences, const nb::list& layers, int threads) {
            (is_double(layers, "forward") ? run_forward<double> : run_forward<float>)(sequences, layers, threads);
        },
        "sequences"_a, "layers"_a, "threads"_a);
    m.def(
        "forward_each",
        [](const std::vector<std::pair<SequencesOf, nb::list>>& runs, int threads) {
            const bool twice = !runs.empty() && is_double(runs[0].second, "forward_each");
            return (twice ? run_forward_each<double> : run_forward_each<float>)(runs, threads);
        },
        "runs"_a, "threads"_a);
    m.def(
        "backward",
        [](const SequencesOf& sequences, const nb::list& layers, const nb::list& gradients, int threads) {
            (is_double(layers, "backward") ? run_backward<double> : run_backward<float>)(sequences, layers, gradients,
                                                                                         threads);
        },
        "sequences"_a, "layers"_a, "gradients"_a, "threads"_a);
}

}  // namespace
