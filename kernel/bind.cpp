// The Python bindings of the kernel. Addresses are integers, or NumPy arrays read through NumPy's C API: a DLPack
// exchange costs more than a step. Shapes and dtypes are checked in Python before any call; see cell.h for what each
// pointer means.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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
    Read h0, c0;
    Write hn, cn, y, gates, cells, norms;
    Read recurrent_dropout, zoneout, zoneout_cell;
    Read patch_lines, patch_table;
    int64_t patch_width;
    Write patch_held;

    template <class T>
    Layer<T> as() const {
        return {nb::cast<const Weights<T>*>(weights),
                h0.as<const T>(),
                c0.as<const T>(),
                hn.as<T>(),
                cn.as<T>(),
                y.as<T>(),
                gates.as<T>(),
                cells.as<T>(),
                norms.as<T>(),
                {recurrent_dropout.as<const T>(), zoneout.as<const T>(), zoneout_cell.as<const T>()},
                {patch_lines.as<const int32_t>(), patch_table.as<const T>(), patch_width, patch_held.as<T>()}};
    }
};

// The arrays of a cell from a tuple, in the order of cellstack.spec.ARRAYS.
template <class T>
Arrays<T> arrays_of(const nb::tuple& tuple) {
    if (tuple.size() != kArrays) throw nb::value_error("arrays: expected one entry for each of spec.ARRAYS");
    Arrays<T> arrays;
    T** const all[] = {&arrays.kernel,     &arrays.recurrent_kernel, &arrays.bias,           &arrays.peepholes,
                       &arrays.projection, &arrays.kernel_gain,      &arrays.recurrent_gain, &arrays.cell_gain,
                       &arrays.cell_bias,  &arrays.initial_h,        &arrays.initial_c};
    using Entry = Address<std::is_const_v<T> ? Use::kRead : Use::kWrite>;
    for (int k = 0; k < kArrays; ++k) *all[k] = nb::cast<Entry>(tuple[k]).template as<T>();
    return arrays;
}

struct GradientsOf {
    Read dy, dhn, dcn, dgates, dcells;
    Write dx, dh0, dc0;
    std::optional<nb::tuple> arrays;

