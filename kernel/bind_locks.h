// Locks and the table of a pool's sessions, for Python. They are written in C++ because there a signal handler can't
// raise while a with statement enters or leaves; in Python, a stream or a session could stay locked forever. The GIL
// protects all of it.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_calls.h"

namespace {

// The lock of a stream.
class CallLock {
  public:
    // One call's attempt to lock it.
    class Attempt {
      public:
        explicit Attempt(CallLock& of) : of_(of) {}
        // Returns whether the call now has the lock; false if another call has it.
        bool enter() {
            locks_ = !of_.locked_;
            of_.locked_ = true;
            return locks_;
        }
        void exit(const nb::args&) {
            if (locks_) of_.locked_ = false;
            locks_ = false;
        }

      private:
        CallLock& of_;
        bool locks_ = false;
    };

    Attempt attempt() { return Attempt(*this); }

  private:
    bool locked_ = false;
};

// Zeros that take no memory before they are written to.
template <class T>
class Zeros {
  public:
    explicit Zeros(size_t count) : data_(static_cast<T*>(std::calloc(count, sizeof(T))), &std::free) {
        if (!data_) throw std::bad_alloc();
    }
    T& operator[](size_t n) { return data_.get()[n]; }

  private:
    std::unique_ptr<T, decltype(&std::free)> data_;
};

// Which sessions of a pool are open, and locks on their slots, whose states a call reads and writes. The number of a
// session is slot + capacity * round, where the round counts how often the slot was used before: numbers aren't reused.
class SessionTable {
  public:
    explicit SessionTable(size_t capacity) : capacity_(capacity), open_(capacity), locked_(capacity), used_(capacity) {}

    // The sessions of one call.
    class Lock {
      public:
        Lock(SessionTable& of, nb::object numbers) : of_(of), numbers_(std::move(numbers)) {}
        // Locks the sessions and returns their slots.
        nb::object enter() {
            auto* array = reinterpret_cast<PyArrayObject*>(numbers_.ptr());
            const npy_intp count = PyArray_DIM(array, 0);
            nb::object slots = nb::steal(PyArray_SimpleNew(1, &count, NPY_INT64));
            if (!slots.is_valid()) nb::raise_python_error();
            slots_ = of_.lock(static_cast<const int64_t*>(PyArray_DATA(array)), size_t(count));
            std::copy(slots_.begin(), slots_.end(),
                      static_cast<int64_t*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(slots.ptr()))));
            return slots;
        }
        void exit(const nb::args&) {
            of_.unlock(slots_);
            slots_.clear();
        }

