// Sequences, stacks and streams: divides the work into rows, layers and chunks, and calls the inner routines.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {
namespace {

// Rows × steps whose x·kernel is one product: enough to use each loaded weight often, few enough to stay in the cache.
constexpr int64_t kProductRows = 64;

}  // namespace

// ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────

namespace {

// The size of a matrix with 16 or 8 bits per weight, in the layout of narrow.h: [blocks][words of all k][gates][W]; for
// int8 the columns' scales follow, and the amounts that the rows' offset of 128 adds to their sums. In floats, or words
// of the same size.
int64_t narrow_size(Element element, int64_t blocks, int64_t rows, int gates, int64_t width) {
    return blocks * gates * width * (narrow_words(rows, bits_of(element)) + (element == Element::kInt8 ? 2 : 0));
}

}  // namespace

template <class T>
struct Weights<T>::Impl {
    const Leaf<T>* leaf;
    Description d;
    Scratch<T> memory;
    Panels<T> panels;
};

template <class T>
Weights<T>::Weights(const Description& d, const Arrays<const T>& arrays, bool copy, Element element) {
    const Leaf<T>& leaf = narrow(element) ? leaf_of<T>(current()) : leaf_for<T>(d.units);
    const int64_t blocks = ceil_div(d.units, leaf.width), output_blocks = ceil_div(d.output, leaf.width);
    const int64_t columns = d.gates() * d.units, row = blocks * d.gates() * leaf.width;
    // The arrays that are neither matrices nor biases, and how many numbers they have.
    struct {
        const T* Arrays<const T>::* array;
        int64_t count;
    } const vectors[] = {
        {&Arrays<const T>::peepholes, 3 * d.units},  {&Arrays<const T>::kernel_gain, columns},
        {&Arrays<const T>::recurrent_gain, columns}, {&Arrays<const T>::cell_gain, d.units},
        {&Arrays<const T>::cell_bias, d.units},
    };
    // How many numbers a matrix takes.
    const auto size = [&](int64_t rows, int64_t units, int gates, Element held) {
        const int64_t of = ceil_div(units, leaf.width);
        return narrow(held) ? narrow_size(held, of, rows, gates, leaf.width) : rows * of * gates * leaf.width;
    };
    const int64_t matrices[] = {size(d.input, d.units, d.gates(), element),
                                size(d.recurrent(), d.units, d.gates(), element), row, row,
                                d.projects() ? size(d.units, d.output, 1, element) : 0};
    int64_t count = 0;
    for (int64_t matrix : matrices) count += Parts<T>::size(matrix);
    for (const auto& vector : vectors) count += Parts<T>::size(vector.count);
    for (int s = 0; s < d.kind->states; ++s) count += Parts<T>::size(d.width(s));
    impl_.reset(new Impl{&leaf, d, Scratch<T>(copy ? count : 0), {}});
    Panels<T>& p = impl_->panels;
    p.d = &impl_->d, p.blocks = blocks, p.output_blocks = output_blocks, p.unpacked = !copy, p.element = element;
    p.pairs = element == Element::kBfloat16 && current().pairs;
    p.tiles = &leaf.tiles_of(element), p.plain = &leaf.plain;
    p.kernel = arrays.kernel, p.recurrent = arrays.recurrent_kernel, p.bias = arrays.bias;
    p.recurrent_bias = d.two_biases() ? arrays.bias + columns : nullptr;
    p.projection = arrays.projection, p.arrays = arrays;
    if (!copy) return;
    Parts<T> parts(impl_->memory.get());
    const auto packed = [&](const T* from, int64_t rows, int64_t units, int gates, Element held) {
        T* to = parts.take(size(rows, units, gates, held));
        if (narrow(held)) {
            const Scratch<T> panel(rows * gates * leaf.width);
            leaf.pack_narrow(to, matrix_of(d, from, rows, units, gates), held, panel.get());
            return to;
        }
        if (from)
            leaf.pack(to, matrix_of(d, from, rows, units, gates));
        else
            std::fill_n(to, size(rows, units, gates, held), T(0));
        return to;
    };
    p.kernel = packed(p.kernel, d.input, d.units, d.gates(), element);
    if (d.kind->recurrent) p.recurrent = packed(p.recurrent, d.output, d.units, d.gates(), element);
    p.bias = packed(p.bias, 1, d.units, d.gates(), element_of<T>());
    if (d.two_biases()) p.recurrent_bias = packed(p.recurrent_bias, 1, d.units, d.gates(), element_of<T>());
    if (d.projects()) p.projection = packed(p.projection, d.units, d.output, 1, element);
    for (const auto& vector : vectors) {
        const T*& array = p.arrays.*vector.array;
        if (!array) continue;
        T* to = parts.take(vector.count);
        const int64_t gone = vector.array == &Arrays<const T>::peepholes && d.coupled ? d.units : 0;
        std::copy(array, array + vector.count - gone, to);
        array = to;
    }
    for (int s = 0; s < d.kind->states; ++s) {
        const T*& initial = p.arrays.initial[s];
        if (!initial) continue;
        T* to = parts.take(d.width(s));
        std::copy_n(initial, d.width(s), to);
        initial = to;
    }
}
template <class T>
Weights<T>::~Weights() = default;
template <class T>
const Description& Weights<T>::description() const {
    return impl_->d;
}
template <class T>
Element Weights<T>::element() const {
    return impl_->panels.element;
}
template <class T>
bool Weights<T>::copied() const {
    return !impl_->panels.unpacked;
}
template <class T>
const Arrays<const T>& Weights<T>::arrays() const {
    return impl_->panels.arrays;
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────────

namespace {

// The number of steps in a chunk; a single step of the plain LSTM is summed in place, without the product.
int64_t chunk_steps(int64_t rows, int64_t steps) {
    return std::max<int64_t>(1, std::min(steps, kProductRows / std::max<int64_t>(rows, 1)));
}

// Multiplications per row and step.
int64_t multiplications(const Description& d) {
    return d.units * (d.gates() * (d.input + d.recurrent()) + (d.projects() ? d.output : 0));
}

// Whether threads may divide the units of a layer: a unit depends on others only through their h.
template <class T>
bool divides(const Weights<T>& weights) {
    const Description& d = weights.description();
    return weights.copied() && !d.layer_norm && !d.projects() && !d.resets_before();
}

// A rough estimate, in nanoseconds, of the time of some rows and blocks of a step, to compare cuts. A core computes two
// multiply-adds per cycle, or two of pairs; each tile of rows loads its panel from the second-level cache, half of
// which the sums hide; and if the weights of a core exceed that cache, each panel is loaded once from a slower level.
double step_cost(const Description& d, int64_t rows, int64_t blocks, int64_t width, double bytes, bool pairs) {
    constexpr double near_bytes = 48, far_bytes = 10, near_size = 1.5e6, activation = 12, gigahertz = 3;
    const double depth = double(d.input + d.recurrent()), panel = depth * d.gates() * width * bytes;
    const double sums = double(rows) * depth * d.gates() / (pairs ? 4 : 2),
                 near = double(ceil_div(rows, 6)) * panel / near_bytes;
    const double far = panel * double(blocks) > near_size ? panel / far_bytes : 0;
    return double(blocks) * (std::max(sums + near / 2, far) + double(rows * d.gates()) * activation) / gigahertz;
}

// Nanoseconds per step that threads which divide the units of a layer take in addition to the sums: they wait for each
// other, and each fetches the others' part of h from their cores, at a fixed time per byte.
double step_between(const Description& d, int64_t rows, int shares, double bytes) {
    constexpr double fetching = 0.5;
    const double others = double(rows * d.output) * bytes * (shares - 1) / shares;
    return lockstep_latency() * (shares - 1) + fetching * others;
}

// By this factor several threads must be faster than one, by the estimate, to be used.
constexpr double kMargin = 1.15;

template <class T>
Cut cut_up(const std::vector<const Weights<T>*>& layers, int64_t B, int64_t steps, int64_t most_groups, bool resets,
           int threads) {
    const int depth = int(layers.size());
    const auto cost = [&](int l, int64_t rows, int shares) {
        const Panels<T>& w = layers[l]->impl().panels;
        const int width = layers[l]->impl().leaf->width;
        const double bytes = w.element == Element::kBfloat16 ? 2 : w.element == Element::kInt8 ? 1 : sizeof(T);
        return steps * step_cost(*w.d, rows, ceil_div(w.blocks, shares), width, bytes, w.pairs);
    };
    const auto cost_of = [&](int first, int last, int64_t rows, int shares) {
        double sum = 0;
        for (int l = first; l < last; ++l) sum += cost(l, rows, shares);
        return sum;
    };
    int64_t most_shares = resets ? 1 : kMostThreads;
    for (const Weights<T>* w : layers) most_shares = std::min(most_shares, divides(*w) ? w->impl().panels.blocks : 1);
    const Cut alone{1, 1, 1, chunk_steps(B, steps)};
    if (threads < 2) return alone;
    const double one = cost_of(0, depth, B, 1);
    Cut best = alone;
    double least = one;
    const auto consider = [&](Cut cut, double taken) {
        if (taken < least) least = taken, best = cut;
    };
    for (int groups = 1; groups <= std::min<int64_t>(most_groups, threads); ++groups) {
        const int64_t rows = ceil_div(B, groups), whole = chunk_steps(rows, steps);
        consider({groups, 1, 1, whole}, cost_of(0, depth, rows, 1));
        const int left = threads / groups, teams = std::min(left, depth);
        if (teams > 1 && steps > 1) {
            // Smaller chunks fill and drain the pipeline sooner, but read the weights over x more often.
            const int64_t chunk = std::max<int64_t>(1, std::min(whole, std::max<int64_t>(8, steps / (16 * teams))));
            double slowest = 0;
            for (int team = 0; team < teams; ++team)
                slowest = std::max(slowest, cost_of(depth * team / teams, depth * (team + 1) / teams, rows, 1));
            consider({groups, teams, 1, chunk}, slowest * (1 + double(teams - 1) * double(chunk) / double(steps)));
        }
        for (int shares = 2; shares <= std::min<int64_t>(left, most_shares); ++shares) {
            double between = 0;
            for (const Weights<T>* w : layers) between += step_between(w->description(), rows, shares, sizeof(T));
            consider({groups, 1, shares, whole}, cost_of(0, depth, rows, shares) + double(steps) * between);
        }
    }
    return least * kMargin < one ? best : alone;
}

// A layer over some rows, run chunk by chunk.
template <class T>
struct Runner {
    Forward<T> f;
    const Leaf<T>* leaf;
    T* product;
    int64_t scale_size, narrow_x_size, narrow_h_size;  // per share: scratch for narrow weights

    // What `open` takes from the parts, in numbers.
    struct Sizes {
        int64_t h, kept, inner, z, q, m, p, scales, narrow_x, narrow_h;  // the last three per share of the units
        Sizes(const Weights<T>& weights, int64_t rows, int64_t chunk, bool dropout, bool patched) {
            Panels<T> w = weights.impl().panels;
            w.patched = patched;
            const Description& d = *w.d;
            const int64_t width = weights.impl().leaf->width, wide = rows * w.blocks * width;
            h = d.keeps_state() ? rows * w.output_blocks * width : 0;
            kept = dropout ? h : 0;
            inner = d.inner_states() * Parts<T>::size(wide);
            z = w.by_blocks() && chunk == 1 ? 0 : chunk * d.gates() * wide;
            q = d.apart() ? d.gates() * wide : 0;
            m = d.projects() || d.layer_norm || d.resets_before() ? wide : 0;
            p = d.projects() ? h : 0;
            const auto narrow_rows = [&](int64_t count, int64_t columns) {
                return narrow(w.element) ? Parts<T>::size(count * narrow_stride(w.element, columns)) : 0;
            };
            scales = w.element == Element::kInt8 ? Parts<T>::size(chunk * rows) : 0;
            narrow_x = narrow_rows(chunk * rows, d.input), narrow_h = narrow_rows(rows, std::max(d.units, d.output));
        }
        int64_t sum(int shares) const {
            int64_t total = 0;
            for (int64_t size : {h, h, kept, inner, z, q, m, p, shares * scales, shares * narrow_x, shares * narrow_h})
                total += Parts<T>::size(size);
            return total;
        }
    };

    void open(const Weights<T>& weights, int64_t rows, int64_t chunk, int shares, bool dropout, bool patched,
              Parts<T>& parts) {
        const Sizes sizes(weights, rows, chunk, dropout, patched);
        const auto take = [&](int64_t count) { return count ? parts.take(count) : nullptr; };
        leaf = weights.impl().leaf;
        f = Forward<T>{};
        f.w = weights.impl().panels, f.w.patched = patched, f.rows = rows;
        f.h = take(sizes.h), f.h_next = take(sizes.h), f.h_kept = take(sizes.kept);
        for (int s = 0; s < f.w.d->inner_states(); ++s) f.inner[s] = take(rows * stride(1));
        product = take(sizes.z), f.q = take(sizes.q), f.m = take(sizes.m), f.p = take(sizes.p);
        f.scales = take(shares * sizes.scales);
        f.narrow_x = take(shares * sizes.narrow_x), f.narrow_h = take(shares * sizes.narrow_h);
        scale_size = sizes.scales, narrow_x_size = sizes.narrow_x, narrow_h_size = sizes.narrow_h;
    }
    // A state, and the distance between its rows; state 0 is h.
    T* state(int s) const { return s ? f.inner[s - 1] : f.h; }
    int64_t stride(int s) const { return (s ? f.w.blocks : f.w.output_blocks) * leaf->width; }

    // Sets the states from which the rows start: those that were passed, else the cell's initial ones. With `places`,
    // the state of row r is at index `places[r]` of the caller's arrays.
    void start(const T* const* given, const int64_t* places = nullptr) {
        const Description& d = *f.w.d;
        for (int s = 0; s < d.kind->states; ++s)
            for (int64_t r = 0; r < f.rows; ++r) {
                const T* from =
                    given && given[s] ? given[s] + (places ? places[r] : r) * d.width(s) : f.w.arrays.initial[s];
                pad(state(s) + r * stride(s), stride(s), from, 1, d.width(s));
            }
        if (!f.recurrent_dropout || !f.h) return;
        memcpy(f.h_kept, f.h, size_t(f.rows * stride(0)) * sizeof(T));
        for (int64_t r = 0; r < f.rows; ++r)
            for (int64_t k = 0; k < d.output; ++k) f.h[r * stride(0) + k] *= f.recurrent_dropout[r * d.output + k];
    }

    void steps(int64_t first, int64_t last) {
        take_chunk(f, first, last);
        f.from = first, f.to = last, f.project = true, f.block = 0, f.end_block = f.w.blocks;
        leaf->forward(f);
    }

    // The same for threads that divide the units, in phases. A phase is a step, and the first phase of a chunk includes
    // its sums over x; without a state, a phase is a whole chunk. In a phase a share writes only its own units, and
    // reads what all shares wrote in earlier phases. `own` describes the chunk; `before` steps of the call precede it.
    int64_t phases(int64_t steps, int64_t chunk) const { return f.w.d->keeps_state() ? steps : ceil_div(steps, chunk); }
    void run_share(Forward<T> own, int64_t phase, int64_t before, int share, int shares) const {
        own.project = phase == 0;
        own.from = own.first + phase, own.to = own.w.d->keeps_state() ? own.from + 1 : own.last;
        own.block = own.w.blocks * share / shares, own.end_block = own.w.blocks * (share + 1) / shares;
        if ((before + phase) & 1) std::swap(own.h, own.h_next);
        if (own.scales) own.scales += share * scale_size;
        if (own.narrow_x) own.narrow_x += share * narrow_x_size, own.narrow_h += share * narrow_h_size;
        leaf->forward(own);
    }
    // After the last phase: makes h the current state.
    void settle(int64_t steps) {
        if (steps & 1) std::swap(f.h, f.h_next);
    }
    void take_chunk(Forward<T>& of, int64_t first, int64_t last) const {
        of.first = first, of.last = last;
        of.z = of.w.by_blocks() && last - first == 1 && of.rows == 1 ? nullptr : product;  // null: summed in place
    }

    void end(T* const* to, const int64_t* places = nullptr) const {
        const Description& d = *f.w.d;
        for (int s = 0; s < d.kind->states; ++s) {
            const T* from = !s && f.recurrent_dropout ? f.h_kept : state(s);
            for (int64_t r = 0; to[s] && r < f.rows; ++r)
                unpad(to[s] + (places ? places[r] : r) * d.width(s), from + r * stride(s), 0, 1, d.width(s));
        }
    }
};

}  // namespace

template <class T>
Cut cut_of(const std::vector<const Weights<T>*>& weights, int64_t batch, int64_t steps, bool resets, int threads) {
    int64_t work = 0;
    for (const Weights<T>* w : weights) work += batch * steps * multiplications(w->description());
    return cut_up(weights, batch, steps, batch, resets, useful_threads(threads, work));
}

template <class T>
void forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads) {
    const int64_t B = in.batch, steps = in.steps;
    const int depth = int(layers.size());
    if (B == 0) return;
    const auto description = [&](int l) -> const Description& { return layers[l].weights->description(); };
    Cut cut{1, 1, 1, chunk_steps(B, steps)};
    if (threads > 1) {
        std::vector<const Weights<T>*> weights;
        for (const Layer<T>& layer : layers) weights.push_back(layer.weights);
        cut = cut_of(weights, B, steps, in.reset, threads);
    }
    const int groups = cut.groups;
    const int64_t most_rows = ceil_div(B, groups), chunk = cut.chunk;

    // The y of layers below the top is stored in scratch unless the caller requests it.
    std::vector<T*> y(depth);
    int64_t count = 0;
    for (int l = 0; l + 1 < depth; ++l)
        if (!layers[l].y) count += Parts<T>::size(checked(checked(B, steps), description(l).output));
    std::vector<int64_t> sizes(depth);
    for (int l = 0; l < depth; ++l) {
        sizes[l] = typename Runner<T>::Sizes(*layers[l].weights, most_rows, chunk, layers[l].drops.recurrent,
                                             layers[l].patches.lines)
                       .sum(cut.shares);
        count += groups * sizes[l];
    }
    Scratch<T> scratch(count);
    Parts<T> parts(scratch.get());
    for (int l = 0; l < depth; ++l)
        y[l] = layers[l].y || l + 1 == depth ? layers[l].y : parts.take(B * steps * description(l).output);
    std::vector<T*> memory(size_t(depth) * groups);
    for (size_t k = 0; k < memory.size(); ++k) memory[k] = parts.take(sizes[k / groups]);
    std::vector<std::atomic<int64_t>> done(size_t(depth) * groups);
    // Where the states of a group's rows are: at their places, or contiguous in the caller's arrays.
    const auto places_of = [&](int group) { return in.places ? in.places + B * group / groups : nullptr; };
    const auto states_of = [&](auto* const* all, int l, int group) {
        std::array<std::decay_t<decltype(*all)>, kStates> own{};
        for (int s = 0; s < kStates; ++s)
            own[s] = all[s] && !in.places ? all[s] + B * group / groups * description(l).width(s) : all[s];
        return own;
    };

    const auto open_layer = [&](Runner<T>& runner, int l, int group) {
        const Layer<T>& layer = layers[l];
        const Description& d = description(l);
        const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first;
        const int64_t H = d.units, P = d.output, below = l ? description(l - 1).output : 0;
        Parts<T> own(memory[size_t(l) * groups + group]);
        runner.open(*layer.weights, rows, chunk, cut.shares, layer.drops.recurrent, layer.patches.lines, own);
        // The group's part of an array with `a_row` numbers per row.
        const auto at = [&](auto* all, int64_t a_row) { return all ? all + first * a_row : nullptr; };
        Forward<T>& f = runner.f;
        f.steps = steps, f.reverse = in.reverse;
        f.x_row = l ? in.row_stride(below) : in.stride_batch, f.x_time = l ? in.time_stride(below) : in.stride_time;
        f.x = (l ? y[l - 1] : in.x) + first * f.x_row;
        f.mask = at(in.mask, steps), f.reset = at(in.reset, steps);
        f.y_row = in.row_stride(P), f.y_time = in.time_stride(P), f.y = at(y[l], f.y_row);
        f.gates = at(layer.gates, steps * d.planes() * H);
        for (int s = 0; s < d.inner_states(); ++s) f.states[s] = at(layer.states[s], steps * H);
        f.norms = at(layer.norms, steps * d.norm_size());
        f.recurrent_dropout = at(layer.drops.recurrent, P);
        f.zoneout = at(layer.drops.zoneout, steps * P), f.zoneout_cell = at(layer.drops.zoneout_cell, steps * H);
        f.patches = layer.patches;
        f.patches.lines = at(layer.patches.lines, steps * d.targets());
        f.patches.held = at(layer.patches.held, d.planes() * H);
        runner.start(states_of(layer.before, l, group).data(), places_of(group));
    };
    const auto close_layer = [&](const Runner<T>& runner, int l, int group) {
        runner.end(states_of(layers[l].after, l, group).data(), places_of(group));
    };
    if (cut.shares > 1) {
        std::vector<Runner<T>> runners(size_t(depth) * groups);
        std::deque<Lockstep> teams;
        std::vector<int64_t> start(size_t(depth) + 1);  // the first phase of each layer
        for (size_t k = 0; k < runners.size(); ++k) open_layer(runners[k], int(k / groups), int(k % groups));
        for (int l = 0; l < depth; ++l) start[l + 1] = start[l] + runners[size_t(l) * groups].phases(steps, chunk);
        for (int group = 0; group < groups; ++group) teams.emplace_back(cut.shares, start[depth]);
        parallel(groups * cut.shares, [&](int k) {
            FlushDenormals flush;
            teams[k % groups].run(k / groups, [&](int64_t phase, int share) {
                int l = 0;
                while (phase >= start[l + 1]) ++l;
                const Runner<T>& runner = runners[size_t(l) * groups + k % groups];
                Forward<T> f = runner.f;
                const bool state = description(l).keeps_state();
                const int64_t n = phase - start[l], first = state ? n / chunk * chunk : n * chunk;
                runner.take_chunk(f, first, std::min(steps, first + chunk));
                runner.run_share(f, state ? n - first : 0, first, share, cut.shares);
            });
        });
        for (size_t k = 0; k < runners.size(); ++k) {
            runners[k].settle(steps);
            close_layer(runners[k], int(k / groups), int(k % groups));
        }
        return;
    }
    const auto run_layer = [&](int l, int group) {
        Runner<T> runner;
        open_layer(runner, l, group);
        for (int64_t n = 0; n < steps; n += chunk) {
            const int64_t last = std::min(steps, n + chunk);
            if (l) wait_for(done[size_t(l - 1) * groups + group], last);
            runner.steps(n, last);
            done[size_t(l) * groups + group].store(last, std::memory_order_release);
        }
        close_layer(runner, l, group);
    };
    // Task k: a team's layers from bottom to top, for one group of rows; it only waits for tasks with lower numbers.
    parallel(groups * cut.teams, [&](int k) {
        FlushDenormals flush;
        const int group = k % groups, team = k / groups;
        for (int l = depth * team / cut.teams; l < depth * (team + 1) / cut.teams; ++l) run_layer(l, group);
    });
}

// ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
struct Stream<T>::Impl {
    std::vector<const Weights<T>*> weights;
    int64_t batch, chunk, work = 0;  // work: multiplications per step
    int threads, groups;             // threads divide the rows into groups, each with separate runners
    std::vector<Runner<T>> runners;  // [groups][layers]
    std::vector<T*> between;         // [groups][layers], y of a layer: two chunks alternately, each [rows, chunk, P]
    std::vector<T*> before;          // [groups][layers], states as saved by `keep`
    std::unique_ptr<Scratch<T>> memory;

    int64_t first_row(int group) const { return batch * group / groups; }
    int shares() const { return groups == 1 ? threads : 1; }  // the most shares of the units
    size_t place(int group, int layer) const { return size_t(group) * weights.size() + size_t(layer); }

    // Sets the fields of `f`, of one group and layer, for chunk n of a call.
    void place_chunk(Forward<T>& f, int group, int layer, int64_t n, const T* x, T* y, int64_t steps) const {
        const int64_t first = n * chunk, row = first_row(group);
        const auto kept = [&](int of, int64_t width) {
            return between[place(group, of)] + n % 2 * f.rows * chunk * width;
        };
        f.steps = std::min(chunk, steps - first);
        f.x_time = f.w.d->input, f.y_time = f.w.d->output;
        if (layer)
            f.x_row = f.steps * f.x_time, f.x = kept(layer - 1, f.x_time);
        else
            f.x_row = steps * f.x_time, f.x = x + row * f.x_row + first * f.x_time;
        if (layer + 1 < int(weights.size()))
            f.y_row = f.steps * f.y_time, f.y = kept(layer, f.y_time);
        else
            f.y_row = steps * f.y_time, f.y = y + row * f.y_row + first * f.y_time;
    }

