// The forward pass of an mLSTM's memory (mlstm.h): gates, the step form and the chunkwise form.
#pragma once
#include "mlstm.h"
#include "product.h"

namespace cellstack {
namespace {

template <class T>
INLINE int64_t whole_vectors(int64_t n) {
    return (n + Vec<T>::W - 1) / Vec<T>::W * Vec<T>::W;
}
template <class T>
INLINE T sum_of_lanes(V<T> v) {
    T sum = 0;
    UNROLL
    for (int l = 0; l < Vec<T>::W; ++l) sum += v[l];
    return sum;
}

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
    constexpr int R = kRows == 6 ? 8 : 4;  // two registers per row
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

// ── the chunkwise form ───────────────────────────────────────────────────────────────────────────────────────────────

// Takes arrays from scratch memory, each at a cache line; without memory it counts.
template <class T>
struct Carve {
    T* memory;
    int64_t taken = 0;
    T* operator()(int64_t count) {
        T* at = memory ? memory + taken : nullptr;
        taken += (count + 15) / 16 * 16;
        return at;
    }
};

// A chunk's arrays, with rows of whole vectors: `keys`, `values` and `steps` numbers. Rows are a line further apart:
// rows that are a multiple of 1 KB apart would share a few lines of the cache.
template <class T>
struct Chunk {
    int64_t keys, values, steps, key_row, value_row, step_row;
    T *Q, *K, *V, *K_columns, *D, *S, *e, *i, *f, *sums, *weights, *H, *C, *n;
    Chunk(const MemoryHead<T>& d, Carve<T>& carve)
        : keys(whole_vectors<T>(d.keys)),
          values(whole_vectors<T>(d.values)),
          steps(whole_vectors<T>(d.chunk)),
          key_row(keys + 16),
          value_row(values + 16),
          step_row(steps + 16) {
        Q = carve(steps * key_row), K = carve(steps * key_row), V = carve(steps * value_row);
        K_columns = carve(keys * step_row);
        D = carve(steps * step_row), S = carve(steps * step_row), e = carve(steps), i = carve(steps), f = carve(steps);
        sums = carve(steps), weights = carve(steps), H = carve(steps * value_row);
        C = carve(keys * value_row), n = carve(keys);
    }
};

// to [rows][vectors·W] = or += a·panel over `depth`, where a[r][k] = a[r·a_row + k·a_step]. If `causal`, the panel has
// the same steps as the rows, and a row takes those up to its own.
template <class T>
void multiply(T* to, int64_t to_row, bool add, const T* a, int64_t a_row, int64_t a_step, const T* panel,
              int64_t panel_step, int64_t rows, int64_t columns, int64_t depth, bool causal = false) {
    constexpr int W = Vec<T>::W;
    static constexpr Tiles<T> tiles = tiles_of<Plain<T>>();
    Tile<T> t{};
    t.a_step = a_step, t.panel_step = panel_step, t.panel_vector = t.to_vector = W, t.to_row = to_row, t.add = add;
    for (int64_t c = 0; c < columns; c += 4 * W)
        each_tile(rows, [&](int64_t r, int R) INLINED {
            for (int k = 0; k < R; ++k) t.a[k] = a + (r + k) * a_row;
            t.panel = panel + c, t.to = to + r * to_row + c, t.depth = causal ? r + R : depth;
            tiles.of[R - 1][(columns - c < 4 * W ? columns - c : 4 * W) / W - 1](t);
        });
}

// The lower triangle of to [steps][steps] = a·panel: in each row the vectors up to its own step.
template <class T>
void multiply_triangle(T* to, int64_t to_row, const T* a, int64_t a_row, const T* panel, int64_t rows, int64_t depth) {
    constexpr int W = Vec<T>::W;
    static constexpr Tiles<T> tiles = tiles_of<Plain<T>>();
    Tile<T> t{};
    t.a_step = 1, t.panel_step = to_row, t.panel_vector = t.to_vector = W, t.to_row = to_row, t.depth = depth;
    each_tile(rows, [&](int64_t r, int R) INLINED {
        for (int k = 0; k < R; ++k) t.a[k] = a + (r + k) * a_row;
        for (int64_t c = 0; c < r + R; c += 4 * W) {
            const int64_t vectors = (r + R - c + W - 1) / W;
            t.panel = panel + c, t.to = to + r * to_row + c;
            tiles.of[R - 1][(vectors < 4 ? vectors : 4) - 1](t);
        }
    });
}

// to [columns][to_row] = the transpose of from [rows][from_row]; whole squares of W.
template <class T>
void transposed(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns) {
    constexpr int W = Vec<T>::W;
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            V<T> square[W];
            UNROLL
            for (int k = 0; k < W; ++k) square[k] = load(from + (r + k) * from_row + c);
            transpose<T>(square);
            UNROLL
            for (int k = 0; k < W; ++k) store(to + (c + k) * to_row + r, square[k]);
        }
}

// Copies rows of a chunk, times `scale`, with zeros at masked steps and beyond the last step and number; returns
// whether all numbers are finite.
template <class T>
bool copy_rows(T* to, int64_t to_row, int64_t width, const T* from, int64_t from_row, int64_t steps, int64_t columns,
               T scale, const uint8_t* mask) {
    constexpr int W = Vec<T>::W;
    const int64_t rows = whole_vectors<T>(steps);
    V<T> any = splat(T(0));
    for (int64_t t = 0; t < rows; ++t, to += to_row, from += from_row)
        for (int64_t c = 0; c < width; c += W) {
            const bool there = t < steps && c < columns && (!mask || mask[t]);
            const V<T> x = there ? load_lanes(from + c, columns - c < W ? int(columns - c) : W) : splat(T(0));
            store(to + c, splat(scale) * x), any = fma(x, splat(T(0)), any);
        }
    return sum_of_lanes<T>(any) == 0;
}

// What both passes need of a chunk of steps from `first`: copies of its rows, its gates, D and e, and the weights of
// its steps in the state after it. Returns whether q, k and v are finite.
template <class T>
bool load_chunk(const MemoryHead<T>& d, Chunk<T>& s, int64_t first, int64_t steps) {
    constexpr int W = Vec<T>::W;
    const uint8_t* mask = d.mask ? d.mask + first : nullptr;
    const int64_t at = first * d.x_time;
    bool finite = copy_rows(s.Q, s.key_row, s.keys, d.q + at, d.x_time, steps, d.keys, T(1), mask);
    finite = copy_rows(s.K, s.key_row, s.keys, d.k + at, d.x_time, steps, d.keys, d.scale, mask) && finite;
    finite = copy_rows(s.V, s.value_row, s.values, d.v + at, d.x_time, steps, d.values, T(1), mask) && finite;
    const int64_t rows = whole_vectors<T>(steps);
    T kept = 1;
    for (int64_t t = 0; t < steps; ++t) {
        const T* gates = d.gates + (first + t) * d.gate_step;
        const T f = gates[kForgetGate * d.gate];
        T* row = s.D + t * s.step_row;
        s.e[t] = kept *= f;
        for (int64_t c = 0; c <= t; c += W) store(row + c, c < t ? splat(f) * load(row + c - s.step_row) : splat(T(0)));
        row[t] = gates[kInputGate * d.gate];
    }
    const T* last = s.D + (steps - 1) * s.step_row;
    for (int64_t c = 0; c < rows; c += W) store(s.weights + c, c < steps ? load(last + c) : splat(T(0)));
    return finite;
}

// The state after a chunk: C = e·C₋ + (weights∘K)ᵀ·V, n = e·n₋ + Kᵀ·weights. K is overwritten by weights∘K.
// `empty`: the state before is zeros.
template <class T>
void advance_state(Chunk<T>& s, int64_t steps, bool empty, const T* C, const T* n, T* C_to, T* n_to) {
    constexpr int W = Vec<T>::W;
    const V<T> kept = splat(s.e[steps - 1]);
    for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < s.keys; c += W)
            store(s.K + t * s.key_row + c, splat(s.weights[t]) * load(s.K + t * s.key_row + c));
    for (int64_t c = 0; c < s.keys; c += W) {
        V<T> sum = kept * load(n + c);
        for (int64_t t = 0; t < steps; ++t) sum = sum + load(s.K + t * s.key_row + c);
        store(n_to + c, sum);
    }
    for (int64_t k = 0; k < s.keys && !empty; ++k)
        for (int64_t c = 0; c < s.values; c += W)
            store(C_to + k * s.value_row + c, kept * load(C + k * s.value_row + c));
    multiply(C_to, s.value_row, !empty, s.K, int64_t(1), s.key_row, s.V, s.value_row, s.keys, s.values, steps);
}

