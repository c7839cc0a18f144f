// The SRU, forward and backward: c = f·c_prev + (1 - f)·g, h = r·φ(c) + (1 - r)·s; f and r see c_prev elementwise.
#pragma once
#include "lstm.h"

namespace cellstack {
namespace {

struct Sru {
    enum Gate : int { kG, kF, kR, kS, kGates };

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T*, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        each_block(f, r, t, [&](const Place& at) INLINED {
            const V<T> c_prev = load(cell_state(f, at));
            const T* seen = f.w.arrays.cell_vectors + at.unit;
            V<T> gates[kGates];
            UNROLL
            for (int v = 0; v < kGates; ++v) gates[v] = load_lanes(sums + v * stride + at.unit, at.lanes);
            gates[kF] = fma(load_lanes(seen, at.lanes), c_prev, gates[kF]);
            gates[kR] = fma(load_lanes(seen + d.units, at.lanes), c_prev, gates[kR]);
            UNROLL
            for (int v = 0; v < kGates; ++v) {
                const V<T> z = limited<T>(d.clip, gates[v]);
                gates[v] = v == kF || v == kR ? act<T, Usual, false>(d.activations[v], z)
                                              : any_activation<T>(d.activations[v], z);
                patch_gate<T>(f, v, at, gates[v]);
            }
            keep_gates(f, at, gates);
            V<T> c = mixed<T>(gates[kF], c_prev, gates[kG]);
            patch_state<T>(f, 1 + kC, at, c, c_prev);
            store(cell_state(f, at), c);
            keep_inner(f, at, kC);
            const V<T> phi_c = any_activation<T>(d.activations[kGates], c);
            write_output<T, false>(f, at, mixed<T>(gates[kR], phi_c, gates[kS]), h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t,
                         int64_t columns) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const T* c_before = inner_before(f, r, n, kC);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[kGates], dz[kGates];
            load_gates(f, at, gates);
            const T* seen = f.arrays.cell_vectors + at.unit;
            const V<T> one = splat(T(1)), c_prev = units_of(c_before, at);
            const V<T> phi_c = any_activation<T>(d.activations[kGates], mixed<T>(gates[kF], c_prev, gates[kG]));
            const V<T> dh = load(f.dm + r * columns + at.unit);
            T* dc_at = f.dinner[kC] + r * f.blocks * W + at.unit;
            V<T> dc = fma(dh * gates[kR], slope<T>(d.activations[kGates], phi_c), load(dc_at));
            if (f.dstates[kC]) dc += load_lanes(f.dstates[kC] + (r * f.steps + t) * d.units + at.unit, at.lanes);
            dz[kG] = (dc * (one - gates[kF]) + extra(f, at, kG)) * any_slope<T>(d, limits, kG, gates[kG]);
            dz[kF] = (dc * (c_prev - gates[kG]) + extra(f, at, kF)) *
                     gate_slope<T, false, Usual, false>(d, limits, kF, gates[kF]);
            dz[kR] = (dh * (phi_c - gates[kS]) + extra(f, at, kR)) *
                     gate_slope<T, false, Usual, false>(d, limits, kR, gates[kR]);
            dz[kS] = (dh * (one - gates[kR]) + extra(f, at, kS)) * any_slope<T>(d, limits, kS, gates[kS]);
            add_to_vector(f, sums_of::cell_vectors, at, dz[kF] * c_prev);
            add_to_vector(f, sums_of::cell_vectors + 1, at, dz[kR] * c_prev);
            dc = fma(dz[kF], load_lanes(seen, at.lanes), dc * gates[kF]);
            store(dc_at, fma(dz[kR], load_lanes(seen + d.units, at.lanes), dc));
            T* to = block_of(f, f.dz, kGates, r, n, at.unit);
            UNROLL
            for (int v = 0; v < kGates; ++v) store(to + v * W, dz[v]);
        });
    }
};

}  // namespace
}  // namespace cellstack
