// Calls of an mLSTM's memory from Python.
#pragma once
#include "bind_calls.h"
#include "mlstm.h"

namespace {

// A call as Python describes it, before its number type is known.
struct MemoryOf {
    SequencesOf sequences;
    MatrixMemory memory;
    std::vector<Read> before;
    std::vector<Write> after;
    Write y;
    int form;

    template <class T>
    MemorySequences<T> as() const {
        const Sequences<T> in = sequences.as<T>();
        MemorySequences<T> call{memory,   in.batch, in.steps, in.x,      in.stride_batch, in.stride_time,  in.mask,
                                in.reset, {},       {},       in.places, y.as<T>(),       MemoryForm(form)};
        for (size_t k = 0; k < before.size(); ++k) call.before[k] = before[k].as<const T>();
        for (size_t k = 0; k < after.size(); ++k) call.after[k] = after[k].as<T>();
        return call;
    }
};

template <class T>
void run_memory(const MemoryOf& of, int threads) {
    const MemorySequences<T> call = of.as<T>();
    nb::gil_scoped_release released;
    memory_forward<T>(call, threads);
}

template <class T>
void run_memory_back(const MemoryOf& of, const Read& dy, const std::vector<Read>& dafter, const Write& dx,
                     const std::vector<Write>& dbefore, int threads) {
    const MemorySequences<T> call = of.as<T>();
    MemoryGradients<T> gradients{};
    gradients.dy = dy.as<const T>(), gradients.dx = dx.as<T>();
    for (size_t k = 0; k < dafter.size(); ++k) gradients.dafter[k] = dafter[k].as<const T>();
    for (size_t k = 0; k < dbefore.size(); ++k) gradients.dbefore[k] = dbefore[k].as<T>();
    nb::gil_scoped_release released;
    memory_backward<T>(call, gradients, threads);
}

void check_states(const char* name, size_t count) {
    if (count && count != kMatrixStates)
        throw nb::value_error((std::string("Memory: expected ") + name + " to be C, n and m, or none").c_str());
}

void bind_mlstm(nb::module_& m) {
    m.attr("SHORT_CHUNK") = kShortChunk;
    nb::class_<MemoryOf>(m, "Memory")
        .def(
            "__init__",
            [](MemoryOf* self, const SequencesOf& sequences, int64_t heads, int64_t keys, int64_t values,
               double epsilon, std::vector<Read> before, std::vector<Write> after, Write y, int form) {
                check_states("before", before.size()), check_states("after", after.size());
                if (form < 0 || form > 2) throw nb::value_error("Memory: expected form to be 0, 1 or 2");
                new (self)
                    MemoryOf{sequences, {heads, keys, values, epsilon}, std::move(before), std::move(after), y, form};
            },
            "sequences"_a, "heads"_a, "keys"_a, "values"_a, "epsilon"_a, "before"_a, "after"_a, "y"_a, "form"_a = 0,
            "The arrays of an mLSTM's call: see kernel/mlstm.h.");
    m.def(
        "memory_forward",
        [](const MemoryOf& of, bool twice, int threads) {
            (twice ? run_memory<double> : run_memory<float>)(of, threads);
        },
        "memory"_a, "twice"_a, "threads"_a);
    m.def(
        "memory_backward",
        [](const MemoryOf& of, bool twice, Read dy, const std::vector<Read>& dafter, Write dx,
           const std::vector<Write>& dbefore, int threads) {
            check_states("dafter", dafter.size()), check_states("dbefore", dbefore.size());
            (twice ? run_memory_back<double> : run_memory_back<float>)(of, dy, dafter, dx, dbefore, threads);
        },
        "memory"_a, "twice"_a, "dy"_a, "dafter"_a, "dx"_a, "dbefore"_a, "threads"_a);
}

}  // namespace
