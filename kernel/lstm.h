// The LSTM with every flag, forward and backward.
//     c = f·c_prev + i·g                               h = o·φ(c)
//     peepholes: i and f use c_prev, o uses c          coupled: f = 1 - i          layer_norm: φ(LN(c)), joint: c =
//     LN(c)
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

constexpr int kC = 0;  // c among the inner states

template <class T>
INLINE V<T> peephole(const Description& d, const T* weights, int gate, const Place& at) {
    const int row = d.coupled && gate == 3 ? 1 : gate == 3 ? 2 : gate;
    return load_lanes(weights + row * d.units + at.unit, at.lanes);
}

template <class T>
INLINE T* cell_state(const Forward<T>& f, const Place& at) {
    return f.inner[kC] + at.r * f.w.blocks * Vec<T>::W + at.unit;
}

// Computes i, f and g from their sums, in place; returns the new cell state before zoneout, and before it is
// normalised.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_cell(const Forward<T>& f, const Place& at, V<T> (&z)[4], V<T> c_prev) {
    const Description& d = *f.w.d;
    if constexpr (!Plain) {
        const T* p = f.w.arrays.peepholes;
        if (d.peepholes) {
            z[0] = fma(peephole(d, p, 0, at), c_prev, z[0]);
            if (!d.coupled) z[1] = fma(peephole(d, p, 1, at), c_prev, z[1]);
        }
        UNROLL
        for (int v = 0; v < 3; ++v) z[v] = limited<T>(d.clip, z[v]);
    }
    const auto patch = [&](int plane) INLINED {
        if constexpr (!Plain) patch_gate<T>(f, plane, at, z[plane]);
    };
    z[0] = act<T, Usual, false>(d.activations[0], z[0]), patch(0);
    z[1] = !Plain && d.coupled ? splat(T(1)) - z[0] : act<T, Usual, false>(d.activations[1], z[1]), patch(1);
    z[2] = act<T, Usual, true>(d.activations[2], z[2]), patch(2);
    const V<T> c = fma(z[1], c_prev, z[0] * z[2]);
    return Plain ? c : limited<T>(d.cell_clip, c);
}

// Stores the new cell state c after zoneout, and computes o from its sum, in place; returns c before zoneout.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_output(const Forward<T>& f, const Place& at, V<T>& o, V<T> c_prev, V<T> c) {
    const Description& d = *f.w.d;
    V<T> kept = c;
    if constexpr (!Plain) {
        if (d.zoneout_cell > 0) kept = mixed<T>(zone(f.zoneout_cell, d.zoneout_cell, f.steps, d.units, at), c_prev, c);
        patch_state<T>(f, 1 + kC, at, kept, c_prev);
        patch_state<T>(f, 1 + kC, at, c, c_prev);
        if (d.peepholes) o = fma(peephole(d, f.w.arrays.peepholes, 3, at), c, o);
        o = limited<T>(d.clip, o);
    }
    o = act<T, Usual, false>(d.activations[3], o);
    if constexpr (!Plain) patch_gate<T>(f, 3, at, o);
    store(cell_state(f, at), kept);
    return c;
}

// h = o·φ(c): computes dz of o from `dm`, the gradient of h, and returns the gradient of c through h.
template <class T, bool Plain, bool Usual>
INLINE V<T> lstm_output_back(const Backward<T>& f, const Limits<T>& limits, const Place& at, V<T> o, V<T> phi_c,
                             V<T> dm, V<T>& dz_o) {
    const Description& d = *f.d;
    dz_o = (dm * phi_c + extra(f, at, 3)) * gate_slope<T, Plain, Usual, false>(d, limits, 3, o);
    return dm * o * slope<T>(Usual ? kUsualTanh : d.activations[4], phi_c);
}

// c = f·c_prev + i·g: computes dz of i, f and g from `dc`, the gradient of c, and returns the gradient of c_prev. The
// caller has computed dz[3].
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

