#pragma once
#include "leaf.h"

namespace cellstack {

const InstructionSet& current();

template <class T>
const Leaf<T>& leaf_of(const InstructionSet& set) {
    if constexpr (sizeof(T) == 4)
        return set.single;
    else
        return set.twice;
}

// The leaf of a layer of so many units: that of the set in use; but where half a vector's lanes or more would lie idle,
// and nobody has asked for that set by name, AVX2's, whose sums have the same bits.
template <class T>
const Leaf<T>& leaf_for(int64_t units);

// A matrix of a cell, or its bias, of depth 1, as the caller has it.
template <class T>
Matrix<T> matrix_of(const Description& d, const T* at, int64_t depth, int64_t units, int gates) {
    Matrix<T> m{at, depth, units, gates, d.rows, {}};
    for (int gate = 0; gates > 1 && gate < gates; ++gate) m.places[gate] = d.place(gate);
    return m;
}

}  // namespace cellstack
