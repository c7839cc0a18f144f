// Locks on the slots of sessions and streams, for Python.
#pragma once
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "bind_calls.h"

namespace {

// Locks on the slots whose states a call reads and writes. It is written in C++ because there a signal handler can't
// raise while a with statement enters or leaves; in Python, a slot could stay locked forever. The GIL protects all of
// it.
class SlotLocks {
  public:
    explicit SlotLocks(size_t slots) : locked_(slots, 0) {}

    // Those of one call: the slots with these indices, or all.
    class Lock {
      public:
        Lock(SlotLocks& of, std::vector<int64_t> slots) : of_(of), slots_(std::move(slots)) {}
        // Returns None if the slots are now locked; otherwise the position of the first slot that was locked already,
        // and whether this call locked it itself because `slots` contains it twice.
        nb::object enter() {
            const auto slot = [&](size_t n) -> char& { return of_.locked_[size_t(slots_[n])]; };
            for (size_t n = 0; n < slots_.size(); ++n) {
                if (slot(n)) {
                    const auto here = slots_.begin() + int64_t(n);
                    const bool twice = std::find(slots_.begin(), here, slots_[n]) != here;
                    for (size_t k = 0; k < n; ++k) slot(k) = 0;
                    return nb::make_tuple(n, twice);
                }
                slot(n) = 1;
            }
            locks_ = true;
            return nb::none();
        }
        void exit(const nb::args&) {
            if (locks_)
                for (int64_t slot : slots_) of_.locked_[size_t(slot)] = 0;
            locks_ = false;
        }

      private:
        SlotLocks& of_;
        std::vector<int64_t> slots_;
        bool locks_ = false;
    };

    Lock lock(nb::handle slots) {
        std::vector<int64_t> all(slots.is_none() ? locked_.size() : 0);
        std::iota(all.begin(), all.end(), 0);
        if (slots.is_none()) return {*this, std::move(all)};
        auto* array = reinterpret_cast<PyArrayObject*>(slots.ptr());
        if (!PyArray_CheckExact(slots.ptr()) || PyArray_TYPE(array) != NPY_INT64 || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array))
            throw nb::type_error("SlotLocks: expected slots as a contiguous array of int64");
        const auto* first = static_cast<const int64_t*>(PyArray_DATA(array));
        all.assign(first, first + PyArray_DIM(array, 0));
        for (int64_t slot : all)
            if (slot < 0 || size_t(slot) >= locked_.size())
                throw nb::index_error(("SlotLocks: there is no slot " + std::to_string(slot)).c_str());
        return {*this, std::move(all)};
    }

    // A slot that is neither locked nor open, for a call that opens it.
    class FreeSlot {
      public:
        FreeSlot(SlotLocks& of, nb::object open) : of_(of), open_(std::move(open)) {}
        // Locks such a slot and returns it, or returns None if there is none.
        nb::object enter() {
            auto* array = reinterpret_cast<PyArrayObject*>(open_.ptr());
            const auto* open = static_cast<const char*>(PyArray_DATA(array));
            const size_t slots = of_.locked_.size();
            for (size_t n = 0; n < slots; ++n) {
                const size_t slot = (of_.next_ + n) % slots;
                if (open[slot] || of_.locked_[slot]) continue;
                of_.locked_[slot] = 1, of_.next_ = slot + 1, slot_ = int64_t(slot);
                return nb::int_(slot);
            }
            return nb::none();
        }
        void exit(const nb::args&) {
            if (slot_ >= 0) of_.locked_[size_t(slot_)] = 0;
            slot_ = -1;
        }

      private:
        SlotLocks& of_;
        nb::object open_;
        int64_t slot_ = -1;
    };

    FreeSlot free(nb::object open) {
        auto* array = reinterpret_cast<PyArrayObject*>(open.ptr());
        if (!PyArray_CheckExact(open.ptr()) || PyArray_TYPE(array) != NPY_BOOL || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array) || size_t(PyArray_DIM(array, 0)) != locked_.size())
            throw nb::type_error("SlotLocks: expected open as a contiguous array of bool, one per slot");
        return {*this, std::move(open)};
    }

  private:
    std::vector<char> locked_;
    size_t next_ = 0;  // where the search for a free slot starts
};

void bind_locks(nb::module_& m) {
    nb::class_<SlotLocks>(m, "SlotLocks")
        .def(nb::init<size_t>(), "slots"_a)
        .def("free", &SlotLocks::free, "open"_a, nb::keep_alive<0, 1>(),
             "A context manager that locks a slot which is neither locked nor open: it returns the slot's number, or "
             "None if there is none.")
        .def(
            "lock", &SlotLocks::lock, "slots"_a.none() = nb::none(), nb::keep_alive<0, 1>(),
            "A context manager that locks slots: it returns None; or, if a slot was already locked, its position among "
            "the slots, and whether it is listed twice.");
    nb::class_<SlotLocks::FreeSlot>(m, "FreeSlot")
        .def("__enter__", &SlotLocks::FreeSlot::enter)
        .def("__exit__", &SlotLocks::FreeSlot::exit);
    nb::class_<SlotLocks::Lock>(m, "Lock")
        .def("__enter__", &SlotLocks::Lock::enter)
        .def("__exit__", &SlotLocks::Lock::exit);
}

}  // namespace
