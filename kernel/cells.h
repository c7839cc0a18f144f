// What the cells are made of, forward and backward: from the sums of a row to its gates and state, and back. A flag is
// found by its name in Description.
//
// `Plain` is the LSTM without flags, whose blocks of units pass from the sums to h in registers; all else goes row by
// row. `Usual` is any cell whose activations are the usual ones.
#pragma once
#include "activations.h"
#include "leaf.h"
#include "product.h"

namespace cellstack {
namespace {

// Where a row's block of units lies: from `unit` on, `lanes` of them.
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

template <class T>
INLINE V<T> limited(double limit, V<T> z) {
    return limit < __builtin_inf() ? clamp(z, T(-limit), T(limit)) : z;
}

// Share `keep` of the old value, the rest of the new one.
template <class T>
INLINE V<T> mixed(V<T> keep, V<T> old, V<T> fresh) {
    return fma(keep, old, (splat(T(1)) - keep) * fresh);
}

// The zoneout of a block: a mask of the call's, or the description's rate.
template <class T>
INLINE V<T> zone(const T* mask, double rate, int64_t steps, int64_t width, const Place& at) {
    return mask ? load_lanes(mask + (at.r * steps + at.t) * width + at.unit, at.lanes) : splat(T(rate));
}

// ── layer normalisation ──────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
INLINE T total(V<T> v) {
    T sum = 0;
    for (int k = 0; k < Vec<T>::W; ++k) sum += v[k];
    return sum;
}

// Ones in the lanes that are units, zeros beyond.
template <class T>
INLINE V<T> lanes_of(const Place& at) {
    V<T> ones{};
    for (int k = 0; k < Vec<T>::W; ++k) ones[k] = k < at.lanes ? T(1) : T(0);
    return ones;
}

// v = (v - mean) / deviation over `gates` gates of a row, `stride` apart; returns the deviation's reciprocal.
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

// Gates that are normalised together: all of them, but for a GRU z and r, then g.
struct Groups {
    int count, first[2], size[2];
    explicit Groups(const Description& d) : count(1), first{0, 2}, size{d.gates(), 1} {
        if (d.kind == kGru) count = 2, size[0] = 2;
    }
};

template <class T>
INLINE V<T> bias_at(const Panels<T>& w, const T* bias, int gate, const Place& at) {
    if (!bias) return splat(T(0));
    if (w.unpacked) return load_lanes(bias + gate * w.d->units + at.unit, at.lanes);
    return load(bias + at.unit * w.d->gates() + gate * Vec<T>::W);
}

// The two sums of a row, [gates][stride] each, normalised, times their gain, plus their bias.
template <class T>
void normalise(const Forward<T>& f, int64_t r, int64_t t, T* z, T* q, int64_t stride) {
    const Description& d = *f.w.d;
    const int64_t H = d.units, wide = d.gates() * H;
    const Groups groups(d);
    T* norms = f.norms ? f.norms + (r * f.steps + t) * d.norm_size() : nullptr;
    for (int side = 0; side < 2; ++side) {
        T* sums = side ? q : z;
        const T* gain = side ? f.w.arrays.recurrent_gain : f.w.arrays.kernel_gain;
        const T* bias = side ? f.w.recurrent_bias : f.w.bias;
        for (int k = 0; k < groups.count; ++k) {
            T* first = sums + groups.first[k] * stride;
            const T reciprocal = standardise(first, groups.size[k], stride, H, d.norm_epsilon);
            if (norms) norms[2 * wide + 2 * side + k] = reciprocal;
        }
        if (norms && groups.count == 1)
            norms[2 * wide + 2 * side + 1] = 0;  // nothing that is given out is left unwritten
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

// ── out of a step ────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
INLINE void write_h(const Forward<T>& f, const Place& at, V<T> kept, V<T> fed, T* h_next) {
    const int64_t here = at.r * f.w.output_blocks * Vec<T>::W + at.unit;
    if (f.recurrent_dropout) store(f.h_kept + here, kept);
    store(h_next + here, fed);
    if (f.y) store_lanes(f.y + at.r * f.y_row + at.t * f.y_time + at.unit, kept, at.lanes);
}

// h before the step, as it was given out.
template <class T>
INLINE V<T> h_before(const Forward<T>& f, const Place& at, const T* h) {
    return load((f.recurrent_dropout ? f.h_kept : h) + at.r * f.w.output_blocks * Vec<T>::W + at.unit);
}

// A block of h goes out: to the next step, and to y.
template <class T, bool Plain>
INLINE void give(const Forward<T>& f, const Place& at, V<T> fresh, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    V<T> kept = fresh;
    if (!Plain && d.zoneout > 0)
        kept = mixed<T>(zone(f.zoneout, d.zoneout, f.steps, d.output, at), h_before(f, at, h), fresh);
    V<T> fed = kept;
    if (f.recurrent_dropout) fed = kept * load_lanes(f.recurrent_dropout + at.r * d.output + at.unit, at.lanes);
    write_h(f, at, kept, fed, h_next);
}

template <class T, int Planes>
INLINE void keep_gates(const Forward<T>& f, const Place& at, const V<T> (&gates)[Planes]) {
    if (!f.gates) return;
    const int64_t H = f.w.d->units;
    T* to = f.gates + (at.r * f.steps + at.t) * Planes * H + at.unit;
    unroll<Planes>([&](auto v) INLINED { store_lanes(to + v * H, gates[v], at.lanes); });
}

template <class T>
INLINE void keep_cell(const Forward<T>& f, const Place& at) {
    if (!f.cells) return;
    const V<T> c = load(f.c + at.r * f.w.blocks * Vec<T>::W + at.unit);
    store_lanes(f.cells + (at.r * f.steps + at.t) * f.w.d->units + at.unit, c, at.lanes);
}

// A row that the mask leaves out: its state stays, its gates are zero.
template <class T>
void carry(const Forward<T>& f, int64_t r, int64_t t, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    each_block<T>(r, t, f.w.output_blocks, d.output, [&](const Place& at) {
        write_h(f, at, h_before(f, at, h), load(h + r * f.w.output_blocks * Vec<T>::W + at.unit), h_next);
    });
    const int64_t here = r * f.steps + t, wide = f.w.blocks * Vec<T>::W;
    if (f.m) memset(f.m + r * wide, 0, size_t(wide) * sizeof(T));  // what a projection is going to read
    if (f.gates) memset(f.gates + here * d.planes() * d.units, 0, size_t(d.planes() * d.units) * sizeof(T));
    if (f.norms) memset(f.norms + here * d.norm_size(), 0, size_t(d.norm_size()) * sizeof(T));
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) { keep_cell(f, at); });
}

// ── LSTM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
//     c = f·c_prev + i·g                          h = o·φ(c)
//     peepholes: i and f see c_prev, o sees c     coupled: f = 1 - i     layer_norm: φ(LN(c))

template <class T>
INLINE V<T> peephole(const Description& d, const T* weights, int gate, const Place& at) {
    const int row = d.coupled && gate == 3 ? 1 : gate == 3 ? 2 : gate;
    return load_lanes(weights + row * d.units + at.unit, at.lanes);
}

// From sums to gates, in place; the new cell is the state, and what comes back is what it would be without zoneout.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_gates(const Forward<T>& f, const Place& at, V<T> (&z)[4]) {
    const Description& d = *f.w.d;
    const T* p = f.w.arrays.peepholes;
    T* state = f.c + at.r * f.w.blocks * Vec<T>::W + at.unit;
    const V<T> c_prev = load(state);
    if constexpr (!Plain) {
        if (d.peepholes) {
            z[0] = fma(peephole(d, p, 0, at), c_prev, z[0]);
            if (!d.coupled) z[1] = fma(peephole(d, p, 1, at), c_prev, z[1]);
        }
        unroll<3>([&](auto v) INLINED { z[v] = limited<T>(d.clip, z[v]); });
    }
    z[0] = act<T, Usual, false>(d.activations[0], z[0]);
    z[1] = !Plain && d.coupled ? splat(T(1)) - z[0] : act<T, Usual, false>(d.activations[1], z[1]);
    z[2] = act<T, Usual, true>(d.activations[2], z[2]);
    V<T> c = fma(z[1], c_prev, z[0] * z[2]), kept = c;
    if constexpr (!Plain) {
        kept = c = limited<T>(d.cell_clip, c);
        if (d.zoneout_cell > 0) kept = mixed<T>(zone(f.zoneout_cell, d.zoneout_cell, f.steps, d.units, at), c_prev, c);
        if (d.peepholes) z[3] = fma(peephole(d, p, 3, at), c, z[3]);
        z[3] = limited<T>(d.clip, z[3]);
    }
    z[3] = act<T, Usual, false>(d.activations[3], z[3]);
    store(state, kept);
    return c;
}

template <class T, bool Usual>
void lstm_row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h, T* h_next) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.w.d;
    T* line = f.m ? f.m + r * f.w.blocks * W : nullptr;
    const auto out = [&](const Place& at, V<T> m) INLINED {
        if (d.projects())
            store(line + at.unit, m);
        else
            give<T, false>(f, at, m, h, h_next);
    };
    if (d.layer_norm) normalise(f, r, t, sums, q, stride);
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) INLINED {
        V<T> z[4];
        int column = 0;
        unroll<4>([&](auto v) INLINED {
            const int64_t from = column * stride + at.unit;
            z[v] = splat(T(0));
            if (v == 1 && d.coupled) return;
            z[v] = load_lanes(sums + from, at.lanes);
            if (d.layer_norm) z[v] += load_lanes(q + from, at.lanes);
            ++column;
        });
        const V<T> c = lstm_gates<T, false, Usual>(f, at, z);
        keep_gates(f, at, z);
        keep_cell(f, at);
        if (d.layer_norm) {
            store(line + at.unit, c);
            store_lanes(sums + at.unit, z[3], at.lanes);
        } else {
            out(at, z[3] * act<T, Usual, true>(d.activations[4], c));
        }
    });
    if (!d.layer_norm) return;
    standardise(line, 1, 0, d.units, d.norm_epsilon);
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) INLINED {
        const V<T> gain = load_lanes(f.w.arrays.cell_gain + at.unit, at.lanes);
        const V<T> c = fma(load(line + at.unit), gain, load_lanes(f.w.arrays.cell_bias + at.unit, at.lanes));
        out(at, load_lanes(sums + at.unit, at.lanes) * act<T, Usual, true>(d.activations[4], c));
    });
}