    // Runs chunk n of a call, for one group and layer.
    void advance(int group, int layer, int64_t n, const T* x, T* y, int64_t steps) {
        Runner<T>& runner = runners[place(group, layer)];
        place_chunk(runner.f, group, layer, n, x, y, steps);
        runner.steps(0, runner.f.steps);
    }

    // A call by threads that divide the units: layer by layer of each chunk.
    void share_out(const T* x, T* y, int64_t steps, int shares) {
        const int depth = int(weights.size());
        const auto phases = [&](int64_t n) {
            int64_t sum = 0;
            for (int l = 0; l < depth; ++l) sum += runners[l].phases(std::min(chunk, steps - n * chunk), chunk);
            return sum;
        };
        const int64_t last = ceil_div(steps, chunk) - 1, each = phases(0);
        Lockstep team(shares, last * each + phases(last));
        parallel(shares, [&](int own) {
            FlushDenormals flush;
            team.run(own, [&](int64_t phase, int share) {
                const int64_t n = phase / each;
                int64_t left = phase - n * each;
                int l = 0;
                for (int64_t of; left >= (of = runners[l].phases(std::min(chunk, steps - n * chunk), chunk)); ++l)
                    left -= of;
                Forward<T> f = runners[l].f;
                place_chunk(f, 0, l, n, x, y, steps);
                runners[l].take_chunk(f, 0, f.steps);
                runners[l].run_share(f, left, n * chunk, share, shares);
            });
        });
        for (Runner<T>& runner : runners) runner.settle(steps);
    }

