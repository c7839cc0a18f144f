// What a cell is, without its weights: the kernel's view of cellstack.cells.spec.CellSpec.
#pragma once
#include <cstdint>

#include "kinds.h"

namespace cellstack {

// Number formats. A call computes in float32 or float64; matrices of a float32 call may have a narrower format.
enum class Element : int { kFloat32, kFloat64, kBfloat16, kInt8 };

template <class T>
constexpr Element element_of() {
    return sizeof(T) == 8 ? Element::kFloat64 : Element::kFloat32;
}
constexpr bool narrow(Element e) { return e == Element::kBfloat16 || e == Element::kInt8; }

// 32-bit words per column of `depth` narrow weights.
constexpr int64_t narrow_words(int64_t depth, int bits) { return (depth * bits + 31) / 32; }
constexpr int bits_of(Element e) { return e == Element::kBfloat16 ? 16 : 8; }
// The same for weights in any format, in numbers of the call's type.
constexpr int64_t words_of(Element e, int64_t depth) { return narrow(e) ? narrow_words(depth, bits_of(e)) : depth; }

// The distance between rows that are multiplied by narrow weights, in words: rows for bfloat16 may be stored as floats,
// and are written in whole vectors.
constexpr int64_t narrow_stride(Element e, int64_t depth) {
    return e == Element::kBfloat16 ? (depth + 15) / 16 * 16 : narrow_words(depth, 8);
}

// In the order of cellstack.cells.activations.ACTIVATIONS.
enum ActivationCode : int {
    kSigmoid,
    kTanh,
    kLinear,
    kRelu,
    kHardSigmoid,
    kSoftsign,
    kSoftplus,
    kElu,
    kAffine,
    kLeakyRelu,
    kThresholdedRelu,
    kScaledTanh,
    kPositive,
    kActivations,
    // in the order of kNodeActivations
    kSilu = kActivations,
    kGelu,
    kGeluTanh
};

// Activations whose derivative isn't a function of their value: of layers without a state, and, except the last one, of
// backbones.
inline constexpr const char* kNodeActivations[] = {"silu", "gelu", "gelu_tanh"};

struct Activation {
    int code;
    double alpha, beta;
};

struct Description {
    const Kind* kind;
    int64_t input, units, output;  // I, without a scalar; H; P: the width of h, H where nothing is projected
    // Of activation, recurrent_activation and gate_activations: one for each of the kind's slots; then a backbone's.
    Activation activations[kMostGates + 1];
    bool rows = false;  // whether matrices have PyTorch's layout: see Arrays
    // The settings of cellstack.cells.spec.CellSpec, and `scalar`: whether the last number of a row of x is one of the
    // step, which isn't multiplied by the kernel. Without `use_kernel` x has the sums over x of all gates.
#define CELLSTACK_FLAG(type, name, value) type name = value;
    CELLSTACK_FLAGS(CELLSTACK_FLAG)
#undef CELLSTACK_FLAG

