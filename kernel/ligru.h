// The light GRU, forward and backward: h = z·h_prev + (1 - z)·m·g, with the mask m of dropout.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct LiGru {
    // The mask of the candidate's dropout; ones without it.
    template <class T, class Pass>
    INLINE static V<T> mask(const Pass& f, const Place& at, int64_t units) {
        return f.candidate_dropout ? load_lanes(f.candidate_dropout + at.r * units + at.unit, at.lanes) : splat(T(1));
    }

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const bool apart = d.apart();
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[2];
            UNROLL
            for (int v = 0; v < 2; ++v) {
                gates[v] = load_lanes(sums + v * stride + at.unit, at.lanes);
                if (apart) gates[v] += load_lanes(q + v * stride + at.unit, at.lanes);
                gates[v] = limited<T>(d.clip, gates[v]);
            }
            gates[0] = act<T, Usual, false>(d.activations[0], gates[0]);
            gates[1] = any_activation<T>(d.activations[1], gates[1]);
            UNROLL
            for (int v = 0; v < 2; ++v) patch_gate<T>(f, v, at, gates[v]);
            keep_gates(f, at, gates);
            const V<T> candidate = gates[1] * mask<T>(f, at, d.units);
            write_output<T, false>(f, at, mixed<T>(gates[0], h_before(f, at, h), candidate), h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const T* h_prev = output_before(f, r, n);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[2];
            load_gates(f, at, gates);
            const V<T> dh = load(f.dm + r * columns + at.unit), m = mask<T>(f, at, d.units);
            const V<T> dz = (dh * (units_of(h_prev, at) - gates[1] * m) + extra(f, at, 0)) *
                            gate_slope<T, false, Usual, false>(d, limits, 0, gates[0]);
            const V<T> dg =
                (dh * (splat(T(1)) - gates[0]) * m + extra(f, at, 1)) * any_slope<T>(d, limits, 1, gates[1]);
            T* to = block_of(f, f.dz, 2, r, n, at.unit);
            store(to, dz), store(to + W, dg);
            if (d.apart()) {
                T* other = block_of(f, f.dq, 2, r, n, at.unit);
                store(other, dz), store(other + W, dg);
            }
            T* carried = f.carry + r * columns + at.unit;
            store(carried, fma(dh, gates[0], load(carried)));
        });
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