    // The states of a group's rows in the caller's arrays.
    template <class P>
    std::array<P, kStates> rows_of(P const* states, int layer, int group) const {
        const Description& d = weights[layer]->description();
        std::array<P, kStates> own{};
        for (int s = 0; s < d.kind->states; ++s) own[s] = states[s] + first_row(group) * d.width(s);
        return own;
    }
    // Copies the states of every layer to `before`, or back.
    void copy_states(bool back) {
        for (size_t k = 0; k < before.size(); ++k) {
            T* kept = before[k];
            for (int s = 0; s < runners[k].f.w.d->kind->states; ++s) {
                const int64_t count = runners[k].f.rows * runners[k].stride(s);
                T* state = runners[k].state(s);
                memcpy(back ? state : kept, back ? kept : state, size_t(count) * sizeof(T));
                kept += count;
            }
        }
    }
};

template <class T>
Stream<T>::Stream(std::vector<const Weights<T>*> weights, int64_t batch, int threads) : impl_(new Impl) {
    Impl& s = *impl_;
    for (const Weights<T>* w : weights) {
        checked(checked(batch, kProductRows), 64 * (w->description().units + w->description().input));
        s.work += batch * multiplications(w->description());
    }
    s.batch = batch, s.threads = int(std::min<int64_t>(threads, kMostThreads));
    s.groups = int(std::min<int64_t>(batch, s.threads));
    const int64_t most_rows = ceil_div(batch, s.groups);
    s.chunk = chunk_steps(most_rows, kProductRows);
    const auto kept = [&](const Weights<T>* w) { return 2 * most_rows * s.chunk * w->description().output; };
    int64_t count = 0;
    for (const Weights<T>* w : weights) {
        const typename Runner<T>::Sizes sizes(*w, most_rows, s.chunk, false, false);
        count += s.groups * (sizes.sum(s.shares()) + Parts<T>::size(kept(w)) + Parts<T>::size(sizes.h + sizes.inner));
    }
    s.memory.reset(new Scratch<T>(count));
    std::fill(s.memory->get(), s.memory->get() + count, T(0));
    Parts<T> parts(s.memory->get());
    s.weights = std::move(weights);
    s.runners.resize(s.weights.size() * size_t(s.groups));
    for (int group = 0; group < s.groups; ++group)
        for (size_t l = 0; l < s.weights.size(); ++l) {
            const int64_t rows = s.first_row(group + 1) - s.first_row(group);
            s.runners[s.place(group, int(l))].open(*s.weights[l], rows, s.chunk, s.shares(), false, false, parts);
            s.between.push_back(parts.take(kept(s.weights[l])));
            const typename Runner<T>::Sizes sizes(*s.weights[l], rows, s.chunk, false, false);
            s.before.push_back(parts.take(sizes.h + sizes.inner));
        }
    reset();
}
template <class T>
Stream<T>::~Stream() = default;