    template <class T>
    Gradients<T> as() const {
        return {dy.as<const T>(),     dhn.as<const T>(),    dcn.as<const T>(),
                dgates.as<const T>(), dcells.as<const T>(), dx.as<T>(),
                dh0.as<T>(),          dc0.as<T>(),          arrays ? arrays_of<T>(*arrays) : Arrays<T>{}};
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
void run_forward(const SequencesOf& sequences, const nb::list& entries, int threads) {
    const std::vector<Layer<T>> layers = each(entries, &LayerOf::as<T>);
    for (const Layer<T>& layer : layers)
        if ((layer.weights->description().rows || narrow(layer.weights->element())) && !layer.weights->copied())
            throw nb::value_error("forward: weights in rows, or with fewer bits, must be copied (copy=True)");
    const Sequences<T> in = sequences.as<T>();
    nb::gil_scoped_release released;
    forward<T>(in, layers, threads);
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

constexpr const char* kElements[] = {"float32", "float64", "bfloat16", "int8"};  // in the order of Element

Element element_named(const std::string& name) {
    for (int k = 0; k < 4; ++k)
        if (name == kElements[k]) return Element(k);
    throw nb::value_error(("element: expected float32, float64, bfloat16 or int8, got " + name).c_str());
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

// Reserves the rows whose states a call reads and writes. It is written in C++ because there a signal handler can't
// raise while a with statement enters or leaves; in Python, a row could stay reserved forever. The GIL protects all of
// it.
class Turns {
  public:
    explicit Turns(size_t rows) : taken_(rows, 0) {}

    // The rows of one call: those with these indices, or all.
    class Turn {
      public:
        Turn(Turns& of, std::vector<int64_t> rows) : of_(of), rows_(std::move(rows)) {}
        // Returns None if the rows are now taken; otherwise the position of the first row that was taken already, and
        // whether this call took it itself because `rows` contains it twice.
        nb::object enter() {
            const auto row = [&](size_t n) -> char& { return of_.taken_[size_t(rows_[n])]; };
            for (size_t n = 0; n < rows_.size(); ++n) {
                if (row(n)) {
                    const auto here = rows_.begin() + int64_t(n);
                    const bool twice = std::find(rows_.begin(), here, rows_[n]) != here;
                    for (size_t k = 0; k < n; ++k) row(k) = 0;
                    return nb::make_tuple(n, twice);
                }
                row(n) = 1;
            }
            holds_ = true;
            return nb::none();
        }
        void exit(const nb::args&) {
            if (holds_)
                for (int64_t row : rows_) of_.taken_[size_t(row)] = 0;
            holds_ = false;
        }

      private:
        Turns& of_;
        std::vector<int64_t> rows_;
        bool holds_ = false;
    };

    Turn turn(nb::handle rows) {
        std::vector<int64_t> all(rows.is_none() ? taken_.size() : 0);
        std::iota(all.begin(), all.end(), 0);
        if (rows.is_none()) return {*this, std::move(all)};
        auto* array = reinterpret_cast<PyArrayObject*>(rows.ptr());
        if (!PyArray_CheckExact(rows.ptr()) || PyArray_TYPE(array) != NPY_INT64 || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array))
            throw nb::type_error("Turns: expected rows as a contiguous array of int64");
        const auto* first = static_cast<const int64_t*>(PyArray_DATA(array));
        all.assign(first, first + PyArray_DIM(array, 0));
        for (int64_t row : all)
            if (row < 0 || size_t(row) >= taken_.size())
                throw nb::index_error(("Turns: there is no row " + std::to_string(row)).c_str());
        return {*this, std::move(all)};
    }

    // A row that is neither taken nor open, for a call that opens it.
    class Free {
      public:
        Free(Turns& of, nb::object open) : of_(of), open_(std::move(open)) {}
        // Takes such a row and returns it, or returns None if there is none.
        nb::object enter() {
            auto* array = reinterpret_cast<PyArrayObject*>(open_.ptr());
            const auto* open = static_cast<const char*>(PyArray_DATA(array));
            const size_t rows = of_.taken_.size();
            for (size_t n = 0; n < rows; ++n) {
                const size_t row = (of_.next_ + n) % rows;
                if (open[row] || of_.taken_[row]) continue;
                of_.taken_[row] = 1, of_.next_ = row + 1, row_ = int64_t(row);
                return nb::int_(row);
            }
            return nb::none();
        }
        void exit(const nb::args&) {
            if (row_ >= 0) of_.taken_[size_t(row_)] = 0;
            row_ = -1;
        }

      private:
        Turns& of_;
        nb::object open_;
        int64_t row_ = -1;
    };

    Free free(nb::object open) {
        auto* array = reinterpret_cast<PyArrayObject*>(open.ptr());
        if (!PyArray_CheckExact(open.ptr()) || PyArray_TYPE(array) != NPY_BOOL || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array) || size_t(PyArray_DIM(array, 0)) != taken_.size())
            throw nb::type_error("Turns: expected open as a contiguous array of bool, one per row");
        return {*this, std::move(open)};
    }

  private:
    std::vector<char> taken_;
    size_t next_ = 0;  // where the search for a free row starts
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
            if (!d.keeps_state()) {
                states.append(nb::make_tuple());
                continue;
            }
            Array<T> h = new_array<T>({size_t(stream_.batch()), size_t(d.output)});
            if (d.kind == kLstm) {
                Array<T> c = new_array<T>({size_t(stream_.batch()), size_t(d.units)});
                stream_.get_state(int(l), h.data(), c.data());
                states.append(nb::make_tuple(h, c));
            } else {
                stream_.get_state(int(l), h.data(), nullptr);
                states.append(nb::make_tuple(h));
            }
        }
        return states;
    }
    using State = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    void set_state(size_t layer, const State& h, std::optional<State> c) {
        if (layer >= stream_.weights().size())
            throw nb::index_error(("Stream: there is no layer " + std::to_string(layer)).c_str());
        const Description& d = description(layer);
        const auto fits = [&](const State& array, int64_t width) {
            return int64_t(array.shape(0)) == stream_.batch() && int64_t(array.shape(1)) == width;
        };
        if (!d.keeps_state() || !fits(h, d.output) || c.has_value() != (d.kind == kLstm) || (c && !fits(*c, d.units)))
            throw nb::value_error("Stream: the state has the wrong shape");
        const InUse in_use(busy_);
        stream_.set_state(int(layer), h.data(), c ? c->data() : nullptr);
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
            !PyArray_ISCARRAY_RO(x) || PyArray_DIM(x, 0) != stream_.batch() || PyArray_DIM(x, Dims - 1) != first.input)
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
            !PyArray_ISCARRAY_RO(x) || PyArray_DIM(x, 2) != weights_[0]->description().input || !PyArray_SIZE(x))
            return nb::none();
        const npy_intp batch = PyArray_DIM(x, 0), steps = PyArray_DIM(x, 1), width = PyArray_DIM(x, 2);
        npy_intp shape[3] = {batch, steps, weights_.back()->description().output};
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
        (last_ ? layers.back().hn : layers.back().y) = head ? between.data() : to;
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
void bind(nb::module_& m, const char* weights, const char* stream, const char* stack) {
    nb::class_<BoundStack<T>>(m, stack).def(
        "run", &BoundStack<T>::run, "x"_a.none(), "threads"_a,
        "y [B, T, P] of x [B, T, I], or [B, P] of the last step; None where x isn't an array as the kernel takes "
        "it, contiguous and not empty.");
    nb::class_<Weights<T>>(m, weights).def_prop_ro("element", [](const Weights<T>& w) {
        return kElements[int(w.element())];
    });
    nb::class_<BoundStream<T>>(m, stream)
        .def("step", &BoundStream<T>::step, "x"_a.none(),
             "y [B, P] of x [B, I]; None where x isn't an array as the kernel takes it.")
        .def("run", &BoundStream<T>::run, "x"_a.none(), "y [B, T, P] of x [B, T, I], likewise.")
        .def("reset", &BoundStream<T>::reset)
        .def("keep", &BoundStream<T>::keep, "Keep the state as it is now.")
        .def("undo", &BoundStream<T>::undo, "Go back to what was kept.")
        .def("get_state", &BoundStream<T>::get_state)
        .def("set_state", &BoundStream<T>::set_state, "layer"_a, "h"_a.noconvert(), "c"_a.noconvert() = nb::none());
}

