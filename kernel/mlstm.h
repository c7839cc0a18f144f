// An mLSTM's memory: a matrix C, a normaliser n and a stabiliser m per head,
//     m = max(log σ(f̃) + m₋, ĩ)      f = e^(log σ(f̃) + m₋ - m)      i = e^(ĩ - m)
//     C = f·C₋ + i·k·vᵀ                n = f·n₋ + i·k                    h = Cᵀq / (max(|nᵀq|, e^(-m)) + ε)
// where k is scaled by 1/√keys. A step reads and writes C once. A sequence is divided into chunks of steps: within a
// chunk, step t takes from step s ≤ t the share
//     D[t, s] = i[s]·f[s+1]·…·f[t]     and from the state before the chunk     e[t] = f[first]·…·f[t],
// so that h follows from matrix products: (S·V + e∘(Q·C₋)), with S = (Q·Kᵀ)∘D.
#pragma once
#include <cstdint>

namespace cellstack {

// A row of x at a step has q [heads][keys], k [heads][keys], v [heads][values], ĩ [heads] and f̃ [heads]; a row of y
// has h [heads][values]. With an output gate, x ends in õ [heads][values], and y is σ(õ)·h.
struct MatrixMemory {
    int64_t heads, keys, values;
    double epsilon;
    int64_t width() const { return heads * (2 * keys + values + 2); }  // of x without õ
    int64_t output() const { return heads * values; }
};

constexpr int kMatrixStates = 3;  // C [heads][keys][values], n [heads][keys], m [heads]

enum class MemoryForm : int { kFastest, kSteps, kChunks };

template <class T>
struct MemorySequences {
    MatrixMemory memory;
    int64_t batch, steps;
    const T* x;  // x of row b at step t: x + b·x_row + t·x_time
    int64_t x_row, x_time;
    const uint8_t *mask, *reset;     // [batch][steps] or null: a masked step keeps the states, and its y is zero
    const T* before[kMatrixStates];  // the states by row; null: zeros
    T* after[kMatrixStates];         // may be the same arrays as `before`; null: not needed
    const int64_t* places;           // the row of the states of each row of x; null: the same
    T* y;                            // [batch][steps][heads·values]
    MemoryForm form;
    bool gated = false;  // whether there is an output gate; forward only
    // S of each chunk, divided as h is, which forward writes and backward reads: [batch][heads][steps][score_row].
    // Null: backward computes it again. The last number of a row is the sum that h is divided by, or NaN if the row is
    // empty.
    T* scores = nullptr;
    int64_t score_row = 0;  // from score_row()
};

template <class T>
void memory_forward(const MemorySequences<T>& in, int threads);

// The row of `scores` of a sequence, with a state before it or needed after it; 0 if it shouldn't be kept: rows that
// are longer than a key and a value take more memory than they are worth.
int64_t score_row(const MatrixMemory& memory, int64_t steps, bool before, bool after);

// Null inputs are zeros; null outputs are not computed.
template <class T>
struct MemoryGradients {
    const T *dy, *dafter[kMatrixStates];
    T *dx, *dbefore[kMatrixStates];  // dx [batch][steps][width]
};

// `in` as it was passed to memory_forward, with the y that it wrote; `after` isn't read, `places` isn't supported.
template <class T>
void memory_backward(const MemorySequences<T>& in, const MemoryGradients<T>& gradients, int threads);

// ── the interface of one instruction set ─────────────────────────────────────────────────────────────────────────────

// Chunks have kChunk steps; or, if that takes fewer multiplications, the sequence is one chunk, of kLongChunk steps at
// most. Fewer steps than kShortChunk run in the step form.
constexpr int64_t kChunk = 64, kLongChunk = 1024, kShortChunk = 6;

// The distance between the rows of S: at least a line longer than a row, as rows that are a multiple of 1 KB apart
// would share a few lines of the cache.
constexpr int64_t kScorePadding = 16;
constexpr int64_t score_row(int64_t chunk) { return (chunk + 15) / 16 * 16 + kScorePadding; }

// The gates of a step: i, f, m and e^(-m), each of all heads, `stride` apart; m before the first step, and after it.
enum Gate : int { kInputGate, kForgetGate, kStabiliser, kFloor, kGatesOfStep };
template <class T>
struct MemoryGates {
    int64_t heads, stride, steps;
    const T *i, *f;  // ĩ and f̃ of the first step; those of step t: + t·x_time
    int64_t x_time;
    const uint8_t *mask, *reset;  // of the row, or null
    T *m, *to;                    // [heads]; [steps][kGatesOfStep][stride]
};

// One head of one row.
template <class T>
struct MemoryHead {
    int64_t keys, values, steps;
    T scale, epsilon;
    const T *q, *k, *v;  // of the first step
    const T* o;          // õ; null: no output gate
    int64_t x_time;
    const T* gates;  // gate g of step t: gates + t·gate_step + g·gate
    int64_t gate_step, gate;
    const uint8_t *mask, *reset;
    const T *C_before, *n_before;  // null: zeros
    T *C, *n;                      // may be C_before, n_before; null: not needed
    T* y;
    int64_t y_time;
    MemoryForm form;
    int64_t chunk;  // steps of a chunk
    T* scores;      // of the first step, those of step t: + t·score_row(chunk); null: not kept
    T* scratch;     // of the leaf's memory_scratch numbers
};

template <class T>
struct MemoryHeadBack {
    MemoryHead<T> head;          // C, n and form aren't used
    const T *i, *f;              // ĩ and f̃ of the first step
    const T *dy, *dC, *dn, *dm;  // null: zeros; dy with y's distances
    T *dq, *dk, *dv, *di, *df;   // of the first step; those of step t: + t·dx_time
    int64_t dx_time;
    T *dC_before, *dn_before, *dm_before;  // or null
    T m_before;
};

}  // namespace cellstack
