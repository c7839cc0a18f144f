// The closed-form solution of a liquid time constant, forward and backward, with the time τ since the previous step:
//     h = limit·(1 - g·e^(-τ·(|decay| + |g|)))
#pragma once
#include "cells.h"

namespace cellstack {
namespace {

struct CfS {
    template <class T>
    INLINE static V<T> size_of(V<T> v) {
        return v < splat(T(0)) ? -v : v;
    }

    template <class T, bool Usual>
    INLINE static void row(const Forward<T>& f, int64_t r, int64_t t, T* sums, T* q, int64_t stride, const T* h,
                           T* h_next) {
        const Description& d = *f.w.d;
        if (d.layer_norm) normalise(f, r, t, sums, q, stride);
        const V<T> elapsed = scalar_of(f, r, t), one = splat(T(1));
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> z = load_lanes(sums + at.unit, at.lanes);
            if (d.apart()) z += load_lanes(q + at.unit, at.lanes);
            V<T> gates[1] = {any_activation<T>(d.activations[0], limited<T>(d.clip, z))};
            patch_gate<T>(f, 0, at, gates[0]);
            keep_gates(f, at, gates);
            const V<T> rate = size_of<T>(load_lanes(f.w.arrays.decay + at.unit, at.lanes)) + size_of<T>(gates[0]);
            const V<T> left = gates[0] * exp<T>(-elapsed * rate);
            write_output<T, false>(f, at, load_lanes(f.w.arrays.limit + at.unit, at.lanes) * (one - left), h, h_next);
        });
    }

    template <class T, bool Usual>
    static void row_back(const Backward<T>& f, const Limits<T>& limits, int64_t r, int64_t n, int64_t columns,
                         int64_t) {
        const Description& d = *f.d;
        const int64_t t = time_of(f, n);
        const V<T> elapsed = scalar_of(f, r, t), one = splat(T(1)), zero = splat(T(0));
        V<T> delapsed = zero;
        each_block(f, r, t, [&](const Place& at) INLINED {
            V<T> gates[1];
            load_gates(f, at, gates);
            const V<T> g = gates[0], decay = load_lanes(f.arrays.decay + at.unit, at.lanes);
            const V<T> rate = size_of<T>(decay) + size_of<T>(g), kept = exp<T>(-elapsed * rate), left = g * kept;
            const V<T> dh = load(f.dm + r * columns + at.unit);
            const V<T> dleft = -dh * load_lanes(f.arrays.limit + at.unit, at.lanes);
            const V<T> drate = -dleft * left * elapsed;
            delapsed -= dleft * left * rate;
            add_to_vector(f, sums_of::limit, at, dh * (one - left));
            add_to_vector(f, sums_of::decay, at, decay > zero ? drate : decay < zero ? -drate : zero);
            const V<T> dg = dleft * kept * (one - elapsed * size_of<T>(g)) + extra(f, at, 0);
            const V<T> dz = dg * any_slope<T>(d, limits, 0, g);
            store(block_of(f, f.dz, 1, r, n, at.unit), dz);
            if (d.apart()) store(block_of(f, f.dq, 1, r, n, at.unit), dz);
        });
        give_scalar<T>(f, r, t, delapsed);
        if (d.layer_norm) normalise_back(f, r, n);
    }
};

}  // namespace
}  // namespace cellstack
