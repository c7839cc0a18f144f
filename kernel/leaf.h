// What one instruction set offers: the inner routines, for one thread, over rows and steps that sequence.cpp and
// gradients.cpp hand out.
//
// Panels. Weights of a layer are stored by blocks of W units (W = lanes of a vector): for each k, the four gates' W
// columns side by side, `[block][k][4][W]`, zeros beyond H. One block's sums of one row are four registers, and i, f,
// g, o of the same units meet there. The backward pass keeps dz in the same layout, `[block][row][4][W]`.
//
// Order of summation, everywhere: bias, then x·kernel by k, then h·recurrent_kernel by k, one chain a unit and gate.
// So a row's bits do not depend on the batch around it, on how a sequence is cut into chunks, or on the threads.
#pragma once
#include <cstdint>

namespace cellstack {

enum Activation : int { kSigmoid, kTanh, kLinear, kRelu, kHardSigmoid, kSoftsign, kSoftplus, kElu, kActivations };

// Weights may also stay as the caller has them (`plain`), for calls too short to be worth packing for.
template <class T>
struct Panels {
    int64_t input = 0, units = 0, blocks = 0;
    const T* kernel = nullptr;     // [blocks][I][4][W]; plain: [I, 4H]
    const T* recurrent = nullptr;  // [blocks][H][4][W]; plain: [H, 4H]
    const T* bias = nullptr;       // [blocks][4][W]; plain: [4H], or null
    int activation = kTanh, recurrent_activation = kSigmoid;
    bool plain = false;
};

// Forward over rows of one layer, for steps n in [first, last) of the processing order.
template <class T>
struct Forward {
    Panels<T> w;
    int64_t rows, steps, first, last;
    bool reverse;  // step n is time steps-1-n
    const T* x;    // x of row r at time t: x + r·x_row + t·x_time
    int64_t x_row, x_time;
    const uint8_t* mask;         // [rows][steps] or null
    const T* recurrent_dropout;  // [rows][H] or null
    T *h, *h_next;               // [rows][blocks·W]; swapped after every step: `h` is the state
    T* h_kept;                   // [rows][blocks·W], h before recurrent dropout; null without it
    T* c;                        // [rows][blocks·W]
    T *y, *cells;                // element (r, t) at r·steps·H + t·H, or null; y has strides of its own
    int64_t y_row, y_time;
    T* gates;  // [rows][steps][4][H] or null
    T* z;      // scratch [blocks][(last-first)·rows][4][W]: x·kernel + bias; null: summed in place;
               // plain: [4H]
};

// Backward over rows of one layer, for steps n in [first, last) of the processing order, last to first.
template <class T>
struct Backward {
    int64_t units, blocks, rows, steps, first, last, batch, row0;  // rows row0 … row0+rows of a batch
    int activation, recurrent_activation;
    bool reverse;
    const T* recurrent_t;           // transposed panels, see pack_transposed
    const T *gates, *cells, *c0;    // [rows][steps][4][H], [rows][steps][H], [rows][H] (null: zeros)
    const uint8_t* mask;            // [rows][steps] or null
    const T* recurrent_dropout;     // [rows][H] or null
    const T *dy, *dgates, *dcells;  // as y, gates, cells; or null
    T *dh, *dc;  // [rows][columns], [rows][blocks·W]: in, after step last - 1; out, before step first
    T* dz;       // out, [blocks][(last - first)·batch][4][W], row (n - first)·batch + b
};

// Gradients of the weights of some blocks: sums over m of a[m]ᵀ·dz[m], where a is x for the kernel and h_prev for the
// recurrent kernel. All go over dz together, some rows at a time, since dz is what does not fit into the cache.
template <class T>
struct WeightGradient {
    const T* dz;  // [blocks][dz_rows][4][W], all blocks
    int64_t dz_rows, units, first, last;
    struct {
        const T* const* rows;  // dz_rows rows of `columns`
        int64_t columns;       // 0: not wanted
        T* out;                // [columns, 4H]; columns of blocks first … last are written
        T* sums;               // scratch [last - first][columns][4][W]
        T* copy;               // scratch, gradient_copy(columns)
    } of[2];
    T* bias;       // [4H] or null
    T* bias_sums;  // scratch [last - first][4][W]
    bool more;     // go on from the sums of the call before; else from zero
    bool write;    // sums are whole: write `out` and `bias`
};

// Rows of dz that stay in L1 while columns of a pass over them, and the room that as many rows of a are copied to:
// their own distance may be one at which a cache keeps only few of them. A line is left between rows for the same
// reason.
constexpr int64_t kGradientRows = 96;
inline int64_t gradient_stride(int64_t columns) { return (columns + 31) / 16 * 16; }
inline int64_t gradient_copy(int64_t columns) { return kGradientRows * gradient_stride(columns); }

template <class T>
struct Leaf {
    int width;
    // kernel [K, 4H] with H columns a gate -> panels [blocks][K][4][W]
    void (*pack)(T* to, const T* from, int64_t rows, int64_t units);
    // kernel [K, 4H] -> [panel][blocks·4·W][4·W]: columns are K (zeros beyond), in the order that dz has
    void (*pack_transposed)(T* to, const T* from, int64_t rows, int64_t units);
    void (*forward)(Forward<T>&);
    void (*backward)(Backward<T>&);
    // out[m] (rows of `columns`) = dz[m]·kernelᵀ for m in [first, last) of the rows·steps; row m goes to out[m]
    void (*input_gradient)(const T* dz, int64_t blocks, int64_t dz_rows, const T* kernel_t, int64_t columns,
                           int64_t first, int64_t last, T* const* out);
    void (*weight_gradient)(const WeightGradient<T>&);
    void (*activate)(int activation, const T* x, T* y, int64_t n);
};

struct InstructionSet {
    const char* name;
    Leaf<float> single;
    Leaf<double> twice;
};

namespace baseline {
extern const InstructionSet set;
}
#ifdef CELLSTACK_X86
namespace avx2 {
extern const InstructionSet set;
}
namespace avx512 {
extern const InstructionSet set;
}
#endif

}  // namespace cellstack
