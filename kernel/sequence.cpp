// Sequences, stacks and streams: cuts the work into rows, layers and chunks, and hands it to the inner routines.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cell.h"
#include "dispatch.h"
#include "threads.h"

namespace cellstack {
namespace {

// Steps whose x·kernel is one product: enough rows to load each weight once for many, few enough to stay in the cache.
constexpr int64_t kProductRows = 64;

// Sizes are products of what a caller asks for: whatever is beyond this would wrap around sooner or later.
constexpr int64_t kMostNumbers = int64_t(1) << 44;

int64_t checked(int64_t a, int64_t b) {
    if (b && a > kMostNumbers / b) throw std::bad_alloc();
    return a * b;
}

// Memory for the length of a call or an object, aligned to a cache line. A block that a thread gave back is kept for
// its next call: fresh pages cost more than the sums that go into them.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : bytes_(bytes_of(count)) {
        Kept& kept = spare();
        if (kept.memory && kept.bytes >= bytes_ && kept.bytes <= 4 * bytes_ + 4096) {
            memory_ = kept.memory, bytes_ = kept.bytes, kept.memory = nullptr;
        } else {
            memory_ = aligned_alloc(64, bytes_);
            if (!memory_) throw std::bad_alloc();
        }
    }
    ~Scratch() {
        Kept& kept = spare();
        if (bytes_ <= kMost && (!kept.memory || kept.bytes < bytes_)) {
            std::swap(kept.memory, memory_);
            std::swap(kept.bytes, bytes_);
        }
        free(memory_);
    }
    Scratch(const Scratch&) = delete;
    T* get() const { return static_cast<T*>(memory_); }

  private:
    static constexpr size_t kMost = size_t(64) << 20;
    static size_t bytes_of(int64_t count) {
        if (count < 0 || count > kMostNumbers) throw std::bad_alloc();
        return (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    }
    struct Kept {
        void* memory = nullptr;
        size_t bytes = 0;
        ~Kept() { free(memory); }
    };
    static Kept& spare() {
        static thread_local Kept kept;
        return kept;
    }
    void* memory_;
    size_t bytes_;
};

// Hands out parts of one scratch block, each on a cache line of its own.
template <class T>
class Parts {
  public:
    explicit Parts(T* memory) : next_(memory) {}
    static int64_t size(int64_t count) { return (count + 15) / 16 * 16; }
    T* take(int64_t count) {
        T* part = next_;
        next_ += size(count);
        return part;
    }

