// Sequences, stacks and streams: cuts the work into rows, layers and chunks, and hands it to the inner routines.
#include <algorithm>
#include <cstring>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {
namespace {

// Steps whose x·kernel is one product: enough rows to load each weight once for many, few enough to stay in the cache.
constexpr int64_t kProductRows = 64;

}  // namespace

// ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
struct Packed<T>::Impl {
    const Leaf<T>* leaf;
    Scratch<T> memory;
    Panels<T> panels;
};

template <class T>
Packed<T>::Packed(int64_t input, int64_t units, const T* kernel, const T* recurrent_kernel, const T* bias,
                  int activation, int recurrent_activation, bool copy) {
    const Leaf<T>& leaf = leaf_of<T>(current());
    const int64_t blocks = ceil_div(units, leaf.width), row = blocks * 4 * leaf.width;
    impl_.reset(new Impl{&leaf, Scratch<T>(copy ? (input + units + 1) * row : 0), {}});
    Panels<T>& p = impl_->panels;
    p.input = input, p.units = units, p.blocks = blocks;
    p.activation = activation, p.recurrent_activation = recurrent_activation;
    p.kernel = kernel, p.recurrent = recurrent_kernel, p.bias = bias, p.plain = !copy;
    if (!copy) return;
    T* memory = impl_->memory.get();
    T *in = memory, *recurrent = in + input * row, *added = recurrent + units * row;
    leaf.pack(in, kernel, input, units);
    leaf.pack(recurrent, recurrent_kernel, units, units);
    if (bias)
        leaf.pack(added, bias, 1, units);
    else
        std::fill(added, added + row, T(0));
    p.kernel = in, p.recurrent = recurrent, p.bias = added;
}
template <class T>
Packed<T>::~Packed() = default;
template <class T>
int64_t Packed<T>::input() const {
    return impl_->panels.input;
}
template <class T>
int64_t Packed<T>::units() const {
    return impl_->panels.units;
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────────

namespace {

// How many steps make a chunk; a single step is summed in place, without the product.
template <class T>
int64_t chunk_steps(int64_t rows, int64_t steps) {
    return std::max<int64_t>(1, std::min(steps, kProductRows / std::max<int64_t>(rows, 1)));
}

template <class T>
int64_t product_size(const Panels<T>& p, int64_t width, int64_t rows, int64_t chunk) {
    if (p.plain) return 4 * p.units;
    return chunk > 1 ? p.blocks * chunk * rows * 4 * width : 0;
}

// A layer over some rows, run chunk by chunk.
template <class T>
struct Runner {
    Forward<T> f;
    const Leaf<T>* leaf;
    T* product;

    // Size of what `open` takes from the parts.
    static int64_t size(const Packed<T>& weights, int64_t rows, int64_t chunk, bool dropout) {
        const Panels<T>& p = weights.impl().panels;
        const int64_t width = weights.impl().leaf->width, state = Parts<T>::size(rows * p.blocks * width);
        return (dropout ? 4 : 3) * state + Parts<T>::size(product_size(p, width, rows, chunk));
    }

    void open(const Packed<T>& weights, int64_t rows, int64_t chunk, bool dropout, Parts<T>& parts) {
        const Panels<T>& p = weights.impl().panels;
        leaf = weights.impl().leaf;
        f = Forward<T>{};
        f.w = p, f.rows = rows;
        const int64_t state = rows * p.blocks * leaf->width;
        f.h = parts.take(state), f.h_next = parts.take(state), f.c = parts.take(state);
        if (dropout) f.h_kept = parts.take(state);
        const int64_t product_count = product_size(p, leaf->width, rows, chunk);
        product = parts.take(product_count);
        if (!product_count) product = nullptr;
    }
    int64_t stride() const { return f.w.blocks * leaf->width; }

    void steps(int64_t first, int64_t last) {
        f.first = first, f.last = last;
        f.z = f.w.plain || last - first > 1 || f.rows > 1 ? product : nullptr;
        leaf->forward(f);
    }
};

}  // namespace

template <class T>
void lstm_forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads) {
    const int64_t B = in.batch, steps = in.steps;
    const int depth = int(layers.size());
    if (B == 0) return;
    int64_t work = 0;
    for (const Layer<T>& layer : layers)
        work += B * steps * 4 * layer.weights->units() * (layer.weights->input() + layer.weights->units());
    threads = useful_threads(threads, work);
    // Threads take rows where there are enough, layers where there are not.
    const int groups = int(std::min<int64_t>(B, threads));
    const int teams = groups < threads && steps > 1 ? std::min(depth, threads / groups) : 1;
    const int64_t most_rows = ceil_div(B, groups), chunk = chunk_steps<T>(most_rows, steps);

    // y of layers below the top that the caller does not want lies in scratch.
    std::vector<T*> y(depth);
    int64_t count = 0;
    for (int l = 0; l + 1 < depth; ++l)
        if (!layers[l].y) count += Parts<T>::size(checked(checked(B, steps), layers[l].weights->units()));
    std::vector<int64_t> sizes(depth);
    for (int l = 0; l < depth; ++l) {
        sizes[l] = Runner<T>::size(*layers[l].weights, most_rows, chunk, layers[l].recurrent_dropout);
        count += groups * sizes[l];
    }
    Scratch<T> scratch(count);
    Parts<T> parts(scratch.get());
    for (int l = 0; l < depth; ++l)
        y[l] = layers[l].y || l + 1 == depth ? layers[l].y : parts.take(B * steps * layers[l].weights->units());
    std::vector<T*> memory(size_t(depth) * groups);
    for (size_t k = 0; k < memory.size(); ++k) memory[k] = parts.take(sizes[k / groups]);
    std::vector<std::atomic<int64_t>> done(size_t(depth) * groups);

    const auto run_layer = [&](int l, int group) {
        const Layer<T>& layer = layers[l];
        const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first;
        const int64_t H = layer.weights->units(), below = l ? layers[l - 1].weights->units() : 0;
        Runner<T> runner;
        Parts<T> own(memory[size_t(l) * groups + group]);
        runner.open(*layer.weights, rows, chunk, layer.recurrent_dropout, own);
        Forward<T>& f = runner.f;
        f.steps = steps, f.reverse = in.reverse;
        f.x_row = l ? steps * below : in.stride_batch, f.x_time = l ? below : in.stride_time;
        f.x = (l ? y[l - 1] : in.x) + first * f.x_row;
        f.mask = in.mask ? in.mask + first * steps : nullptr;
        f.y = y[l] ? y[l] + first * steps * H : nullptr, f.y_row = steps * H, f.y_time = H;
        f.gates = layer.gates ? layer.gates + first * steps * 4 * H : nullptr;
        f.cells = layer.cells ? layer.cells + first * steps * H : nullptr;
        const int64_t stride = runner.stride();
        const auto rows_of = [&](const T* all) { return all ? all + first * H : nullptr; };
        pad(f.h, stride, rows_of(layer.h0), rows, H);
        pad(f.c, stride, rows_of(layer.c0), rows, H);
        f.recurrent_dropout = rows_of(layer.recurrent_dropout);
        if (f.recurrent_dropout) {
            memcpy(f.h_kept, f.h, size_t(rows * stride) * sizeof(T));
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t k = 0; k < H; ++k) f.h[r * stride + k] *= f.recurrent_dropout[r * H + k];
        }
        for (int64_t n = 0; n < steps; n += chunk) {
            const int64_t last = std::min(steps, n + chunk);
            if (l) wait_for(done[size_t(l - 1) * groups + group], last);
            runner.steps(n, last);
            done[size_t(l) * groups + group].store(last, std::memory_order_release);
        }
        unpad(layer.hn + first * H, f.recurrent_dropout ? f.h_kept : f.h, stride, rows, H);
        unpad(layer.cn + first * H, f.c, stride, rows, H);
    };
    // Task k: rows k mod groups, layers from bottom to top; it waits for tasks with lower numbers alone.
    parallel(groups * teams, [&](int k) {
        FlushDenormals flush;
        const int group = k % groups, team = k / groups;
        for (int l = depth * team / teams; l < depth * (team + 1) / teams; ++l) run_layer(l, group);
    });
}

// ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
struct Stream<T>::Impl {
    std::vector<const Packed<T>*> weights;
    std::vector<Runner<T>> runners;
    std::vector<T*> between;  // y of each layer but the last, [B, chunk, H]
    int64_t batch, chunk;
    std::unique_ptr<Scratch<T>> memory;
};

template <class T>
Stream<T>::Stream(std::vector<const Packed<T>*> weights, int64_t batch) : impl_(new Impl) {
    Impl& s = *impl_;
    for (const Packed<T>* w : weights) checked(checked(batch, kProductRows), 64 * (w->units() + w->input()));
    s.batch = batch, s.chunk = chunk_steps<T>(batch, kProductRows);
    int64_t count = 0;
    for (const Packed<T>* w : weights)
        count += Runner<T>::size(*w, batch, s.chunk, false) + Parts<T>::size(batch * s.chunk * w->units());
    s.memory.reset(new Scratch<T>(count));
    std::fill(s.memory->get(), s.memory->get() + count, T(0));
    Parts<T> parts(s.memory->get());
    s.runners.resize(weights.size());
    for (size_t l = 0; l < weights.size(); ++l) {
        s.runners[l].open(*weights[l], batch, s.chunk, false, parts);
        s.between.push_back(parts.take(batch * s.chunk * weights[l]->units()));
    }
    s.weights = std::move(weights);
}
template <class T>
Stream<T>::~Stream() = default;

