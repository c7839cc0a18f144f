// The forward pass over sequences: divides the work into rows, layers and chunks, and calls the inner routines.
#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <type_traits>

#include "runner.h"

namespace cellstack {
namespace {

// A stack over sequences as tasks, which threads run in any order that `parallel` allows.
template <class T>
class Pass {
  public:
    Pass(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const Cut& cut);
    Pass(const Pass&) = delete;
    int tasks() const { return in.batch ? groups * cut.teams * cut.shares : 0; }
    void run(int task);  // only waits for tasks with lower numbers
    void end();          // once, after the last task

  private:
    const Description& description(int l) const { return layers[l].weights->description(); }
    // Where the states of a group's rows are: at their places, or contiguous in the caller's arrays.
    const int64_t* places_of(int group) const { return in.places ? in.places + in.batch * group / groups : nullptr; }
    template <class P>
    std::array<P, kStates> states_of(P const* all, int l, int group) const {
        std::array<P, kStates> own{};
        for (int s = 0; s < kStates; ++s)
            own[s] = all[s] && !in.places ? all[s] + in.batch * group / groups * description(l).width(s) : all[s];
        return own;
    }
    void open_layer(Runner<T>& runner, int l, int group) const;
    void close_layer(const Runner<T>& runner, int l, int group) const {
        runner.end(states_of(layers[l].after, l, group).data(), places_of(group));
    }
    void run_layer(int l, int group);
    void run_share(int64_t phase, int group, int share) const;

