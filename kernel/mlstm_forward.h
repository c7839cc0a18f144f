// The forward pass of an mLSTM's memory (mlstm.h): gates, the step form and the chunkwise form.
#pragma once
#include "mlstm_products.h"

namespace cellstack {
namespace {

template <class T>
void memory_gates(const MemoryGates<T>& g) {
    constexpr int W = Vec<T>::W;
    const V<T> zero = splat(T(0)), one = splat(T(1));
    for (int64_t head = 0; head < g.heads; head += W) {
        const int lanes = g.heads - head < W ? int(g.heads - head) : W;
        V<T> m = load_lanes(g.m + head, lanes);
        for (int64_t t = 0; t < g.steps; ++t) {
            T* to = g.to + t * kGatesOfStep * g.stride + head;
            V<T> in = zero, forget = one;
            if (g.reset && g.reset[t]) m = zero;
            if (!g.mask || g.mask[t]) {
                const V<T> i = load_lanes(g.i + t * g.x_time + head, lanes);
                const V<T> kept = log_sigmoid<T>(load_lanes(g.f + t * g.x_time + head, lanes)) + m;
                const V<T> difference = kept - i;
                const V<T> less =
                    exp<T>(difference > zero ? -difference : difference);  // one of i and f, the other is 1
                m = difference > zero ? kept : i;
                in = difference > zero ? less : one, forget = difference > zero ? one : less;
            }
            store_lanes(to + kInputGate * g.stride, in, lanes), store_lanes(to + kForgetGate * g.stride, forget, lanes);
            store_lanes(to + kStabiliser * g.stride, m, lanes);
            store_lanes(to + kFloor * g.stride, exp<T>(-m), lanes);
        }
        store_lanes(g.m + head, m, lanes);
    }
}

// ── the step form ────────────────────────────────────────────────────────────────────────────────────────────────────

// R rows of C: C = f·C₋ + key·v, h += q·C.
template <int R, class T>
INLINE void update_rows(const T* from, int64_t from_row, T* to, int64_t to_row, const T* key, const T* q, T f,
                        const T* v, T* h, int64_t values) {
    constexpr int W = Vec<T>::W;
    V<T> keys[R], queries[R];
    UNROLL
    for (int r = 0; r < R; ++r) keys[r] = splat(key[r]), queries[r] = splat(q[r]);
    const auto column = [&](int64_t c, int lanes) INLINED {
        const V<T> value = load_lanes(v + c, lanes);
        V<T> sum = load(h + c);
        UNROLL
        for (int r = 0; r < R; ++r) {
            const V<T> old = from ? splat(f) * load_lanes(from + r * from_row + c, lanes) : splat(T(0));
            const V<T> C = fma(keys[r], value, old);
            store_lanes(to + r * to_row + c, C, lanes);
            sum = fma(queries[r], C, sum);
        }
        store(h + c, sum);
    };
    int64_t c = 0;
    for (; c + W <= values; c += W) column(c, W);
    if (c < values) column(c, int(values - c));
}

// One step: the states from `C_from` and `n_from`, null: zeros, to `C_to` and `n_to`. Scratch: key [keys], h [values],
// whole vectors each.
template <class T>
void memory_step(const MemoryHead<T>& d, int64_t t, const T* C_from, int64_t from_row, const T* n_from, T* C_to,
                 int64_t to_row, T* n_to, T* key, T* h) {
    constexpr int W = Vec<T>::W;
    const T* gates = d.gates + t * d.gate_step;
    const T *q = d.q + t * d.x_time, *k = d.k + t * d.x_time, *v = d.v + t * d.x_time;
    const T in = gates[kInputGate * d.gate] * d.scale, f = gates[kForgetGate * d.gate];
    V<T> dot = splat(T(0));
    for (int64_t j = 0; j < d.keys; j += W) {
        const int lanes = d.keys - j < W ? int(d.keys - j) : W;
        const V<T> one = splat(in) * load_lanes(k + j, lanes);
        const V<T> n = n_from ? fma(splat(f), load_lanes(n_from + j, lanes), one) : one;
        store(key + j, one), store_lanes(n_to + j, n, lanes);
        dot = fma(load_lanes(q + j, lanes), n, dot);
    }
    for (int64_t c = 0; c < d.values; c += W) store(h + c, splat(T(0)));
    const auto row = [&](int64_t j) { return C_from ? C_from + j * from_row : nullptr; };
    int64_t j = 0;
    constexpr int R = kRegisters / 4;  // two registers per row
    for (; j + R <= d.keys; j += R)
        update_rows<R>(row(j), from_row, C_to + j * to_row, to_row, key + j, q + j, f, v, h, d.values);
    for (; j < d.keys; ++j)
        update_rows<1>(row(j), from_row, C_to + j * to_row, to_row, key + j, q + j, f, v, h, d.values);
    const T sum = sum_of_lanes<T>(dot), size = sum < 0 ? -sum : sum, floor = gates[kFloor * d.gate];
    const V<T> by = splat(T(1) / ((size < floor ? floor : size) + d.epsilon));
    T* y = d.y + t * d.y_time;
    for (int64_t c = 0; c < d.values; c += W)
        store_lanes(y + c, load(h + c) * by, d.values - c < W ? int(d.values - c) : W);
}

template <class T>
void zero_output(const MemoryHead<T>& d, int64_t t) {
    for (int64_t c = 0; c < d.values; ++c) d.y[t * d.y_time + c] = 0;
}

// y = σ(õ)·h at all steps that aren't masked.
template <class T>
void gate_output(const MemoryHead<T>& d) {
    constexpr int W = Vec<T>::W;
    for (int64_t t = 0; t < d.steps; ++t) {
        if (d.mask && !d.mask[t]) continue;
        T* y = d.y + t * d.y_time;
        for (int64_t c = 0; c < d.values; c += W) {
            const int lanes = d.values - c < W ? int(d.values - c) : W;
            store_lanes(y + c, sigmoid<T>(load_lanes(d.o + t * d.x_time + c, lanes)) * load_lanes(y + c, lanes), lanes);
        }
    }
}

template <class T>
INLINE bool runs_in_steps(const MemoryHead<T>& d) {
    return d.form == MemoryForm::kSteps || (d.form == MemoryForm::kFastest && d.steps < kShortChunk);
}

// What the step form takes from scratch memory: the states, unless the caller needs them; a key, and h.
template <class T>
struct StepScratch {
    T *C, *n, *key, *h;
    StepScratch(const MemoryHead<T>& d, Carve<T>& carve) {
        C = d.C ? d.C : carve(d.keys * d.values), n = d.n ? d.n : carve(d.keys);
        key = carve(whole_vectors<T>(d.keys)), h = carve(whole_vectors<T>(d.values));
    }
};

template <class T>
void memory_steps(const MemoryHead<T>& d) {
    Carve<T> carve{d.scratch};
    const StepScratch<T> s(d, carve);
    const T *C = d.C_before, *n = d.n_before;
    for (int64_t t = 0; t < d.steps; ++t) {
        if (d.reset && d.reset[t]) C = n = nullptr;
        if (d.mask && !d.mask[t]) {
            zero_output(d, t);
        } else {
            memory_step(d, t, C, d.values, n, s.C, d.values, s.n, s.key, s.h);
            C = s.C, n = s.n;
        }
    }
    const int64_t count = d.keys * d.values;
    if (d.C && C != d.C)  // no step was used since the last reset
        for (int64_t k = 0; k < count; ++k) d.C[k] = C ? C[k] : T(0);
    if (d.n && n != d.n)
        for (int64_t k = 0; k < d.keys; ++k) d.n[k] = n ? n[k] : T(0);
}

// ── the chunkwise form ───────────────────────────────────────────────────────────────────────────────────────────────

// The weights of a chunk's steps in the state after it, with the scale of k, and that of the state before it in `e` of
// the last step.
template <class T>
void find_weights(const MemoryHead<T>& d, Chunk<T>& s, int64_t first, int64_t steps) {
    T kept = 1;
    for (int64_t t = whole_vectors<T>(steps); t-- > 0;) {
        const T* gates = d.gates + (first + t) * d.gate_step;
        s.weights[t] = t < steps ? kept * d.scale * gates[kInputGate * d.gate] : T(0);
        if (t < steps) kept *= gates[kForgetGate * d.gate];
    }
    s.e[steps - 1] = kept;
}

// The state after a chunk: C = e·C₋ + Kᵀ·(weights∘V), n = e·n₋ + weights·K. K_columns are overwritten by weights∘K.
// `empty`: the state before is zeros.
template <class T>
void advance_state(Chunk<T>& s, const Source<T>& values, int64_t steps, bool empty, T kept, const T* C, const T* n,
                   T* C_to, T* n_to) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < s.keys; ++k)
        for (int64_t t = 0; t < steps; t += W) {
            T* at = s.K_columns + k * s.step_row + t;
            store(at, load(s.weights + t) * load(at));
        }
    for (int64_t k = 0; k < s.keys && !empty; ++k)
        for (int64_t c = 0; c < s.values; c += W)
            store(C_to + k * s.value_row + c, splat(kept) * load(C + k * s.value_row + c));
    for (int64_t c = 0; c < s.keys; c += W)
        store(n_to + c, empty ? load(s.weighted + c) : fma(splat(kept), load(n + c), load(s.weighted + c)));
    multiply<Range::kAll>(C_to, s.value_row, !empty, {s.K_columns, s.step_row, 1, values.at, values.row}, s.keys,
                          s.values, steps);
}