// ── GRU ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
//     h = z·h_prev + (1 - z)·g          reset_after: g = φ(x·K + r·(h·R)), else g = φ(x·K + (r·h)·R)

// The reset gate before the product: z, and r·h, which the candidate's product is going to take.
template <class T, bool Usual>
void gru_reset(const Forward<T>& f, int64_t r, int64_t t, T* sums, int64_t stride, const T* h) {
    const Description& d = *f.w.d;
    const int64_t wide = f.w.blocks * Vec<T>::W;
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) INLINED {
        unroll<2>([&](auto v) INLINED {
            T* sum = sums + v * stride + at.unit;
            const V<T> z = limited<T>(d.clip, load_lanes(sum, at.lanes));
            store_lanes(sum, act<T, Usual, false>(d.activations[v], z), at.lanes);
        });
        store(f.m + r * wide + at.unit, load_lanes(sums + stride + at.unit, at.lanes) * load(h + r * wide + at.unit));
    });
}

template <class T, bool Usual>
void gru_row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    if (d.layer_norm) normalise(f, r, t, sums, q, stride);
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) INLINED {
        V<T> z[3], after[4] = {};
        unroll<3>([&](auto v) INLINED { z[v] = load_lanes(sums + v * stride + at.unit, at.lanes); });
        if (d.reset_after) {
            unroll<3>([&](auto v) INLINED { after[v] = load_lanes(q + v * stride + at.unit, at.lanes); });
            unroll<2>([&](auto v) INLINED {
                z[v] = act<T, Usual, false>(d.activations[v], limited<T>(d.clip, z[v] + after[v]));
            });
            z[2] = fma(z[1], after[2], z[2]);
        }
        z[2] = act<T, Usual, true>(d.activations[2], limited<T>(d.clip, z[2]));
        if (d.reset_after) {
            after[3] = after[2];
            unroll<3>([&](auto v) INLINED { after[v] = z[v]; });
            keep_gates(f, at, after);
        } else {
            keep_gates(f, at, z);
        }
        give<T, false>(f, at, mixed<T>(z[0], h_before(f, at, h), z[2]), h, h_next);
    });
}

