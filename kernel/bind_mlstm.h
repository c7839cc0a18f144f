// Calls of an mLSTM's memory from Python, and steps of memories with the dense layers around them.
#pragma once
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <tuple>

#include "bind_streams.h"
#include "mlstm.h"
#include "nodes.h"
#include "scratch.h"

namespace {

// A call as Python describes it, before its number type is known.
struct MemoryOf {
    SequencesOf sequences;
    MatrixMemory memory;
    std::vector<Read> before;
    std::vector<Write> after;
    Write y;
    int form;
    bool gated;
    Write scores;
    int64_t score_row;

    template <class T>
    MemorySequences<T> as() const {
        const Sequences<T> in = sequences.as<T>();
        MemorySequences<T> call{memory,   in.batch, in.steps, in.x,      in.stride_batch, in.stride_time,  in.mask,
                                in.reset, {},       {},       in.places, y.as<T>(),       MemoryForm(form)};
        call.gated = gated, call.scores = scores.as<T>(), call.score_row = score_row;
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

// Dense layers and memories in turn, run one step at a time. The states of the memories are arrays of the caller, of
// which there may be two sets.
template <class T>
class MemorySteps {
  public:
    // A stage is a layer without a state, or heads, keys, values, epsilon of a memory, and whether it has an output
    // gate.
    MemorySteps(const nb::list& stages, int64_t rows, int threads)
        : kept_(nb::tuple(stages)), rows_(rows), threads_(threads) {
        for (nb::handle stage : stages) {
            Stage made{};
            if (nb::isinstance<Weights<T>>(stage)) {
                made.weights = nb::cast<const Weights<T>*>(stage);
                made.input = made.weights->description().input, made.output = made.weights->description().output;
            } else {
                const auto [heads, keys, values, epsilon, gated] =
                    nb::cast<std::tuple<int64_t, int64_t, int64_t, double, bool>>(stage);
                made.memory = {heads, keys, values, epsilon}, made.gated = gated;
                made.output = made.memory.output(), made.input = made.memory.width() + gated * made.output;
            }
            widest_ = std::max(widest_, made.output);
            stages_.push_back(made);
        }
        if (stages_.empty()) throw nb::value_error("MemorySteps: expected at least one stage");
    }

    // Sets one of the two sets of states: C, n and m of each memory in turn.
    void set_states(int number, const nb::list& states) {
        size_t n = 0;
        for (Stage& stage : stages_)
            for (int s = 0; s < kMatrixStates && !stage.weights; ++s, ++n)
                stage.states[number][s] = nb::cast<Write>(states[n]).as<T>();
        states_[number] = states;
    }

    // y [n, W] of x [n, I]: from the states `before` to the states `after`, each the number of a set. `places` [n] are
    // the rows of the states; None: all of them. Returns None for an x that isn't an array as the kernel takes it.
    nb::object step(nb::handle given, Read places, int before, int after) {
        auto* x = reinterpret_cast<PyArrayObject*>(given.ptr());
        constexpr int type = sizeof(T) == 8 ? NPY_DOUBLE : NPY_FLOAT;
        if (!PyArray_CheckExact(given.ptr()) || PyArray_NDIM(x) != 2 || PyArray_TYPE(x) != type ||
            !PyArray_ISCARRAY_RO(x) || PyArray_DIM(x, 1) != stages_.front().input ||
            (!places.at && PyArray_DIM(x, 0) != rows_))
            return nb::none();
        const int64_t rows = PyArray_DIM(x, 0);
        const npy_intp shape[2] = {npy_intp(rows), npy_intp(stages_.back().output)};
        nb::object y = nb::steal(PyArray_SimpleNew(2, shape, type));
        if (!y.is_valid()) nb::raise_python_error();
        auto* to = static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(y.ptr())));
        const auto* from = static_cast<const T*>(PyArray_DATA(x));
        std::optional<InUse> in_use;
        if (!places.at) in_use.emplace(busy_);  // calls for different rows may run at the same time
        nb::gil_scoped_release released;
        const int64_t size = checked(rows, widest_);
        const Scratch<T> between(2 * size);
        for (size_t n = 0; n < stages_.size() && rows; ++n) {
            T* out = n + 1 == stages_.size() ? to : between.get() + int64_t(n % 2) * size;
            run(stages_[n], from, out, rows, places.as<const int64_t>(), before, after);
            from = out;
        }
        return y;
    }

