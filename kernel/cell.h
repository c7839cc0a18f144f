// cellstack's native API: steps and sequences of recurrent cells, forward and backward, on the CPU. Knows no Python and
// no torch. The equations of every cell and flag: lstm.h, gru.h, rnn.h, and src/cellstack/reference.py.
//
// Blocks of H columns a gate, in the order i f g o (LSTM; without f where coupled), z r g (GRU), g (SimpleRNN). All
// arrays are the caller's, in row-major order, of type T (float or double), and must outlive the call; a null pointer
// means what stands beside it. Shapes are not checked here. Every call is safe from any thread; Weights are
// never written after they are made.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "description.h"

namespace cellstack {

// Instruction sets that this machine runs, best first; the one in use, at first the best.
std::vector<const char*> instruction_sets();
const char* instruction_set();
bool set_instruction_set(const char* name);  // false: not among instruction_sets()

void activate(const Activation& activation, const float* x, float* y, int64_t n);
void activate(const Activation& activation, const double* x, double* y, int64_t n);

// Weights of one cell, for the instruction set that was in use when they were made.
template <class T>
class Weights {
  public:
    // With `copy` the arrays are packed into its layout and not needed any more afterwards; without, they are read
    // where they lie, at each call, and must outlive this object: slower by the step, but a call of a few steps costs
    // less than packing, and `backward` reads no others. The bits are the same. Matrices that are copied may be held in
    // a narrower element. Without a copy, bfloat16 is for `backward` alone: its products are of rounded numbers where
    // the instruction set multiplies pairs of these.
    Weights(const Description& description, const Arrays<const T>& arrays, bool copy = true,
            Element element = element_of<T>());
    ~Weights();
    Weights(const Weights&) = delete;
    const Description& description() const;
    Element element() const;
    bool copied() const;
    const Arrays<const T>& arrays() const;  // where they lie; not the matrices of a copy
    struct Impl;
    const Impl& impl() const { return *impl_; }

  private:
    std::unique_ptr<Impl> impl_;
};

// What a training draws anew for a call.
template <class T>
struct Drops {
    const T* recurrent;     // [B, P], multiplies h_prev in the sums of every step; null: none
    const T* zoneout;       // [B, T, P], 1 = keep the old value; null: the description's rate, as a constant
    const T* zoneout_cell;  // [B, T, H], likewise
};

// One layer of a stack: what forward takes and writes, and what backward reads of it.
template <class T>
struct Layer {
    const Weights<T>* weights;
    const T *h0, *c0;  // [B, P], [B, H]; null: the cell's initial state
    T *hn, *cn;        // [B, P], [B, H], state after the last step processed; c only for an LSTM; null: not wanted
    T* y;              // [B, T, P], h of every step (see time_major); null: not wanted
    T* gates;          // [B, T, planes, H], after their activations; null: not wanted
    T* cells;          // [B, T, H], c of every step; null: not wanted, and without a cell
    T* norms;          // [B, T, norm_size()], what layer normalisation left; null: not wanted, and without it
    Drops<T> drops;
    Patches<T> patches{};  // forward alone
};

// Sequences of one batch.
template <class T>
struct Sequences {
    int64_t batch, steps;  // either may be 0
    const T* x;            // [B, T, I]: element (b, t, i) at x[b·stride_batch + t·stride_time + i]
    int64_t stride_batch, stride_time;
    const uint8_t* mask;   // [B, T]: 0 = leave the state as it is, gates 0, y repeats h; null: all ones
    const uint8_t* reset;  // [B, T]: 1 = before this step the state becomes the cell's initial state; null: all zeros
    bool reverse;          // process steps from T-1 to 0; y, gates and cells stay in the order of x
    // Where the state of each row lies in h0, c0, hn and cn, which may be the same arrays and have more rows; all
    // different. Null: row b's at b.
    const int64_t* places = nullptr;
    // Whether y of every layer, its gradient and that of x have time before batch: [T, B, P], [T, B, I].
    bool time_major = false;

    // How far apart rows and steps of an array with so much a step lie, where the flag has a say.
    int64_t row_stride(int64_t width) const { return time_major ? width : steps * width; }
    int64_t time_stride(int64_t width) const { return time_major ? batch * width : width; }
};

// A thread more is of use for each this many multiplications (some 20 µs of one): below, waking it takes longer than it
// helps.
constexpr int64_t kThreadWork = int64_t(1) << 20;

// How threads cut a call up: groups of rows; of each group's threads either teams, which share out the layers, each
// some chunks behind the team below (a wavefront), or shares of the units, step by step. A chunk has so many steps.
struct Cut {
    int groups, teams, shares;
    int64_t chunk;
};

// What takes least by estimate.
template <class T>
Cut cut_of(const std::vector<const Weights<T>*>& weights, int64_t batch, int64_t steps, bool resets, int threads);

// Runs a stack, cut up like this; y of one layer is x of the next. Every result has the same bits for any number of
// threads and any cut of the sequences into calls.
template <class T>
void forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads);

// Gradients of the loss, of one layer. Inputs may be null (zeros), outputs too (not wanted).
template <class T>
struct Gradients {
    const T *dy, *dhn, *dcn, *dgates, *dcells;  // by the caller's own use of y, hn, cn, gates, cells, in their shapes
    T *dx, *dh0, *dc0;                          // [B, T, I], of the lowest layer alone; [B, P], [B, H]; overwritten
    Arrays<T> arrays;                           // overwritten
};

// Back through a stack: `layers` as forward took them, with y, gates, cells and norms as it left them (hn and cn aren't
// read), and with weights that aren't copied; `gradients` one a layer. Where gates and norms are null they are made
// again of x, y and cells, some steps at a time, with the same bits. Layers below the lowest of which a gradient is
// wanted aren't visited. No `places`.
template <class T>
void backward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const std::vector<Gradients<T>>& gradients,
              int threads);

// A stack with its state, for steps as they come. On one thread it allocates nothing after construction. One thread at
// a time may use it; a call that is long enough is shared by up to `threads`.
template <class T>
class Stream {
  public:
    // The weights must outlive the stream.
    Stream(std::vector<const Weights<T>*> weights, int64_t batch, int threads = 1);
    ~Stream();
    // x [B, T, I] -> y [B, T, P of the top layer]; T = 1 is a step.
    void run(const T* x, T* y, int64_t steps);
    void reset();                                 // to the cells' initial states
    void keep();                                  // the state as it is now,
    void undo();                                  // and back to it
    void get_state(int layer, T* h, T* c) const;  // [B, P], [B, H]; c null without a cell
    void set_state(int layer, const T* h, const T* c);
    int64_t batch() const;
    const std::vector<const Weights<T>*>& weights() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace cellstack
