// Every kind of cell in one table, which kernel/declared.py writes from `src/cellstack/cells/`; a kind also has a
// header with a struct of its routines (see cells.h), whose name its row begins with.
#pragma once
#include <cstdint>
#include <cstring>

#include "declared.h"

namespace cellstack {

// The most states that a kind may have: h, the output, with P numbers per row; and inner states such as an LSTM's c,
// with H numbers per row, in the order of the kind's declaration.
constexpr int kStates = 4, kInner = kStates - 1;
constexpr int kMostGates = 4;  // more would need tiles, sums and vectors of that many gates

struct Kind {
    const char* name;
    int gates;                // each has a block of H columns in every matrix
    const char* slots;        // activations of the gates, and of c if h = o·φ(c): by default sigmoid (s) or tanh (t),
                              // which have a specialised copy of each routine; any (-)
    int in_rows[kMostGates];  // the positions of the gates' blocks in PyTorch's layout
    int states;               // h and inner states; 0: a layer without a state
    bool recurrent;           // whether the sums of the gates include a product with h
    bool drops_candidate;     // whether recurrent dropout multiplies the candidate, and not h in that product
    bool resets;              // whether gate 1 multiplies h in the candidate's product: before it, or after it
    int normed;               // layer normalisation: how many gates form a group, the others form a second; 0: all
    int saved;                // how many numbers per unit a step saves for the backward pass in addition to the gates
};

// The position of a kind in the table.
enum KindIndex : int {
#define CELLSTACK_KIND(rows, ...) k##rows,
    CELLSTACK_KINDS(CELLSTACK_KIND)
#undef CELLSTACK_KIND
        kDense
};

#define CELLSTACK_KIND(rows, name, gates, ...) \
    static_assert(gates <= kMostGates, "the kernel computes at most kMostGates gates: " name);
CELLSTACK_KINDS(CELLSTACK_KIND)
#undef CELLSTACK_KIND

inline constexpr Kind kKinds[] = {
#define CELLSTACK_KIND(rows, ...) {__VA_ARGS__},
    CELLSTACK_KINDS(CELLSTACK_KIND)
#undef CELLSTACK_KIND
    // A dense layer, whose output at a step depends on that step only; it has a forward pass only.
    {"dense", 1, "", {0}, 0, false, false, false, 0, 0}};

// Null if there is no such kind.
inline const Kind* kind_named(const char* name) {
    for (const Kind& kind : kKinds)
        if (!strcmp(kind.name, name)) return &kind;
    return nullptr;
}

}  // namespace cellstack