// S = (Q·Kᵀ)∘D, zero above the diagonal, and nᵀq of every step in `sums`.
template <class T>
void scores(Chunk<T>& s, int64_t steps, const T* n) {
    constexpr int W = Vec<T>::W;
    const int64_t rows = whole_vectors<T>(steps);
    transposed(s.K_columns, s.step_row, s.K, s.key_row, rows, s.keys);
    multiply_triangle(s.S, s.step_row, s.Q, s.key_row, s.K_columns, steps, s.keys);
    for (int64_t t = 0; t < steps; ++t) {
        V<T> sum = splat(T(0)), dot = splat(T(0));
        for (int64_t c = 0; c < rows; c += W) {
            T* at = s.S + t * s.step_row + c;
            const V<T> share = load(s.D + t * s.step_row + c);
            const V<T> score = c <= t ? (share != splat(T(0)) ? share * load(at) : splat(T(0))) : splat(T(0));
            store(at, score), sum = sum + score;
        }
        for (int64_t c = 0; c < s.keys; c += W) dot = fma(load(s.Q + t * s.key_row + c), load(n + c), dot);
        s.sums[t] = sum_of_lanes<T>(fma(dot, splat(s.e[t]), sum));
    }
}

// `empty`: the state before is zeros; `wanted`: the state after is needed.
template <class T>
bool memory_chunk(const MemoryHead<T>& d, Chunk<T>& s, int64_t first, int64_t steps, bool empty, bool wanted) {
    constexpr int W = Vec<T>::W;
    if (!load_chunk(d, s, first, steps)) return false;
    scores(s, steps, s.n);
    if (!empty) {
        multiply(s.H, s.value_row, false, s.Q, s.key_row, int64_t(1), s.C, s.value_row, steps, s.values, s.keys);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < s.values; c += W)
                store(s.H + t * s.value_row + c, splat(s.e[t]) * load(s.H + t * s.value_row + c));
    }
    multiply(s.H, s.value_row, !empty, s.S, s.step_row, int64_t(1), s.V, s.value_row, steps, s.values, steps, true);
    for (int64_t t = 0; t < steps; ++t) {
        if (d.mask && !d.mask[first + t]) {
            zero_output(d, first + t);
            continue;
        }
        const T floor = d.gates[(first + t) * d.gate_step + kFloor * d.gate];
        const T size = s.sums[t] < 0 ? -s.sums[t] : s.sums[t];
        const V<T> by = splat(T(1) / ((size < floor ? floor : size) + d.epsilon));
        T* y = d.y + (first + t) * d.y_time;
        for (int64_t c = 0; c < d.values; c += W)
            store_lanes(y + c, load(s.H + t * s.value_row + c) * by, d.values - c < W ? int(d.values - c) : W);
    }
    if (wanted) advance_state(s, steps, empty, s.C, s.n, s.C, s.n);
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
void store_state(const MemoryHead<T>& d, const Chunk<T>& s, T* C, T* n) {
    for (int64_t k = 0; k < d.keys; ++k) memcpy(C + k * d.values, s.C + k * s.value_row, size_t(d.values) * sizeof(T));
    memcpy(n, s.n, size_t(d.keys) * sizeof(T));
}

