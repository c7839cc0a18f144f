// What one instruction set offers: the inner routines, for one thread, over rows and steps that sequence.cpp and
// gradients.cpp hand out.
//
// Panels. Weights of a layer are stored by blocks of W units (W = lanes of a vector): for each k, the gates' W columns
// side by side, `[block][k][gates][W]`, zeros beyond H. One block's sums of one row are a few registers, and the gates
// of the same units meet there. The backward pass keeps dz in the same layout, `[block][row][gates][W]`.
//
// Order of summation, everywhere: two chains a unit and gate, bias and x·kernel by k, and h·recurrent_kernel by k; then
// their sum, but for a cell that needs the two apart. So a row's bits do not depend on the batch around it, on how a
// sequence is cut into chunks, or on the threads. One chain through both would round each product with h to the size of
// the sum over x.
#pragma once
#include <cstdint>

#include "description.h"

namespace cellstack {

// A tile of a product: a few rows times a few vectors of columns, whose sums stay in registers while k runs,
//     sums[r][v] = from[r][v] + Σ_k a[r][k]·panel[k][v]
// The vectors of a panel are the gates of one block of units, of two blocks, or one gate of several blocks. Distances
// are in numbers. What a number is depends on the table that the routine is in, see Tiles.
constexpr int kMostRows = 6;
template <class T>
struct Tile {
    const T* a[kMostRows];  // k of row r: a[r][k·a_step]
    int64_t a_step, a_row;  // the latter, of rows that are so far apart, is for `recurrent` alone
    const T* panel;         // vector v of k: panel + k·panel_step + v·panel_vector, in a second block + panel_block
    int64_t panel_step, panel_vector, panel_block;
    int64_t depth;                // how many k there are in a segment
    int64_t segments, a_segment;  // segments follow each other in the panel, and a_segment apart in the rows
    const T* from;                // what the sums start with; null: zeros
    int64_t from_row, from_vector, from_block;
    T* to;
    int64_t to_row, to_vector, to_block;
    bool add;                               // to what is in `to`
    const T* ahead;                         // `recurrent` prefetches from here on, a line for each k
    const T *row_scales, *scales, *shifts;  // int8: of the rows; of the columns, as far apart as `from`
};
template <class T>
using TileRoutine = void (*)(const Tile<T>&);

// The routines for tiles of every size, for numbers of one kind: those of T; bfloat16, one by one or in pairs; int8.
template <class T>
struct Tiles {
    TileRoutine<T> of[kMostRows][4];  // [rows - 1][vectors - 1]
    // One row alone has too few sums to hide the latency of each: it takes more vectors.
    TileRoutine<T> two_blocks[2];  // of three gates, of four
    TileRoutine<T> eight_blocks;   // of one gate
    // With less to ask, for what is done at every step: rows number by number from a[0] on, panels 4·W wide, sums that
    // start from zero and go to [rows][4][W].
    TileRoutine<T> recurrent[kMostRows][4];
};

// Weights may also stay as the caller has them (`unpacked`), for calls too short to be worth packing for. What isn't a
// matrix or a bias always does.
template <class T>
struct Panels {
    const Description* d = nullptr;
    int64_t blocks = 0, output_blocks = 0;  // of H, of P
    const T* kernel = nullptr;              // [blocks][I][gates][W]; unpacked: [I, gates·H]
    const T* recurrent = nullptr;           // [blocks][P][gates][W]; unpacked: [P, gates·H]
    const T* bias = nullptr;                // [blocks][gates][W]; unpacked: [gates·H], or null
    const T* recurrent_bias = nullptr;      // likewise, of the sums over h, where they are apart; null: none
    const T* projection = nullptr;          // [output_blocks][H][1][W]; unpacked: [H, P]
    Arrays<const T> arrays{};
    bool unpacked = false;
    Element element = element_of<T>();  // of a weight in a matrix; narrow ones are laid out as narrow.h says
    bool pairs = false;                 // bfloat16 is multiplied two k at a time, by an instruction of the processor
    const Tiles<T>*tiles = nullptr, *plain = nullptr;  // for `element`, for T
    bool patched = false;                              // patches act on the numbers of a step

