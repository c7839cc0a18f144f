// The SimpleRNN, forward and backward: h = φ(x·K + h_prev·R + b).
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct SimpleRnn {
    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const bool apart = d.apart();
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> z[1] = {load_lanes(sums + at.unit, at.lanes)};
            if (apart) z[0] += load_lanes(q + at.unit, at.lanes);
            z[0] = act<T, Usual, true>(d.activations[0], limited<T>(d.clip, z[0]));
            patch_gate<T>(f, 0, at, z[0]);
            keep_gates(f, at, z);
            write_output<T, false>(f, at, z[0], h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[1];
            load_gates(f, at, gates);
            const V<T> dz = (load(f.dm + r * columns + at.unit) + extra(f, at, 0)) *
                            gate_slope<T, false, Usual, true>(d, limits, 0, gates[0]);
            store(block_of(f, f.dz, 1, r, n, at.unit), dz);
            if (d.apart()) store(block_of(f, f.dq, 1, r, n, at.unit), dz);
        });
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
