// A backbone, forward and backward: dense layers of U units, the first one over x and h. The gates' sums z are products
// with the output of the last one:
//     b₀ = φ(x·kernel + h·recurrent_kernel + bias)     bₖ = φ(bₖ₋₁·backbone_kernelₖ₋₁ + backbone_biasₖ₋₁)
//     z = b·gate_kernel + gate_bias
#pragma once
#include "cells.h"
#include "narrow.h"

namespace cellstack {
namespace {

// Computes the output of a step's first layer from its sums, in their place, in rows of `row` numbers; the following
// layers; and from the last one the sums of the gates, in q, [gates][stride] per row, after which q has a buffer for a
// layer. Also stores what the backward pass needs of each layer.
template <class T>
NOINLINE void run_backbone(const Forward<T>& f, int64_t t, T* sums, int64_t row, int64_t stride) {
    const Panels<T>& w = f.w;
    const Description& d = *w.d;
    const Activation& activation = d.backbone_activation();
    const int64_t U = d.backbone_units, size = d.layer_size();
    Product<T> between(w, 1, U, w.sum_blocks, 0, w.sum_blocks, row, f.scales);
    T* other = f.q + f.rows * d.gates() * stride;
    for (int64_t layer = 0; layer < d.backbone_layers; ++layer) {
        if (layer) {
            const int64_t before = layer - 1;
            between.set(w.backbone_kernel + before * w.backbone_step,
                        w.backbone_bias ? w.backbone_bias + before * w.backbone_bias_step : nullptr, U, f.narrow_h);
            multiply(between, {sums, row, 0, f.rows}, f.rows, other);
            T* from = sums;
            sums = other, other = from;
        }
        for (int64_t r = 0; r < f.rows; ++r) {
            if (f.mask && !f.mask[r * f.steps + t]) continue;
            T* kept =
                f.intermediate ? f.intermediate + (r * f.steps + t) * d.intermediate_size() + layer * size : nullptr;
            each_block<T>(r, t, w.sum_blocks, U, [&](const Place& at) INLINED {
                T* b = sums + r * row + at.unit;
                const V<T> z = load_lanes(b, at.lanes), v = every_activation<T>(activation, z);
                store_lanes(b, v, at.lanes);
                if (!kept) return;
                store_lanes(kept + at.unit, v, at.lanes);
                if (size > U) store_lanes(kept + U + at.unit, slope_at<T>(activation, z), at.lanes);
            });
        }
    }
    Product<T> product(w, d.gates(), d.units, w.blocks, 0, w.blocks, stride, f.scales);
    product.set(w.gate_kernel, w.gate_bias, U, f.narrow_h);
    multiply(product, {sums, row, 0, f.rows}, f.rows, f.q);
}

// Computes the gradients of the layers' sums, in db, from that of the gates' sums, in dz.
template <class T>
NOINLINE void backbone_back(const Backward<T>& f, int64_t n) {
    const Description& d = *f.d;
    const int64_t U = d.backbone_units, size = d.layer_size(), t = time_of(f, n), last = d.more_layers();
    Transposed<T> p{*f.tiles,
                    f.dz,
                    d.gates(),
                    (n - f.first) * f.batch + f.row0,
                    f.rows,
                    f.blocks,
                    (f.last - f.first) * f.batch,
                    f.gates_t,
                    {f.blocks, nullptr},
                    U,
                    0,
                    (U + 4 * Vec<T>::W - 1) / (4 * Vec<T>::W),
                    bool(n & 1),
                    f.pairs};
    for (int64_t layer = last; layer >= 0; --layer) {
        if (layer < last) {
            p.dz = f.db + (layer + 1) * f.db_step, p.gates = 1, p.blocks = p.band.depth = f.sum_blocks;
            p.panels = f.backbone_t + layer * f.backbone_step;
        }
        T* db = f.db + layer * f.db_step;
        product_transposed(p, [&](int64_t r, int64_t unit, V<T> gradient) INLINED {
            const Place at = place<T>(r, t, unit / Vec<T>::W, U);
            const T* kept = f.intermediate + kept_at(f, r, t) * d.intermediate_size() + layer * size + unit;
            const V<T> slope = size > U ? load_lanes(kept + U, at.lanes)
                                        : slope_of<T>(d.backbone_activation(), load_lanes(kept, at.lanes));
            store(block_of(f, db, 1, r, n, unit), gradient * slope);
        });
    }
}

}  // namespace
}  // namespace cellstack
