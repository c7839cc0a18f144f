#pragma once
#include <vector>

#include "leaf.h"

namespace cellstack {

const InstructionSet& current();

// The bytes of weights that stay in a core's second-level cache from step to step, next to the rows of a step.
double resident_bytes();

template <class T>
const Leaf<T>& leaf_of(const InstructionSet& set) {
    if constexpr (sizeof(T) == 4)
        return set.single;
    else
        return set.twice;
}

// The leaf for a layer of this many units: that of the instruction set in use. If at least half of each vector would be
// padding, and the set wasn't chosen by name, it is that of AVX2, whose sums have the same bits.
template <class T>
const Leaf<T>& leaf_for(int64_t units);

// A matrix of a cell in the caller's layout, or a bias as a matrix of depth 1.
template <class T>
Matrix<T> matrix_of(const Description& d, const T* at, int64_t depth, int64_t units, int gates) {
    Matrix<T> m{at, depth, units, gates, d.rows, {}};
    for (int gate = 0; gates > 1 && gate < gates; ++gate) m.places[gate] = d.place(gate);
    return m;
}

// The band of a recurrent matrix in panels of `wide` columns, with `step` of the `total` rows in one, for weights of
// this format.
struct Bands {
    int64_t depth;
    std::vector<int64_t> first;  // empty without heads
    bool diagonal = false;
    Band band() const { return {depth, first.empty() ? nullptr : first.data(), diagonal}; }
};
Bands bands_of(const Description& d, int64_t wide, int64_t total, int64_t step, Element element);

// The recurrent matrix in the caller's layout, and which part of it a panel has.
template <class T>
Matrix<T> recurrent_of(const Description& d, const T* at, const Band& band) {
    Matrix<T> m = matrix_of(d, at, d.output, d.sum_units(), d.sum_gates());
    m.heads = d.heads, m.band = band;
    return m;
}

}  // namespace cellstack
