// cellstack's native API: steps and sequences of recurrent cells on the CPU, forward and backward, without Python or
// PyTorch. kinds.h lists the kinds of cell; for the equations of each, with every flag, see its header and
// src/cellstack/reference.
//
// A matrix has a block of H columns per gate, in the order of `gates` in src/cellstack/cells (without a coupled f). The
// states of a kind are lists: h [P] first, then its inner states [H], such as c. All arrays belong to the caller, are
// in row-major order, have type T (float or double), and must outlive the call. The comment on each pointer says what
// null means. Shapes are not checked here. Any thread may make any call; Weights never change after construction.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "description.h"

namespace cellstack {

// The instruction sets that this machine supports, best first; and the one in use, initially the best.
std::vector<const char*> instruction_sets();
const char* instruction_set();
bool set_instruction_set(const char* name);  // returns false if the name isn't among instruction_sets()

void activate(const Activation& activation, const float* x, float* y, int64_t n);
void activate(const Activation& activation, const double* x, double* y, int64_t n);

// Weights of one cell, for the instruction set in use at construction.
template <class T>
class Weights {
  public:
    // With `copy`, the arrays are packed into the layout of the instruction set and not needed afterwards. Without it,
    // every call reads them in place, and they must outlive this object: steps are slower, but for a call of a few
    // steps this costs less than packing. `backward` only accepts weights without a copy. The results have the same
    // bits. Copied matrices may have a narrower format. Without a copy, bfloat16 is for `backward` only, which then
    // rounds the operands of its products, if the instruction set multiplies pairs of bfloat16. Threads share the
    // packing of a large matrix.
    Weights(const Description& description, const Arrays<const T>& arrays, bool copy = true,
            Element element = element_of<T>(), int threads = 1);
    ~Weights();
    Weights(const Weights&) = delete;
    const Description& description() const;
    Element element() const;
    bool copied() const;
    const Arrays<const T>& arrays() const;  // pointers to the arrays; invalid for matrices that were copied
    struct Impl;
    const Impl& impl() const { return *impl_; }

  private:
    std::unique_ptr<Impl> impl_;
};

// Random masks that training draws for each call.
template <class T>
struct Drops {
    const T* recurrent;     // [B, P], multiplies h_prev in the sums of every step, or the candidate; null: none
    const T* zoneout;       // [B, T, P], 1 = keep the old value; null: the description's rate, as a constant
    const T* zoneout_cell;  // [B, T, H], the same for c
};

// One layer of a stack: the inputs and outputs of `forward`, some of which `backward` reads.
template <class T>
struct Layer {
    const Weights<T>* weights;
    const T* before[kStates];  // [B, P], [B, H] …, states; null: the cell's initial state
    T* after[kStates];         // [B, P], [B, H] …, states after the last step processed; null: not written
    T* y;                      // [B, T, P], h of every step (see time_major); null: not written
    T* gates;                  // [B, T, planes, H], after their activations; null: not written
    T* states[kInner];         // [B, T, H] each, the inner states of every step; null: not written, or no such state
    T* intermediate;           // [B, T, intermediate_size()], see there; null: not written, or of size 0
    Drops<T> drops;
    Patches<T> patches{};  // forward only

    // The mask of recurrent dropout, if it multiplies h; or if it multiplies the candidate.
    const T* dropped_h() const { return weights->description().kind->drops_candidate ? nullptr : drops.recurrent; }
    const T* dropped_candidate() const { return dropped_h() ? nullptr : drops.recurrent; }
};

// The sequences of one batch.
template <class T>
struct Sequences {
    int64_t batch, steps;  // either may be 0
    const T* x;            // [B, T, I]: element (b, t, i) at x[b·stride_batch + t·stride_time + i]
    int64_t stride_batch, stride_time;
    const uint8_t* mask;   // [B, T]: 0 = keep the state, gates 0, y repeats h; null: all ones
    const uint8_t* reset;  // [B, T]: 1 = before this step the state becomes the cell's initial state; null: all zeros
    bool reverse;          // process steps from T-1 to 0; y, gates and states stay in the order of x
    // The index of each row's states in `before` and `after`; all different. These may be the same arrays, and may have
    // more rows than the batch. Null: index b for row b.
    const int64_t* places = nullptr;
    // Whether y of every layer, its gradient and the gradient of x have time before batch: [T, B, P], [T, B, I].
    bool time_major = false;
    // How many calls write their outputs to one array: y of the top layer is part of [B, T, ways, P], or [T, ways, B,
    // P]. Forward only.
    int64_t ways = 1;

