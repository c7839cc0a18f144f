// ONNX's recurrent operators for ONNX Runtime, from Python.
#pragma once
#include "bind_calls.h"
#include "onnxruntime.h"

namespace {

// Publishes an operator for as long as this object exists.
class BoundRecurrent {
  public:
    // Each cell is a description and arrays.
    BoundRecurrent(const nb::list& cells, bool twice, bool reverse, bool batch_first, bool directions, bool lengths,
                   const nb::list& started, int threads) {
        auto made = std::make_shared<Recurrent>();
        made->reverse = reverse, made->batch_first = batch_first, made->directions = directions;
        made->lengths = lengths, made->threads = threads;
        for (size_t k = 0; k < std::size(made->started); ++k)
            made->started[k] = k < started.size() && nb::cast<bool>(started[k]);
        for (nb::handle cell : cells) {
            const auto& [description, arrays] = nb::cast<std::pair<Description, nb::tuple>>(cell);
            if (twice)
                made->twice.push_back(std::make_unique<Weights<double>>(description, arrays_of<const double>(arrays)));
            else
                made->single.push_back(std::make_unique<Weights<float>>(description, arrays_of<const float>(arrays)));
        }
        handle_ = publish(std::move(made));
    }
    ~BoundRecurrent() { withdraw(handle_); }
    BoundRecurrent(const BoundRecurrent&) = delete;
    int64_t handle() const { return handle_; }

  private:
    int64_t handle_;
};

void bind_onnxruntime(nb::module_& m) {
    nb::class_<BoundRecurrent>(m, "Recurrent")
        .def(nb::init<const nb::list&, bool, bool, bool, bool, bool, const nb::list&, int>(), "cells"_a, "twice"_a,
             "reverse"_a, "batch_first"_a, "directions"_a, "lengths"_a, "started"_a, "threads"_a)
        .def_prop_ro("handle", &BoundRecurrent::handle);
}

}  // namespace