// ── SimpleRNN ────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T, bool Usual>
void rnn_row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h, T* h_next) {
    const Description& d = *f.w.d;
    if (d.layer_norm) normalise(f, r, t, sums, q, stride);
    each_block<T>(r, t, f.w.blocks, d.units, [&](const Place& at) INLINED {
        V<T> z[1] = {load_lanes(sums + at.unit, at.lanes)};
        if (d.layer_norm) z[0] += load_lanes(q + at.unit, at.lanes);
        z[0] = act<T, Usual, true>(d.activations[0], limited<T>(d.clip, z[0]));
        keep_gates(f, at, z);
        give<T, false>(f, at, z[0], h, h_next);
    });
}

// ── back ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

// What the state was before step n of a row: null for zeros.
template <class T>
INLINE const T* before(const Backward<T>& f, int64_t r, int64_t n, const T* all, const T* start, const T* initial,
                       int64_t width) {
    const int64_t here = r * f.steps + time_of(f, n);
    if (f.reset && f.reset[here]) return initial;
    if (n > 0) return all + (r * f.steps + time_of(f, n - 1)) * width;
    return start ? start + r * width : initial;
}
template <class T>
INLINE const T* cell_before(const Backward<T>& f, int64_t r, int64_t n) {
    return before(f, r, n, f.cells, f.c0, f.arrays.initial_c, f.d->units);
}
template <class T>
INLINE const T* output_before(const Backward<T>& f, int64_t r, int64_t n) {
    return before(f, r, n, f.y, f.h0, f.arrays.initial_h, f.d->output);
}
template <class T>
INLINE V<T> units_of(const T* row, const Place& at) {
    return row ? load_lanes(row + at.unit, at.lanes) : splat(T(0));
}