template <class T>
void Stream<T>::run(const T* x, T* y, int64_t steps) {
    Impl& s = *impl_;
    const int depth = int(s.weights.size());
    const int64_t chunks = ceil_div(steps, s.chunk);
    const int64_t work = steps > kMostNumbers / std::max<int64_t>(s.work, 1) ? kMostNumbers : s.work * steps;
    const int threads = useful_threads(s.threads, work);
    // Threads divide the rows if there are enough, else the units or the layers: each team's layers stay a chunk behind
    // the team below.
    const int tasks = std::min(threads, s.groups);
    const Cut cut = s.groups == 1 ? cut_up(s.weights, s.batch, steps, 1, false, threads)
                                  : Cut{tasks, std::min(depth, threads / tasks), 1, s.chunk};
    if (cut.shares > 1) return s.share_out(x, y, steps, cut.shares);
    const int teams = chunks > 1 ? cut.teams : 1;
    for (int64_t round = 0; round < (teams > 1 ? chunks + teams - 1 : 1); ++round)
        parallel(tasks * teams, [&](int k) {
            FlushDenormals flush;
            const int team = k / tasks;
            const int64_t first = teams > 1 ? std::max<int64_t>(round - team, 0) : 0;
            const int64_t end = teams > 1 ? std::min(round - team + 1, chunks) : chunks;
            for (int64_t n = first; n < end; ++n)
                for (int group = k % tasks; group < s.groups; group += tasks)
                    for (int l = depth * team / teams; l < depth * (team + 1) / teams; ++l)
                        s.advance(group, l, n, x, y, steps);
        });
}

