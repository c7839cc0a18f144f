// The passes over an mLSTM's memory: first the gates of all rows, then each head of each row by itself.
#include "mlstm.h"

#include <cmath>
#include <vector>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {
namespace {

// Calls body(task, thread) for every task, on as many threads as the multiplications are worth.
template <class F>
void each_task(int64_t tasks, int64_t multiplications, int threads, F&& body) {
    const int count = int(std::min<int64_t>(useful_threads(threads, multiplications), std::max<int64_t>(tasks, 1)));
    parallel(count, [&](int thread) {
        const FlushDenormals flush;
        for (int64_t task = thread; task < tasks; task += count) body(task, thread);
    });
}

// The steps of a chunk. Per step, a chunk of L steps takes L·(keys + values) multiplications, and its products with the
// states before and after it 2·keys·values each, where those are needed.
int64_t chunk_of(const MatrixMemory& d, int64_t steps, int64_t before, int64_t after) {
    const int64_t sizes = d.keys + d.values, product = d.keys * d.values;
    if (steps > kLongChunk || steps <= kChunk) return kChunk;
    const int64_t chunks = ceil_div(steps, kChunk);
    const int64_t many = kChunk * sizes + product * 2 * (2 * chunks - 2 + before + after) / chunks;
    return steps * sizes + product * 2 * (before + after) < many ? steps : kChunk;
}

template <class T>
T* at(T* array, int64_t row, int64_t size) {
    return array ? array + row * size : nullptr;
}

// A call: the gates of all rows, and its heads.
template <class T>
class Call {
  public:
    Call(const MemorySequences<T>& in, T* const* m, int threads)
        : in_(in),
          d_(in.memory),
          threads_(threads),
          stride_(ceil_div(d_.heads, leaf.width) * leaf.width),
          row_(checked(in.steps, kGatesOfStep * stride_)),
          gates_(checked(in.batch, row_)) {
        chunk_ = in.scores ? in.score_row - kScorePadding
                           : chunk_of(d_, in.steps, in.before[0] != nullptr, in.after[0] != nullptr);
        each_task(in.batch, in.batch * in.steps * stride_ * 64, threads, [&](int64_t b, int) {
            const T *x = in.x + b * in.x_row, *gates = x + d_.heads * (2 * d_.keys + d_.values);
            leaf.memory_gates({d_.heads, stride_, in.steps, gates, gates + d_.heads, in.x_time, of_row(in.mask, b),
                               of_row(in.reset, b), m[b], gates_.get() + b * row_});
        });
    }

    // Head `task % heads` of row `task / heads`, without its states and scratch memory.
    MemoryHead<T> head(int64_t task) const {
        const int64_t b = task / d_.heads, h = task % d_.heads, keys = d_.heads * d_.keys;
        const T* x = in_.x + b * in_.x_row;
        MemoryHead<T> head{};
        head.keys = d_.keys, head.values = d_.values, head.steps = in_.steps;
        head.scale = T(1 / std::sqrt(double(d_.keys))), head.epsilon = T(d_.epsilon);
        head.q = x + h * d_.keys, head.k = head.q + keys, head.v = x + 2 * keys + h * d_.values;
        head.x_time = in_.x_time;
        head.gates = gates_.get() + b * row_ + h, head.gate_step = kGatesOfStep * stride_, head.gate = stride_;
        head.mask = of_row(in_.mask, b), head.reset = of_row(in_.reset, b);
        head.y_time = d_.heads * d_.values, head.y = in_.y + b * in_.steps * head.y_time + h * d_.values;
        head.o = in_.gated ? x + d_.width() + h * d_.values : nullptr;
        head.form = in_.form, head.chunk = chunk_, head.scores = at(in_.scores, task, in_.steps * in_.score_row);
        return head;
    }

    // Calls body(task, its scratch memory) for all heads of all rows.
    template <class F>
    void each_head(bool backward, F&& body) const {
        const int64_t tasks = in_.batch * d_.heads;
        int64_t size = 0;
        for (int64_t b = 0; b < in_.batch; b += backward ? 1 : in_.batch) {  // the resets determine the chunks
            MemoryHead<T> one = head(b * d_.heads);
            one.C = in_.after[0], one.n = in_.after[1];
            size = std::max(size, leaf.memory_scratch(one, backward));
        }
        const int64_t work = checked(checked(tasks, in_.steps), d_.keys * (d_.values + kChunk) * (backward ? 6 : 2));
        const int threads = int(std::min<int64_t>(useful_threads(threads_, work), std::max<int64_t>(tasks, 1)));
        const Scratch<T> scratch(checked(threads, size));
        each_task(tasks, work, threads, [&](int64_t task, int thread) { body(task, scratch.get() + thread * size); });
    }

