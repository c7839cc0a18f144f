// A backbone, forward and backward: a dense layer of U units over x and h. The gates' sums z are products with its
// output b:
//     b = φ(x·kernel + h·recurrent_kernel + bias)      z = b·gate_kernel + gate_bias
#pragma once
#include "cells.h"
#include "narrow.h"

namespace cellstack {
namespace {

// Computes the output b of a step from its sums, in their place, in rows of `row` numbers, and from b the sums of the
// gates, in q, [gates][stride] per row. Also stores b for the backward pass.
template <class T>
NOINLINE void run_backbone(const Forward<T>& f, int64_t t, T* sums, int64_t row, int64_t stride) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    for (int64_t r = 0; r < f.rows; ++r) {
        if (f.mask && !f.mask[r * f.steps + t]) continue;
        T* kept = f.intermediate ? f.intermediate + (r * f.steps + t) * d.intermediate_size() : nullptr;
        each_block<T>(r, t, w.sum_blocks, d.backbone_units, [&](const Place& at) INLINED {
            T* b = sums + r * row + at.unit;
            const V<T> v = any_activation<T>(d.backbone_activation(), load_lanes(b, at.lanes));
            store_lanes(b, v, at.lanes);
            if (kept) store_lanes(kept + at.unit, v, at.lanes);
        });
    }
    Product<T> product(w, d.gates(), d.units, w.blocks, 0, w.blocks, stride, f.scales);
    product.set(w.gate_kernel, w.gate_bias, d.backbone_units, f.narrow_h);
    multiply(product, {sums, row, 0, f.rows}, f.rows, f.q);
}

// Computes the gradient of the backbone's sums, in db, from that of the gates' sums, in dz.
template <class T>
NOINLINE void backbone_back(const Backward<T>& f, int64_t n) {
    const Description& d = *f.d;
    const int64_t t = time_of(f, n), panels = (d.backbone_units + 4 * Vec<T>::W - 1) / (4 * Vec<T>::W);
    const Transposed<T> p{*f.tiles,
                          f.dz,
                          d.gates(),
                          (n - f.first) * f.batch + f.row0,
                          f.rows,
                          f.blocks,
                          (f.last - f.first) * f.batch,
                          f.gates_t,
                          {f.blocks, nullptr},
                          d.backbone_units,
                          0,
                          panels,
                          bool(n & 1),
                          f.pairs};
    product_transposed(p, [&](int64_t r, int64_t unit, V<T> gradient) INLINED {
        const Place at = place<T>(r, t, unit / Vec<T>::W, d.backbone_units);
        const V<T> b = load_lanes(f.intermediate + kept_at(f, r, t) * d.intermediate_size() + unit, at.lanes);
        store(block_of(f, f.db, 1, r, n, unit), gradient * slope_of<T>(d.backbone_activation(), b));
    });
}

}  // namespace
}  // namespace cellstack
