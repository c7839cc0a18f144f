// The backward pass, some steps at a time: first their dz, from last to first, with dh through the transposed weights;
// then the gradients of x and of the weights, over all of these steps and rows at once.
#pragma once
#include "backbone.h"
#include "product.h"
#include "rows.h"

namespace cellstack {
namespace {

// One block of a row of the plain LSTM: from dh and dc after the step to dz, and dc before the step.
template <class T>
INLINE void differentiate(const Backward<T>& f, const Limits<T>& limits, const Place& at, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t H = f.d->units, here = at.r * f.steps + at.t;
    T* to = block_of(f, f.dz, 4, at.r, n, at.unit);
    T* dh_at = f.dh + at.r * columns + at.unit;
    T* dc_at = f.dinner[kC] + at.r * f.blocks * W + at.unit;
    V<T> dh = load(dh_at), dc = load(dc_at);
    if (f.dy) dh += load_lanes(f.dy + at.r * f.y_row + at.t * f.y_time + at.unit, at.lanes);
    if (f.dstates[kC]) dc += load_lanes(f.dstates[kC] + here * H + at.unit, at.lanes);
    if (f.mask && !f.mask[here]) {
        UNROLL
        for (int v = 0; v < 4; ++v) store(to + v * W, splat(T(0)));
        store(dh_at, dh);
        store(dc_at, dc);
        return;
    }
    V<T> gates[4], dz[4];
    load_gates(f, at, gates);
    const V<T> phi_c = tanh<T>(load_lanes(f.states[kC] + here * H + at.unit, at.lanes));
    dc += lstm_output_back<T, true, true>(f, limits, at, gates[3], phi_c, dh, dz[3]);
    dc = lstm_cell_back<T, true, true>(f, limits, at, gates, units_of(inner_before(f, at.r, n, kC), at), dc, dz);
    UNROLL
    for (int v = 0; v < 4; ++v) store(to + v * W, dz[v]);
    store(dc_at, dc);
}

// The blocks of h, and their panels, that belong to the blocks of this call: all of them if h is projected.
template <class T>
struct Outputs {
    int64_t block, end_block, panel, end_panel;
    explicit Outputs(const Backward<T>& f)
        : block(f.d->projects() ? 0 : f.block),
          end_block(f.d->projects() ? f.output_blocks : f.end_block),
          panel(block / kBlocksOfPanel),
          end_panel((end_block + kBlocksOfPanel - 1) / kBlocksOfPanel) {}
};

// The gradient of the state of rows that were reset before step n: it is added to that of the initial state, and the
// step before gets none.
template <class T>
NOINLINE void restart_back(const Backward<T>& f, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t wide = f.blocks * W, t = time_of(f, n);
    const Outputs<T> own(f);
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    for (int64_t r = 0; r < f.rows; ++r) {
        if (!f.reset[r * f.steps + t]) continue;
        for (int64_t k = own.block * W; k < least(own.end_block * W, f.d->output); ++k) {
            T& dh = f.dh[r * columns + k];
            if (f.dinitial[0]) f.dinitial[0][r * columns + k] += dh;
            dh = 0;
        }
        for (int s = 0; s < f.d->inner_states(); ++s)
            for (int64_t k = f.block * W; k < least(f.end_block * W, f.d->units); ++k) {
                T& d = f.dinner[s][r * wide + k];
                if (f.dinitial[1 + s]) f.dinitial[1 + s][r * wide + k] += d;
                d = 0;
            }
    }
}

// dh before step n: dq, or db, times the transposed weights, for unmasked rows, plus (not Plain) the part in `carry`.
// Panels in ascending order at even steps, descending at odd ones: the last ones are still in the cache.
template <class T, bool Plain>
void pass_back(const Backward<T>& f, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t P = f.d->output, t = time_of(f, n);
    const Outputs<T> own(f);
    if (!Plain && !f.d->kind->recurrent) {
        const int64_t from = own.block * W, width = (own.end_block - own.block) * W;
        for (int64_t r = 0; r < f.rows; ++r)
            memcpy(f.dh + r * columns + from, f.carry + r * columns + from, size_t(width) * sizeof(T));
        if (f.reset) restart_back(f, n, columns);
        return;
    }
    const Transposed<T> p{*f.tiles,
                          f.dsums,
                          f.sum_gates,
                          (n - f.first) * f.batch + f.row0,
                          f.rows,
                          f.sum_blocks,
                          (f.last - f.first) * f.batch,
                          f.recurrent_t,
                          f.band,
                          P,
                          own.panel,
                          own.end_panel,
                          bool(n & 1),
                          f.pairs};
    product_transposed(p, [&](int64_t r, int64_t unit, V<T> d) INLINED {
        T* dh = f.dh + r * columns + unit;
        const int64_t left = P - unit;
        if (f.recurrent_dropout) d *= load_lanes(f.recurrent_dropout + r * P + unit, left < W ? int(left) : W);
        if constexpr (!Plain)
            store(dh, d + load(f.carry + r * columns + unit));
        else if (!f.mask || f.mask[r * f.steps + t])
            store(dh, d);
    });
    if (f.reset) restart_back(f, n, columns);
}

template <class T>
void run_blocks_back(Backward<T>& f) {
    constexpr int wide = 4 * Vec<T>::W;
    const int64_t columns = (f.d->units + wide - 1) / wide * wide;
    const Limits<T> limits(*f.d);
    for (int64_t phase = f.phase; phase < f.end_phase; ++phase) {
        const int64_t n = f.last - 1 - phase;
        if (phase > 0) pass_back<T, true>(f, n + 1, columns);
        for (int64_t r = 0; n >= f.first && r < f.rows; ++r)
            each_block(f, r, time_of(f, n), [&](const Place& at) INLINED { differentiate(f, limits, at, n, columns); });
    }
}

// From dh after the step to the gradient of h before zoneout, stored in dm (in dp if h is projected); the part of dh
// that passes to the step before unchanged, by zoneout or a mask, is stored in `carry`.
template <class T>
void output_gradient(const Backward<T>& f, int64_t r, int64_t n, int64_t columns, int64_t unit_columns, bool used) {
    const Description& d = *f.d;
    const int64_t t = time_of(f, n);
    const Outputs<T> own(f);
    for (int64_t block = own.block; block < own.end_block; ++block) {
        const Place at = place<T>(r, t, block, d.output);
        V<T> dh = load(f.dh + r * columns + at.unit), carried = splat(T(0));
        if (f.dy) dh += load_lanes(f.dy + r * f.y_row + t * f.y_time + at.unit, at.lanes);
        if (!used) {
            carried = dh, dh = splat(T(0));
        } else if (d.zoneout > 0) {
            const V<T> keep = zone(f.zoneout, d.zoneout, f.steps, d.output, at);
            carried = keep * dh, dh *= splat(T(1)) - keep;
        }
        store(f.carry + r * columns + at.unit, carried);
        store(d.projects() ? block_of(f, f.dp, 1, r, n, at.unit) : f.dm + r * unit_columns + at.unit, dh);
    }
}

// A masked row: its gradients pass to the step before, and its dz is zero.
template <class T>
NOINLINE void mask_row(const Backward<T>& f, int64_t r, int64_t n) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    each_block(f, r, time_of(f, n), [&](const Place& at) INLINED {
        for (int v = 0; v < d.gates(); ++v) {
            store(block_of(f, f.dz, d.gates(), r, n, at.unit) + v * W, splat(T(0)));
            store(block_of(f, f.dq, d.gates(), r, n, at.unit) + v * W, splat(T(0)));
        }
        if (d.projects())
            store_lanes(f.m + ((n - f.first) * f.batch + f.row0 + r) * d.units + at.unit, splat(T(0)), at.lanes);
        for (int s = 0; s < d.inner_states(); ++s) {
            if (!f.dstates[s]) continue;
            T* to = f.dinner[s] + r * f.blocks * W + at.unit;
            store(to, load(to) + load_lanes(f.dstates[s] + (r * f.steps + at.t) * d.units + at.unit, at.lanes));
        }
    });
}

template <class T>
void run_rows_back(Backward<T>& f) {
    constexpr int wide = 4 * Vec<T>::W;
    const Description& d = *f.d;
    const BackwardRoutines<T>& kind = backward_routines<T>(d.kind, d.usual());
    const int64_t H = d.units, columns = (d.output + wide - 1) / wide * wide,
                  unit_columns = (H + wide - 1) / wide * wide;
    const int64_t dz_rows = (f.last - f.first) * f.batch, each_step = phases_of_step(d);
    const Limits<T> limits(d);
    for (int64_t phase = f.phase; phase < f.end_phase; ++phase) {
        const int64_t n = f.last - 1 - phase / each_step, part = phase % each_step;
        if (part == 0 && phase > 0) pass_back<T, false>(f, n + 1, columns);
        if (n < f.first) break;
        const int64_t t = time_of(f, n), m = (n - f.first) * f.batch + f.row0;
        const auto to_dm = [&](const T* from, int gates, int64_t blocks, const T* panels, const Band& band,
                               int64_t columns, int64_t first, int64_t last) {
            const Transposed<T> p{*f.tiles, from, gates,   m,     f.rows, blocks,      dz_rows,
                                  panels,   band, columns, first, last,   bool(n & 1), f.pairs};
            product_transposed(
                p, [&](int64_t r, int64_t unit, V<T> dm) INLINED { store(f.dm + r * unit_columns + unit, dm); });
        };
        const auto rows = [&](auto&& body) INLINED {
            for (int64_t r = 0; r < f.rows; ++r) body(r, !f.mask || f.mask[r * f.steps + t]);
        };
        if (part == 0) {
            rows([&](int64_t r, bool used) { output_gradient(f, r, n, columns, unit_columns, used); });
            if (d.projects())
                to_dm(f.dp, 1, f.output_blocks, f.projection_t, {f.output_blocks, nullptr}, H, 0, unit_columns / wide);
            rows([&](int64_t r, bool used) {
                if (!used)
                    mask_row(f, r, n);
                else
                    kind.row(f, limits, r, n, columns, unit_columns);
            });
            if (d.backbone_units) backbone_back(f, n);
        } else if (part == 1) {
            // At this point dz of r is zero, so the product doesn't include it; the next phase computes it.
            const Outputs<T> own(f);
            to_dm(f.dz, d.gates(), f.blocks, f.candidate_t, f.band, d.output, own.panel, own.end_panel);
        } else {
            rows([&](int64_t r, bool used) {
                if (used) kind.reset(f, limits, r, n, columns, unit_columns);
            });
        }
    }
}

template <class T>
void backward(Backward<T>& f) {
    if (f.d->plain())
        run_blocks_back<T>(f);
    else
        run_rows_back<T>(f);
}

template <class T>
void input_gradient(const Tiles<T>& tiles, const T* dz, int gates, int64_t blocks, int64_t dz_rows, const T* kernel_t,
                    int64_t columns, int64_t first, int64_t last, T* const* out, T* pairs) {
    constexpr int W = Vec<T>::W;
    const Transposed<T> p{tiles,
                          dz,
                          gates,
                          first,
                          last - first,
                          blocks,
                          dz_rows,
                          kernel_t,
                          {blocks, nullptr},
                          columns,
                          0,
                          (columns + 4 * W - 1) / (4 * W),
                          false,
                          pairs};
    product_transposed(p, [&](int64_t row, int64_t column, V<T> sum) INLINED {
        const int64_t left = columns - column;
        store_lanes(out[first + row] + column, sum, left < W ? int(left) : W);
    });
}

// The distances between blocks, columns and gates in the sums of weight gradients.
struct Sums {
    int64_t block, column, gate;
};

template <class T>
void weight_gradient(const WeightGradient<T>& f) {
    constexpr int W = Vec<T>::W;
    const int G = f.gates, wide = G * W, together = G > 1 ? 1 : int(kBlocksOfPanel);
    const bool pairs = f.tiles->pairs();
    const int64_t count = pairs ? (f.dz_rows + 1) / 2 : f.dz_rows, dz_stride = count * wide;
    const auto is_diagonal = [&](const auto& of) { return !pairs && of.heads > 1 && of.heads == f.units; };
    for (const auto& of : f.of)
        for (int64_t m = 0; !f.copied && of.columns && !is_diagonal(of) && m < count; ++m) {
            T* to = of.copy + m * gradient_stride(of.columns);
            if (pairs)
                f.tiles->pair_rows(to, of.rows[2 * m], 2 * m + 1 < f.dz_rows ? of.rows[2 * m + 1] : nullptr,
                                   of.columns);
            else
                memcpy(to, of.rows[m], size_t(of.columns) * sizeof(T));
        }
    const int64_t pieces = (count + kGradientRows - 1) / kGradientRows;
    const auto blocks = [&](int N, int64_t block, int lanes) {
        const T* all = f.dz + block * dz_stride;
        if (pairs) {
            all = f.dz_pairs;
            for (int b = 0; b < N; ++b)
                for (int64_t m = 0; m < count; ++m) {
                    const T* row = f.dz + ((block + b) * f.dz_rows + 2 * m) * wide;
                    f.tiles->pair_rows(f.dz_pairs + (b * count + m) * wide, row,
                                       2 * m + 1 < f.dz_rows ? row + wide : nullptr, wide);
                }
        }
        for (const auto& of : f.of) {
            if (!of.columns || !is_diagonal(of)) continue;
            for (int64_t own = block; own < block + N; ++own) {
                const T* dz = f.dz + own * f.dz_rows * wide;
                T* to = of.out + own * W * G;
                V<T> sums[kMostGates];
                for (int v = of.first_gate; v < of.last_gate; ++v) {
                    sums[v] = splat(T(0));
                    for (int k = 0; f.more && k < lanes; ++k) sums[v][k] = to[k * G + v];
                }
                for (int64_t m = 0; m < f.dz_rows; ++m) {
                    const V<T> a = load_lanes(of.rows[m] + own * W, lanes);
                    for (int v = of.first_gate; v < of.last_gate; ++v)
                        sums[v] = fma(a, load(dz + m * wide + v * W), sums[v]);
                }
                for (int v = of.first_gate; v < of.last_gate; ++v)
                    for (int k = 0; k < lanes; ++k) to[k * G + v] = sums[v][k];
            }
        }
        const int vectors = N > 1 ? N : G;  // one gate of several blocks, or all gates of one block
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t m = count * piece / pieces, rows = count * (piece + 1) / pieces - m;
            const bool more = f.more || piece > 0;
            for (const auto& of : f.of) {
                if (!of.columns || is_diagonal(of)) continue;
                const int64_t stride = gradient_stride(of.columns), H = f.units;
                // Sums of some columns, whose first one is at `sums`, and of lanes [lane, lane + lanes) of each vector.
                const auto add_up = [&](T* sums, const Sums& apart, int64_t first, int64_t columns, int vectors,
                                        int64_t vector, const T* panel, int lane, int lanes) {
                    // If the vectors extend beyond what may be written, the sums of a tile pass through a separate
                    // buffer.
                    const bool whole = f.rows || (lanes == W && of.first_gate == 0 && of.last_gate == G);
                    const Sums inside = whole ? apart : Sums{0, wide, W};
                    Tile<T> t = tile_over<T>(rows);
                    t.a_step = stride, t.panel = panel + m * wide, t.panel_step = wide, t.panel_vector = vector;
                    t.from_row = t.to_row = inside.column;
                    t.from_vector = t.to_vector = N > 1 ? inside.block : inside.gate;
                    const auto tile = [&](int64_t column, int R) {
                        alignas(kVectorBytes) T own[kRows * 4 * W];
                        T* outside = sums + column * apart.column;
                        const auto each = [&](auto&& body) INLINED {
                            for (int r = 0; !whole && r < R; ++r)
                                for (int v = of.first_gate; v < of.last_gate; ++v)
                                    body(outside + r * apart.column + v * apart.gate, own + r * wide + v * W + lane);
                        };
                        if (!whole) memset(own, 0, sizeof(own));
                        if (more)
                            each([&](const T* from, T* to)
                                     INLINED { store_lanes(to, load_lanes(from, lanes), lanes); });
                        for (int r = 0; r < R; ++r) t.a[r] = of.copy + m * stride + first + column + r;
                        t.to = whole ? outside : own, t.from = more ? t.to : nullptr;
                        f.tiles->of[R - 1][vectors - 1](t);
                        each([&](T* to, const T* from) INLINED { store_lanes(to, load_lanes(from, lanes), lanes); });
                    };
                    each_tile(columns, tile, kGradientColumns);
                };
                if (of.heads == 1) {
                    const Sums apart = f.rows ? Sums{of.columns * wide, wide, W} : Sums{W, G * H, H};
                    T* sums = f.rows ? of.sums + (block - f.first) * apart.block : of.out + block * W;
                    add_up(sums, apart, 0, of.columns, vectors, N > 1 ? dz_stride : W, all, 0, lanes);
                    continue;
                }
                // Of each head, the units that are in these blocks.
                const int64_t size = H / of.heads, row = G * size;
                for (int b = 0; b < N; ++b)
                    for (int64_t unit = (block + b) * W, end = unit + lanes, next; unit < end; unit = next) {
                        const int64_t head = unit / size * size;
                        next = head + size < end ? head + size : end;
                        add_up(of.out + head * row + unit - head, {0, row, size}, head, size, G, W, all + b * dz_stride,
                               int(unit - (block + b) * W), int(next - unit));
                    }
            }
        }
    };
    const auto lanes_of = [&](int64_t block) { return f.units - block * W < W ? int(f.units - block * W) : W; };
    int64_t block = f.first;
    for (; block + together <= f.last && lanes_of(block + together - 1) == W; block += together)
        blocks(together, block, W);
    for (; block < f.last; ++block) blocks(1, block, lanes_of(block));
    for (block = f.first; f.bias && block < f.last; ++block) {
        const T* dz = f.dz + block * f.dz_rows * wide;
        T* bias = f.bias_sums + (block - f.first) * wide;
        for (int v = 0; v < G; ++v) {
            V<T> sum = f.more ? load(bias + v * W) : splat(T(0));
            for (int64_t m = 0; m < f.dz_rows; ++m) sum += load(dz + m * wide + v * W);
            store(bias + v * W, sum);
        }
    }
    if (!f.write) return;
    const auto write = [&](T* out, const T* sums, int64_t rows, int first_gate, int last_gate) INLINED {
        for (int64_t block = f.first; block < f.last; ++block, sums += rows * wide) {
            const int64_t left = f.units - block * W;
            const int lanes = left < W ? int(left) : W;
            for (int gate = first_gate; gate < last_gate; ++gate) {
                const int64_t first_unit = f.places[gate] * f.units + block * W;
                if (!f.rows || rows == 1) {
                    for (int64_t k = 0; k < rows; ++k)
                        store_lanes(out + k * G * f.units + first_unit, load(sums + (k * G + gate) * W), lanes);
                    continue;
                }
                for (int64_t k = 0; k < rows; k += W) {
                    const int columns = rows - k < W ? int(rows - k) : W;
                    V<T> square[W];
                    UNROLL
                    for (int c = 0; c < W; ++c)
                        square[c] = c < columns ? load(sums + ((k + c) * G + gate) * W) : splat(T(0));
                    transpose<T>(square);
                    UNROLL
                    for (int r = 0; r < W; ++r)
                        if (r < lanes) store_lanes(out + (first_unit + r) * rows + k, square[r], columns);
                }
            }
        }
    };
    for (const auto& of : f.of)
        if (f.rows) write(of.out, of.sums, of.columns, of.first_gate, of.last_gate);
    if (f.bias) write(f.bias, f.bias_sums, 1, 0, G);
}

}  // namespace
}  // namespace cellstack