struct Lstm {
    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.w.d;
        T* line = f.m ? f.m + r * f.w.blocks * W : nullptr;
        const auto out = [&](const Place& at, V<T> m) INLINED {
            if (d.projects())
                store(line + at.unit, m);
            else
                write_output<T, false>(f, at, m, h, h_next);
        };
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const bool apart = d.apart();
        const auto normed =
            [&](const Place& at) INLINED {  // c in `line`, once it is normalised, with its gain and bias
                const V<T> gain = load_lanes(f.w.arrays.cell_gain + at.unit, at.lanes);
                return fma(load(line + at.unit), gain, load_lanes(f.w.arrays.cell_bias + at.unit, at.lanes));
            };
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> z[4];
            int column = 0;
            UNROLL
            for (int v = 0; v < 4; ++v) {
                const int64_t from = column * stride + at.unit;
                z[v] = splat(T(0));
                if (v == 1 && d.coupled) continue;
                z[v] = load_lanes(sums + from, at.lanes);
                if (apart) z[v] += load_lanes(q + from, at.lanes);
                ++column;
            }
            const V<T> c_prev = load(cell_state(f, at));
            V<T> c = lstm_cell<T, false, Usual>(f, at, z, c_prev);
            if (d.joint()) {  // o, which the second pass computes, replaces its sum among the gates
                store(line + at.unit, c);
                keep_gates(f, at, z);
                return;
            }
            c = lstm_output<T, false, Usual>(f, at, z[3], c_prev, c);
            keep_gates(f, at, z);
            keep_inner(f, at, kC);
            if (d.layer_norm) {
                store(line + at.unit, c);
                store_lanes(sums + at.unit, z[3], at.lanes);
            } else {
                out(at, z[3] * act<T, Usual, true>(d.activations[4], c));
            }
        });
        if (!d.layer_norm) return;
        standardise(line, 1, 0, d.units, d.norm_epsilon);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> c = normed(at), o = load_lanes(sums + (d.joint() ? d.gates() - 1 : 0) * stride + at.unit, at.lanes);
            if (d.joint()) {
                c = lstm_output<T, false, Usual>(f, at, o, load(cell_state(f, at)), c);
                if (f.gates) store_lanes(f.gates + ((r * f.steps + t) * 4 + 3) * d.units + at.unit, o, at.lanes);
                keep_inner(f, at, kC);
            }
            out(at, o * act<T, Usual, true>(d.activations[4], c));
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t,
                         int64_t columns) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n), wide = f.blocks * W;
        const T* p = f.arrays.peepholes;
        const T* c_before = inner_before(f, r, n, kC);
        T *cell = f.line, *dcell = f.line + wide;
        const int gates_in_dz = d.gates();
        const auto blocks = [&](auto&& body) INLINED { each_block(f, r, t, body); };
        const auto fresh = [&](const Place& at, const V<T>(&gates)[4]) INLINED {  // c of the step, before zoneout
            return limited<T>(d.cell_clip, fma(gates[1], units_of(c_before, at), gates[0] * gates[2]));
        };
        blocks([&](const Place& at) INLINED {
            V<T> gates[4];
            load_gates(f, at, gates);
            store(cell + at.unit, fresh(at, gates));
        });
        // The gradient of c after the step, before zoneout; `passed` is the part that zoneout passes to the step
        // before.
        const auto after = [&](const Place& at, V<T>& passed) INLINED {
            V<T> dc = load(f.dinner[kC] + r * wide + at.unit);
            passed = splat(T(0));
            if (f.dstates[kC]) dc += load_lanes(f.dstates[kC] + (r * f.steps + t) * d.units + at.unit, at.lanes);
            if (d.zoneout_cell > 0) {
                const V<T> keep = zone(f.zoneout_cell, d.zoneout_cell, f.steps, d.units, at);
                passed = keep * dc, dc *= splat(T(1)) - keep;
            }
            return dc;
        };
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
                store_lanes(f.m + ((n - f.first) * f.batch + f.row0 + r) * d.units + at.unit, gates[3] * phi_c,
                            at.lanes);
            V<T> dc = lstm_output_back<T, false, Usual>(f, limits, at, gates[3], phi_c, dm, dz_o);
            if (d.joint()) {
                V<T> passed;
                dc += after(at, passed);
                if (d.peepholes) {
                    dc = fma(dz_o, peephole(d, p, 3, at), dc);
                    add_to_vector(f, sums_of::peepholes + (d.coupled ? 1 : 2), at, dz_o * c);
                }
            }
            if (d.layer_norm) {
                add_to_vector(f, sums_of::cell_gain, at, dc * v);
                add_to_vector(f, sums_of::cell_bias, at, dc);
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
            T* dc_at = f.dinner[kC] + r * wide + at.unit;
            const V<T> c_prev = units_of(c_before, at), c = fresh(at, gates);
            V<T> dc = load(dcell + at.unit), passed;
            if (d.layer_norm) dc = splat(reciprocal) * (dc - mean - load_lanes(cell + at.unit, at.lanes) * share);
            dz[3] = load(to + (gates_in_dz - 1) * W);
            const V<T> given = after(at, passed);
            if (!d.joint()) {
                dc += given;
                if (d.peepholes) {
                    dc = fma(dz[3], peephole(d, p, 3, at), dc);
                    add_to_vector(f, sums_of::peepholes + (d.coupled ? 1 : 2), at, dz[3] * c);
                }
            }
            if (d.cell_clip < __builtin_inf()) {
                const V<T> end = splat(T(d.cell_clip));
                dc = ((c < end) & (c > -end)) ? dc : splat(T(0));
            }
            passed += lstm_cell_back<T, false, Usual>(f, limits, at, gates, c_prev, dc, dz);
            if (d.peepholes) {
                passed = fma(dz[0], peephole(d, p, 0, at), passed);
                add_to_vector(f, sums_of::peepholes, at, dz[0] * c_prev);
                if (!d.coupled) {
                    passed = fma(dz[1], peephole(d, p, 1, at), passed);
                    add_to_vector(f, sums_of::peepholes + 1, at, dz[1] * c_prev);
                }
            }
            store(to, dz[0]);
            if (!d.coupled) store(to + W, dz[1]);
            store(to + (gates_in_dz - 2) * W, dz[2]);
            store(dc_at, passed);
            if (d.apart()) {
                T* other = block_of(f, f.dq, gates_in_dz, r, n, at.unit);
                for (int k = 0; k < gates_in_dz; ++k) store(other + k * W, load(to + k * W));
            }
        });
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