    // The distances between rows and between steps in such an array with `width` numbers per step.
    int64_t row_stride(int64_t width, int64_t of_ways = 1) const {
        return time_major ? width : steps * of_ways * width;
    }
    int64_t time_stride(int64_t width, int64_t of_ways = 1) const { return (time_major ? batch : 1) * of_ways * width; }
};

// One thread is added per this many multiplications (some 20 µs of one thread); with less work, waking it takes longer
// than it saves.
constexpr int64_t kThreadWork = int64_t(1) << 20;

// How a call is divided among threads: the batch into groups of rows, and the threads of each group either into teams
// that divide the layers, each some chunks behind the team below (a wavefront), or into shares that divide the units of
// each step. `chunk` is the number of steps in a chunk.
struct Cut {
    int groups, teams, shares;
    int64_t chunk;
    double time = 0;  // the estimate, in nanoseconds
};

// The fastest cut, by an estimate.
template <class T>
Cut cut_of(const std::vector<const Weights<T>*>& weights, int64_t batch, int64_t steps, bool resets, int threads);

// Runs a stack, divided in this way; y of one layer is x of the next. All results have the same bits for any number of
// threads and any division of the sequences into calls.
template <class T>
void forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads);

// A stack and its sequences.
template <class T>
struct Run {
    Sequences<T> in;
    std::vector<Layer<T>> layers;
};

// Runs independent stacks, such as the two directions of a layer: at the same time, each with an equal part of the
// threads, or one after the other, each with all of them. The faster way is chosen by an estimate. The bits are the
// same. Returns whether they ran at the same time.
template <class T>
bool forward(const std::vector<Run<T>>& runs, int threads);

// Gradients of the loss for one layer. Null inputs are zeros; null outputs are not computed.
template <class T>
struct Gradients {
    // For the caller's own uses of y, `after`, gates and `states`, in their shapes.
    const T *dy, *dafter[kStates], *dgates, *dstates[kInner];
    T *dx, *dbefore[kStates];  // [B, T, I], for the lowest layer only; in the shapes of `before`; overwritten
    Arrays<T> arrays;          // overwritten
};

// The backward pass through a stack: `layers` as they were passed to `forward`, with the y, gates, states and
// intermediate values that it wrote (`after` isn't read), and with weights without a copy; `gradients` has one entry
// per layer. If gates and intermediate values are null, they are recomputed from x, y and states, some steps at a time,
// with the same bits. Layers below the lowest one with a requested gradient are skipped. `places` isn't supported.
template <class T>
void backward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const std::vector<Gradients<T>>& gradients,
              int threads);

// A stack with its state, for sequences that arrive step by step. With one thread it allocates nothing after
// construction. Only one thread at a time may use it; a long call is divided among up to `threads` threads.
template <class T>
class Stream {
  public:
    // The weights must outlive the stream.
    Stream(std::vector<const Weights<T>*> weights, int64_t batch, int threads = 1);
    ~Stream();
    // x [B, T, I] -> y [B, T, P of the top layer]; T = 1 is a step.
    void run(const T* x, T* y, int64_t steps);
    void reset();  // sets the cells' initial states
    void keep();   // saves the current states
    void undo();   // restores the saved states
    // One array per state of the layer's kind, [B, P], [B, H] …
    void get_state(int layer, T* const* states) const;
    void set_state(int layer, const T* const* states);
    int64_t batch() const;
    const std::vector<const Weights<T>*>& weights() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace cellstack
