// The forward pass over sequences: divides the work into rows, layers and chunks, and calls the inner routines.
#include <algorithm>
#include <array>
#include <deque>
#include <type_traits>

#include "runner.h"

namespace cellstack {

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
        sizes[l] = typename Runner<T>::Sizes(*layers[l].weights, most_rows, chunk, layers[l].dropped_h(),
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
        runner.open(*layer.weights, rows, chunk, cut.shares, layer.dropped_h(), layer.patches.lines, own);
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
        f.recurrent_dropout = at(layer.dropped_h(), P), f.candidate_dropout = at(layer.dropped_candidate(), P);
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

template void forward(const Sequences<float>&, const std::vector<Layer<float>>&, int);
template void forward(const Sequences<double>&, const std::vector<Layer<double>>&, int);

}  // namespace cellstack