template <class T>
void Stream<T>::reset() {
    for (Runner<T>& runner : impl_->runners) runner.start(nullptr);
}
template <class T>
void Stream<T>::keep() {
    impl_->copy_states(false);
}
template <class T>
void Stream<T>::undo() {
    impl_->copy_states(true);
}
template <class T>
void Stream<T>::get_state(int layer, T* const* states) const {
    for (int group = 0; group < impl_->groups; ++group)
        impl_->runners[impl_->place(group, layer)].end(impl_->rows_of(states, layer, group).data());
}
template <class T>
void Stream<T>::set_state(int layer, const T* const* states) {
    for (int group = 0; group < impl_->groups; ++group)
        impl_->runners[impl_->place(group, layer)].start(impl_->rows_of(states, layer, group).data());
}
template <class T>
int64_t Stream<T>::batch() const {
    return impl_->batch;
}
template <class T>
const std::vector<const Weights<T>*>& Stream<T>::weights() const {
    return impl_->weights;
}

template class Weights<float>;
template class Weights<double>;
template class Stream<float>;
template class Stream<double>;
template Cut cut_of(const std::vector<const Weights<float>*>&, int64_t, int64_t, bool, int);
template Cut cut_of(const std::vector<const Weights<double>*>&, int64_t, int64_t, bool, int);
template void forward(const Sequences<float>&, const std::vector<Layer<float>>&, int);
template void forward(const Sequences<double>&, const std::vector<Layer<double>>&, int);

}  // namespace cellstack