// dz of a row's block, gate by gate.
template <class T>
INLINE T* block_of(const Backward<T>& f, T* dz, int gates, int64_t r, int64_t n, int64_t unit) {
    const int64_t m = (n - f.first) * f.batch + f.row0 + r, dz_rows = (f.last - f.first) * f.batch;
    return dz + (unit / Vec<T>::W * dz_rows + m) * gates * Vec<T>::W;
}

template <class T>
INLINE void add_to_vector(const Backward<T>& f, int vector, const Place& at, V<T> gradient) {
    T* sum = f.vectors + (at.r * kVectors + vector) * f.blocks * Vec<T>::W + at.unit;
    store(sum, load(sum) + gradient);
}

// Gradients of one side's sums, out of those of their normalised values times gain plus bias.
template <class T>
void normalise_back(const Backward<T>& f, int64_t r, int64_t n, T* dz, int side) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    const int64_t H = d.units, t = time_of(f, n), wide = d.gates() * H;
    const T* norms = f.norms + (r * f.steps + t) * d.norm_size();
    const T* gain = side ? f.arrays.recurrent_gain : f.arrays.kernel_gain;
    const Groups groups(d);
    for (int k = 0; k < groups.count; ++k) {
        V<T> sum = splat(T(0)), product = splat(T(0));
        for (int g = groups.first[k]; g < groups.first[k] + groups.size[k]; ++g)
            each_block<T>(r, t, f.blocks, H, [&](const Place& at) INLINED {
                T* to = block_of(f, dz, d.gates(), r, n, at.unit) + g * W;
                const V<T> v = load_lanes(norms + side * wide + g * H + at.unit, at.lanes), given = load(to);
                add_to_vector(f, (side ? kRecurrentGain : kKernelGain) + g, at, given * v);
                add_to_vector(f, (side ? kRecurrentBias : kBias) + g, at, given);
                const V<T> dv = given * load_lanes(gain + g * H + at.unit, at.lanes);
                store(to, dv);
                sum += dv;
                product = fma(dv, v, product);
            });
        const T count = T(groups.size[k] * H), reciprocal = norms[2 * wide + 2 * side + k];
        const V<T> mean = splat(total<T>(sum) / count), share = splat(total<T>(product) / count);
        for (int g = groups.first[k]; g < groups.first[k] + groups.size[k]; ++g)
            each_block<T>(r, t, f.blocks, H, [&](const Place& at) INLINED {
                T* to = block_of(f, dz, d.gates(), r, n, at.unit) + g * W;
                const V<T> v = load_lanes(norms + side * wide + g * H + at.unit, at.lanes);
                store(to, splat(reciprocal) * (load(to) - mean - v * share));
            });
    }
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
    const T* from = f.gates + (at.r * f.steps + at.t) * Planes * H + at.unit;
    unroll<Planes>([&](auto v) INLINED { gates[v] = load_lanes(from + v * H, at.lanes); });
}

