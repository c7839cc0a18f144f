// The interface of one instruction set: its inner routines, for one thread, over the rows and steps that sequence.cpp
// and gradients.cpp assign.
//
// Panels. The weights of a layer are stored in blocks of W units (W = lanes of a vector). For each k, a block has the W
// columns of every gate next to each other, `[block][k][gates][W]`, with zeros beyond H. The sums of one row and block
// are then a few registers, with the gates of a unit in the same lane of each. The backward pass stores dz in the same
// layout, `[block][row][gates][W]`.
//
// If few lanes of the last block are units, its gates share vectors, see Tail.
//
// Order of summation, everywhere: two chains per unit and gate, (bias, then x·kernel by rising k) and
// (h·recurrent_kernel by rising k), and then their sum, except in cells that need the two separately. The bits of a row
// therefore depend neither on the rest of the batch, nor on how a sequence is divided into chunks, nor on the threads.
// A single chain would round each product with h to the magnitude of the sum over x.
#pragma once
#include <cstdint>

#include "description.h"
#include "mlstm.h"
#include "nodes.h"

namespace cellstack {

// A tile of a product: a few rows times a few vectors of columns, whose sums stay in registers while k runs,
//     sums[r][v] = from[r][v] + Σ_k a[r][k]·panel[k][v]
// The vectors are the gates of one block of units, the gates of two blocks, or one gate of several blocks. Distances
// are counted in numbers; what a number is depends on the routine's table, see Tiles.
constexpr int kMostRows = 6;
template <class T>
struct Tile {
    const T* a[kMostRows];  // k of row r: a[r][k·a_step]
    int64_t a_step, a_row;  // a_row: the distance between rows, for `recurrent` only
    const T* panel;         // vector v of k: panel + k·panel_step + v·panel_vector (+ panel_block in a second block)
    const T* tail;          // `with_tail` only: the panel of its last vectors
    int64_t panel_step, panel_vector, panel_block;
    int64_t depth;                // number of k in a segment
    int64_t segments, a_segment;  // `recurrent` only: segments are contiguous in the panel, a_segment apart in the rows
    const T* from;                // initial values of the sums; null: zeros
    int64_t from_row, from_vector, from_block;
    T* to;
    int64_t to_row, to_vector, to_block;
    bool add;                               // to the values in `to`, instead of overwriting them
    const T* ahead;                         // `recurrent` prefetches from here, one cache line per k
    const T *row_scales, *scales, *shifts;  // int8: of rows; of columns, with the distances of `from`
};
template <class T>
using TileRoutine = void (*)(const Tile<T>&);

template <class T>
struct Forward;

// The routines for tiles of every size, for one kind of number: T; bfloat16, widened or in pairs; int8. And what else
// depends on it.
template <class T>
struct Tiles {
    TileRoutine<T> of[kMostRows][4];  // [rows - 1][vectors - 1]
    // A single row has too few sums to hide the latency of each addition: it takes more vectors.
    TileRoutine<T> two_blocks[2];  // for three gates, for four
    TileRoutine<T> eight_blocks;   // for one gate
    // The last block with gates of its own, of three or four gates, and the vectors that those of the tail share.
    TileRoutine<T> with_tail[2][3];  // [gates - 3][vectors - 1]
    // For the products of every step, with fixed distances: rows contiguous in k, which start at a[0], panels 4·W wide,
    // and sums that start from zero and are written to [rows][4][W].
    TileRoutine<T> recurrent[kMostRows][4];
    // Computes blocks [f.block, end_block) of a plain LSTM at step n of a batch of one row: see forward.h.
    void (*alone)(const Forward<T>& f, int64_t n, bool down, int64_t end_block, const T* h, T* h_next);
    // For bfloat16 that is multiplied two k at a time, by one instruction; else null. They write pairs of adjacent
    // numbers of a row, or of numbers of a row and the next one, which may be missing.
    void (*pair_lanes)(T* to, const T* from, int64_t n);
    void (*pair_rows)(T* to, const T* row, const T* next, int64_t n);
    bool pairs() const { return pair_lanes; }
};

// Which rows of a matrix of heads its panels have: those of the heads to which a panel's columns belong. All panels
// have the same number of rows, so some also have rows of zeros, of an adjacent head. Rows are counted in words of the
// weights' format; in a transposed matrix, in blocks of dz. A diagonal matrix, of heads of one unit each, is a vector
// for each gate of a block instead, [blocks][gates][W], in a transposed matrix too.
struct Band {
    int64_t depth;
    const int64_t* first;  // of each panel; null: all have all rows
    bool diagonal = false;
    int64_t start(int64_t panel) const { return first ? first[panel] : 0; }
};

// The last block of a layer whose gates share vectors: lane gate·units + j of these vectors, which are [vectors][W] for
// each k in panels, and in biases, is a gate of unit j. So 100 units take 25 vectors for each k and not 28, if W = 16.
struct Tail {
    int units = 0, vectors = 0;  // 0: there is no such block
};
// A single gate has nothing to share; and two gates, or a product for some of the gates, are computed across blocks.
inline Tail tail_of(const Description& d, int width) {
    const int units = int(d.units % width), vectors = (units * d.gates() + width - 1) / width;
    const bool shares = d.units > width && d.gates() > 2 && !d.resets_before() && vectors < d.gates();
    return shares ? Tail{units, vectors} : Tail{};
}

// The weights of a layer. Matrices and biases may also stay in the caller's layout (`unpacked`), for calls that are too
// short to be worth packing; the other arrays always do.
template <class T>
struct Panels {
    const Description* d = nullptr;
    bool usual = false, flagless = false;   // d->usual(), d->plain(): they take longer than a test in a step
    int64_t blocks = 0, output_blocks = 0;  // of H, of P
    int64_t sum_blocks = 0;              // of the sums over x and h: of H, or of U with a backbone, [gates] then is 1
    const T* kernel = nullptr;           // [sum_blocks][I][gates][W]; unpacked: [I, gates·H]
    const T* recurrent = nullptr;        // [sum_blocks][band.depth][gates][W]; unpacked: as in Arrays
    const T* bias = nullptr;             // [sum_blocks][gates][W]; unpacked: [gates·H], or null
    const T* recurrent_bias = nullptr;   // the same for the sums over h, if they are separate; null: none
    const T* gate_kernel = nullptr;      // [blocks][U][gates][W]; unpacked: [U, gates·H]
    const T* gate_bias = nullptr;        // [blocks][gates][W]; unpacked: [gates·H], or null
    const T* backbone_kernel = nullptr;  // of each layer after the first, [sum_blocks][U][1][W]; unpacked: [U, U]
    const T* backbone_bias = nullptr;    // of each, [sum_blocks][1][W]; unpacked: [U], or null
    int64_t backbone_step = 0, backbone_bias_step = 0;  // from one to the next
    const T* projection = nullptr;                      // [output_blocks][H][1][W]; unpacked: [H, P]
    Arrays<const T> arrays{};
    bool unpacked = false;
    Element element = element_of<T>();  // format of a matrix's weights; narrow.h describes the layout of narrow ones
    Band band{0, nullptr};              // the rows of `recurrent`
    Tail tail;
    const Tiles<T>*tiles = nullptr, *plain = nullptr;  // for `element`, for T
    bool patched = false;                              // patches change values during a step

