// What a cell is, without its numbers: the kernel's view of cellstack.spec.CellSpec. A dense layer is one without a
// state, whose output at a step depends on that step alone; it has a forward pass only.
#pragma once
#include <cstdint>

namespace cellstack {

// What numbers are held in. Those of a call are float32 or float64; matrices of a float32 call may be narrower.
enum class Element : int { kFloat32, kFloat64, kBfloat16, kInt8 };

template <class T>
constexpr Element element_of() {
    return sizeof(T) == 8 ? Element::kFloat64 : Element::kFloat32;
}
constexpr bool narrow(Element e) { return e == Element::kBfloat16 || e == Element::kInt8; }

// Words of 32 bits that a column of so many narrow weights takes.
constexpr int64_t narrow_words(int64_t depth, int bits) { return (depth * bits + 31) / 32; }
constexpr int bits_of(Element e) { return e == Element::kBfloat16 ? 16 : 8; }
// The same of weights of any element, in numbers of the call.
constexpr int64_t words_of(Element e, int64_t depth) { return narrow(e) ? narrow_words(depth, bits_of(e)) : depth; }

// How far apart the rows that narrow weights are multiplied with are, in words: bfloat16 may be widened to floats
// again, and is written some vectors at a time.
constexpr int64_t narrow_stride(Element e, int64_t depth) {
    return e == Element::kBfloat16 ? (depth + 15) / 16 * 16 : narrow_words(depth, 8);
}

enum Kind : int { kLstm, kGru, kRnn, kDense };

// In the order of cellstack.spec.ACTIVATIONS.
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
    kActivations
};

struct Activation {
    int code;
    double alpha, beta;
};

struct Description {
    int kind;
    int64_t input, units, output;  // I, H, P: the width of h, H where nothing is projected
    // Of activation, recurrent_activation and gate_activations: LSTM i f g o and the cell's; GRU z r g; SimpleRNN g.
    Activation activations[5];
    bool use_bias, peepholes, coupled, layer_norm, reset_after;
    bool rows;                             // whether matrices lie as PyTorch has them: see Arrays
    double norm_epsilon, clip, cell_clip;  // clips: infinity where there is none
    double zoneout, zoneout_cell;

    bool projects() const { return output != units; }  // proj_size
    bool keeps_state() const { return kind != kDense; }
    // Blocks of columns in the weights.
    int gates() const { return kind == kLstm ? (coupled ? 3 : 4) : kind == kGru ? 3 : 1; }
    // Where the block of a gate stands among those of a matrix or a bias, as the caller has them.
    int place(int gate) const { return rows && kind == kGru && gate < 2 ? 1 - gate : gate; }
    // What is kept of a step's gates: one array a gate, a coupled f too; the candidate's recurrent sum before a reset.
    int planes() const { return kind == kLstm ? 4 : kind == kGru ? (reset_after ? 4 : 3) : 1; }
    // Normalised sums of x and of h; the reciprocal deviations of two groups of gates each.
    int64_t norm_size() const { return layer_norm ? 2 * gates() * units + 4 : 0; }
    // Whether the sums over x and over h are needed apart.
    bool apart() const { return layer_norm || (kind == kGru && reset_after); }
    bool zones() const { return zoneout > 0 || zoneout_cell > 0; }
    // Whether every gate has its usual activation: constants in a copy of each routine.
    bool usual() const {
        const int g = kind == kRnn ? 0 : 2, count = kind == kLstm ? 5 : kind == kGru ? 3 : 1;
        for (int k = 0; k < count; ++k)
            if (activations[k].code != (k == g || k == 4 ? kTanh : kSigmoid)) return false;
        return true;
    }
    // Whether this is the LSTM without any flag, for which there is a shorter way.
    bool plain() const {
        constexpr double none = __builtin_inf();
        return kind == kLstm && usual() && !peepholes && !coupled && !projects() && !layer_norm && clip == none &&
               cell_clip == none && !zones();
    }
};

// The arrays of a cell, or of their gradients; null where it has none. In the order of cellstack.spec.ARRAYS. Of a
// description with `rows` each matrix is transposed, [gates·H, I], [gates·H, P], [P, H], and the gates of a GRU, in its
// biases too, stand in PyTorch's order, r z g.
template <class T>
struct Arrays {
    T* kernel;            // [I, gates·H]
    T* recurrent_kernel;  // [P, gates·H]
    T* bias;              // [gates·H]; [2, gates·H] for a GRU whose reset acts after the product
    T* peepholes;         // [3, H], i f o; [2, H], i o, where coupled
    T* projection;        // [H, P]
    T* kernel_gain;       // [gates·H]
    T* recurrent_gain;    // [gates·H]
    T* cell_gain;         // [H]
    T* cell_bias;         // [H]
    T* initial_h;         // [P], of learn_initial_state
    T* initial_c;         // [H]
};
constexpr int kArrays = 11;

// What a patch may act on: gates by their plane, the cell, h.
enum Target : int { kGatesTarget = 0, kCellTarget = 4, kOutputTarget, kTargets };

// Numbers of a layer that are changed as it runs, unit by unit of a target: v becomes scale·v + hold·before + shift,
// `before` being what v was after the step before (or in the state that was given). A factor of 0 leaves out even what
// is no number. Steps that a mask leaves out stay as they are.
template <class T>
struct Patches {
    const int32_t* lines;  // [B, T, kTargets]: which line of the table; negative: none. Null: nothing is patched
    const T* table;        // [lines, 3, width]: scale, hold and shift of every unit
    int64_t width;
    T* held;  // [B, planes, H], gates after the last step that was used, in and out; null: no gate has a hold
};

}  // namespace cellstack