// h = o·φ(c): dz of o; returns the gradient of c on this way. `dm` is that of h.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_output_back(const Backward<T>& f, const Limits<T>& limits, const Place& at, V<T> o, V<T> phi_c,
                             V<T> dm, V<T>& dz_o) {
    const Description& d = *f.d;
    dz_o = (dm * phi_c + extra(f, at, 3)) * gate_slope<T, Plain, Usual, false>(d, limits, 3, o);
    return dm * o * slope<T>(Usual ? kUsualTanh : d.activations[4], phi_c);
}

// c = f·c_prev + i·g: dz of i, f and g; returns the gradient of c_prev. `dc` is that of c; dz[3] is there already.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_cell_back(const Backward<T>& f, const Limits<T>& limits, const Place& at, const V<T> (&gates)[4],
                           V<T> c_prev, V<T> dc, V<T> (&dz)[4]) {
    const Description& d = *f.d;
    V<T> di = dc * gates[2] + extra(f, at, 0), df = dc * c_prev + extra(f, at, 1), dg = dc * gates[0] + extra(f, at, 2);
    if (!Plain && d.coupled) di -= df;
    dz[0] = di * gate_slope<T, Plain, Usual, false>(d, limits, 0, gates[0]);
    dz[1] = df * gate_slope<T, Plain, Usual, false>(d, limits, 1, gates[1]);
    dz[2] = dg * gate_slope<T, Plain, Usual, true>(d, limits, 2, gates[2]);
    return dc * gates[1];
}

