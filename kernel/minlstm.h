// The minLSTM, forward and backward: h = (f·h_prev + i·g) / (f + i), where i, f and g depend on x alone.
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct MinLstm {
    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T*, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, sums, stride);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[3];
            UNROLL
            for (int v = 0; v < 3; ++v)
                gates[v] = limited<T>(d.clip, load_lanes(sums + v * stride + at.unit, at.lanes));
            UNROLL
            for (int v = 0; v < 2; ++v) gates[v] = act<T, Usual, false>(d.activations[v], gates[v]);
            gates[2] = any_activation<T>(d.activations[2], gates[2]);
            UNROLL
            for (int v = 0; v < 3; ++v) patch_gate<T>(f, v, at, gates[v]);
            keep_gates(f, at, gates);
            const V<T> next = fma(gates[1], h_before(f, at, h), gates[0] * gates[2]) / (gates[1] + gates[0]);
            write_output<T, false>(f, at, next, h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        constexpr int W = Vec<T>::W;
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const T* before = output_before(f, r, n);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[3];
            load_gates(f, at, gates);
            const V<T> h_prev = units_of(before, at), sum = gates[1] + gates[0];
            const V<T> divisor = sum == splat(T(0)) ? splat(T(1)) : sum;  // 0 in padding, whose dz must be finite
            const V<T> h = fma(gates[1], h_prev, gates[0] * gates[2]) / divisor;
            const V<T> share = load(f.dm + r * columns + at.unit) / divisor;
            T* to = block_of(f, f.dz, 3, r, n, at.unit);
            store(to, (share * (gates[2] - h) + extra(f, at, 0)) *
                          gate_slope<T, false, Usual, false>(d, limits, 0, gates[0]));
            store(to + W, (share * (h_prev - h) + extra(f, at, 1)) *
                              gate_slope<T, false, Usual, false>(d, limits, 1, gates[1]));
            store(to + 2 * W, (share * gates[0] + extra(f, at, 2)) * any_slope<T>(d, limits, 2, gates[2]));
            T* carried = f.carry + r * columns + at.unit;
            store(carried, fma(share, gates[1], load(carried)));
        });
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
