// The kernel for Python. Addresses are plain integers: a DLPack exchange costs more than a step. Shapes and dtypes are
// checked in Python, before anything here is called; see cell.h for what each pointer means.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
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

// The addresses in a tuple, one after the other.
class Addresses {
  public:
    Addresses(const nb::tuple& tuple, size_t count, const char* what) : tuple_(tuple) {
        if (tuple.size() != count)
            throw nb::value_error((std::string(what) + ": expected " + std::to_string(count) + " entries").c_str());
    }
    template <class T>
    T* next() {
        return at<T>(nb::cast<uintptr_t>(tuple_[at_++]));
    }
    nb::handle object() { return tuple_[at_++]; }

  private:
    nb::tuple tuple_;
    size_t at_ = 0;
};

template <class T>
Arrays<T> arrays_of(const nb::tuple& tuple) {
    Addresses a(tuple, kArrays, "arrays");
    Arrays<T> arrays;
    T** const all[] = {&arrays.kernel,     &arrays.recurrent_kernel, &arrays.bias,           &arrays.peepholes,
                       &arrays.projection, &arrays.kernel_gain,      &arrays.recurrent_gain, &arrays.cell_gain,
                       &arrays.cell_bias,  &arrays.initial_h,        &arrays.initial_c};
    for (T** array : all) *array = a.next<T>();
    return arrays;
}

template <class T>
Drops<T> drops_of(Addresses& a) {
    const T* recurrent = a.next<const T>();
    const T* zoneout = a.next<const T>();
    return {recurrent, zoneout, a.next<const T>()};
}

template <class T>
void run_forward(int64_t batch, int64_t steps, const nb::list& layers, uintptr_t x, int64_t stride_batch,
                 int64_t stride_time, uintptr_t mask, uintptr_t reset, bool reverse, int threads, uintptr_t places) {
    std::vector<Layer<T>> all;
    for (nb::handle entry : layers) {
        Addresses a(nb::cast<nb::tuple>(entry), 12, "forward: a layer");
        Layer<T> layer;
        layer.weights = nb::cast<const Packed<T>*>(a.object());
        layer.h0 = a.next<const T>(), layer.c0 = a.next<const T>();
        layer.hn = a.next<T>(), layer.cn = a.next<T>(), layer.y = a.next<T>();
        layer.gates = a.next<T>(), layer.cells = a.next<T>(), layer.norms = a.next<T>();
        layer.drops = drops_of<T>(a);
        all.push_back(layer);
    }
    nb::gil_scoped_release released;
    forward<T>({batch, steps, at<T>(x), stride_batch, stride_time, at<uint8_t>(mask), at<uint8_t>(reset), reverse,
                at<int64_t>(places)},
               all, threads);
}