      private:
        SessionTable& of_;
        nb::object numbers_;
        std::vector<int64_t> slots_;
    };

    Lock locked(nb::object numbers) {
        auto* array = reinterpret_cast<PyArrayObject*>(numbers.ptr());
        if (!PyArray_CheckExact(numbers.ptr()) || PyArray_TYPE(array) != NPY_INT64 || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array))
            throw nb::type_error("SessionTable: expected numbers as a contiguous array of int64");
        return {*this, std::move(numbers)};
    }

    // A session that a call opens.
    class Opening {
      public:
        explicit Opening(SessionTable& of) : of_(of) {}
        // Locks a slot that is neither locked nor open, and returns the number of its next session; None if there is
        // none.
        nb::object enter() {
            for (size_t n = 0; n < of_.capacity_; ++n) {
                const size_t slot = (of_.next_ + n) % of_.capacity_;
                if (of_.open_[slot] || of_.locked_[slot]) continue;
                of_.locked_[slot] = 1, of_.next_ = slot + 1, slot_ = int64_t(slot);
                return nb::int_(int64_t(slot) + int64_t(of_.capacity_) * of_.used_[slot]);
            }
            return nb::none();
        }
        // The session is open unless there was an exception.
        void exit(nb::handle raised, nb::handle, nb::handle) {
            if (slot_ < 0) return;
            if (raised.is_none()) of_.open_[size_t(slot_)] = 1, ++of_.used_[size_t(slot_)], ++of_.count_;
            of_.locked_[size_t(slot_)] = 0;
            slot_ = -1;
        }

      private:
        SessionTable& of_;
        int64_t slot_ = -1;
    };

    Opening opening() { return Opening(*this); }

    // Locks the slots of different open sessions and returns them; otherwise changes nothing and throws.
    std::vector<int64_t> lock(const int64_t* numbers, size_t count) {
        std::vector<int64_t> slots(count);
        for (size_t n = 0; n < count; ++n) {
            if (!is_open(numbers[n]))
                throw nb::key_error(("Sessions: session " + std::to_string(numbers[n]) + " is not open").c_str());
            slots[n] = numbers[n] % int64_t(capacity_);
        }
        for (size_t n = 0; n < count; ++n) {
            if (locked_[size_t(slots[n])]) {
                bool twice = false;
                for (size_t k = 0; k < n; ++k) {
                    locked_[size_t(slots[k])] = 0;
                    twice |= slots[k] == slots[n];
                }
                const std::string number = std::to_string(numbers[n]);
                if (twice)
                    throw nb::value_error(("Sessions: session " + number + " is given twice in one step").c_str());
                throw std::runtime_error("Sessions: another thread is stepping session " + number);
            }
            locked_[size_t(slots[n])] = 1;
        }
        return slots;
    }
    void unlock(const std::vector<int64_t>& slots) {
        for (int64_t slot : slots) locked_[size_t(slot)] = 0;
    }
    // The caller has the session's lock, or nobody knows its number.
    void close(int64_t number) {
        if (!is_open(number)) return;
        open_[size_t(number % int64_t(capacity_))] = 0;
        --count_;
    }
    size_t count() const { return count_; }

  private:
    bool is_open(int64_t number) {
        const int64_t capacity = int64_t(capacity_);
        return number >= 0 && open_[size_t(number % capacity)] &&
               used_[size_t(number % capacity)] == number / capacity + 1;
    }
    size_t capacity_, count_ = 0;
    Zeros<char> open_, locked_;
    Zeros<int64_t> used_;  // how often each slot was opened
    size_t next_ = 0;      // where the search for a free slot starts
};

void bind_locks(nb::module_& m) {
    nb::class_<CallLock>(m, "CallLock")
        .def(nb::init<>())
        .def("attempt", &CallLock::attempt, nb::keep_alive<0, 1>(),
             "A context manager that takes the lock: it returns whether the call has it, or another call.");
    nb::class_<CallLock::Attempt>(m, "Attempt")
        .def("__enter__", &CallLock::Attempt::enter)
        .def("__exit__", &CallLock::Attempt::exit);
    nb::class_<SessionTable>(m, "SessionTable")
        .def(nb::init<size_t>(), "capacity"_a)
        .def("opening", &SessionTable::opening, nb::keep_alive<0, 1>(),
             "A context manager that opens a session: it locks its slot and returns its number, or None if there is no "
             "free slot. The session is open after the context, unless this raised.")
        .def("locked", &SessionTable::locked, "numbers"_a, nb::keep_alive<0, 1>(),
             "A context manager that locks different open sessions and returns their slots.")
        .def("close", &SessionTable::close, "number"_a, "Close a session if it is open.")
        .def("__len__", &SessionTable::count);
    nb::class_<SessionTable::Lock>(m, "SessionLock")
        .def("__enter__", &SessionTable::Lock::enter)
        .def("__exit__", &SessionTable::Lock::exit);
    nb::class_<SessionTable::Opening>(m, "Opening")
        .def("__enter__", &SessionTable::Opening::enter)
        .def("__exit__", &SessionTable::Opening::exit, nb::arg().none(), nb::arg().none(), nb::arg().none());
}

}  // namespace