    // Whether a step goes block by block, the shorter way of the plain LSTM.
    bool by_blocks() const { return d->plain() && !unpacked && element != Element::kInt8 && !patched; }
};

// A matrix [depth, gates·units] as the caller has it, or a bias, of depth 1.
template <class T>
struct Matrix {
    const T* at;
    int64_t depth, units;
    int gates;
    bool rows;      // it is transposed, [gates·units, depth]
    int places[4];  // where the block of each gate stands
};

// Forward over rows of one layer, for steps n in [first, last) of the processing order.
template <class T>
struct Forward {
    Panels<T> w;
    int64_t rows, steps, first, last;
    // Of the chunk first … last: the steps that are run now, with the sums over x made before them or, where they lie
    // in z already, not; and the blocks of units. Threads that share out the units each have some of the blocks.
    int64_t from, to, block, end_block;
    bool project;
    bool reverse;  // step n is time steps-1-n
    const T* x;    // x of row r at time t: x + r·x_row + t·x_time
    int64_t x_row, x_time;
    const uint8_t *mask, *reset;      // [rows][steps] or null
    const T* recurrent_dropout;       // [rows][P] or null
    const T *zoneout, *zoneout_cell;  // [rows][steps][P], [rows][steps][H] or null
    T *h, *h_next;                    // [rows][output_blocks·W]; swapped after every step: `h` is the state
    T* h_kept;                        // [rows][output_blocks·W], h before recurrent dropout; null without it
    T* c;                             // [rows][blocks·W]
    T *y, *cells;                     // y has strides of its own; cells: (r, t) at r·steps·H + t·H; or null
    int64_t y_row, y_time;
    T *gates, *norms;  // [rows][steps][planes][H], [rows][steps][norms] or null
    T* z;              // scratch, sums over x. The shorter way: [blocks][(last-first)·rows][4][W], null: summed in
                       // place. By rows: [(last-first)·rows][gates][stride], stride = blocks·W; unpacked: H
    T *q, *m, *p;      // scratch by rows: sums over h apart [rows][gates][stride]; a vector a row [rows][blocks·W];
                       // what was projected [rows][output_blocks·W]
    T *narrow_x, *narrow_h, *scales;  // scratch of narrow weights, for rows of x and of what is made of it: see Product
    Patches<T> patches;               // from the first of the rows on
};

// Backward over rows of one layer, for steps n in [first, last) of the processing order, last to first. It goes in
// phases (see phases_back), and by blocks of units: all of both in one call; or, where threads share out the units,
// each has some of the blocks, and a phase begins when all of them have ended the one before.
template <class T>
struct Backward {
    const Description* d;
    Arrays<const T> arrays;
    int64_t blocks, output_blocks, rows, steps, first, last, batch, row0;  // rows row0 … row0+rows of a batch
    int64_t phase, end_phase, block, end_block;                            // those that are run now
    bool reverse;
    const T *recurrent_t, *candidate_t, *projection_t;  // transposed panels, see pack_transposed; the second: of a GRU
                                                        // whose reset acts before the product
    const T *gates, *norms;                             // [planes][H], [norms] of every row and step,
    int64_t kept_first, kept_row, kept_time;  // that of row r at time t: kept_first + r·kept_row + t·kept_time
    const T *cells, *y;                       // [rows][steps][H] and so on, as forward left them
    int64_t y_row, y_time;                    // y and dy have strides of their own, as in Forward
    const T *h0, *c0;                         // [rows][P], [rows][H] or null
    const uint8_t *mask, *reset;              // [rows][steps] or null
    const T* recurrent_dropout;
    const T *zoneout, *zoneout_cell;
    const T *dy, *dgates, *dcells;  // as y, gates, cells; or null
    T *dh, *dc;     // [rows][columns of P], [rows][blocks·W]: in, after step last - 1; out, before first
    T *dz, *dq;     // out, [blocks][(last - first)·batch][gates][W], row (n - first)·batch + b: of the sums over x and
                    // over h; dq = dz where they are one
    T* dp;          // out, [output_blocks][(last - first)·batch][1][W]: of what was projected; null without
    T* m;           // out, rows [(last - first)·batch][H] that were projected, or [P]: r·h that went into the candidate
    T *dm, *carry;  // scratch [rows][columns of H], [rows][columns of P]
    T* line;        // scratch [2][blocks·W], of this thread
    const Tiles<T>* tiles;
    T* pairs;    // scratch of this thread for rows in pairs of bfloat16, see product_transposed; null: products of T
    T* vectors;  // sums [rows][kVectors][blocks·W] of the gradients of arrays that aren't matrices; or null
    T *dinitial_h, *dinitial_c;  // sums [rows][columns of P], [rows][blocks·W]; or null
};

// A step forms its dz from dh and dc, after dh was formed from the dz of the step behind it; the last phase forms that
// of before the first step. Where a GRU's reset acts before the product, dz of r waits for the others in phases of its
// own.
inline int64_t phases_of_step(const Description& d) { return d.kind == kGru && !d.reset_after ? 3 : 1; }
inline int64_t phases_back(const Description& d, int64_t steps) { return steps * phases_of_step(d) + 1; }

// Blocks that a share begins and ends with are a multiple of this apart: a panel of transposed weights is as wide.
constexpr int64_t kBlocksOfPanel = 4;

// Which sums of `vectors` belong to which array: the first of as many as it has gates.
enum Vector : int {
    kPeepholes = 0,
    kKernelGain = 3,
    kRecurrentGain = 7,
    kBias = 11,
    kRecurrentBias = 15,
    kCellGain = 19,
    kCellBias = 20,
    kVectors = 21
};

// Gradients of matrices of some blocks: sums over m of a[m]ᵀ·dz[m], where a is x, h, or what took their place. A
// block's sums stay in the cache while all rows of its dz are gone over, some at a time. They are made where they are
// to go, or, where that is transposed, in `sums`.
template <class T>
struct WeightGradient {
    int gates;
    bool rows;      // `out` is transposed
    int places[4];  // where in `out` and `bias` the block of each gate stands
    const T* dz;    // [blocks][dz_rows][gates][W], all blocks
    int64_t dz_rows, units, first, last;
    struct {
        const T* const* rows;  // dz_rows rows of `columns`
        int64_t columns;       // 0: not wanted
        int first_gate, last_gate;
        T* out;   // [columns, gates·H]; columns of these gates and of blocks first … last are written
        T* sums;  // scratch [last - first][columns][gates][W] where out is transposed
        T* copy;  // scratch [dz_rows][gradient_stride(columns)], for `rows` side by side
    } of[3];
    bool copied;  // they are there already
    const Tiles<T>* tiles;
    bool pairs;    // products of bfloat16, of two rows at once; `copy` is of half as many rows then
    T* dz_pairs;   // scratch for it, [kBlocksOfPanel][dz_rows / 2, rounded up][gates][W]
    T* bias;       // [gates·H] or null
    T* bias_sums;  // scratch [last - first][gates][W]
    bool more;     // go on from the sums of the call before; else from zero
    bool write;    // sums are whole: write `out` and `bias`
};

// Rows of dz that stay in L1 while columns of a pass over them; and how far apart rows of a are copied to: their own
// distance may be one at which a cache keeps only few of them. A line is left between rows for the same reason.
constexpr int64_t kGradientRows = 128;
inline int64_t gradient_stride(int64_t columns) { return (columns + 31) / 16 * 16; }

template <class T>
struct Leaf {
    int width;
    Tiles<T> plain, bfloat16, int8;
    // a matrix [K, gates·H] with H columns a gate -> panels [blocks][K][gates][W]
    void (*pack)(T* to, const Matrix<T>& from);
    // the same in a narrow element, as narrow.h reads it; scratch: a block's panel, [K][gates][W]
    void (*pack_narrow)(T* to, const Matrix<T>& from, Element element, T* panel);
    // a matrix [K, gates·H] -> [panel][blocks·gates·W][4·W]: columns are K (zeros beyond), in the order that dz has;
    // gates outside of [first, last) are zero. Of its panels, panel … end_panel, each at its place in the whole.
    // With `pairs`, two of the rows of a panel are one, in pairs of bfloat16.
    void (*pack_transposed)(T* to, const Matrix<T>& from, int first, int last, int64_t panel, int64_t end_panel,
                            bool pairs);
    void (*forward)(Forward<T>&);
    void (*backward)(Backward<T>&);
    // out[m] (rows of `columns`) = dz[m]·kernelᵀ for m in [first, last) of the rows·steps; row m goes to out[m].
    // `tiles` and `pairs` as in Backward
    void (*input_gradient)(const Tiles<T>& tiles, const T* dz, int gates, int64_t blocks, int64_t dz_rows,
                           const T* kernel_t, int64_t columns, int64_t first, int64_t last, T* const* out, T* pairs);
    void (*weight_gradient)(const WeightGradient<T>&);
    void (*activate)(const Activation& activation, const T* x, T* y, int64_t n);

    const Tiles<T>& tiles_of(Element element) const {
        return element == Element::kBfloat16 ? bfloat16 : element == Element::kInt8 ? int8 : plain;
    }
};

struct InstructionSet {
    const char* name;
    Leaf<float> single;
    Leaf<double> twice;
    bool pairs;  // bfloat16 is multiplied two k at a time
};

// What kernel/simd.cpp is compiled to: the second and third for processors that have more instructions for weights of 8
// and 16 bits, with the same routines but for their tiles.
namespace baseline {
extern const InstructionSet set;
}
namespace avx2 {
extern const InstructionSet set;
}
namespace avx512 {
extern const InstructionSet set, vnni, pairs;
bool pairs_pay();  // whether pairs are multiplied faster than the numbers one by one
}  // namespace avx512

}  // namespace cellstack