  private:
    struct Stage {
        const Weights<T>* weights;  // null: a memory
        MatrixMemory memory;
        bool gated;
        int64_t input, output;
        T* states[2][kMatrixStates];
    };
    void run(const Stage& stage, const T* x, T* y, int64_t rows, const int64_t* places, int before, int after) const {
        if (stage.weights) return multiply_groups<T>(&stage.weights, 1, x, y, rows, threads_);
        MemorySequences<T> call{};
        call.memory = stage.memory, call.batch = rows, call.steps = 1, call.gated = stage.gated;
        call.x = x, call.x_row = call.x_time = stage.input, call.y = y, call.places = places;
        for (int s = 0; s < kMatrixStates; ++s)
            call.before[s] = stage.states[before][s], call.after[s] = stage.states[after][s];
        memory_forward<T>(call, threads_);
    }

    nb::tuple kept_;
    nb::object states_[2];
    std::vector<Stage> stages_;
    int64_t rows_, widest_ = 0;
    int threads_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

template <class T>
void bind_memory_steps(nb::module_& m, const char* name) {
    nb::class_<MemorySteps<T>>(m, name)
        .def("set_states", &MemorySteps<T>::set_states, "number"_a, "states"_a,
             "Set one of the two sets of states, 0 or 1: a list of C, n and m of each memory in turn.")
        .def("step", &MemorySteps<T>::step, "x"_a.none(), "places"_a = nb::none(), "before"_a = 0, "after"_a = 0,
             "y [n, W] of x [n, I], from one set of states to another; None where x isn't an array as the kernel takes "
             "it. `places` [n]: the rows of the states; None: all of them.");
}

void bind_mlstm(nb::module_& m) {
    m.attr("SHORT_CHUNK") = kShortChunk;
    bind_memory_steps<float>(m, "MemoryStepsSingle");
    bind_memory_steps<double>(m, "MemoryStepsDouble");
    m.def(
        "memory_steps",
        [](const nb::list& stages, int64_t rows, bool twice, int threads) -> nb::object {
            if (twice) return nb::cast(new MemorySteps<double>(stages, rows, threads), nb::rv_policy::take_ownership);
            return nb::cast(new MemorySteps<float>(stages, rows, threads), nb::rv_policy::take_ownership);
        },
        "stages"_a, "rows"_a, "twice"_a, "threads"_a,
        "Dense layers and memories in turn, run step by step: Weights, or (heads, keys, values, epsilon, whether there "
        "is an output gate).");
    m.def(
        "score_row",
        [](int64_t keys, int64_t values, int64_t steps, bool before, bool after) {
            return score_row(MatrixMemory{1, keys, values, 0}, steps, before, after);
        },
        "keys"_a, "values"_a, "steps"_a, "before"_a, "after"_a,
        "The numbers per step and head that memory_forward can keep for memory_backward; 0: none.");
    nb::class_<MemoryOf>(m, "Memory")
        .def(
            "__init__",
            [](MemoryOf* self, const SequencesOf& sequences, int64_t heads, int64_t keys, int64_t values,
               double epsilon, std::vector<Read> before, std::vector<Write> after, Write y, int form, bool gated,
               Write scores, int64_t score_row) {
                check_states("before", before.size()), check_states("after", after.size());
                if (form < 0 || form > 2) throw nb::value_error("Memory: expected form to be 0, 1 or 2");
                new (self) MemoryOf{sequences,
                                    {heads, keys, values, epsilon},
                                    std::move(before),
                                    std::move(after),
                                    y,
                                    form,
                                    gated,
                                    scores,
                                    score_row};
            },
            "sequences"_a, "heads"_a, "keys"_a, "values"_a, "epsilon"_a, "before"_a, "after"_a, "y"_a, "form"_a = 0,
            "gated"_a = false, "scores"_a = nb::none(), "score_row"_a = 0,
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