template <class T, bool Usual>
void lstm_row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    const int64_t t = time_of(f, n), wide = f.blocks * W;
    const T* p = f.arrays.peepholes;
    const T* c_before = cell_before(f, r, n);
    T *cell = f.line, *dcell = f.line + wide;
    const int gates_in_dz = d.gates();
    const auto blocks = [&](auto&& body) INLINED { each_block<T>(r, t, f.blocks, d.units, body); };
    const auto fresh = [&](const Place& at, const V<T>(&gates)[4]) INLINED {  // c of the step, before zoneout
        return limited<T>(d.cell_clip, fma(gates[1], units_of(c_before, at), gates[0] * gates[2]));
    };
    blocks([&](const Place& at) INLINED {
        V<T> gates[4];
        load_gates(f, at, gates);
        store(cell + at.unit, fresh(at, gates));
    });
    T reciprocal = 1;
    if (d.layer_norm) reciprocal = standardise(cell, 1, 0, d.units, d.norm_epsilon);
    V<T> sum = splat(T(0)), product = splat(T(0));
    blocks([&](const Place& at) INLINED {
        V<T> gates[4], dz_o, v = load_lanes(cell + at.unit, at.lanes), c = v, gain = splat(T(1));
        load_gates(f, at, gates);
        if (d.layer_norm) {
            gain = load_lanes(f.arrays.cell_gain + at.unit, at.lanes);
            c = fma(v, gain, load_lanes(f.arrays.cell_bias + at.unit, at.lanes));
        }
        const V<T> phi_c = act<T, Usual, true>(d.activations[4], c);
        const V<T> dm = load(f.dm + r * columns + at.unit);
        if (d.projects())
            store_lanes(f.m + ((n - f.first) * f.batch + f.row0 + r) * d.units + at.unit, gates[3] * phi_c, at.lanes);
        V<T> dc = lstm_output_back<T, false, Usual>(f, limits, at, gates[3], phi_c, dm, dz_o);
        if (d.layer_norm) {
            add_to_vector(f, kCellGain, at, dc * v);
            add_to_vector(f, kCellBias, at, dc);
            dc *= gain;
            sum += dc;
            product = fma(dc, v, product);
        }
        store(dcell + at.unit, dc);
        store(block_of(f, f.dz, gates_in_dz, r, n, at.unit) + (gates_in_dz - 1) * W, dz_o);
    });
    const V<T> mean = splat(total<T>(sum) / T(d.units)), share = splat(total<T>(product) / T(d.units));
    blocks([&](const Place& at) INLINED {
        V<T> gates[4], dz[4];
        load_gates(f, at, gates);
        T* to = block_of(f, f.dz, gates_in_dz, r, n, at.unit);
        T* dc_at = f.dc + r * wide + at.unit;
        const V<T> c_prev = units_of(c_before, at), c = fresh(at, gates);
        V<T> dc = load(dcell + at.unit), given = load(dc_at), passed = splat(T(0));
        if (d.layer_norm) dc = splat(reciprocal) * (dc - mean - load_lanes(cell + at.unit, at.lanes) * share);
        if (f.dcells) given += load_lanes(f.dcells + (r * f.steps + t) * d.units + at.unit, at.lanes);
        if (d.zoneout_cell > 0) {
            const V<T> keep = zone(f.zoneout_cell, d.zoneout_cell, f.steps, d.units, at);
            passed = keep * given, given *= splat(T(1)) - keep;
        }
        dz[3] = load(to + (gates_in_dz - 1) * W);
        dc += given;
        if (d.peepholes) dc = fma(dz[3], peephole(d, p, 3, at), dc);
        if (d.cell_clip < __builtin_inf()) {
            const V<T> end = splat(T(d.cell_clip));
            dc = (c < end) & (c > -end) ? dc : splat(T(0));
        }
        passed += lstm_cell_back<T, false, Usual>(f, limits, at, gates, c_prev, dc, dz);
        if (d.peepholes) {
            passed = fma(dz[0], peephole(d, p, 0, at), passed);
            add_to_vector(f, kPeepholes, at, dz[0] * c_prev);
            if (!d.coupled) {
                passed = fma(dz[1], peephole(d, p, 1, at), passed);
                add_to_vector(f, kPeepholes + 1, at, dz[1] * c_prev);
            }
            add_to_vector(f, kPeepholes + (d.coupled ? 1 : 2), at, dz[3] * c);
        }
        store(to, dz[0]);
        if (!d.coupled) store(to + W, dz[1]);
        store(to + (gates_in_dz - 2) * W, dz[2]);
        store(dc_at, passed);
        if (d.layer_norm) {
            T* other = block_of(f, f.dq, gates_in_dz, r, n, at.unit);
            for (int k = 0; k < gates_in_dz; ++k) store(other + k * W, load(to + k * W));
        }
    });
    if (!d.layer_norm) return;
    normalise_back(f, r, n, f.dz, 0);
    normalise_back(f, r, n, f.dq, 1);
}