    const Leaf<T>& leaf = leaf_of<T>(current());

  private:
    const uint8_t* of_row(const uint8_t* flags, int64_t b) const { return flags ? flags + b * in_.steps : nullptr; }

    const MemorySequences<T>& in_;
    const MatrixMemory& d_;
    int threads_;
    int64_t stride_, row_, chunk_;
    Scratch<T> gates_;
};

}  // namespace

int64_t score_row(const MatrixMemory& d, int64_t steps, bool before, bool after) {
    const int64_t row = score_row(chunk_of(d, steps, before, after));
    return steps >= kShortChunk && row <= d.keys + d.values ? row : 0;
}

template <class T>
void memory_forward(const MemorySequences<T>& in, int threads) {
    const MatrixMemory& d = in.memory;
    const int64_t n_size = d.keys, C_size = d.keys * d.values;
    const Scratch<T> states(in.after[2] ? 0 : checked(in.batch, d.heads));
    std::vector<T*> m(size_t(in.batch));
    const auto row_of = [&](int64_t b) { return in.places ? in.places[b] : b; };
    for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t row = row_of(b) * d.heads;
        m[size_t(b)] = in.after[2] ? in.after[2] + row : states.get() + b * d.heads;
        for (int64_t h = 0; h < d.heads; ++h) m[size_t(b)][h] = in.before[2] ? in.before[2][row + h] : T(0);
    }
    const Call<T> call(in, m.data(), threads);
    call.each_head(false, [&](int64_t task, T* scratch) {
        const int64_t row = row_of(task / d.heads) * d.heads + task % d.heads;
        MemoryHead<T> head = call.head(task);
        head.C_before = at(in.before[0], row, C_size), head.n_before = at(in.before[1], row, n_size);
        head.C = at(in.after[0], row, C_size), head.n = at(in.after[1], row, n_size);
        head.scratch = scratch;
        call.leaf.memory_forward(head);
    });
}

template <class T>
void memory_backward(const MemorySequences<T>& in, const MemoryGradients<T>& g, int threads) {
    const MatrixMemory& d = in.memory;
    const int64_t n_size = d.keys, C_size = d.keys * d.values, width = d.width();
    const Scratch<T> states(checked(in.batch, d.heads));
    std::vector<T*> m(size_t(in.batch));
    for (int64_t b = 0; b < in.batch; ++b) {
        m[size_t(b)] = states.get() + b * d.heads;
        for (int64_t h = 0; h < d.heads; ++h) m[size_t(b)][h] = in.before[2] ? in.before[2][b * d.heads + h] : T(0);
    }
    const Call<T> call(in, m.data(), threads);
    call.each_head(true, [&](int64_t row, T* scratch) {
        MemoryHeadBack<T> back{};
        back.head = call.head(row);
        back.head.C_before = at(in.before[0], row, C_size), back.head.n_before = at(in.before[1], row, n_size);
        back.head.scratch = scratch;
        // dx, and dy, have the rows and columns of x and y
        const int64_t b = row / d.heads, h = row % d.heads, keys = d.heads * d.keys;
        const int64_t gates = 2 * keys + d.heads * d.values;
        back.i = in.x + b * in.x_row + gates + h, back.f = back.i + d.heads;
        T* dx = g.dx + b * in.steps * width;
        back.dq = dx + h * d.keys, back.dk = back.dq + keys, back.dv = dx + 2 * keys + h * d.values;
        back.di = dx + gates + h, back.df = back.di + d.heads, back.dx_time = width;
        back.dy = at(g.dy, 1, back.head.y - in.y);
        back.dC = at(g.dafter[0], row, C_size), back.dn = at(g.dafter[1], row, n_size);
        back.dm = at(g.dafter[2], row, 1);
        back.dC_before = at(g.dbefore[0], row, C_size), back.dn_before = at(g.dbefore[1], row, n_size);
        back.dm_before = at(g.dbefore[2], row, 1);
        call.leaf.memory_backward(back);
    });
}

template void memory_forward(const MemorySequences<float>&, int);
template void memory_forward(const MemorySequences<double>&, int);
template void memory_backward(const MemorySequences<float>&, const MemoryGradients<float>&, int);
template void memory_backward(const MemorySequences<double>&, const MemoryGradients<double>&, int);

}  // namespace cellstack