    const Sequences<T>& in;
    const std::vector<Layer<T>>& layers;
    const Cut cut;
    const int depth = int(layers.size()), groups = cut.groups;
    const int64_t steps = in.steps, chunk = cut.chunk;
    std::optional<Scratch<T>> scratch;
    std::vector<T*> y, memory;               // y of every layer; the scratch memory of every layer and group
    std::vector<std::atomic<int64_t>> done;  // steps of every layer and group
    // If threads divide the units:
    std::vector<Runner<T>> runners;
    std::vector<std::unique_ptr<Lockstep>> teams;
    std::vector<int64_t> start;  // the first phase of each layer
};

template <class T>
Pass<T>::Pass(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const Cut& cut)
    : in(in), layers(layers), cut(cut), y(depth), memory(size_t(depth) * groups), done(size_t(depth) * groups) {
    // The y of layers below the top is stored in scratch unless the caller requests it.
    const int64_t most_rows = ceil_div(in.batch, groups);
    int64_t count = 0;
    for (int l = 0; l + 1 < depth; ++l)
        if (!layers[l].y) count += Parts<T>::size(checked(checked(in.batch, steps), description(l).output));
    std::vector<int64_t> sizes(depth);
    for (int l = 0; l < depth; ++l) {
        sizes[l] = typename Runner<T>::Sizes(*layers[l].weights, most_rows, chunk, layers[l].dropped_h(),
                                             layers[l].patches.lines)
                       .sum(cut.shares);
        count += groups * sizes[l];
    }
    scratch.emplace(count);
    Parts<T> parts(scratch->get());
    for (int l = 0; l < depth; ++l)
        y[l] = layers[l].y || l + 1 == depth ? layers[l].y : parts.take(in.batch * steps * description(l).output);
    for (size_t k = 0; k < memory.size(); ++k) memory[k] = parts.take(sizes[k / groups]);
    if (cut.shares == 1) return;
    runners.resize(memory.size()), start.resize(size_t(depth) + 1);
    for (size_t k = 0; k < runners.size(); ++k) open_layer(runners[k], int(k / groups), int(k % groups));
    for (int l = 0; l < depth; ++l) start[l + 1] = start[l] + runners[size_t(l) * groups].phases(steps, chunk);
    for (int group = 0; group < groups; ++group) teams.emplace_back(new Lockstep(cut.shares, start[depth]));
}

template <class T>
void Pass<T>::open_layer(Runner<T>& runner, int l, int group) const {
    const Layer<T>& layer = layers[l];
    const Description& d = description(l);
    const int64_t first = in.batch * group / groups, rows = in.batch * (group + 1) / groups - first;
    const int64_t H = d.units, P = d.output, below = l ? description(l - 1).output : 0;
    Parts<T> own(memory[size_t(l) * groups + group]);
    runner.open(*layer.weights, rows, chunk, cut.shares, layer.dropped_h(), layer.patches.lines, own);
    // The group's part of an array with `a_row` numbers per row.
    const auto at = [&](auto* all, int64_t a_row) { return all ? all + first * a_row : nullptr; };
    Forward<T>& f = runner.f;
    f.steps = steps, f.reverse = in.reverse;
    f.x_row = l ? in.row_stride(below) : in.stride_batch, f.x_time = l ? in.time_stride(below) : in.stride_time;
    f.x = (l ? y[l - 1] : in.x) + first * f.x_row;
    f.mask = at(in.mask, steps), f.reset = at(in.reset, steps);
    const int64_t ways = l + 1 == depth ? in.ways : 1;
    f.y_row = in.row_stride(P, ways), f.y_time = in.time_stride(P, ways), f.y = at(y[l], f.y_row);
    f.gates = at(layer.gates, steps * d.planes() * H);
    for (int s = 0; s < d.inner_states(); ++s) f.states[s] = at(layer.states[s], steps * H);
    f.intermediate = at(layer.intermediate, steps * d.intermediate_size());
    f.recurrent_dropout = at(layer.dropped_h(), P), f.candidate_dropout = at(layer.dropped_candidate(), P);
    f.zoneout = at(layer.drops.zoneout, steps * P), f.zoneout_cell = at(layer.drops.zoneout_cell, steps * H);
    f.patches = layer.patches;
    f.patches.lines = at(layer.patches.lines, steps * d.targets());
    f.patches.held = at(layer.patches.held, d.planes() * H);
    runner.start(states_of(layer.before, l, group).data(), places_of(group));
}

template <class T>
void Pass<T>::run_layer(int l, int group) {
    Runner<T> runner;
    open_layer(runner, l, group);
    for (int64_t n = 0; n < steps; n += chunk) {
        const int64_t last = std::min(steps, n + chunk);
        if (l) wait_for(done[size_t(l - 1) * groups + group], last);
        runner.steps(n, last);
        done[size_t(l) * groups + group].store(last, std::memory_order_release);
    }
    close_layer(runner, l, group);
}

template <class T>
void Pass<T>::run_share(int64_t phase, int group, int share) const {
    int l = 0;
    while (phase >= start[l + 1]) ++l;
    const Runner<T>& runner = runners[size_t(l) * groups + group];
    Forward<T> f = runner.f;
    const bool state = description(l).keeps_state();
    const int64_t n = phase - start[l], first = state ? n / chunk * chunk : n * chunk;
    runner.take_chunk(f, first, std::min(steps, first + chunk));
    runner.run_share(f, state ? n - first : 0, first, share, cut.shares);
}

template <class T>
void Pass<T>::run(int task) {
    FlushDenormals flush;
    const int group = task % groups, own = task / groups;
    if (cut.shares > 1) {
        teams[group]->run(own, [&](int64_t phase, int share) { run_share(phase, group, share); });
    } else {  // a team's layers from bottom to top
        for (int l = depth * own / cut.teams; l < depth * (own + 1) / cut.teams; ++l) run_layer(l, group);
    }
}

template <class T>
void Pass<T>::end() {
    for (size_t k = 0; k < runners.size(); ++k) {
        runners[k].settle(steps);
        close_layer(runners[k], int(k / groups), int(k % groups));
    }
}

}  // namespace

template <class T>
void forward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads) {
    Pass<T> pass(in, layers, cut_of(in, layers, threads));
    parallel(pass.tasks(), [&](int k) { pass.run(k); });
    pass.end();
}

template <class T>
bool forward(const std::vector<Run<T>>& runs, int threads) {
    const Cuts cuts = cuts_of(runs, threads);
    const size_t count = cuts.at_once ? runs.size() : 1;
    for (size_t from = 0; from < runs.size(); from += count) {
        std::deque<Pass<T>> passes;
        std::vector<int> first{0};  // the first task of each pass
        for (size_t k = from; k < from + count; ++k) {
            passes.emplace_back(runs[k].in, runs[k].layers, cuts.of[k]);
            first.push_back(first.back() + passes.back().tasks());
        }
        parallel(first.back(), [&](int task) {
            size_t k = 0;
            while (task >= first[k + 1]) ++k;
            passes[k].run(task - first[k]);
        });
        for (Pass<T>& pass : passes) pass.end();
    }
    return cuts.at_once;
}

template void forward(const Sequences<float>&, const std::vector<Layer<float>>&, int);
template void forward(const Sequences<double>&, const std::vector<Layer<double>>&, int);
template bool forward(const std::vector<Run<float>>&, int);
template bool forward(const std::vector<Run<double>>&, int);

}  // namespace cellstack