  private:
    T* next_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread more for each this many multiplications (some 20 µs of one): below, waking it takes longer than it helps.
constexpr int64_t kThreadWork = int64_t(1) << 20;
constexpr int64_t kMostThreads = 256;

int useful_threads(int asked, int64_t multiplications) {
    return int(std::max<int64_t>(1, std::min<int64_t>({asked, multiplications / kThreadWork, kMostThreads})));
}

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

// [rows][units] between the caller's arrays and the padded ones that the inner routines use.
template <class T>
void pad(T* to, int64_t stride, const T* from, int64_t rows, int64_t units) {
    for (int64_t r = 0; r < rows; ++r) {
        if (from) memcpy(to + r * stride, from + r * units, size_t(units) * sizeof(T));
        std::fill(to + r * stride + (from ? units : 0), to + (r + 1) * stride, T(0));
    }
}
template <class T>
void unpad(T* to, const T* from, int64_t stride, int64_t rows, int64_t units) {
    for (int64_t r = 0; r < rows; ++r) memcpy(to + r * units, from + r * stride, size_t(units) * sizeof(T));
}

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
    for (auto& part : memory) part = parts.take(sizes[size_t(&part - memory.data()) / groups]);
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

// ── backward ─────────────────────────────────────────────────────────────────────────────────────────────────────────

namespace {

// As much dz as stays in a second-level cache until the gradients have been made of it.
constexpr int64_t kGradientBytes = int64_t(512) << 10;
constexpr int64_t kInputRows = 96;  // of a task of the gradient of x

}  // namespace

template <class T>
void lstm_backward(const Sequences<T>& in, const Saved<T>& s, const Gradients<T>& g, int threads) {
    const Leaf<T>& leaf = leaf_of<T>(current());
    const int64_t B = in.batch, steps = in.steps, I = s.input, H = s.units;
    const int64_t W = leaf.width, wide = 4 * W, blocks = ceil_div(H, W);
    const int64_t columns = ceil_div(H, wide) * wide, input_columns = ceil_div(I, wide) * wide;
    const auto wanted = [](T* out, int64_t count) { return out ? count : 0; };
    if (B * steps == 0) {
        std::fill_n(g.dkernel, wanted(g.dkernel, I * 4 * H), T(0));
        std::fill_n(g.drecurrent_kernel, wanted(g.drecurrent_kernel, H * 4 * H), T(0));
        std::fill_n(g.dbias, wanted(g.dbias, 4 * H), T(0));
    }
    threads = useful_threads(threads, B * steps * 8 * H * (I + H));
    const int groups = int(std::max<int64_t>(1, std::min<int64_t>(B, threads)));
    const int64_t chunk = std::max<int64_t>(
        1, std::min(steps, kGradientBytes / int64_t(blocks * wide * sizeof(T)) / std::max<int64_t>(B, 1)));

    const int64_t state = Parts<T>::size(B * columns), transposed = Parts<T>::size(columns * blocks * wide);
    const int64_t transposed_in = Parts<T>::size(wanted(g.dx, input_columns * blocks * wide));
    const int64_t chunk_dz = Parts<T>::size(blocks * chunk * B * wide);
    const int64_t dropped = s.recurrent_dropout ? Parts<T>::size(chunk * B * H) : 0;
    const int64_t sums = Parts<T>::size(blocks * (I + H + 1) * wide);
    const int64_t copies = Parts<T>::size(gradient_copy(I) + gradient_copy(H));
    Scratch<T> scratch(2 * state + transposed + transposed_in + chunk_dz + dropped + sums + threads * copies +
                       Parts<T>::size(std::max(I, H)));
    Parts<T> parts(scratch.get());
    T *dh = parts.take(state), *dc = parts.take(state);
    T *recurrent_t = parts.take(transposed), *kernel_t = parts.take(transposed_in), *dz = parts.take(chunk_dz);
    T *h_dropped = parts.take(dropped), *gradients = parts.take(sums), *copied = parts.take(threads * copies);
    T* zeros = parts.take(std::max(I, H));
    std::fill(zeros, zeros + std::max(I, H), T(0));
    leaf.pack_transposed(recurrent_t, s.recurrent_kernel, H, H);
    if (g.dx) leaf.pack_transposed(kernel_t, s.kernel, I, H);
    pad(dh, columns, g.dhn, B, H);
    pad(dc, blocks * W, g.dcn, B, H);

    // Back through the time of a chunk, rows apart.
    const auto through_time = [&](int group, int64_t first_step, int64_t last_step) {
        const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first;
        const auto at = [&](const T* all, int64_t per_row) { return all ? all + first * per_row : nullptr; };
        Backward<T> f{};
        f.units = H, f.blocks = blocks, f.rows = rows, f.steps = steps, f.batch = B, f.row0 = first;
        f.first = first_step, f.last = last_step;
        f.activation = s.activation, f.recurrent_activation = s.recurrent_activation, f.reverse = in.reverse;
        f.recurrent_t = recurrent_t;
        f.gates = at(s.gates, steps * 4 * H), f.cells = at(s.cells, steps * H), f.c0 = at(s.c0, H);
        f.mask = in.mask ? in.mask + first * steps : nullptr;
        f.recurrent_dropout = at(s.recurrent_dropout, H);
        f.dy = at(g.dy, steps * H), f.dgates = at(g.dgates, steps * 4 * H), f.dcells = at(g.dcells, steps * H);
        f.dh = dh + first * columns, f.dc = dc + first * blocks * W;
        f.dz = dz;
        leaf.backward(f);
    };

    // Where the rows of dz came from, in its order: x, the h that went into the step, and dx.
    std::vector<const T*> x_rows(size_t(chunk * B)), h_rows(size_t(chunk * B));
    std::vector<T*> dx_rows(size_t(chunk * B));
    const auto h_before = [&](int64_t b, int64_t n) -> const T* {
        if (n == 0) return s.h0 ? s.h0 + b * H : zeros;
        return s.y + (b * steps + (in.reverse ? steps - n : n - 1)) * H;
    };
    const auto find_rows = [&](int64_t first, int64_t last) {
        for (int64_t n = first, m = 0; n < last; ++n)
            for (int64_t b = 0; b < B; ++b, ++m) {
                const int64_t t = in.reverse ? steps - 1 - n : n;
                // dz is zero where the mask leaves a step out; x and h may be anything there, NaN too, and must not
                // meet it
                const bool used = !in.mask || in.mask[b * steps + t];
                x_rows[m] = used ? in.x + b * in.stride_batch + t * in.stride_time : zeros;
                dx_rows[m] = g.dx ? g.dx + (b * steps + t) * I : nullptr;
                h_rows[m] = used ? h_before(b, n) : zeros;
                if (s.recurrent_dropout) {
                    T* product = h_dropped + m * H;
                    for (int64_t k = 0; k < H; ++k) product[k] = h_rows[m][k] * s.recurrent_dropout[b * H + k];
                    h_rows[m] = product;
                }
            }
    };

    const int64_t weight_tasks = g.dkernel || g.drecurrent_kernel || g.dbias ? std::min<int64_t>(threads, blocks) : 0;
    for (int64_t last = steps; last > 0 && B > 0; last -= std::min(chunk, last)) {
        const int64_t first = std::max<int64_t>(0, last - chunk), rows = (last - first) * B;
        parallel(groups, [&](int group) {
            FlushDenormals flush;
            through_time(group, first, last);
        });
        find_rows(first, last);
        // Every task writes a part of its own, so the bits do not depend on which thread takes it.
        const int64_t tasks = weight_tasks + (g.dx ? ceil_div(rows, kInputRows) : 0);
        std::atomic<int64_t> next{0};
        parallel(int(std::min<int64_t>(threads, tasks)), [&](int k) {
            FlushDenormals flush;
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
                if (task >= weight_tasks) {
                    const int64_t row = (task - weight_tasks) * kInputRows;
                    leaf.input_gradient(dz, blocks, rows, kernel_t, I, row, std::min(rows, row + kInputRows),
                                        dx_rows.data());
                    continue;
                }
                WeightGradient<T> f{};
                f.dz = dz, f.dz_rows = rows, f.units = H;
                f.first = blocks * task / weight_tasks, f.last = blocks * (task + 1) / weight_tasks;
                T* copy = copied + k * copies;
                f.of[0] = {x_rows.data(), wanted(g.dkernel, I), g.dkernel, gradients + f.first * I * wide, copy};
                f.of[1] = {h_rows.data(), wanted(g.drecurrent_kernel, H), g.drecurrent_kernel,
                           gradients + (blocks * I + f.first * H) * wide, copy + gradient_copy(I)};
                f.bias = g.dbias, f.bias_sums = gradients + (blocks * (I + H) + f.first) * wide;
                f.more = last < steps, f.write = first == 0;
                leaf.weight_gradient(f);
            }
        });
    }
    if (g.dh0) unpad(g.dh0, dh, columns, B, H);
    if (g.dc0) unpad(g.dc0, dc, blocks * W, B, H);
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
template void lstm_backward(const Sequences<float>&, const Saved<float>&, const Gradients<float>&, int);
template void lstm_backward(const Sequences<double>&, const Saved<double>&, const Gradients<double>&, int);

}  // namespace cellstack