template <class T>
void Stream<T>::run(const T* x, T* y, int64_t steps) {
    FlushDenormals flush;
    Impl& s = *impl_;
    const size_t depth = s.runners.size();
    for (int64_t first = 0; first < steps; first += s.chunk) {
        const int64_t now = std::min(s.chunk, steps - first);
        for (size_t l = 0; l < depth; ++l) {
            Forward<T>& f = s.runners[l].f;
            f.steps = now;
            if (l) {
                f.x = s.between[l - 1], f.x_time = s.weights[l - 1]->units(), f.x_row = now * f.x_time;
            } else {
                f.x_time = f.w.input, f.x_row = steps * f.w.input, f.x = x + first * f.x_time;
            }
            f.y_time = f.w.units;
            if (l + 1 < depth)
                f.y = s.between[l], f.y_row = now * f.y_time;
            else
                f.y = y + first * f.y_time, f.y_row = steps * f.y_time;
            s.runners[l].steps(0, now);
        }
    }
}

template <class T>
void Stream<T>::get_state(int layer, T* h, T* c) const {
    const Runner<T>& r = impl_->runners[layer];
    unpad(h, r.f.h, r.stride(), impl_->batch, r.f.w.units);
    unpad(c, r.f.c, r.stride(), impl_->batch, r.f.w.units);
}
template <class T>
void Stream<T>::set_state(int layer, const T* h, const T* c) {
    const Runner<T>& r = impl_->runners[layer];
    pad(r.f.h, r.stride(), h, impl_->batch, r.f.w.units);
    pad(r.f.c, r.stride(), c, impl_->batch, r.f.w.units);
}
template <class T>
int64_t Stream<T>::batch() const {
    return impl_->batch;
}
template <class T>
const std::vector<const Packed<T>*>& Stream<T>::weights() const {
    return impl_->weights;
}

template class Packed<float>;
template class Packed<double>;
template class Stream<float>;
template class Stream<double>;
template void lstm_forward(const Sequences<float>&, const std::vector<Layer<float>>&, int);
template void lstm_forward(const Sequences<double>&, const std::vector<Layer<double>>&, int);

}  // namespace cellstack