template <class T>
void run_backward(const Description& description, int64_t batch, int64_t steps, const nb::tuple& arrays, uintptr_t x,
                  int64_t stride_batch, int64_t stride_time, uintptr_t mask, uintptr_t reset, bool reverse,
                  const nb::tuple& saved, const nb::tuple& given, const nb::tuple& wanted, int threads) {
    Addresses s(saved, 9, "backward: saved"), d(given, 5, "backward: given"), w(wanted, 4, "backward: wanted");
    Saved<T> kept;
    kept.description = &description, kept.arrays = arrays_of<const T>(arrays);
    kept.h0 = s.next<const T>(), kept.c0 = s.next<const T>(), kept.y = s.next<const T>();
    kept.gates = s.next<const T>(), kept.cells = s.next<const T>(), kept.norms = s.next<const T>();
    kept.drops = drops_of<T>(s);
    Gradients<T> g;
    g.dy = d.next<const T>(), g.dhn = d.next<const T>(), g.dcn = d.next<const T>();
    g.dgates = d.next<const T>(), g.dcells = d.next<const T>();
    g.dx = w.next<T>(), g.dh0 = w.next<T>(), g.dc0 = w.next<T>();
    g.arrays = arrays_of<T>(nb::cast<nb::tuple>(w.object()));
    nb::gil_scoped_release released;
    backward<T>({batch, steps, at<T>(x), stride_batch, stride_time, at<uint8_t>(mask), at<uint8_t>(reset), reverse},
                kept, g, threads);
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
    BoundStream(const nb::list& weights, int64_t batch, int threads)
        : kept_(weights), stream_(pointers(weights), batch, threads) {}

    nb::object step(nb::handle x) { return advance<2>(x); }
    nb::object run(nb::handle x) { return advance<3>(x); }
    void reset() {
        const InUse in_use(busy_);
        stream_.reset();
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
        if (layer >= stream_.weights().size()) throw nb::index_error("Stream: no such layer");
        const Description& d = description(layer);
        const auto fits = [&](const State& array, int64_t width) {
            return int64_t(array.shape(0)) == stream_.batch() && int64_t(array.shape(1)) == width;
        };
        if (!d.keeps_state() || !fits(h, d.output) || c.has_value() != (d.kind == kLstm) || (c && !fits(*c, d.units)))
            throw nb::value_error("Stream: a state has the wrong shape");
        const InUse in_use(busy_);
        stream_.set_state(int(layer), h.data(), c ? c->data() : nullptr);
    }

  private:
    static std::vector<const Packed<T>*> pointers(const nb::list& weights) {
        std::vector<const Packed<T>*> all;
        for (nb::handle w : weights) all.push_back(nb::cast<const Packed<T>*>(w));
        if (all.empty()) throw nb::value_error("Stream: no layers");
        return all;
    }
    // NumPy's own interface, not nanobind's: two arrays through DLPack cost more than the step of a small cell.
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
    nb::list kept_;
    Stream<T> stream_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

template <class T>
void bind(nb::module_& m, const char* packed, const char* stream) {
    nb::class_<Packed<T>>(m, packed)
        .def_prop_ro("input_size", [](const Packed<T>& p) { return p.description().input; })
        .def_prop_ro("units", [](const Packed<T>& p) { return p.description().units; })
        .def_prop_ro("output_size", [](const Packed<T>& p) { return p.description().output; })
        .def_prop_ro("double", [](const Packed<T>&) { return sizeof(T) == 8; });
    nb::class_<BoundStream<T>>(m, stream)
        .def("step", &BoundStream<T>::step, "x"_a.none(),
             "y [B, P] of x [B, I]; None where x isn't an array as the kernel takes it.")
        .def("run", &BoundStream<T>::run, "x"_a.none(), "y [B, T, P] of x [B, T, I], likewise.")
        .def("reset", &BoundStream<T>::reset)
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

bool is_double(const nb::handle& packed) { return nb::isinstance<Packed<double>>(packed); }

}  // namespace

NB_MODULE(_kernel, m) {
    if (PyArray_ImportNumPyAPI() < 0) nb::raise_python_error();
    nb::set_leak_warnings(false);  // weights that a module of the user's still holds at exit are no leak
    m.doc() = "The kernel: recurrent cells on the CPU. Addresses are integers; nothing checks shapes here.";
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

    nb::class_<Description>(m, "Description")
        .def(
            "__init__",
            [](Description* self, int kind, int64_t input, int64_t units, int64_t output, const nb::list& activations,
               bool bias, bool peepholes, bool coupled, bool layer_norm, bool reset_after, double epsilon, double clip,
               double cell_clip, double zoneout, double zoneout_cell) {
                if (activations.size() > 5) throw nb::value_error("Description: at most five activations");
                Description d{};
                d.kind = kind, d.input = input, d.units = units, d.output = output;
                for (size_t k = 0; k < activations.size(); ++k) {
                    const nb::tuple a = nb::cast<nb::tuple>(activations[k]);
                    d.activations[k] = {nb::cast<int>(a[0]), nb::cast<double>(a[1]), nb::cast<double>(a[2])};
                }
                d.use_bias = bias, d.peepholes = peepholes, d.coupled = coupled, d.layer_norm = layer_norm;
                d.reset_after = reset_after, d.norm_epsilon = epsilon, d.clip = clip, d.cell_clip = cell_clip;
                d.zoneout = zoneout, d.zoneout_cell = zoneout_cell;
                new (self) Description(d);
            },
            "kind"_a, "input_size"_a, "units"_a, "output_size"_a, "activations"_a, "use_bias"_a, "peepholes"_a,
            "coupled"_a, "layer_norm"_a, "reset_after"_a, "norm_epsilon"_a, "clip"_a, "cell_clip"_a, "zoneout"_a,
            "zoneout_cell"_a, "A cell without its arrays: cellstack.native makes one of a CellSpec.");
    m.def(
        "Packed",
        [](bool twice, const Description& description, const nb::tuple& arrays, bool copy, int bits) -> nb::object {
            if (bits != 32 && ((bits != 16 && bits != 8) || twice || !copy))
                throw nb::value_error("Packed: 16 or 8 bits are for float32 weights that are copied");
            if (twice)
                return nb::cast(new Packed<double>(description, arrays_of<const double>(arrays), copy),
                                nb::rv_policy::take_ownership);
            return nb::cast(new Packed<float>(description, arrays_of<const float>(arrays), copy, bits),
                            nb::rv_policy::take_ownership);
        },
        "double"_a, "description"_a, "arrays"_a, "copy"_a = true, "bits"_a = 32);
    m.def(
        "Stream",
        [](const nb::list& packed, int64_t batch, int threads) -> nb::object {
            if (packed.size() && is_double(packed[0]))
                return nb::cast(new BoundStream<double>(packed, batch, threads), nb::rv_policy::take_ownership);
            return nb::cast(new BoundStream<float>(packed, batch, threads), nb::rv_policy::take_ownership);
        },
        "packed_list"_a, "batch"_a, "threads"_a = 1);
    m.def(
        "forward",
        [](int64_t batch, int64_t steps, const nb::list& layers, uintptr_t x, int64_t stride_batch, int64_t stride_time,
           uintptr_t mask, uintptr_t reset, bool reverse, int threads, uintptr_t places) {
            if (!layers.size()) throw nb::value_error("forward: no layers");
            const bool twice = is_double(nb::cast<nb::tuple>(layers[0])[0]);
            (twice ? run_forward<double> : run_forward<float>)(batch, steps, layers, x, stride_batch, stride_time, mask,
                                                               reset, reverse, threads, places);
        },
        "batch"_a, "steps"_a, "layers"_a, "x"_a, "x_stride_b"_a, "x_stride_t"_a, "mask"_a, "reset"_a, "reverse"_a,
        "threads"_a, "places"_a = 0);
    m.def(
        "backward",
        [](bool twice, const Description& description, int64_t batch, int64_t steps, const nb::tuple& arrays,
           uintptr_t x, int64_t stride_batch, int64_t stride_time, uintptr_t mask, uintptr_t reset, bool reverse,
           const nb::tuple& saved, const nb::tuple& given, const nb::tuple& wanted, int threads) {
            (twice ? run_backward<double> : run_backward<float>)(description, batch, steps, arrays, x, stride_batch,
                                                                 stride_time, mask, reset, reverse, saved, given,
                                                                 wanted, threads);
        },
        "double"_a, "description"_a, "batch"_a, "steps"_a, "arrays"_a, "x"_a, "x_stride_b"_a, "x_stride_t"_a, "mask"_a,
        "reset"_a, "reverse"_a, "saved"_a, "given"_a, "wanted"_a, "threads"_a);
    bind_activate<float>(m);
    bind_activate<double>(m);
}