template <class T>
void memory_head(const MemoryHead<T>& d) {
    Carve<T> carve{d.scratch};
    Chunk<T> s(d, carve);
    T *key = carve(s.keys), *h = carve(s.values);
    const T *C = d.C_before, *n = d.n_before;
    if (d.form == MemoryForm::kSteps || (d.form == MemoryForm::kFastest && d.steps < kShortChunk)) {
        T *C_to = d.C ? d.C : s.C, *n_to = d.n ? d.n : s.n;
        for (int64_t t = 0; t < d.steps; ++t) {
            if (d.reset && d.reset[t]) C = n = nullptr;
            if (d.mask && !d.mask[t]) {
                zero_output(d, t);
            } else {
                memory_step(d, t, C, d.values, n, C_to, d.values, n_to, key, h);
                C = C_to, n = n_to;
            }
        }
        const int64_t count = d.keys * d.values;
        if (d.C && C != d.C)  // no step was used since the last reset
            for (int64_t k = 0; k < count; ++k) d.C[k] = C ? C[k] : T(0);
        if (d.n && n != d.n)
            for (int64_t k = 0; k < d.keys; ++k) d.n[k] = n ? n[k] : T(0);
        return;
    }
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
            if (d.mask && !d.mask[t]) {
                zero_output(d, t);
            } else {
                memory_step<T>(d, t, empty ? nullptr : s.C, s.value_row, s.n, s.C, s.value_row, s.n, key, h);
                empty = false;
            }
        }
    }
    if (d.C && empty) load_state<T>(d, s, nullptr, nullptr, s.C, s.n);
    if (d.C) store_state(d, s, d.C, d.n);
}

}  // namespace
}  // namespace cellstack
