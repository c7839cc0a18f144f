// ONNX's recurrent operators for ONNX Runtime. Its custom operators "Recurrent" and "RecurrentDouble" have the
// attribute `handle`, a number under which a Recurrent is published when a session is created; the session then keeps
// it.
#pragma once
#include <memory>
#include <vector>

#include "cell.h"

namespace cellstack {

// An operator without its inputs. Which of the optional ones it takes determines their order: X, the lengths, the
// states.
struct Recurrent {
    bool reverse;           // of its only direction
    bool batch_first;       // ONNX's layout 1
    bool directions;        // whether y and the states have an axis of directions, as in ONNX, other than of a Scan
    bool lengths;           // whether the rows' lengths are an input
    bool started[kStates];  // whether an initial state is an input; otherwise it is the cell's
    int threads;            // at most
    std::vector<std::unique_ptr<const Weights<float>>> single;  // of each direction; one of the two lists is empty
    std::vector<std::unique_ptr<const Weights<double>>> twice;

    template <class T>
    const std::vector<std::unique_ptr<const Weights<T>>>& cells() const {
        if constexpr (sizeof(T) == 4)
            return single;
        else
            return twice;
    }
};

int64_t publish(std::shared_ptr<const Recurrent> recurrent);  // returns its handle
void withdraw(int64_t handle);

}  // namespace cellstack
