// The minGRU, forward and backward: h = (1 - z)·h_prev + z·g, where z and g depend on x alone.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct MinGru {
    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T*, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, sums, stride);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[2];
            UNROLL
            for (int v = 0; v < 2; ++v)
                gates[v] = limited<T>(d.clip, load_lanes(sums + v * stride + at.unit, at.lanes));
            gates[0] = act<T, Usual, false>(d.activations[0], gates[0]);
            gates[1] = any_activation<T>(d.activations[1], gates[1]);
            UNROLL
            for (int v = 0; v < 2; ++v) patch_gate<T>(f, v, at, gates[v]);
            keep_gates(f, at, gates);
            const V<T> kept = (splat(T(1)) - gates[0]) * h_before(f, at, h);
            write_output<T, false>(f, at, fma(gates[0], gates[1], kept), h, h_next);
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
            const V<T> dh = load(f.dm + r * columns + at.unit);
            T* to = block_of(f, f.dz, 2, r, n, at.unit);
            store(to, (dh * (gates[1] - units_of(h_prev, at)) + extra(f, at, 0)) *
                          gate_slope<T, false, Usual, false>(d, limits, 0, gates[0]));
            store(to + W, (dh * gates[0] + extra(f, at, 1)) * any_slope<T>(d, limits, 1, gates[1]));
            T* carried = f.carry + r * columns + at.unit;
            store(carried, fma(dh, splat(T(1)) - gates[0], load(carried)));
        });
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
