// The parts that all cells share, forward and backward: from the sums of a row to its gates and state, and back.
// lstm.h, gru.h and so on have the equations of each. Flags have the names that they have in Description.
//
// `Plain` is the LSTM without flags, whose blocks of units are computed from the sums to h in registers; all other
// cells are computed row by row. `Usual` is any cell with the default activations.
//
// A kind's header defines a struct with static templates over T and Usual, which run_rows and run_rows_back call for
// every row that isn't masked:
//     row         from the sums of a row, z over x and q over h (the same place unless they are apart), to h_next, the
//                 inner states and all outputs
//     row_back    from the gradients dm of h (before a projection) and dinner of the inner states, to dz (and dq), and
//                 the gradients of the states before; what doesn't pass through a product is added to `carry`. With
//                 separate sums, dz is written to dq too. In padding dz must be finite. The last two arguments
//                 are the distances between rows of `carry`, and of `dm`.
#pragma once
#include "activations.h"
#include "leaf.h"
#include "product.h"

namespace cellstack {
namespace {

// A block of units of row r at time t: `lanes` units, starting at `unit`.
struct Place {
    int64_t r, t, unit;
    int lanes;
};
template <class T>
INLINE Place place(int64_t r, int64_t t, int64_t block, int64_t units) {
    constexpr int W = Vec<T>::W;
    const int64_t left = units - block * W;
    return {r, t, block * W, left < W ? int(left) : W};
}

template <class T, class F>
INLINE void each_block(int64_t r, int64_t t, int64_t blocks, int64_t units, F&& body) {
    for (int64_t block = 0; block < blocks; ++block) body(place<T>(r, t, block, units));
}

// Calls body for the blocks of a row that this call computes.
template <class T, class F>
INLINE void each_block(const Forward<T>& f, int64_t r, int64_t t, F&& body) {
    for (int64_t block = f.block; block < f.end_block; ++block) body(place<T>(r, t, block, f.w.d->units));
}

template <class T>
INLINE V<T> limited(double limit, V<T> z) {
    return limit < __builtin_inf() ? clamp(z, T(-limit), T(limit)) : z;
}

// The fraction `keep` of the old value plus the rest of the new one.
template <class T>
INLINE V<T> mixed(V<T> keep, V<T> old, V<T> fresh) {
    return fma(keep, old, (splat(T(1)) - keep) * fresh);
}

// The zoneout of a block: the mask passed for this call, or the description's rate.
template <class T>
INLINE V<T> zone(const T* mask, double rate, int64_t steps, int64_t width, const Place& at) {
    return mask ? load_lanes(mask + (at.r * steps + at.t) * width + at.unit, at.lanes) : splat(T(rate));
}

// A block of a target after its patch, if it has one; `before` is its value after the previous step.
template <class T>
INLINE V<T> patched(const Forward<T>& f, int target, const Place& at, V<T> v, V<T> before) {
    const Patches<T>& p = f.patches;
    const int32_t line = p.lines[(at.r * f.steps + at.t) * f.w.d->targets() + target];
    if (line < 0) return v;
    const T* row = p.table + line * 3 * p.width + at.unit;
    const V<T> scale = load_lanes(row, at.lanes), hold = load_lanes(row + p.width, at.lanes), none = splat(T(0));
    V<T> out = load_lanes(row + 2 * p.width, at.lanes);
    out = scale != none ? fma(scale, v, out) : out;
    return hold != none ? fma(hold, before, out) : out;
}
template <class T>
NOINLINE V<T> patched_state(const Forward<T>& f, int state, const Place& at, V<T> v, V<T> before) {
    return patched<T>(f, f.w.d->kind->gates + state, at, v, before);
}
template <class T>
NOINLINE V<T> patched_gate(const Forward<T>& f, int plane, const Place& at, V<T> v) {
    const Description& d = *f.w.d;
    if (!f.patches.held) return patched<T>(f, plane, at, v, splat(T(0)));
    T* held = f.patches.held + (at.r * d.planes() + plane) * d.units + at.unit;
    v = patched<T>(f, plane, at, v, load_lanes(held, at.lanes));
    store_lanes(held, v, at.lanes);
    return v;
}
template <class T>
INLINE void patch_state(const Forward<T>& f, int state, const Place& at, V<T>& v, V<T> before) {
    if (f.patches.lines) v = patched_state<T>(f, state, at, v, before);
}
template <class T>
INLINE void patch_gate(const Forward<T>& f, int plane, const Place& at, V<T>& v) {
    if (f.patches.lines) v = patched_gate<T>(f, plane, at, v);
}

// ── layer normalisation ──────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
INLINE T total(V<T> v) {
    T sum = 0;
    for (int k = 0; k < Vec<T>::W; ++k) sum += v[k];
    return sum;
}

// Ones in lanes that are units, zeros in padding.
template <class T>
INLINE V<T> lanes_of(const Place& at) {
    V<T> ones{};
    for (int k = 0; k < Vec<T>::W; ++k) ones[k] = k < at.lanes ? T(1) : T(0);
    return ones;
}

// v = (v - mean) / deviation over `gates` gates of a row, `stride` apart; returns the reciprocal of the deviation.
template <class T>
INLINE T standardise(T* v, int gates, int64_t stride, int64_t units, double epsilon) {
    constexpr int W = Vec<T>::W;
    const int64_t blocks = (units + W - 1) / W;
    const T count = T(gates * units);
    V<T> sum = splat(T(0)), squares = splat(T(0));
    for (int g = 0; g < gates; ++g)
        each_block<T>(0, 0, blocks, units,
                      [&](const Place& at) INLINED { sum += load_lanes(v + g * stride + at.unit, at.lanes); });
    const V<T> mean = splat(total<T>(sum) / count);
    for (int g = 0; g < gates; ++g)
        each_block<T>(0, 0, blocks, units, [&](const Place& at) INLINED {
            V<T> d = load_lanes(v + g * stride + at.unit, at.lanes) - mean;
            if (at.lanes < W) d *= lanes_of<T>(at);
            squares = fma(d, d, squares);
        });
    const T reciprocal = T(1) / T(__builtin_sqrt(double(total<T>(squares) / count) + epsilon));
    for (int g = 0; g < gates; ++g)
        each_block<T>(0, 0, blocks, units, [&](const Place& at) INLINED {
            T* to = v + g * stride + at.unit;
            store_lanes(to, (load_lanes(to, at.lanes) - mean) * splat(reciprocal), at.lanes);
        });
    return reciprocal;
}

// Gates that are normalised together.
struct Groups {
    int count, first[2], size[2];
    explicit Groups(const Description& d) : count(1), first{0, d.kind->normed}, size{d.gates(), 0} {
        if (d.kind->normed) count = 2, size[0] = d.kind->normed, size[1] = d.gates() - d.kind->normed;
    }
};

template <class T>
INLINE V<T> bias_at(const Panels<T>& w, const T* bias, int gate, const Place& at) {
    if (!bias) return splat(T(0));
    if (w.unpacked) return load_lanes(bias + gate * w.d->units + at.unit, at.lanes);
    const bool shared = w.tail.vectors && at.lanes < Vec<T>::W;
    return load_lanes(bias + at.unit * w.d->gates() + gate * (shared ? at.lanes : Vec<T>::W),
                      shared ? at.lanes : Vec<T>::W);
}

// Normalises the sums of a row over x and over h, [gates][stride] each, or all in one in z; multiplies them by their
// gain and adds their bias.
template <class T>
void normalise(const Forward<T>& f, int64_t r, int64_t t, T* z, T* q, int64_t stride) {
    const Description& d = *f.w.d;
    const int64_t H = d.units, wide = d.gates() * H;
    const int sides = d.normed();
    const Groups groups(d);
    T* norms = f.intermediate ? f.intermediate + (r * f.steps + t) * d.intermediate_size() : nullptr;
    for (int side = 0; side < sides; ++side) {
        T* sums = side ? q : z;
        const T* gain = side ? f.w.arrays.recurrent_gain : f.w.arrays.kernel_gain;
        const T* bias = side ? f.w.recurrent_bias : f.w.bias;
        for (int k = 0; k < groups.count; ++k) {
            T* first = sums + groups.first[k] * stride;
            const T reciprocal = standardise(first, groups.size[k], stride, H, d.norm_epsilon);
            if (norms) norms[sides * wide + 2 * side + k] = reciprocal;
        }
        if (norms && groups.count == 1)
            norms[sides * wide + 2 * side + 1] = 0;  // not used, but no part of an output array is left unwritten
        for (int g = 0; g < d.gates(); ++g)
            each_block<T>(r, t, f.w.blocks, H, [&](const Place& at) INLINED {
                T* sum = sums + g * stride + at.unit;
                const V<T> v = load_lanes(sum, at.lanes);
                if (norms) store_lanes(norms + side * wide + g * H + at.unit, v, at.lanes);
                store_lanes(sum, fma(v, load_lanes(gain + g * H + at.unit, at.lanes), bias_at(f.w, bias, g, at)),
                            at.lanes);
            });
    }
}

// The number of a step that the last column of x has; 1 without it.
template <class T>
INLINE V<T> scalar_of(const Forward<T>& f, int64_t r, int64_t t) {
    const Description& d = *f.w.d;
    return splat(d.scalar ? f.x[r * f.x_row + t * f.x_time + d.input] : T(1));
}

// ── outputs of a step ────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
INLINE void write_y(const Forward<T>& f, const Place& at, V<T> h) {
    if (f.y) store_lanes(f.y + at.r * f.y_row + at.t * f.y_time + at.unit, h, at.lanes);
}

template <class T>
INLINE void write_h(const Forward<T>& f, const Place& at, V<T> kept, V<T> fed, T* h_next) {
    const int64_t here = at.r * f.w.output_blocks * Vec<T>::W + at.unit;
    if (f.recurrent_dropout) store(f.h_kept + here, kept);
    store(h_next + here, fed);
    write_y(f, at, kept);
}

// h after recurrent dropout.
template <class T>
INLINE V<T> dropped(const Forward<T>& f, const Place& at, V<T> h) {
    return f.recurrent_dropout ? h * load_lanes(f.recurrent_dropout + at.r * f.w.d->output + at.unit, at.lanes) : h;
}

// h before the step, without recurrent dropout.
template <class T>
INLINE V<T> h_before(const Forward<T>& f, const Place& at, const T* h) {
    return load((f.recurrent_dropout ? f.h_kept : h) + at.r * f.w.output_blocks * Vec<T>::W + at.unit);
}

// Writes a block of h for the next step, and to y. Zoneout, patches and dropout are applied out of line on the path by
// rows, whose kinds then contain one test of them.
template <class T>
NOINLINE void write_altered(const Forward<T>& f, const Place& at, V<T> fresh, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    V<T> kept = fresh;
    if (d.zoneout > 0) kept = mixed<T>(zone(f.zoneout, d.zoneout, f.steps, d.output, at), h_before(f, at, h), fresh);
    if (f.patches.lines) patch_state<T>(f, 0, at, kept, h_before(f, at, h));
    write_h(f, at, kept, dropped<T>(f, at, kept), h_next);
}
template <class T, bool Plain>
INLINE void write_output(const Forward<T>& f, const Place& at, V<T> fresh, const T* h, T* h_next) {
    if constexpr (Plain) return write_h(f, at, fresh, dropped<T>(f, at, fresh), h_next);
    if (f.altered) return write_altered<T>(f, at, fresh, h, h_next);
    store(h_next + at.r * f.w.output_blocks * Vec<T>::W + at.unit, fresh);
    write_y(f, at, fresh);
}

template <class T, int Planes>
INLINE void keep_gates(const Forward<T>& f, const Place& at, const V<T> (&gates)[Planes]) {
    if (!f.gates) return;
    const int64_t H = f.w.d->units;
    T* to = f.gates + (at.r * f.steps + at.t) * Planes * H + at.unit;
    UNROLL
    for (int v = 0; v < Planes; ++v) store_lanes(to + v * H, gates[v], at.lanes);
}

template <class T>
INLINE void keep_inner(const Forward<T>& f, const Place& at, int k) {
    if (!f.states[k]) return;
    const V<T> state = load(f.inner[k] + at.r * f.w.blocks * Vec<T>::W + at.unit);
    store_lanes(f.states[k] + (at.r * f.steps + at.t) * f.w.d->units + at.unit, state, at.lanes);
}

// A masked row: its state stays, its gates are zero.
template <class T>
NOINLINE void carry(const Forward<T>& f, int64_t r, int64_t t, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    const int64_t here = r * f.steps + t, wide = f.w.blocks * Vec<T>::W;
    const auto stay = [&](const Place& at) {
        write_h(f, at, h_before(f, at, h), load(h + r * f.w.output_blocks * Vec<T>::W + at.unit), h_next);
    };
    if (d.projects()) each_block<T>(r, t, f.w.output_blocks, d.output, stay);
    if (f.m) memset(f.m + r * wide, 0, size_t(wide) * sizeof(T));  // which the projection reads
    if (f.intermediate)
        memset(f.intermediate + here * d.intermediate_size(), 0, size_t(d.intermediate_size()) * sizeof(T));
    each_block(f, r, t, [&](const Place& at) {
        if (!d.projects()) stay(at);
        for (int plane = 0; f.gates && plane < d.planes(); ++plane)
            store_lanes(f.gates + (here * d.planes() + plane) * d.units + at.unit, splat(T(0)), at.lanes);
        for (int k = 0; k < d.inner_states(); ++k) keep_inner(f, at, k);
    });
}

// ── backward ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// Calls body for the blocks of a row that this call computes.
template <class T, class F>
INLINE void each_block(const Backward<T>& f, int64_t r, int64_t t, F&& body) {
    for (int64_t block = f.block; block < f.end_block; ++block) body(place<T>(r, t, block, f.d->units));
}

// The index of a row and time in the stored gates and intermediate values.
template <class T>
INLINE int64_t kept_at(const Backward<T>& f, int64_t r, int64_t t) {
    return f.kept_first + r * f.kept_row + t * f.kept_time;
}

// The state before step n of a row; null: zeros.
template <class T>
INLINE const T* before(const Backward<T>& f, int64_t r, int64_t n, const T* all, int64_t row, int64_t time,
                       const T* start, const T* initial, int64_t width) {
    if (f.reset && f.reset[r * f.steps + time_of(f, n)]) return initial;
    if (n > 0) return all + r * row + time_of(f, n - 1) * time;
    return start ? start + r * width : initial;
}
template <class T>
INLINE const T* inner_before(const Backward<T>& f, int64_t r, int64_t n, int k) {
    const int64_t H = f.d->units;
    return before(f, r, n, f.states[k], f.steps * H, H, f.before[1 + k], f.arrays.initial[1 + k], H);
}
template <class T>
INLINE const T* output_before(const Backward<T>& f, int64_t r, int64_t n) {
    return before(f, r, n, f.y, f.y_row, f.y_time, f.before[0], f.arrays.initial[0], f.d->output);
}
template <class T>
INLINE V<T> units_of(const T* row, const Place& at) {
    return row ? load_lanes(row + at.unit, at.lanes) : splat(T(0));
}

// Where dz of a row's block is stored, [gates][W].
template <class T>
INLINE T* block_of(const Backward<T>& f, T* dz, int gates, int64_t r, int64_t n, int64_t unit) {
    const int64_t m = (n - f.first) * f.batch + f.row0 + r, dz_rows = (f.last - f.first) * f.batch;
    return dz + (unit / Vec<T>::W * dz_rows + m) * gates * Vec<T>::W;
}

template <class T>
INLINE void add_to_vector(const Backward<T>& f, int vector, const Place& at, V<T> gradient) {
    T* sum = f.vectors + (at.r * kSums + vector) * f.blocks * Vec<T>::W + at.unit;
    store(sum, load(sum) + gradient);
}

// Given the gradients of the normalised sums times gain plus bias, over x in dz and over h in dq, computes those of the
// sums.
template <class T>
void normalise_back(const Backward<T>& f, int64_t r, int64_t n) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    const int64_t H = d.units, t = time_of(f, n), wide = d.gates() * H;
    const int sides = d.normed();
    const T* norms = f.intermediate + kept_at(f, r, t) * d.intermediate_size();
    const Groups groups(d);
    for (int side = 0; side < sides; ++side) {
        T* dz = side ? f.dq : f.dz;
        const T* gain = side ? f.arrays.recurrent_gain : f.arrays.kernel_gain;
        for (int k = 0; k < groups.count; ++k) {
            V<T> sum = splat(T(0)), product = splat(T(0));
            for (int g = groups.first[k]; g < groups.first[k] + groups.size[k]; ++g)
                each_block<T>(r, t, f.blocks, H, [&](const Place& at) INLINED {
                    T* to = block_of(f, dz, d.gates(), r, n, at.unit) + g * W;
                    const V<T> v = load_lanes(norms + side * wide + g * H + at.unit, at.lanes), given = load(to);
                    add_to_vector(f, (side ? sums_of::recurrent_gain : sums_of::kernel_gain) + g, at, given * v);
                    add_to_vector(f, (side ? sums_of::recurrent_bias : sums_of::bias) + g, at, given);
                    const V<T> dv = given * load_lanes(gain + g * H + at.unit, at.lanes);
                    store(to, dv);
                    sum += dv;
                    product = fma(dv, v, product);
                });
            const T count = T(groups.size[k] * H), reciprocal = norms[sides * wide + 2 * side + k];
            const V<T> mean = splat(total<T>(sum) / count), share = splat(total<T>(product) / count);
            for (int g = groups.first[k]; g < groups.first[k] + groups.size[k]; ++g)
                each_block<T>(r, t, f.blocks, H, [&](const Place& at) INLINED {
                    T* to = block_of(f, dz, d.gates(), r, n, at.unit) + g * W;
                    const V<T> v = load_lanes(norms + side * wide + g * H + at.unit, at.lanes);
                    store(to, splat(reciprocal) * (load(to) - mean - v * share));
                });
        }
    }
}

template <class T>
INLINE V<T> scalar_of(const Backward<T>& f, int64_t r, int64_t t) {
    return splat(f.d->scalar ? f.scalar[r * f.scalar_row + t * f.scalar_time] : T(1));
}
// Writes its gradient, the sum over all units.
template <class T>
INLINE void give_scalar(const Backward<T>& f, int64_t r, int64_t t, V<T> gradient) {
    if (f.d->scalar && f.dscalar) f.dscalar[r * f.dscalar_row + t * f.dscalar_time] = total<T>(gradient);
}

template <class T>
INLINE V<T> extra(const Backward<T>& f, const Place& at, int plane) {
    if (!f.dgates) return splat(T(0));
    const Description& d = *f.d;
    return load_lanes(f.dgates + ((at.r * f.steps + at.t) * d.planes() + plane) * d.units + at.unit, at.lanes);
}

template <class T, int Planes>
INLINE void load_gates(const Backward<T>& f, const Place& at, V<T> (&gates)[Planes]) {
    const int64_t H = f.d->units;
    const T* from = f.gates + kept_at(f, at.r, at.t) * Planes * H + at.unit;
    UNROLL
    for (int v = 0; v < Planes; ++v) gates[v] = load_lanes(from + v * H, at.lanes);
}

}  // namespace
}  // namespace cellstack
