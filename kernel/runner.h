// A layer over some rows, as sequences and streams run it: its state, scratch memory and chunks of steps.
#pragma once
#include <algorithm>
#include <cstring>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {

template <class T>
struct Weights<T>::Impl {
    const Leaf<T>* leaf;
    Description d;
    Scratch<T> memory;
    Bands bands;
    Panels<T> panels;
};

// Rows × steps whose x·kernel is one product: enough to use each loaded weight often, few enough to stay in the cache.
constexpr int64_t kProductRows = 64;

// The number of steps in a chunk; a single step of the plain LSTM is summed in place, without the product.
inline int64_t chunk_steps(int64_t rows, int64_t steps) {
    return std::max<int64_t>(1, std::min(steps, kProductRows / std::max<int64_t>(rows, 1)));
}

// Multiplications per row and step.
inline int64_t multiplications(const Description& d) {
    return d.sum_units() * d.sum_gates() * (d.multiplied() + d.recurrent()) +
           d.units * (d.gates() * d.backbone_units + (d.projects() ? d.output : 0)) +
           d.more_layers() * d.backbone_units * d.backbone_units;
}

// The fastest cut with at most this many groups of rows, by an estimate.
template <class T>
Cut cut_up(const std::vector<const Weights<T>*>& layers, int64_t B, int64_t steps, int64_t most_groups, bool resets,
           int threads);

// The cut of a call.
template <class T>
Cut cut_of(const Sequences<T>& in, const std::vector<Layer<T>>& layers, int threads);

// The cuts of runs, and whether they run at the same time.
struct Cuts {
    std::vector<Cut> of;
    bool at_once = false;
};
template <class T>
Cuts cuts_of(const std::vector<Run<T>>& runs, int threads);

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
            z = w.by_blocks() && chunk == 1 ? 0 : chunk * rows * d.sum_gates() * w.sum_blocks * width;
            q = d.apart() || d.backbone_units ? d.gates() * wide : 0;
            q += d.more_layers() ? rows * w.sum_blocks * width : 0;
            m = d.projects() || d.layer_norm || d.resets_before() ? wide : 0;
            p = d.projects() ? h : 0;
            const auto narrow_rows = [&](int64_t count, int64_t columns) {
                return narrow(w.element) ? Parts<T>::size(count * narrow_stride(w.element, columns)) : 0;
            };
            scales = w.element == Element::kInt8 ? Parts<T>::size(chunk * rows) : 0;
            narrow_x = narrow_rows(chunk * rows, d.multiplied()),
            narrow_h = narrow_rows(rows, std::max({d.units, d.output, d.backbone_units}));
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

}  // namespace cellstack
