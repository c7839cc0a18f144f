// Backward, some steps at a time: their dz, last to first, with dh going through the transposed weights; then, over all
// of these steps and rows at once, the gradients of x and of the weights.
#pragma once
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace cellstack {
namespace {

// A block of a row of the plain LSTM, from dh and dc after the step to dz and dc before it.
template <class T>
INLINE void differentiate(const Backward<T>& f, const Limits<T>& limits, const Place& at, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t H = f.d->units, here = at.r * f.steps + at.t;
    T* to = block_of(f, f.dz, 4, at.r, n, at.unit);
    T* dh_at = f.dh + at.r * columns + at.unit;
    T* dc_at = f.dc + at.r * f.blocks * W + at.unit;
    V<T> dh = load(dh_at), dc = load(dc_at);
    if (f.dy) dh += load_lanes(f.dy + at.r * f.y_row + at.t * f.y_time + at.unit, at.lanes);
    if (f.dcells) dc += load_lanes(f.dcells + here * H + at.unit, at.lanes);
    if (f.mask && !f.mask[here]) {
        unroll<4>([&](auto v) INLINED { store(to + v * W, splat(T(0))); });
        store(dh_at, dh);
        store(dc_at, dc);
        return;
    }
    V<T> gates[4], dz[4];
    load_gates(f, at, gates);
    const V<T> phi_c = tanh<T>(load_lanes(f.cells + here * H + at.unit, at.lanes));
    dc += lstm_output_back<T, true, true>(f, limits, at, gates[3], phi_c, dh, dz[3]);
    dc = lstm_cell_back<T, true, true>(f, limits, at, gates, units_of(cell_before(f, at.r, n), at), dc, dz);
    unroll<4>([&](auto v) INLINED { store(to + v * W, dz[v]); });
    store(dc_at, dc);
}

// What rows that started afresh before step n pass on goes into the initial state, not into the step before.
template <class T>
__attribute__((noinline)) void restart_back(const Backward<T>& f, int64_t n, int64_t columns) {
    const int64_t wide = f.blocks * Vec<T>::W, t = time_of(f, n);
    for (int64_t r = 0; r < f.rows; ++r) {
        if (!f.reset[r * f.steps + t]) continue;
        for (int64_t k = 0; k < f.d->output; ++k) {
            T& dh = f.dh[r * columns + k];
            if (f.dinitial_h) f.dinitial_h[r * columns + k] += dh;
            dh = 0;
        }
        for (int64_t k = 0; f.dc && k < f.d->units; ++k) {
            T& dc = f.dc[r * wide + k];
            if (f.dinitial_c) f.dinitial_c[r * wide + k] += dc;
            dc = 0;
        }
    }
}

// dh before step n: dq through the transposed weights, for rows that the mask lets in, and (not Plain) what was
// carried.
template <class T, int G, bool Plain>
INLINE void pass_back(const Backward<T>& f, int64_t n, int64_t columns) {
    constexpr int W = Vec<T>::W;
    const int64_t P = f.d->output, t = time_of(f, n);
    product_transposed<T, G>(f.dq, (n - f.first) * f.batch + f.row0, f.rows, f.blocks, (f.last - f.first) * f.batch,
                             f.recurrent_t, P, [&](int64_t r, int64_t unit, V<T> d) INLINED {
                                 const int64_t left = P - unit;
                                 if (left <= 0) return;
                                 T* dh = f.dh + r * columns + unit;
                                 if (f.recurrent_dropout)
                                     d *= load_lanes(f.recurrent_dropout + r * P + unit, left < W ? int(left) : W);
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
    for (int64_t n = f.last - 1; n >= f.first; --n) {
        for (int64_t r = 0; r < f.rows; ++r)
            each_block<T>(r, time_of(f, n), f.blocks, f.d->units,
                          [&](const Place& at) INLINED { differentiate(f, limits, at, n, columns); });
        pass_back<T, 4, true>(f, n, columns);
    }
}

// From dh after the step to the gradient of h without zoneout, into dm (or dp, where h was projected), and what of dh
// goes past the step, into carry.
template <class T>
void give_back(const Backward<T>& f, int64_t r, int64_t n, int64_t columns, int64_t unit_columns, bool used) {
    const Description& d = *f.d;
    const int64_t t = time_of(f, n);
    each_block<T>(r, t, f.output_blocks, d.output, [&](const Place& at) INLINED {
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
    });
}

// A row that the mask leaves out has no gradient but what passes by.
template <class T, int G>
void leave_out(const Backward<T>& f, int64_t r, int64_t n) {
    constexpr int W = Vec<T>::W;
    const Description& d = *f.d;
    const int64_t t = time_of(f, n);
    each_block<T>(r, t, f.blocks, d.units, [&](const Place& at) INLINED {
        unroll<G>([&](auto v) INLINED {
            store(block_of(f, f.dz, G, r, n, at.unit) + v * W, splat(T(0)));
            store(block_of(f, f.dq, G, r, n, at.unit) + v * W, splat(T(0)));
        });
        if (d.projects())
            store_lanes(f.m + ((n - f.first) * f.batch + f.row0 + r) * d.units + at.unit, splat(T(0)), at.lanes);
        if (f.dcells) {
            T* dc = f.dc + r * f.blocks * W + at.unit;
            store(dc, load(dc) + load_lanes(f.dcells + (r * f.steps + t) * d.units + at.unit, at.lanes));
        }
    });
}

template <class T, int Kind, int G, bool Usual>
void run_rows_back(Backward<T>& f) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const Description& d = *f.d;
    const int64_t H = d.units, columns = (d.output + wide - 1) / wide * wide,
                  unit_columns = (H + wide - 1) / wide * wide;
    const int64_t dz_rows = (f.last - f.first) * f.batch;
    const Limits<T> limits(d);
    for (int64_t n = f.last - 1; n >= f.first; --n) {
        const int64_t t = time_of(f, n), m = (n - f.first) * f.batch + f.row0;
        const auto rows = [&](auto&& body) INLINED {
            for (int64_t r = 0; r < f.rows; ++r) body(r, !f.mask || f.mask[r * f.steps + t]);
        };
        rows([&](int64_t r, bool used) { give_back(f, r, n, columns, unit_columns, used); });
        if (Kind == kLstm && d.projects())
            product_transposed<T, 1>(f.dp, m, f.rows, f.output_blocks, dz_rows, f.projection_t, H,
                                     [&](int64_t r, int64_t unit, V<T> dm)
                                         INLINED { store(f.dm + r * unit_columns + unit, dm); });
        rows([&](int64_t r, bool used) {
            if (!used)
                leave_out<T, G>(f, r, n);
            else if constexpr (Kind == kLstm)
                lstm_row_back<T, Usual>(f, limits, r, n, unit_columns);
            else if constexpr (Kind == kGru)
                gru_row_back<T, Usual>(f, limits, r, n, columns);
            else
                rnn_row_back<T, Usual>(f, limits, r, n, columns);
        });
        if (Kind == kGru && !d.reset_after) {
            // What goes into r's place is what the product below is going to read of it, and not before.
            product_transposed<T, G>(f.dz, m, f.rows, f.blocks, dz_rows, f.candidate_t, H,
                                     [&](int64_t r, int64_t unit, V<T> given)
                                         INLINED { store(f.dm + r * unit_columns + unit, given); });
            rows([&](int64_t r, bool used) {
                if (!used) return;
                each_block<T>(r, t, f.blocks, H, [&](const Place& at) INLINED {
                    gru_reset_back<T, Usual>(f, limits, n, columns, at, load(f.dm + r * unit_columns + at.unit));
                });
            });
        }
        pass_back<T, G, false>(f, n, columns);
    }
}

template <class T, bool Usual>
void choose_back(Backward<T>& f) {
    if (f.d->kind == kGru)
        run_rows_back<T, kGru, 3, Usual>(f);
    else if (f.d->kind == kRnn)
        run_rows_back<T, kRnn, 1, Usual>(f);
    else if (f.d->coupled)
        run_rows_back<T, kLstm, 3, Usual>(f);
    else
        run_rows_back<T, kLstm, 4, Usual>(f);
}

template <class T>
void backward(Backward<T>& f) {
    if (f.d->plain())
        run_blocks_back<T>(f);
    else if (f.d->usual())
        choose_back<T, true>(f);
    else
        choose_back<T, false>(f);
}

// Calls body(Int<gates>) with the number of gates as a constant.
template <class F>
INLINE void with_gates(int gates, F&& body) {
    if (gates == 4)
        body(Int<4>{});
    else if (gates == 3)
        body(Int<3>{});
    else
        body(Int<1>{});
}

template <class T>
void input_gradient(const T* dz, int gates, int64_t blocks, int64_t dz_rows, const T* kernel_t, int64_t columns,
                    int64_t first, int64_t last, T* const* out) {
    constexpr int W = Vec<T>::W;
    with_gates(gates, [&](auto G) {
        product_transposed<T, G>(dz, first, last - first, blocks, dz_rows, kernel_t, columns,
                                 [&](int64_t row, int64_t column, V<T> sum) INLINED {
                                     const int64_t left = columns - column;
                                     if (left > 0)
                                         store_lanes(out[first + row] + column, sum, left < W ? int(left) : W);
                                 });
    });
}

// The rows of N blocks of dz, `stride` apart, against R columns of a.
template <class T, int R, int N, int G>
INLINE void weight_tile(const T* dz, int64_t dz_stride, const T* a, int64_t stride, int64_t rows, bool more, T* sums_at,
                        int64_t sums_stride) {
    constexpr int W = Vec<T>::W;
    V<T> sums[N][R][G];
    const auto each = [&](auto&& body) INLINED {
        unroll<N>([&](auto b) INLINED {
            unroll<R>([&](auto r) INLINED {
                unroll<G>([&](auto v) INLINED { body(sums[b][r][v], sums_at + b * sums_stride + (r * G + v) * W); });
            });
        });
    };
    each([&](V<T>& sum, const T* at) INLINED { sum = more ? load(at) : splat(T(0)); });
    for (int64_t m = 0; m < rows; ++m, a += stride) {
        V<T> s[R];
        unroll<R>([&](auto r) INLINED { s[r] = splat(a[r]); });
        unroll<N>([&](auto b) INLINED {
            unroll<G>([&](auto v) INLINED {
                V<T> w = load(dz + b * dz_stride + (m * G + v) * W);
                unroll<R>([&](auto r) INLINED { sums[b][r][v] = fma(s[r], w, sums[b][r][v]); });
            });
        });
    }
    each([&](const V<T>& sum, T* at) INLINED { store(at, sum); });
}

template <class T, int G>
void weight_gradient_of(const WeightGradient<T>& f) {
    constexpr int W = Vec<T>::W, wide = G * W, together = G >= 3 ? 1 : 4;
    for (int64_t m = 0; m < f.dz_rows; m += kGradientRows) {
        const int64_t rows = f.dz_rows - m < kGradientRows ? f.dz_rows - m : kGradientRows;
        const bool more = f.more || m > 0;
        for (const auto& of : f.of)
            for (int64_t k = 0; of.columns && k < rows; ++k)
                memcpy(of.copy + k * gradient_stride(of.columns), of.rows[m + k], size_t(of.columns) * sizeof(T));
        const auto blocks = [&](auto N, int64_t block) INLINED {
            const T* dz = f.dz + (block * f.dz_rows + m) * wide;
            for (const auto& of : f.of) {
                T* sums = of.sums + (block - f.first) * of.columns * wide;
                tiles(of.columns, [&](auto R, int64_t column) INLINED {
                    weight_tile<T, R, N, G>(dz, f.dz_rows * wide, of.copy + column, gradient_stride(of.columns), rows,
                                            more, sums + column * wide, of.columns * wide);
                });
            }
        };
        int64_t block = f.first;
        for (; block + together <= f.last; block += together) blocks(Int<together>{}, block);
        for (; block < f.last; ++block) blocks(Int<1>{}, block);
        for (block = f.first; block < f.last; ++block) {
            const T* dz = f.dz + (block * f.dz_rows + m) * wide;
            T* bias = f.bias_sums + (block - f.first) * wide;
            unroll<G>([&](auto v) INLINED {
                V<T> sum = more ? load(bias + v * W) : splat(T(0));
                for (int64_t k = 0; k < rows; ++k) sum += load(dz + k * wide + v * W);
                store(bias + v * W, sum);
            });
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
                    unroll<W>([&](auto c) INLINED {
                        square[c] = c < columns ? load(sums + ((k + c) * G + gate) * W) : splat(T(0));
                    });
                    transpose<T>(square);
                    unroll<W>([&](auto r) INLINED {
                        if (r < lanes) store_lanes(out + (first_unit + r) * rows + k, square[r], columns);
                    });
                }
            }
        }
    };
    for (const auto& of : f.of) write(of.out, of.sums, of.columns, of.first_gate, of.last_gate);
    if (f.bias) write(f.bias, f.bias_sums, 1, 0, G);
}

template <class T>
void weight_gradient(const WeightGradient<T>& f) {
    with_gates(f.gates, [&](auto G) { weight_gradient_of<T, G>(f); });
}

}  // namespace
}  // namespace cellstack
