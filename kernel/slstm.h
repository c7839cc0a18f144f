// The sLSTM, forward and backward:
//     l = log σ(z_f), or z_f with exponential_forget       m = max(l + m_prev, z_i)
//     i = exp(z_i - m)      f = exp(l + m_prev - m)         c = f·c_prev + i·g      n = f·n_prev + i      h = o·c/n
// Where n_prev is 0, nothing is stored: m = z_i and f = 0.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct Slstm {
    enum Inner : int { kC, kN, kM };          // the places of c, n and m among the inner states
    static constexpr int kGates = 4, kL = 4;  // the plane of l follows those of the gates

    // Computes i, f, g, o and l from the sums, and the states c, n and m; returns h before zoneout.
    template <class T, bool Usual>
    INLINE static V<T> unit(const Forward<T>& f, const Place& at, const V<T> (&z)[kGates], V<T> (&gates)[kGates + 1]) {
        const Description& d = *f.w.d;
        const V<T> zero = splat(T(0)), one = splat(T(1));
        T* states[3];
        V<T> before[3];
        UNROLL
        for (int s = 0; s < 3; ++s) {
            states[s] = f.inner[s] + at.r * f.w.blocks * Vec<T>::W + at.unit;
            before[s] = load(states[s]);
        }
        const V<T> l = d.exponential_forget ? z[1] : log_sigmoid<T>(z[1]);
        const V<T> kept = l + before[kM], apart = kept - z[0];
        const auto stored = before[kN] != zero, keeps = stored & (apart > zero);
        const V<T> most = kept == kept ? (keeps ? kept : z[0]) : kept;  // a NaN stays one
        const V<T> m = stored ? most : z[0];
        // One of the two gates is 1, or NaN if m isn't finite; the other one is e^-|l + m_prev - z_i|.
        const V<T> smaller = exp<T>(apart < zero ? apart : -apart);
        gates[0] = keeps ? smaller : one + (z[0] - m);
        gates[1] = stored ? (keeps ? one + (kept - m) : smaller) : zero;
        gates[2] = act<T, Usual, true>(d.activations[2], z[2]);
        gates[3] = act<T, Usual, false>(d.activations[3], z[3]);
        gates[kL] = l;
        UNROLL
        for (int v = 0; v < kGates; ++v) patch_gate<T>(f, v, at, gates[v]);
        V<T> after[3] = {fma(gates[1], before[kC], gates[0] * gates[2]), fma(gates[1], before[kN], gates[0]), m};
        UNROLL
        for (int s = 0; s < 3; ++s) {
            patch_state<T>(f, 1 + s, at, after[s], before[s]);
            store(states[s], after[s]);
        }
        return gates[3] * (after[kC] / after[kN]);
    }

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T*, int64_t stride, const T* h,
                           T* h_next) {
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> z[kGates], gates[kGates + 1];
            UNROLL
            for (int v = 0; v < kGates; ++v) z[v] = load_lanes(sums + v * stride + at.unit, at.lanes);
            const V<T> fresh = unit<T, Usual>(f, at, z, gates);
            keep_gates(f, at, gates);
            UNROLL
            for (int s = 0; s < 3; ++s) keep_inner(f, at, s);
            write_output<T, false>(f, at, fresh, h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t,
                         int64_t columns) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n), H = d.units, here = (r * f.steps + t) * H;
        const T* before[3];
        for (int s = 0; s < 3; ++s) before[s] = inner_before(f, r, n, s);
        each_block(f, r, t, [&](const Place& at) INLINED {
            const V<T> zero = splat(T(0)), one = splat(T(1));
            V<T> gates[kGates + 1], prev[3], after[3], given[3];
            T* carried[3];
            load_gates(f, at, gates);
            UNROLL
            for (int s = 0; s < 3; ++s) {
                prev[s] = units_of(before[s], at);
                after[s] = load_lanes(f.states[s] + here + at.unit, at.lanes);
                carried[s] = f.dinner[s] + r * f.blocks * W + at.unit;
                given[s] = load(carried[s]);
                if (f.dstates[s]) given[s] += load_lanes(f.dstates[s] + here + at.unit, at.lanes);
            }
            if (at.lanes < W) after[kN] = after[kN] == zero ? one : after[kN];  // padding, whose dz must be finite
            const V<T> dh = load(f.dm + r * columns + at.unit), value = after[kC] / after[kN];
            const V<T> share = dh * gates[3] / after[kN];
            const V<T> dc = given[kC] + share, dn = given[kN] - share * value;
            const V<T> di = (dc * gates[2] + dn + extra(f, at, 0)) * gates[0];  // times i: the gradient of z_i - m
            const V<T> df = (dc * prev[kC] + dn * prev[kN] + extra(f, at, 1)) * gates[1];
            const V<T> dg = dc * gates[0] + extra(f, at, 2), dout = dh * value + extra(f, at, 3);
            // The gradient of m belongs to the larger one of l + m_prev, where f is 1, and z_i, where i is 1; each gets
            // half of it if they are equal.
            const V<T> dm = given[kM] - di - df;
            const V<T> part = gates[1] == one ? (gates[0] == one ? splat(T(0.5)) : one) : zero;
            const V<T> dkept = fma(part, dm, df);
            const V<T> slope_f = d.exponential_forget ? one : -exp_minus_one<T>(gates[kL]);
            T* to = block_of(f, f.dz, kGates, r, n, at.unit);
            store(to, fma(one - part, dm, di));
            store(to + W, dkept * slope_f);
            store(to + 2 * W, dg * gate_slope<T, false, Usual, true>(d, limits, 2, gates[2]));
            store(to + 3 * W, dout * gate_slope<T, false, Usual, false>(d, limits, 3, gates[3]));
            store(carried[kC], dc * gates[1]);
            store(carried[kN], dn * gates[1]);
            store(carried[kM], dkept);
        });
    }
};

}  // namespace
}  // namespace cellstack