// D of a step from that of the step before it, in place: beyond the step it is zero.
template <class T>
INLINE void next_shares(T* shares, int64_t t, T in, T f) {
    for (int64_t c = 0; c < t; c += Vec<T>::W) store(shares + c, splat(f) * load(shares + c));
    shares[t] = in;
}

// q·k of a step with all steps up to it becomes (q·k)∘D; returns the sum. Those of the steps after it that a tile may
// read become zeros.
template <class T>
INLINE T apply_shares(T* row, const T* shares, int64_t t) {
    constexpr int W = Vec<T>::W;
    V<T> sum = splat(T(0));
    int64_t c = 0;
    for (; c <= t; c += W) {
        const V<T> share = load(shares + c);
        const V<T> score = share != splat(T(0)) ? share * load(row + c) : splat(T(0));
        store(row + c, score), sum = sum + score;
    }
    for (; c < t + kRows; c += W) store(row + c, splat(T(0)));
    return sum_of_lanes<T>(sum);
}

// 1/N, where h = (S·V + e∘(Q·C₋))/N.
template <class T>
INLINE T divided(const MemoryHead<T>& d, T sum, T floor) {
    const T size = sum < 0 ? -sum : sum;
    return T(1) / ((size < floor ? floor : size) + d.epsilon);
}

