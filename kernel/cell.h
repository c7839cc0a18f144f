// cellstack's native API: LSTM steps and sequences, forward and backward, on the CPU. Knows no Python and no torch.
//
//     z = x·kernel + h_prev·recurrent_kernel + bias          kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]
//     i, f, o = recurrent_activation(z_i, z_f, z_o)          g = activation(z_g)
//     c = f·c_prev + i·g                                     h = o·activation(c)
//
// Gate order i, f, g, o in every array of 4H columns. All arrays are the caller's, in row-major order, of type T (float
// or double), and must outlive the call; a null pointer means what stands beside it. Shapes are not checked here. Every
// call is safe from any thread; weights (Packed) are never written after they are made.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace cellstack {

// Instruction sets that this machine runs, best first; the one in use, at first the best.
std::vector<const char*> instruction_sets();
const char* instruction_set();
bool set_instruction_set(const char* name);  // false: not among instruction_sets()

void activate(int activation, const float* x, float* y, int64_t n);
void activate(int activation, const double* x, double* y, int64_t n);

// Weights of one cell in the layout of the instruction set that was in use when they were packed.
template <class T>
class Packed {
  public:
    // kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H] or null (zeros). With `copy` they are packed and not needed
    // any more afterwards; without, they are read where they lie, at each call, and must outlive this object: slower by
    // the step, but a call of a few steps costs less than packing. The bits are the same.
    Packed(int64_t input, int64_t units, const T* kernel, const T* recurrent_kernel, const T* bias, int activation,
           int recurrent_activation, bool copy = true);
    ~Packed();
    Packed(const Packed&) = delete;
    int64_t input() const;
    int64_t units() const;
    struct Impl;
    const Impl& impl() const { return *impl_; }

  private:
    std::unique_ptr<Impl> impl_;
};

// One layer of a stack in lstm_forward.
template <class T>
struct Layer {
    const Packed<T>* weights;
    const T *h0, *c0;            // [B, H]; null: zeros
    T *hn, *cn;                  // [B, H], state after the last step processed
    T* y;                        // [B, T, H], h of every step; null: not wanted
    T* gates;                    // [B, T, 4, H], i f g o after their activations; null: not wanted
    T* cells;                    // [B, T, H], c of every step; null exactly where gates is
    const T* recurrent_dropout;  // [B, H], multiplies h_prev at every step; null: none
};

// Sequences of one batch.
template <class T>
struct Sequences {
    int64_t batch, steps;  // either may be 0
    const T* x;            // [B, T, I]: element (b, t, i) at x[b·stride_batch + t·stride_time + i]
    int64_t stride_batch, stride_time;
    const uint8_t* mask;  // [B, T]: 0 = leave the state as it is, gates 0, y repeats h; null: all ones
    bool reverse;         // process steps from T-1 to 0; y, gates and cells stay in the order of x
};

// Runs a stack; y of one layer is x of the next. Two threads or more share the rows, or, where rows are fewer than
// threads, the layers, each as many steps behind the one below it as a chunk has. Every result has the same bits for
// any number of threads and any cut of the sequences into calls.
template <class T>
void lstm_forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads);

// Gradients of one layer, from what lstm_forward left. Inputs may be null (zeros), outputs too (not wanted).
template <class T>
struct Gradients {
    const T *dy, *dhn, *dcn, *dgates, *dcells;  // of the loss, in the shapes of y, hn, cn, gates, cells
    T *dx, *dh0, *dc0;                          // [B, T, I], [B, H], [B, H]; overwritten
    T *dkernel, *drecurrent_kernel, *dbias;     // [I, 4H], [H, 4H], [4H]; overwritten
};

template <class T>
struct Saved {
    int64_t input, units;
    const T *kernel, *recurrent_kernel;  // [I, 4H], [H, 4H], not packed
    const T *h0, *c0;                    // [B, H] or null (zeros)
    const T *y, *gates, *cells;          // what lstm_forward wrote
    const T* recurrent_dropout;          // [B, H] or null
    int activation, recurrent_activation;
};

template <class T>
void lstm_backward(const Sequences<T>& in, const Saved<T>& saved, const Gradients<T>& gradients, int threads);

// A stack with its state, for steps as they come. Allocates nothing after construction but for chunks longer than any
// before. One thread at a time may use it.
template <class T>
class Stream {
  public:
    Stream(std::vector<const Packed<T>*> weights, int64_t batch);  // weights must outlive the stream
    ~Stream();
    // x [B, T, I] -> y [B, T, H of the top layer]; T = 1 is a step.
    void run(const T* x, T* y, int64_t steps);
    void get_state(int layer, T* h, T* c) const;  // [B, H] each
    void set_state(int layer, const T* h, const T* c);
    int64_t batch() const;
    const std::vector<const Packed<T>*>& weights() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace cellstack