    bool joint() const { return layer_norm == 2; }  // layer_norm="joint"
    // Numbers per row of x.
    int64_t x_width() const { return input + scalar; }
    bool projects() const { return output != units; }  // proj_size
    bool keeps_state() const { return kind->states > 0; }
    int inner_states() const { return kind->states > 1 ? kind->states - 1 : 0; }
    // Numbers per row of a state; state 0 is h.
    int64_t width(int state) const { return state ? units : output; }
    // Numbers of x that the kernel multiplies.
    int64_t multiplied() const { return use_kernel ? input : 0; }
    // Numbers of h that the sums of a unit include.
    int64_t recurrent() const { return kind->recurrent ? output / heads : 0; }
    // Blocks of columns in the matrices: one per gate, except a coupled f.
    int gates() const { return kind->gates - coupled; }
    // The sums of the products with x and h: of the gates, or of a backbone, which is one block of U columns.
    int sum_gates() const { return backbone_units ? 1 : gates(); }
    int64_t sum_units() const { return backbone_units ? backbone_units : units; }
    const Activation& backbone_activation() const { return activations[kind->gates]; }
    // Layers of a backbone after the first one.
    int64_t more_layers() const { return backbone_layers - 1; }
    // The numbers of a layer of a backbone that the forward pass stores per step: its output; and the derivative of its
    // activation, where that isn't a function of the output.
    int64_t layer_size() const { return backbone_units * (1 + (backbone_activation().code >= kActivations)); }
    // The position of a gate's block in the caller's matrices and biases.
    int place(int gate) const { return rows ? kind->in_rows[gate] : gate; }
    bool resets_before() const { return kind->resets && !reset_after; }
    bool resets_after() const { return kind->resets && reset_after; }
    bool two_biases() const { return use_bias && resets_after(); }
    // Gate arrays stored per step: one per gate, including a coupled f; and the candidate's recurrent sum before the
    // reset, if the reset acts after the product; and what else the kind saves.
    int planes() const { return kind->gates + resets_after() + kind->saved; }
    // What a patch may change: the gates, then the states, in their order.
    int targets() const { return kind->gates + kind->states; }
    // Whether the sums over x and over h are needed separately.
    bool apart() const { return kind->recurrent && ((layer_norm && !joint()) || resets_after()); }
    // How many sums layer normalisation normalises: those over x and over h, or all in one.
    int normed() const { return kind->recurrent && !joint() ? 2 : 1; }
    // The numbers between the products and the gates that the forward pass stores per step for the backward pass: with
    // layer normalisation these sums, normalised, and for each the reciprocal deviations of two groups of gates; or the
    // layers of a backbone, which excludes layer normalisation.
    int64_t intermediate_size() const {
        return layer_norm ? normed() * (gates() * units + 2) : backbone_layers * layer_size();
    }
    bool zones() const { return zoneout > 0 || zoneout_cell > 0; }
    // Whether every gate has its default activation: a constant in a specialised copy of each routine.
    bool usual() const {
        for (int k = 0; kind->slots[k]; ++k)
            if (kind->slots[k] != '-' && activations[k].code != (kind->slots[k] == 't' ? kTanh : kSigmoid))
                return false;
        return true;
    }
    // Whether the cell has no flag, so that it can take the path by blocks.
    bool plain() const {
        constexpr double none = __builtin_inf();
        return kind == &kKinds[kLstm] && use_kernel && usual() && !peepholes && !coupled && !projects() &&
               !layer_norm && clip == none && cell_clip == none && !zones();
    }
};

// The arrays of a cell, or their gradients; null if the cell doesn't have one. From the table in declared.h, which is
// in the order of cellstack.cells.spec.ARRAYS, follow the fields, the bindings, the packing of vectors and the sums of
// their gradients. If the description has `rows`, which excludes heads and a backbone, each matrix is transposed,
// [gates·H, I], [gates·H, P], [P, H], and the gates have PyTorch's order, in biases too.
template <class T>
struct Arrays {
#define CELLSTACK_ARRAY(name, ...) T* name;
    CELLSTACK_ARRAYS(CELLSTACK_ARRAY)
#undef CELLSTACK_ARRAY
    T* initial[kStates];  // [P], [H] …, with learn_initial_state
};

inline constexpr const char* kArrays[] = {
#define CELLSTACK_ARRAY(name, ...) #name,
    CELLSTACK_ARRAYS(CELLSTACK_ARRAY)
#undef CELLSTACK_ARRAY
};

// The index of an array's first, among the vectors that the backward pass sums for each row of the batch: the gradients
// of vectors; with layer normalisation, of biases too.
namespace sums_of {
enum : int {
#define CELLSTACK_ARRAY(name, form, numbers, sums) name, last_##name = name + (sums) - 1,
    CELLSTACK_ARRAYS(CELLSTACK_ARRAY)
#undef CELLSTACK_ARRAY
        recurrent_bias = bias +
    kMostGates
};
}  // namespace sums_of
#define CELLSTACK_ARRAY(name, form, numbers, sums) +sums
constexpr int kSums = 0 CELLSTACK_ARRAYS(CELLSTACK_ARRAY);
#undef CELLSTACK_ARRAY

enum class Form { kMatrix, kBias, kVectors };  // packed in panels; in the caller's layout, as vectors of H numbers
struct Layout {
    Form form;
    int64_t numbers;
    int sums;  // the index of its first, see sums_of
};
// Calls body(array, its layout) for each array except the initial states; `arrays` is an Arrays.
template <class A, class F>
void each_array(A& arrays, const Description& d, F&& body) {
#define CELLSTACK_ARRAY(name, form, numbers, sums) body(arrays.name, Layout{Form::form, numbers, sums_of::name});
    CELLSTACK_ARRAYS(CELLSTACK_ARRAY)
#undef CELLSTACK_ARRAY
}

// Patches change values of a layer during a run, for each unit of a target: v becomes scale·v + hold·before + shift,
// where `before` is v after the previous step (or in the initial state). A term with the factor 0 is left out, even if
// the other factor is NaN or infinite. Masked steps aren't changed.
template <class T>
struct Patches {
    const int32_t* lines;  // [B, T, targets()]: the line of the table; negative: no patch. Null: no patches at all
    const T* table;        // [lines, 3, width]: scale, hold and shift of every unit
    int64_t width;
    T* held;  // [B, planes, H], gates after the last unmasked step, read and written; null: no gate has a hold
};

}  // namespace cellstack