template <class T>
INLINE T dot_of(const T* a, const T* b, int64_t n) {
    V<T> sum = splat(T(0));
    for (int64_t c = 0; c < n; c += Vec<T>::W) {
        const int lanes = n - c < Vec<T>::W ? int(n - c) : Vec<T>::W;
        sum = fma(load_lanes(a + c, lanes), load_lanes(b + c, lanes), sum);
    }
    return sum_of_lanes<T>(sum);
}

// `empty`: the state before is zeros; `wanted`: the state after is needed. Returns false, and changes no state, if a
// number in q, k or v isn't finite.
template <class T>
bool memory_chunk(const MemoryHead<T>& d, Chunk<T>& s, int64_t first, int64_t steps, bool empty, bool wanted) {
    const uint8_t* mask = d.mask ? d.mask + first : nullptr;
    const int64_t at = first * d.x_time;
    find_weights(d, s, first, steps);
    const T kept = s.e[steps - 1];
    read_columns(s.K_columns, s.step_row, d.k + at, d.x_time, d.keys, steps, mask, s.weights,
                 wanted ? s.weighted : nullptr);
    const Source<T> values(d.v + at, d.x_time, d.values, steps, mask, s.V, s.value_row);
    if (!values.finite(d.values, steps)) return false;
    // S = (Q·Kᵀ)∘D/N
    const Factors<T> scores{d.q + at, d.x_time, 1, s.K_columns, s.step_row};
    T* S = d.scores ? d.scores + first * s.step_row : s.S;
    T e = 1, any = 0;
    memset(s.shares, 0, size_t(s.steps) * sizeof(T));
    for (int64_t r = 0; r < steps; r += kBlock) {
        const int64_t end = r + kBlock < steps ? r + kBlock : steps;
        multiply_triangle(S, s.step_row, scores, r, end, d.keys);
        for (int64_t t = r; t < end; ++t) {
            const T* gates = d.gates + (first + t) * d.gate_step;
            T* row = S + t * s.step_row;
            if (!mask || mask[t]) any += row[t] * T(0);  // NaN, if a number of the step's q or k isn't finite
            e *= gates[kForgetGate * d.gate];
            next_shares(s.shares, t, d.scale * gates[kInputGate * d.gate], gates[kForgetGate * d.gate]);
            T sum = apply_shares(row, s.shares, t);
            if (!empty) sum += e * dot_of(scores.a + t * d.x_time, s.n, d.keys);
            const T by = divided(d, sum, gates[kFloor * d.gate]);
            scale_row(row, by, t + 1), s.e[t] = e * by;
            if (d.scores) row[s.step_row - 1] = sum;
        }
    }
    if (any != 0) return false;
    T* y = d.y + first * d.y_time;
    const Result<T> h(y, d.y_time, d.values, s.H, s.value_row);
    if (!empty) {
        multiply<Range::kAll>(h.at, h.row, false, {scores.a, d.x_time, 1, s.C, s.value_row}, steps, s.values, d.keys);
        for (int64_t t = 0; t < steps; ++t) scale_row(h.at + t * h.row, s.e[t], s.values);
    }
    multiply<Range::kUpToRow>(h.at, h.row, !empty, {S, s.step_row, 1, values.at, values.row}, steps, s.values, steps);
    h.finish(y, d.y_time, d.values, steps);
    for (int64_t t = 0; t < steps && mask; ++t)
        if (!mask[t]) zero_output(d, first + t);
    if (wanted) advance_state(s, values, steps, empty, kept, s.C, s.n, s.C, s.n);
    return true;
}

