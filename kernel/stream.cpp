// Streams: stacks that keep their states between calls.
#include <algorithm>
#include <array>
#include <cstring>

#include "runner.h"

namespace cellstack {

template <class T>
struct Stream<T>::Impl {
    std::vector<const Weights<T>*> weights;
    int64_t batch, chunk, work = 0;  // work: multiplications per step
    int64_t most_steps;              // beyond these, the work of a call is counted as kMostNumbers
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
        f.x_time = f.w.d->x_width(), f.y_time = f.w.d->output;
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
    s.most_steps = kMostNumbers / std::max<int64_t>(s.work, 1);
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
    const int64_t work = steps > s.most_steps ? kMostNumbers : s.work * steps;
    const int threads = useful_threads(s.threads, work);
    const int64_t chunks = ceil_div(steps, s.chunk);
    // Runs layers [first_layer, end_layer) of every `tasks`-th group.
    const auto pass = [&](int64_t n, int64_t end, int task, int tasks, int first_layer, int end_layer) {
        FlushDenormals flush;
        for (; n < end; ++n)
            for (int group = task; group < s.groups; group += tasks)
                for (int l = first_layer; l < end_layer; ++l) s.advance(group, l, n, x, y, steps);
    };
    if (threads == 1) return pass(0, chunks, 0, 1, 0, depth);  // the divisions below take as long as a small step
    // Threads divide the rows if there are enough, else the units or the layers: each team's layers stay a chunk behind
    // the team below.
    const int tasks = std::min(threads, s.groups);
    const Cut cut = s.groups == 1 ? cut_up(s.weights, s.batch, steps, 1, false, threads)
                                  : Cut{tasks, std::min(depth, threads / tasks), 1, s.chunk};
    if (cut.shares > 1) return s.share_out(x, y, steps, cut.shares);
    const int teams = chunks > 1 ? cut.teams : 1;
    for (int64_t round = 0; round < (teams > 1 ? chunks + teams - 1 : 1); ++round)
        parallel(tasks * teams, [&](int k) {
            const int team = k / tasks;
            const int64_t first = teams > 1 ? std::max<int64_t>(round - team, 0) : 0;
            const int64_t end = teams > 1 ? std::min(round - team + 1, chunks) : chunks;
            pass(first, end, k % tasks, tasks, depth * team / teams, depth * (team + 1) / teams);
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

template class Stream<float>;
template class Stream<double>;

}  // namespace cellstack
