// The Python module: descriptions and weights of cells, instruction sets; the included headers bind the rest.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "bind_calls.h"
#include "bind_mlstm.h"
#include "bind_nodes.h"
#ifndef __EMSCRIPTEN__
#include "bind_onnxruntime.h"
#endif
#include "bind_sessions.h"
#include "bind_streams.h"

namespace {

constexpr const char* kElements[] = {"float32", "float64", "bfloat16", "int8"};  // in the order of Element

Element element_named(const std::string& name) {
    for (int k = 0; k < 4; ++k)
        if (name == kElements[k]) return Element(k);
    throw nb::value_error(("element: expected float32, float64, bfloat16 or int8, got " + name).c_str());
}

template <class T>
void bind_weights(nb::module_& m, const char* name) {
    nb::class_<Weights<T>>(m, name).def_prop_ro("element",
                                                [](const Weights<T>& w) { return kElements[int(w.element())]; });
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
    bind_weights<float>(m, "WeightsSingle");
    bind_weights<double>(m, "WeightsDouble");
    bind_streams(m);
    bind_calls(m);
    bind_mlstm(m);
    bind_nodes(m);
    bind_sessions(m);
#ifndef __EMSCRIPTEN__
    bind_onnxruntime(m);
#endif

    m.def(
        "isas",
        [] {
            nb::list names;
            for (const char* name : instruction_sets()) names.append(name);
            return names;
        },
        "The instruction sets that this machine supports, best first.");
    m.attr("THREAD_WORK") = kThreadWork;
    nb::list names;
    for (const char* name : kArrays) names.append(name);
    m.attr("ARRAYS") = nb::tuple(names);
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
            [](Description* self, const char* kind, int64_t input, int64_t units, int64_t output,
               const nb::list& activations, const nb::dict& flags, bool rows) {
                if (activations.size() > std::size(Description{}.activations))
                    throw nb::value_error("Description: too many activations");
                Description d{};
                d.kind = kind_named(kind);
                if (!d.kind) throw nb::value_error((std::string("Description: unknown kind ") + kind).c_str());
                d.input = input, d.units = units, d.output = output;
                for (size_t k = 0; k < activations.size(); ++k) {
                    const nb::tuple a = nb::cast<nb::tuple>(activations[k]);
                    d.activations[k] = {nb::cast<int>(a[0]), nb::cast<double>(a[1]), nb::cast<double>(a[2])};
                }
                d.rows = rows;
#define CELLSTACK_FLAG(type, name, value) \
    if (flags.contains(#name)) d.name = type(nb::cast<double>(flags[#name]));
                CELLSTACK_FLAGS(CELLSTACK_FLAG)
#undef CELLSTACK_FLAG
                new (self) Description(d);
            },
            "kind"_a, "input_size"_a, "units"_a, "output_size"_a, "activations"_a, "flags"_a, "rows"_a = false,
            "A cell without its arrays; cellstack.native makes it from a CellSpec.");
    m.def(
        "weights",
        [](const Description& description, const std::string& name, const nb::tuple& arrays, bool copy,
           int threads) -> nb::object {
            const Element element = element_named(name);
            if (element == Element::kInt8 && !copy) throw nb::value_error("weights: int8 requires copy=True");
            if (element == Element::kFloat64)
                return nb::cast(
                    new Weights<double>(description, arrays_of<const double>(arrays), copy, element, threads),
                    nb::rv_policy::take_ownership);
            return nb::cast(new Weights<float>(description, arrays_of<const float>(arrays), copy, element, threads),
                            nb::rv_policy::take_ownership);
        },
        "description"_a, "element"_a, "arrays"_a, "copy"_a = true, "threads"_a = 1);
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
    bind_activate<float>(m);
    bind_activate<double>(m);
}