// The length of the chunk of steps from `first`: a chunk ends before a reset.
template <class T>
INLINE int64_t chunk_of(const MemoryHead<T>& d, int64_t first) {
    const int64_t most = d.steps - first < d.chunk ? d.steps - first : d.chunk;
    for (int64_t t = 1; d.reset && t < most; ++t)
        if (d.reset[first + t]) return t;
    return most;
}

// The state of a head, null: zeros, in the padded rows of a chunk; and back.
template <class T>
void load_state(const MemoryHead<T>& d, const Chunk<T>& s, const T* C, const T* n, T* C_to, T* n_to) {
    const size_t row = size_t(d.values) * sizeof(T);
    for (int64_t k = 0; k < s.keys; ++k) {
        T* to = C_to + k * s.value_row;
        const bool there = C && k < d.keys;
        if (there) memcpy(to, C + k * d.values, row);
        memset(there ? to + d.values : to, 0, size_t(there ? s.value_row - d.values : s.value_row) * sizeof(T));
    }
    memset(n_to, 0, size_t(s.keys) * sizeof(T));
    if (n) memcpy(n_to, n, size_t(d.keys) * sizeof(T));
}
template <class T>
void store_state(const MemoryHead<T>& d, const Chunk<T>& s, const T* C, const T* n, T* C_to, T* n_to) {
    for (int64_t k = 0; k < d.keys; ++k) memcpy(C_to + k * d.values, C + k * s.value_row, size_t(d.values) * sizeof(T));
    memcpy(n_to, n, size_t(d.keys) * sizeof(T));
}

template <class T>
void memory_chunks(const MemoryHead<T>& d) {
    Carve<T> carve{d.scratch};
    Chunk<T> s(d, carve);
    T *key = carve(s.keys), *h = carve(s.values);
    const T *C = d.C_before, *n = d.n_before;
    bool empty = !C;  // then s.n is zeros, and s.C isn't read
    const auto clear = [&] { empty = true, memset(s.n, 0, size_t(s.keys) * sizeof(T)); };
    if (empty)
        clear();
    else
        load_state(d, s, C, n, s.C, s.n);
    for (int64_t first = 0, steps; first < d.steps; first += steps) {
        steps = chunk_of(d, first);
        if (d.reset && d.reset[first]) clear();
        const bool wanted = d.C || first + steps < d.steps;
        const bool chunk = d.form == MemoryForm::kChunks || steps >= kShortChunk;
        if (chunk && memory_chunk(d, s, first, steps, empty, wanted)) {
            empty = false;
            continue;
        }
        // With infinities or NaN a product would spread them to earlier steps.
        for (int64_t t = first; t < first + steps; ++t) {
            if (d.scores) d.scores[(t + 1) * s.step_row - 1] = T(__builtin_nan(""));
            if (d.mask && !d.mask[t]) {
                zero_output(d, t);
            } else {
                memory_step<T>(d, t, empty ? nullptr : s.C, s.value_row, s.n, s.C, s.value_row, s.n, key, h);
                empty = false;
            }
        }
    }
    if (d.C && empty) load_state<T>(d, s, nullptr, nullptr, s.C, s.n);
    if (d.C) store_state(d, s, s.C, s.n, d.C, d.n);
}

template <class T>
void memory_head(const MemoryHead<T>& d) {
    runs_in_steps(d) ? memory_steps(d) : memory_chunks(d);
    if (d.o) gate_output(d);
}

}  // namespace
}  // namespace cellstack