// All of a GRU's gates but, where it acts before the product, r; dh_prev past the product goes into `carry`.
template <class T, bool Usual>
void gru_row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    const int64_t t = time_of(f, n);
    const T* h_prev = output_before(f, r, n);
    each_block<T>(r, t, f.blocks, d.units, [&](const Place& at) INLINED {
        V<T> gates[4];
        const int64_t H = d.units;
        const T* from = f.gates + (r * f.steps + t) * d.planes() * H + at.unit;
        unroll<3>([&](auto v) INLINED { gates[v] = load_lanes(from + v * H, at.lanes); });
        const V<T> h = units_of(h_prev, at), dh = load(f.dm + r * columns + at.unit), zero = splat(T(0));
        const V<T> dz_z =
            (dh * (h - gates[2]) + extra(f, at, 0)) * gate_slope<T, false, Usual, false>(d, limits, 0, gates[0]);
        const V<T> dg = (dh * (splat(T(1)) - gates[0]) + extra(f, at, 2)) *
                        gate_slope<T, false, Usual, true>(d, limits, 2, gates[2]);
        T* carried = f.carry + r * columns + at.unit;
        store(carried, fma(dh, gates[0], load(carried)));
        T* to = block_of(f, f.dz, 3, r, n, at.unit);
        store(to, dz_z);
        store(to + W, zero);
        store(to + 2 * W, dg);
        if (d.reset_after) {
            gates[3] = load_lanes(from + 3 * H, at.lanes);
            const V<T> dr =
                (dg * gates[3] + extra(f, at, 1)) * gate_slope<T, false, Usual, false>(d, limits, 1, gates[1]);
            store(to + W, dr);
            T* other = block_of(f, f.dq, 3, r, n, at.unit);
            store(other, dz_z);
            store(other + W, dr);
            store(other + 2 * W, dg * gates[1]);
        }
    });
    if (!d.layer_norm) return;
    normalise_back(f, r, n, f.dz, 0);
    normalise_back(f, r, n, f.dq, 1);
}

// The reset gate before the product, from the gradient of r·h (with h's dropout) that went into it: `given`.
template <class T, bool Usual>
INLINE void gru_reset_back(const Backward<T>& f, const Limits<T>& limits, int64_t n, int64_t columns, const Place& at,
                           V<T> given) {
    const Description& d = *f.d;
    const int64_t H = d.units;
    const V<T> reset = load_lanes(f.gates + ((at.r * f.steps + at.t) * 3 + 1) * H + at.unit, at.lanes);
    if (f.recurrent_dropout) given *= load_lanes(f.recurrent_dropout + at.r * H + at.unit, at.lanes);
    const V<T> dr = given * units_of(output_before(f, at.r, n), at) + extra(f, at, 1);
    store(block_of(f, f.dz, 3, at.r, n, at.unit) + Vec<T>::W,
          dr * gate_slope<T, false, Usual, false>(d, limits, 1, reset));
    T* carried = f.carry + at.r * columns + at.unit;
    store(carried, fma(given, reset, load(carried)));
}

template <class T, bool Usual>
void rnn_row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns) {
    const Description& d = *f.d;
    const int64_t t = time_of(f, n);
    each_block<T>(r, t, f.blocks, d.units, [&](const Place& at) INLINED {
        V<T> gates[1];
        load_gates(f, at, gates);
        const V<T> dz = (load(f.dm + r * columns + at.unit) + extra(f, at, 0)) *
                        gate_slope<T, false, Usual, true>(d, limits, 0, gates[0]);
        store(block_of(f, f.dz, 1, r, n, at.unit), dz);
        if (d.layer_norm) store(block_of(f, f.dq, 1, r, n, at.unit), dz);
    });
    if (!d.layer_norm) return;
    normalise_back(f, r, n, f.dz, 0);
    normalise_back(f, r, n, f.dq, 1);
}

}  // namespace
}  // namespace cellstack
