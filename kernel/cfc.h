// The closed-form continuous-time cell, forward and backward, with the time τ since the previous step:
//     t = σ(z_t + s·τ)      h = (1 - t)·g + t·k, or g + t·k with no_gate
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

constexpr int kNoGate = 1;  // mode

struct CfC {
    enum Gate : int { kG, kK, kS, kT, kGates };

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const bool apart = d.apart();
        const V<T> elapsed = scalar_of(f, r, t);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[kGates];
            UNROLL
            for (int v = 0; v < kGates; ++v) {
                gates[v] = load_lanes(sums + v * stride + at.unit, at.lanes);
                if (apart) gates[v] += load_lanes(q + v * stride + at.unit, at.lanes);
            }
            UNROLL
            for (int v = kG; v <= kK; ++v)
                gates[v] = act<T, Usual, true>(d.activations[v], limited<T>(d.clip, gates[v]));
            UNROLL
            for (int v = 0; v < kT; ++v) patch_gate<T>(f, v, at, gates[v]);
            const V<T> z = limited<T>(d.clip, fma(gates[kS], elapsed, gates[kT]));
            gates[kT] = act<T, Usual, false>(d.activations[kT], z);
            patch_gate<T>(f, kT, at, gates[kT]);
            keep_gates(f, at, gates);
            const V<T> fresh =
                d.mode == kNoGate ? fma(gates[kT], gates[kK], gates[kG]) : mixed<T>(gates[kT], gates[kK], gates[kG]);
            write_output<T, false>(f, at, fresh, h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const V<T> elapsed = scalar_of(f, r, t), one = splat(T(1));
        V<T> delapsed = splat(T(0));
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[kGates], dz[kGates];
            load_gates(f, at, gates);
            const V<T> dh = load(f.dm + r * columns + at.unit);
            const V<T> share = d.mode == kNoGate ? one : one - gates[kT];  // of g in h
            const V<T> change = d.mode == kNoGate ? gates[kK] : gates[kK] - gates[kG];
            dz[kG] = (dh * share + extra(f, at, kG)) * gate_slope<T, false, Usual, true>(d, limits, kG, gates[kG]);
            dz[kK] = (dh * gates[kT] + extra(f, at, kK)) * gate_slope<T, false, Usual, true>(d, limits, kK, gates[kK]);
            dz[kT] = (dh * change + extra(f, at, kT)) * gate_slope<T, false, Usual, false>(d, limits, kT, gates[kT]);
            dz[kS] = fma(dz[kT], elapsed, extra(f, at, kS));
            delapsed = fma(dz[kT], gates[kS], delapsed);
            T* to = block_of(f, f.dz, kGates, r, n, at.unit);
            T* other = block_of(f, f.dq, kGates, r, n, at.unit);
            UNROLL
            for (int v = 0; v < kGates; ++v) {
                store(to + v * W, dz[v]);
                if (d.apart()) store(other + v * W, dz[v]);
            }
        });
        give_scalar<T>(f, r, t, delapsed);
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
