// Steps of a pool's sessions from Python: the checks and the call of the kernel together, with little overhead.
#pragma once
#include <vector>

#include "bind_locks.h"

namespace {

// The step of sessions whose states are rows of arrays.
template <class T>
class SessionSteps {
  public:
    // The layers have their arrays of states as `before` and `after`; the table belongs to these sessions.
    SessionSteps(nb::object table, nb::list layers, int threads)
        : table_(nb::cast<SessionTable&>(table)),
          kept_(nb::make_tuple(table, layers)),
          layers_(layers_of<T>(layers)),
          threads_(threads) {}

    // Returns y [n, P] of x [n, I], whose rows may have gaps between them; None if an argument isn't an array that
    // needs no conversion.
    nb::object step(nb::handle sessions, nb::handle given) {
        auto* numbers = reinterpret_cast<PyArrayObject*>(sessions.ptr());
        auto* x = reinterpret_cast<PyArrayObject*>(given.ptr());
        constexpr int type = sizeof(T) == 8 ? NPY_DOUBLE : NPY_FLOAT;
        const int64_t width = layers_.front().weights->description().x_width();
        if (!PyArray_CheckExact(sessions.ptr()) || PyArray_NDIM(numbers) != 1 || PyArray_TYPE(numbers) != NPY_INT64 ||
            !PyArray_ISCARRAY_RO(numbers) || !PyArray_CheckExact(given.ptr()) || PyArray_NDIM(x) != 2 ||
            PyArray_TYPE(x) != type || !PyArray_ISALIGNED(x) || !PyArray_ISNOTSWAPPED(x) || !PyArray_SIZE(x) ||
            PyArray_DIM(x, 0) != PyArray_DIM(numbers, 0) || PyArray_DIM(x, 1) != width ||
            PyArray_STRIDE(x, 1) != npy_intp(sizeof(T)) || PyArray_STRIDE(x, 0) % npy_intp(sizeof(T)))
            return nb::none();
        const npy_intp count = PyArray_DIM(x, 0);
        const npy_intp shape[2] = {count, npy_intp(layers_.back().weights->description().output)};
        nb::object y = nb::steal(PyArray_SimpleNew(2, shape, type));
        if (!y.is_valid()) nb::raise_python_error();
        std::vector<Layer<T>> layers = layers_;
        layers.back().y = static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(y.ptr())));
        const Locked locked(table_, static_cast<const int64_t*>(PyArray_DATA(numbers)), size_t(count));
        const int64_t stride = PyArray_STRIDE(x, 0) / npy_intp(sizeof(T));
        const Sequences<T> in{count,   1,     static_cast<const T*>(PyArray_DATA(x)),
                              stride,  width, nullptr,
                              nullptr, false, locked.slots.data()};
        nb::gil_scoped_release released;
        forward<T>(in, layers, threads_);
        return y;
    }

  private:
    struct Locked {
        Locked(SessionTable& of, const int64_t* numbers, size_t count) : table(of), slots(of.lock(numbers, count)) {}
        ~Locked() { table.unlock(slots); }
        Locked(const Locked&) = delete;
        SessionTable& table;
        std::vector<int64_t> slots;
    };

    SessionTable& table_;
    nb::tuple kept_;  // what the addresses in the layers refer to
    std::vector<Layer<T>> layers_;
    int threads_;
};

template <class T>
void bind_session_steps(nb::module_& m, const char* name) {
    nb::class_<SessionSteps<T>>(m, name).def(
        "step", &SessionSteps<T>::step, "sessions"_a.none(), "x"_a.none(),
        "y [n, P] of x [n, I] for n different open sessions; None where an argument isn't an array as the kernel takes "
        "it.");
}

void bind_sessions(nb::module_& m) {
    bind_locks(m);
    bind_session_steps<float>(m, "SessionStepsSingle");
    bind_session_steps<double>(m, "SessionStepsDouble");
    m.def(
        "session_steps",
        [](nb::object table, nb::list layers, int threads) -> nb::object {
            if (is_double(layers, "session_steps"))
                return nb::cast(new SessionSteps<double>(table, layers, threads), nb::rv_policy::take_ownership);
            return nb::cast(new SessionSteps<float>(table, layers, threads), nb::rv_policy::take_ownership);
        },
        "table"_a, "layers"_a, "threads"_a);
}

}  // namespace
