// The GRU in both forms, forward and backward.
//     h = z·h_prev + (1 - z)·g          attention u: (1 - u·(1 - z)) for z
//     reset_after: g = φ(x·K + r·(h·R)), else g = φ(x·K + (r·h)·R)
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct Gru {
    // The share of h_prev that a step keeps, given its attention.
    template <class T>
    INLINE static V<T> kept_by(V<T> attention, V<T> z) {
        return splat(T(1)) - attention * (splat(T(1)) - z);
    }

    // For a reset gate before the product: computes z, r, and r·h, the input of the candidate's product. Patches don't
    // apply to masked rows, whose results aren't used.
    template <class T, bool Usual>
    INLINE static void reset(const Forward<T>& f, int64_t r, int64_t t, T* sums, int64_t stride, const T* h,
                             bool used) {
        const Description& d = *f.w.d;
        const int64_t wide = f.w.blocks * Vec<T>::W;
        each_block(f, r, t, [&](const Place& at) INLINED {
            UNROLL
            for (int v = 0; v < 2; ++v) {
                T* sum = sums + v * stride + at.unit;
                const V<T> z = limited<T>(d.clip, load_lanes(sum, at.lanes));
                V<T> gate = act<T, Usual, false>(d.activations[v], z);
                if (used) patch_gate<T>(f, v, at, gate);
                store_lanes(sum, gate, at.lanes);
            }
            store(f.m + r * wide + at.unit,
                  load_lanes(sums + stride + at.unit, at.lanes) * load(h + r * wide + at.unit));
        });
    }

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const V<T> attention = scalar_of(f, r, t);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> z[3], after[4] = {};
            UNROLL
            for (int v = 0; v < 3; ++v) z[v] = load_lanes(sums + v * stride + at.unit, at.lanes);
            if (d.reset_after) {
                UNROLL
                for (int v = 0; v < 3; ++v) after[v] = load_lanes(q + v * stride + at.unit, at.lanes);
                UNROLL
                for (int v = 0; v < 2; ++v) {
                    z[v] = act<T, Usual, false>(d.activations[v], limited<T>(d.clip, z[v] + after[v]));
                    patch_gate<T>(f, v, at, z[v]);
                }
                z[2] = fma(z[1], after[2], z[2]);
            }
            z[2] = act<T, Usual, true>(d.activations[2], limited<T>(d.clip, z[2]));
            patch_gate<T>(f, 2, at, z[2]);
            if (d.reset_after) {
                after[3] = after[2];
                UNROLL
                for (int v = 0; v < 3; ++v) after[v] = z[v];
                keep_gates(f, at, after);
            } else {
                keep_gates(f, at, z);
            }
            if (d.scalar) z[0] = kept_by<T>(attention, z[0]);
            write_output<T, false>(f, at, mixed<T>(z[0], h_before(f, at, h), z[2]), h, h_next);
        });
    }

    // dz of all gates, except of an r that acts before the product; the gradient of h_prev that doesn't pass through a
    // product is added to `carry`.
    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const T* h_prev = output_before(f, r, n);
        const V<T> attention = scalar_of(f, r, t);
        V<T> dattention = splat(T(0));
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[4];
            const int64_t H = d.units;
            const T* from = f.gates + kept_at(f, r, t) * d.planes() * H + at.unit;
            UNROLL
            for (int v = 0; v < 3; ++v) gates[v] = load_lanes(from + v * H, at.lanes);
            const V<T> h = units_of(h_prev, at), dh = load(f.dm + r * columns + at.unit), zero = splat(T(0));
            V<T> dkept = dh * (h - gates[2]), kept = gates[0];
            if (d.scalar) {
                dattention -= dkept * (splat(T(1)) - kept);
                dkept *= attention, kept = kept_by<T>(attention, kept);
            }
            const V<T> dz_z = (dkept + extra(f, at, 0)) * gate_slope<T, false, Usual, false>(d, limits, 0, gates[0]);
            const V<T> dg = (dh * (splat(T(1)) - kept) + extra(f, at, 2)) *
                            gate_slope<T, false, Usual, true>(d, limits, 2, gates[2]);
            T* carried = f.carry + r * columns + at.unit;
            store(carried, fma(dh, kept, load(carried)));
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
        give_scalar<T>(f, r, t, dattention);
        if (d.layer_norm) normalise_back(f, r, n);
    }

    // dz of an r that acts before the product, from dm, the gradient of r·h, to which h's dropout still applies.
    template <class T, bool Usual>
    static void reset_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                           int64_t unit_columns) {
        const Description& d = *f.d;
        const int64_t H = d.units;
        const T* h_prev = output_before(f, r, n);
        each_block(f, r, time_of(f, n), [&](const Place& at) INLINED {
            V<T> given = load(f.dm + r * unit_columns + at.unit);
            const V<T> reset = load_lanes(f.gates + (kept_at(f, r, at.t) * 3 + 1) * H + at.unit, at.lanes);
            if (f.recurrent_dropout) given *= load_lanes(f.recurrent_dropout + r * H + at.unit, at.lanes);
            const V<T> dr = given * units_of(h_prev, at) + extra(f, at, 1);
            store(block_of(f, f.dz, 3, r, n, at.unit) + Vec<T>::W,
                  dr * gate_slope<T, false, Usual, false>(d, limits, 1, reset));
            T* carried = f.carry + r * columns + at.unit;
            store(carried, fma(given, reset, load(carried)));
        });
    }
};

}  // namespace
}  // namespace cellstack
