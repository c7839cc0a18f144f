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

}  // namespace cellstack