    bool is_tail(int64_t block) const { return tail.vectors && block == blocks - 1; }
    // Where a block's part of h begins, in a row that the weights are multiplied with.
    int64_t start(int64_t block) const {
        return band.start(block) * (element == Element::kBfloat16 && !tiles->pairs() ? 2 : 1);
    }
    // Whether a step is computed by blocks, the shorter path of the plain LSTM, which exists in float32.
    static constexpr bool kBlocks = sizeof(T) == 4;
    bool by_blocks() const {
        return kBlocks && flagless && !unpacked && element != Element::kInt8 && !patched && !band.diagonal;
    }
};

// A matrix [depth, gates·units] in the caller's layout, or a bias as a matrix of depth 1.
template <class T>
struct Matrix {
    const T* at;
    int64_t depth, units;
    int gates;
    bool rows;               // it is transposed, [gates·units, depth]
    int places[kMostGates];  // the position of each gate's block
    int64_t heads = 1;       // if there are several, the matrix is [heads, depth/heads, gates·units/heads]
    Band band{0, nullptr};
    Tail tail{};
};

// The forward pass over rows of one layer, for steps n in [first, last) of the processing order.
template <class T>
struct Forward {
    Panels<T> w;
    int64_t rows, steps, first, last;
    // What this call computes: steps [from, to) of the chunk [first, last), and blocks [block, end_block) of units,
    // since threads that divide the units each have some of the blocks. `project`: whether the chunk's sums over x are
    // computed first; if not, z contains them already.
    int64_t from, to, block, end_block;
    bool project;
    bool reverse;  // step n is time steps-1-n
    const T* x;    // x of row r at time t: x + r·x_row + t·x_time
    int64_t x_row, x_time;
    const uint8_t *mask, *reset;                     // [rows][steps] or null
    const T *recurrent_dropout, *candidate_dropout;  // [rows][P] or null
    const T *zoneout, *zoneout_cell;                 // [rows][steps][P], [rows][steps][H] or null
    bool altered;   // by rows: whether patches, recurrent dropout or zoneout change h; tested instead of each of them
    T *h, *h_next;  // [rows][output_blocks·W]; swapped after every step: `h` is the state
    T* h_kept;      // [rows][output_blocks·W], h before recurrent dropout; null without it
    T* inner[kInner];  // [rows][blocks·W], the inner states
    T* y;              // with the strides below; or null
    int64_t y_row, y_time;
    T* states[kInner];        // the inner states of every step, (r, t) at r·steps·H + t·H; or null
    T *gates, *intermediate;  // [rows][steps][planes][H], [rows][steps][intermediate_size()] or null
    // Scratch, sums over x. By blocks: [blocks][(last-first)·rows][4][W], null: summed in place. By rows:
    // [(last-first)·rows][gates][stride], stride = blocks·W; unpacked: H. With a backbone, its sums
    // [(last-first)·rows][sum_blocks·W]; unpacked: U.
    T* z;
    // Scratch of the path by rows: separate sums over h, or those of the gates over a backbone, [rows][gates][stride],
    // and a layer of it, as in z, if it has several; a vector per row [rows][blocks·W]; the projected h
    // [rows][output_blocks·W].
    T *q, *m, *p;
    // Scratch for narrow weights: rows of x; rows of h, r·h, o·φ(c) or a backbone; scales of rows: see Product.
    T *narrow_x, *narrow_h, *scales;
    Patches<T> patches;  // `lines` and `held` start at the first of the rows
};

// The backward pass over rows of one layer, for steps n in [first, last) of the processing order, from last to first.
// It consists of phases (see phases_back) and blocks of units. One call computes all of both; or, if threads divide the
// units, each has some of the blocks, and a phase begins when all threads have finished the previous one.
template <class T>
struct Backward {
    const Description* d;
    Arrays<const T> arrays;
    int64_t blocks, output_blocks, rows, steps, first, last, batch, row0;  // rows row0 … row0+rows of a batch
    int64_t phase, end_phase, block, end_block;                            // what this call computes
    bool reverse;
    // Transposed panels, see pack_transposed; candidate_t: if a reset acts before the product.
    const T *recurrent_t, *candidate_t, *projection_t, *gates_t, *backbone_t;
    int64_t backbone_step;                    // from one layer's panels to the next
    Band band;                                // the blocks of dz that a panel of recurrent_t or candidate_t multiplies
    const T *gates, *intermediate;            // [planes][H], [intermediate_size()] of every row and step;
    int64_t kept_first, kept_row, kept_time;  // row r and time t: kept_first + r·kept_row + t·kept_time
    const T *y, *states[kInner];              // as `forward` wrote them
    int64_t y_row, y_time;                    // the strides of y and dy, as in Forward
    const T* before[kStates];                 // [rows][P], [rows][H] … or null
    const uint8_t *mask, *reset;              // [rows][steps] or null
    const T *recurrent_dropout, *candidate_dropout;
    const T* scalar;  // of every row and step, in x
    T* dscalar;       // in dx; or null
    int64_t scalar_row, scalar_time, dscalar_row, dscalar_time;
    const T *zoneout, *zoneout_cell;
    const T *dy, *dgates, *dstates[kInner];  // in the shapes of y, gates, states; or null
    T *dh, *dinner[kInner];  // [rows][columns of P], [rows][blocks·W]; in: after step last - 1; out: before first
    // Out, [blocks][(last - first)·batch][gates][W], row (n - first)·batch + b: for the sums over x and over h; dq = dz
    // unless these are separate.
    T *dz, *dq;
    T* db;  // out, [sum_blocks][(last - first)·batch][1][W]: for the sums of each layer of a backbone; null without
    int64_t db_step;  // from one layer to the next
    // What is multiplied by the transposed recurrent weights, dq or db, and its gates and blocks.
    const T* dsums;
    int sum_gates;
    int64_t sum_blocks;
    T* dp;          // out, [output_blocks][(last - first)·batch][1][W]: for the projection's output; null without
    T* m;           // out, rows [(last - first)·batch]: the projection's input [H], or the candidate's input r·h [P]
    T *dm, *carry;  // scratch [rows][columns of H], [rows][columns of P]
    T* line;        // scratch [2][blocks·W] of this thread
    const Tiles<T>* tiles;
    T* pairs;    // scratch of this thread for rows in pairs of bfloat16, see product_transposed; null: products of T
    T* vectors;  // sums [rows][kSums][blocks·W] of the gradients of arrays that aren't matrices; or null
    T* dinitial[kStates];  // sums [rows][columns of P], [rows][blocks·W] …; or null
};

// Step n first computes dh from the dz of step n + 1, then its own dz from dh and dc; the last phase computes dh before
// the first step. If a reset acts before the product, its dz depends on the other gates' dz and takes separate phases.
inline int64_t phases_of_step(const Description& d) { return d.resets_before() ? 3 : 1; }
inline int64_t phases_back(const Description& d, int64_t steps) { return steps * phases_of_step(d) + 1; }

// Shares begin and end at multiples of this many blocks, the width of a panel of transposed weights.
constexpr int64_t kBlocksOfPanel = 4;

// Gradients of matrices for some blocks: sums over m of a[m]ᵀ·dz[m], where a is x, h or another input of a product. The
// sums of a block stay in the cache while all rows of its dz are processed, some at a time. They are summed in the
// caller's array or, if that is transposed, in `sums`.
template <class T>
struct WeightGradient {
    int gates;
    bool rows;               // `out` is transposed
    int places[kMostGates];  // the position of each gate's block in `out` and `bias`
    const T* dz;             // [blocks][dz_rows][gates][W], all blocks
    int64_t dz_rows, units, first, last;
    struct {
        const T* const* rows;  // dz_rows rows of `columns`
        int64_t columns;       // 0: no gradient requested
        int first_gate, last_gate;
        T* out;         // [columns, gates·H]; columns of these gates and of blocks first … last are written
        int64_t heads;  // more than 1: [heads, columns/heads, gates·H/heads]
        T* sums;        // scratch [last - first][columns][gates][W] if out is transposed
        T* copy;        // scratch [dz_rows][gradient_stride(columns)], a contiguous copy of `rows`
    } of[3];
    bool copied;            // the copies were made by an earlier call
    const Tiles<T>* tiles;  // if they multiply pairs, two rows are multiplied at once, and `copy` has half as many rows
    T* dz_pairs;            // scratch for pairs, [kBlocksOfPanel][dz_rows / 2, rounded up][gates][W]
    T* bias;                // [gates·H] or null
    T* bias_sums;           // scratch [last - first][gates][W]
    bool more;              // continue the sums of the previous call; else start from zero
    bool write;             // the sums are complete: write `out` and `bias`
};

// Rows of dz that stay in the L1 cache during a pass over the columns; and the distance between copied rows of a. The
// caller's distance may be one at which a cache can keep only few rows; for the same reason a line is left between
// copied rows.
constexpr int64_t kGradientRows = 128;
inline int64_t gradient_stride(int64_t columns) { return (columns + 31) / 16 * 16; }

template <class T>
struct Leaf {
    int width;
    Tiles<T> plain, bfloat16, int8;
    // a matrix [K, gates·H] with H columns per gate -> panels [blocks][K][gates][W]; writes those of [block,
    // end_block), each at its position in the whole
    void (*pack)(T* to, const Matrix<T>& from, int64_t block, int64_t end_block);
    // the same in a narrow format, in the layout of narrow.h; panel: scratch for a block, [K][gates][W]
    void (*pack_narrow)(T* to, const Matrix<T>& from, int64_t block, int64_t end_block, Element element, T* panel);
    // a matrix [K, gates·H] -> [panel][blocks·gates·W][4·W]: columns are K (zeros beyond), rows have the order of dz;
    // of a matrix of heads [panel][band.depth·gates·W][4·W], the blocks that the panel's band of them has; gates
    // outside [first, last) are zero. Writes panels [panel, end_panel), each at its position in the whole. If the tiles
    // multiply pairs, two rows of a panel become one row of pairs of bfloat16.
    void (*pack_transposed)(T* to, const Matrix<T>& from, int first, int last, int64_t panel, int64_t end_panel,
                            const Tiles<T>& tiles);
    void (*forward)(Forward<T>&);
    void (*backward)(Backward<T>&);
    // out[m] (rows of `columns`) = dz[m]·kernelᵀ for m in [first, last) of the rows × steps. `tiles` and `pairs` as in
    // Backward.
    void (*input_gradient)(const Tiles<T>& tiles, const T* dz, int gates, int64_t blocks, int64_t dz_rows,
                           const T* kernel_t, int64_t columns, int64_t first, int64_t last, T* const* out, T* pairs);
    void (*weight_gradient)(const WeightGradient<T>&);
    void (*activate)(const Activation& activation, const T* x, T* y, int64_t n);
    int64_t (*memory_scratch)(const MemoryHead<T>& head, bool backward);
    void (*memory_gates)(const MemoryGates<T>&);
    void (*memory_forward)(const MemoryHead<T>&);
    void (*memory_backward)(const MemoryHeadBack<T>&);
    void (*norm)(const Norm<T>&);
    void (*convolve)(const Convolution<T>&);

    const Tiles<T>& tiles_of(Element element) const {
        return element == Element::kBfloat16 ? bfloat16 : element == Element::kInt8 ? int8 : plain;
    }
};

struct InstructionSet {
    const char *name, *needs;  // `needs`: the features of the processor that its code uses, separated by commas
    Leaf<float> single;
    Leaf<double> twice;
};

// What replaces routines of a set on processors with more instructions; `needs` as above, of this code.
struct Replacement {
    const char *name, *needs;
    Tiles<float> tiles;
};

// The time of a steady clock (threads.cpp).
int64_t nanoseconds();

// What kernel/simd.cpp is compiled to, and the routines for weights of 8 and 16 bits on processors with instructions
// for them (int8.cpp, bfloat16.cpp). Each is an object of its own: a compiler may move any instruction of an object in
// front of the test that guards it.
namespace baseline {
extern const InstructionSet set;
}
namespace simd128 {  // of WebAssembly
extern const InstructionSet set;
}
namespace avx2 {
extern const InstructionSet set;
}
namespace avx512 {
extern const InstructionSet set;
}
namespace avx512vnni {
extern const Replacement int8;
}
namespace avx512bf16 {
extern const Replacement bfloat16;
}

}  // namespace cellstack