template <class T>
void bind_activate(nb::module_& m) {
    using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    m.def(
        "activate",
        [](int code, double alpha, double beta, const In& x, const Out& y) {
            activate({code, alpha, beta}, x.data(), y.data(), int64_t(std::min(x.size(), y.size())));
        },
        "code"_a, "alpha"_a, "beta"_a, "x"_a.noconvert(), "y"_a.noconvert(),
        "One activation over an array, for tests.");
}

// Asks the system for large pages for memory that was just allocated, before it is written: for some ten megabytes, the
// page faults of small pages take longer than the writes.
void prefer_large_pages(void* memory, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t page = 4096;
    const uintptr_t first = (uintptr_t(memory) + page - 1) / page * page,
                    last = (uintptr_t(memory) + bytes) / page * page;
    // Only a hint: failure is harmless.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

NB_MODULE(_kernel, m) {
    if (PyArray_ImportNumPyAPI() < 0) nb::raise_python_error();
    nb::set_leak_warnings(false);  // weights that a user's module still references at exit are no leak
    m.doc() = "The kernel: recurrent cells on the CPU. Addresses are integers; shapes are not checked here.";
    if (const char* asked = std::getenv("CELLSTACK_ISA"); asked && !set_instruction_set(asked)) {
        std::string message = std::string("CELLSTACK_ISA: expected one of this machine's instruction sets (");
        for (const char* name : instruction_sets()) message += std::string(name) + ", ";
        message.resize(message.size() - 2);
        throw nb::import_error((message + "), got '" + asked + "'").c_str());
    }
    bind<float>(m, "WeightsSingle", "StreamSingle", "StackSingle");
    bind<double>(m, "WeightsDouble", "StreamDouble", "StackDouble");

    m.def(
        "isas",
        [] {
            nb::list names;
            for (const char* name : instruction_sets()) names.append(name);
            return names;
        },
        "The instruction sets that this machine supports, best first.");
    m.attr("THREAD_WORK") = kThreadWork;
    m.def("isa", &instruction_set, "The instruction set in use.");
    m.def(
        "set_isa",
        [](const char* name) {
            if (!set_instruction_set(name))
                throw nb::value_error((std::string("set_isa: this machine doesn't support ") + name).c_str());
        },
        "name"_a,
        "Use this instruction set for all weights packed from now on; '' for the default: the best one, and AVX2 for "
        "float layers of few units.");

    nb::class_<Description>(m, "Description")
        .def(
            "__init__",
            [](Description* self, int kind, int64_t input, int64_t units, int64_t output, const nb::list& activations,
               bool bias, bool peepholes, bool coupled, bool layer_norm, bool reset_after, double epsilon, double clip,
               double cell_clip, double zoneout, double zoneout_cell, bool rows) {
                if (activations.size() > 5) throw nb::value_error("Description: at most five activations");
                Description d{};
                d.kind = kind, d.input = input, d.units = units, d.output = output;
                for (size_t k = 0; k < activations.size(); ++k) {
                    const nb::tuple a = nb::cast<nb::tuple>(activations[k]);
                    d.activations[k] = {nb::cast<int>(a[0]), nb::cast<double>(a[1]), nb::cast<double>(a[2])};
                }
                d.use_bias = bias, d.peepholes = peepholes, d.coupled = coupled, d.layer_norm = layer_norm;
                d.reset_after = reset_after, d.norm_epsilon = epsilon, d.clip = clip, d.cell_clip = cell_clip;
                d.zoneout = zoneout, d.zoneout_cell = zoneout_cell, d.rows = rows;
                new (self) Description(d);
            },
            "kind"_a, "input_size"_a, "units"_a, "output_size"_a, "activations"_a, "use_bias"_a, "peepholes"_a,
            "coupled"_a, "layer_norm"_a, "reset_after"_a, "norm_epsilon"_a, "clip"_a, "cell_clip"_a, "zoneout"_a,
            "zoneout_cell"_a, "rows"_a = false,
            "A cell without its arrays; cellstack.native makes it from a CellSpec.");
    m.def(
        "weights",
        [](const Description& description, const std::string& name, const nb::tuple& arrays, bool copy) -> nb::object {
            const Element element = element_named(name);
            if (element == Element::kInt8 && !copy) throw nb::value_error("weights: int8 requires copy=True");
            if (element == Element::kFloat64)
                return nb::cast(new Weights<double>(description, arrays_of<const double>(arrays), copy),
                                nb::rv_policy::take_ownership);
            return nb::cast(new Weights<float>(description, arrays_of<const float>(arrays), copy, element),
                            nb::rv_policy::take_ownership);
        },
        "description"_a, "element"_a, "arrays"_a, "copy"_a = true);
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
    m.def(
        "cut",
        [](const nb::list& weights, int64_t batch, int64_t steps, bool resets, int threads) {
            const auto of = [&](auto number) {
                std::vector<const Weights<decltype(number)>*> all;
                for (nb::handle w : weights) all.push_back(nb::cast<const Weights<decltype(number)>*>(w));
                const Cut cut = cut_of(all, batch, steps, resets, threads);
                return nb::make_tuple(cut.groups, cut.teams, cut.shares);
            };
            return weights.size() && nb::isinstance<Weights<double>>(weights[0]) ? of(0.0) : of(0.0f);
        },
        "weights"_a, "batch"_a, "steps"_a, "resets"_a, "threads"_a,
        "How a call is divided among threads: groups of rows, and in each group teams that divide the layers, or "
        "shares of the units.");
    m.def(
        "prefer_large_pages",
        [](uintptr_t memory, size_t bytes) { prefer_large_pages(reinterpret_cast<void*>(memory), bytes); }, "memory"_a,
        "bytes"_a, "Ask the system for large pages for memory that was just allocated: they cause fewer page faults.");
    nb::class_<Turns>(m, "Turns")
        .def(nb::init<size_t>(), "rows"_a)
        .def("free", &Turns::free, "open"_a, nb::keep_alive<0, 1>(),
             "A context manager that takes a row which is neither taken nor open: it returns the row's number, or None "
             "if there is none.")
        .def("turn", &Turns::turn, "rows"_a.none() = nb::none(), nb::keep_alive<0, 1>(),
             "A context manager that takes rows: it returns None; or, if a row was already taken, its position among "
             "the rows, and whether it is listed twice.");
    nb::class_<Turns::Free>(m, "Free").def("__enter__", &Turns::Free::enter).def("__exit__", &Turns::Free::exit);
    nb::class_<Turns::Turn>(m, "Turn").def("__enter__", &Turns::Turn::enter).def("__exit__", &Turns::Turn::exit);
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
            [](LayerOf* self, nb::object weights, Read h0, Read c0, Write hn, Write cn, Write y, Write gates,
               Write cells, Write norms, Read recurrent_dropout, Read zoneout, Read zoneout_cell, Read patch_lines,
               Read patch_table, int64_t patch_width, Write patch_held) {
                new (self) LayerOf{weights,   h0,           c0,          hn,          cn,
                                   y,         gates,        cells,       norms,       recurrent_dropout,
                                   zoneout,   zoneout_cell, patch_lines, patch_table, patch_width,
                                   patch_held};
            },
            "weights"_a, "h0"_a = none, "c0"_a = none, "hn"_a = none, "cn"_a = none, "y"_a = none, "gates"_a = none,
            "cells"_a = none, "norms"_a = none, "recurrent_dropout"_a = none, "zoneout"_a = none,
            "zoneout_cell"_a = none, "patch_lines"_a = none, "patch_table"_a = none, "patch_width"_a = 0,
            "patch_held"_a = none);
    nb::class_<GradientsOf>(m, "Gradients")
        .def(
            "__init__",
            [](GradientsOf* self, Read dy, Read dhn, Read dcn, Read dgates, Read dcells, Write dx, Write dh0, Write dc0,
               std::optional<nb::tuple> arrays) {
                new (self) GradientsOf{dy, dhn, dcn, dgates, dcells, dx, dh0, dc0, arrays};
            },
            "dy"_a = none, "dhn"_a = none, "dcn"_a = none, "dgates"_a = none, "dcells"_a = none, "dx"_a = none,
            "dh0"_a = none, "dc0"_a = none, "arrays"_a = none);
    m.def(
        "forward",
        [](const SequencesOf& sequences, const nb::list& layers, int threads) {
            (is_double(layers, "forward") ? run_forward<double> : run_forward<float>)(sequences, layers, threads);
        },
        "sequences"_a, "layers"_a, "threads"_a);
    m.def(
        "backward",
        [](const SequencesOf& sequences, const nb::list& layers, const nb::list& gradients, int threads) {
            (is_double(layers, "backward") ? run_backward<double> : run_backward<float>)(sequences, layers, gradients,
                                                                                         threads);
        },
        "sequences"_a, "layers"_a, "gradients"_a, "threads"_a);
    bind_activate<float>(m);
    bind_activate<double>(m);
}
