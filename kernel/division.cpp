// Divides a call among threads, by an estimate of the time that each division takes.
#include <algorithm>

#include "dispatch.h"
#include "runner.h"

namespace cellstack {
namespace {

// Whether threads may divide the units of a layer: a unit depends on others only through their h.
template <class T>
bool divides(const Weights<T>& weights) {
    const Description& d = weights.description();
    return weights.copied() && !d.layer_norm && !d.projects() && !d.resets_before() && !d.backbone_units;
}

// A rough estimate, in nanoseconds, of the time of some rows and blocks of a step, to compare cuts. A core computes two
// multiply-adds per cycle, or two of pairs; each tile of rows loads its panel from the second-level cache, half of
// which the sums hide; and if the weights of a core exceed that cache, each panel is loaded once from a slower level.
double step_cost(const Description& d, int64_t rows, int64_t blocks, int64_t width, double bytes, bool pairs) {
    constexpr double near_bytes = 48, far_bytes = 10, activation = 12, gigahertz = 3;
    const double depth = double(d.sum_units() * (d.sum_gates() * (d.multiplied() + d.recurrent()) +
                                                 d.more_layers() * d.backbone_units)) /
                             double(d.units * d.gates()) +
                         double(d.backbone_units);
    const double panel = depth * d.gates() * width * bytes;
    const double sums = double(rows) * depth * d.gates() / (pairs ? 4 : 2),
                 near = double(ceil_div(rows, 6)) * panel / near_bytes;
    const double far = panel * double(blocks) > resident_bytes() ? panel / far_bytes : 0;
    return double(blocks) * (std::max(sums + near / 2, far) + double(rows * d.gates()) * activation) / gigahertz;
}

// Nanoseconds per step that threads which divide the units of a layer take in addition to the sums: they wait for each
// other, and each fetches the others' part of h from their cores, at a fixed time per byte.
double step_between(const Description& d, int64_t rows, int shares, double bytes) {
    constexpr double fetching = 0.5;
    const double others = double(rows * d.output) * bytes * (shares - 1) / shares;
    return lockstep_latency() * (shares - 1) + fetching * others;
}

template <class T>
std::vector<const Weights<T>*> weights_of(const std::vector<Layer<T>>& layers) {
    std::vector<const Weights<T>*> weights;
    for (const Layer<T>& layer : layers) weights.push_back(layer.weights);
    return weights;
}

// Bytes per number of the matrices.
template <class T>
double bytes_of(const Weights<T>& weights) {
    const Element element = weights.impl().panels.element;
    return element == Element::kBfloat16 ? 2 : element == Element::kInt8 ? 1 : sizeof(T);
}

// Reading weights that exceed the second-level cache takes as long as the sums of about so many rows.
constexpr int64_t kFarRows = 7;

template <class T>
int64_t work_of(const std::vector<const Weights<T>*>& weights, int64_t batch, int64_t steps) {
    int64_t work = 0;
    for (const Weights<T>* w : weights) {
        const int64_t row = multiplications(w->description());
        const bool far = double(row) * bytes_of(*w) > resident_bytes();
        work += (far ? std::max(batch, kFarRows) : batch) * steps * row;
    }
    return work;
}

// By this factor several threads must be faster than one, by the estimate, to be used.
constexpr double kMargin = 1.15;

}  // namespace

template <class T>
Cut cut_up(const std::vector<const Weights<T>*>& layers, int64_t B, int64_t steps, int64_t most_groups, bool resets,
           int threads) {
    const int depth = int(layers.size());
    const auto cost = [&](int l, int64_t rows, int shares) {
        const Panels<T>& w = layers[l]->impl().panels;
        const int width = layers[l]->impl().leaf->width;
        const int64_t blocks = ceil_div(w.blocks, shares);
        return steps * step_cost(*w.d, rows, blocks, width, bytes_of(*layers[l]), w.tiles->pairs());
    };
    const auto cost_of = [&](int first, int last, int64_t rows, int shares) {
        double sum = 0;
        for (int l = first; l < last; ++l) sum += cost(l, rows, shares);
        return sum;
    };
    int64_t most_shares = resets ? 1 : kMostThreads;
    for (const Weights<T>* w : layers) most_shares = std::min(most_shares, divides(*w) ? w->impl().panels.blocks : 1);
    const Cut alone{1, 1, 1, chunk_steps(B, steps), cost_of(0, depth, B, 1)};
    Cut best = alone;
    const auto consider = [&](const Cut& cut) {
        if (cut.time < best.time) best = cut;
    };
    if (threads < 2) return alone;
    for (int groups = 1; groups <= std::min<int64_t>(most_groups, threads); ++groups) {
        const int64_t rows = ceil_div(B, groups), whole = chunk_steps(rows, steps);
        consider({groups, 1, 1, whole, cost_of(0, depth, rows, 1)});
        const int left = threads / groups, teams = std::min(left, depth);
        if (teams > 1 && steps > 1) {
            // Smaller chunks fill and drain the pipeline sooner, but read the weights over x more often.
            const int64_t chunk = std::max<int64_t>(1, std::min(whole, std::max<int64_t>(8, steps / (16 * teams))));
            double slowest = 0;
            for (int team = 0; team < teams; ++team)
                slowest = std::max(slowest, cost_of(depth * team / teams, depth * (team + 1) / teams, rows, 1));
            const double time = slowest * (1 + double(teams - 1) * double(chunk) / double(steps));
            consider({groups, teams, 1, chunk, time});
        }
        for (int shares = 2; shares <= std::min<int64_t>(left, most_shares); ++shares) {
            double between = 0;
            for (const Weights<T>* w : layers) between += step_between(w->description(), rows, shares, sizeof(T));
            consider({groups, 1, shares, whole, cost_of(0, depth, rows, shares) + double(steps) * between});
        }
    }
    return best.time * kMargin < alone.time ? best : alone;
}

template <class T>
Cut cut_of(const std::vector<const Weights<T>*>& weights, int64_t batch, int64_t steps, bool resets, int threads) {
    return cut_up(weights, batch, steps, batch, resets, useful_threads(threads, work_of(weights, batch, steps)));
}

template <class T>
Cut cut_of(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads) {
    if (threads < 2 || in.batch == 0) return {1, 1, 1, chunk_steps(in.batch, in.steps)};
    return cut_of(weights_of(layers), in.batch, in.steps, in.reset, threads);
}

template <class T>
Cuts cuts_of(const std::vector<Run<T>>& runs, int threads) {
    Cuts in_turn, at_once{{}, true};
    for (const Run<T>& run : runs) in_turn.of.push_back(cut_of(run.in, run.layers, threads));
    if (threads < 2 || runs.size() < 2) return in_turn;
    int64_t work = 0;
    for (const Run<T>& run : runs) work += work_of(weights_of(run.layers), run.in.batch, run.in.steps);
    const int each = useful_threads(threads, work) / int(runs.size());
    if (!each) return in_turn;
    double sum = 0, longest = 0;
    for (const Cut& cut : in_turn.of) sum += cut.time;
    for (const Run<T>& run : runs) {
        at_once.of.push_back(cut_of(weights_of(run.layers), run.in.batch, run.in.steps, run.in.reset, each));
        longest = std::max(longest, at_once.of.back().time);
    }
    return longest <= sum ? at_once : in_turn;
}

template Cut cut_up(const std::vector<const Weights<float>*>&, int64_t, int64_t, int64_t, bool, int);
template Cut cut_up(const std::vector<const Weights<double>*>&, int64_t, int64_t, int64_t, bool, int);
template Cut cut_of(const std::vector<const Weights<float>*>&, int64_t, int64_t, bool, int);
template Cut cut_of(const std::vector<const Weights<double>*>&, int64_t, int64_t, bool, int);
template Cut cut_of(const Sequences<float>&, const std::vector<Layer<float>>&, int);
template Cut cut_of(const Sequences<double>&, const std::vector<Layer<double>>&, int);
template Cuts cuts_of(const std::vector<Run<float>>&, int);
template Cuts cuts_of(const std::vector<Run<double>>&, int);

}  // namespace cellstack
