// The backward pass of an mLSTM's memory (mlstm.h), chunk by chunk from the last one, after the states before each
// chunk were computed again.
//
// m is only a factor that C, n and e^(-m) share: with fixed C·e^m and n·e^m, h depends on m through ε alone, and the
// states after the last step through their own factor. The gradients of the gates are therefore computed with m as a
// constant, and one number, `through_m`, follows the maximum from step to step: to ĩ, or to log σ(f̃) and m₋.
#pragma once
#include "mlstm_forward.h"

namespace cellstack {
namespace {

template <class T>
struct ChunkBack {
    T *G, *GE, *V_columns, *G_columns, *A, *turned, *dQ, *dK, *dV, *columns, *dot, *dsum, *dC, *dn;
    T *through_h, *of_weights;
    ChunkBack(const Chunk<T>& s, Carve<T>& carve) {
        G = carve(s.steps * s.value_row), GE = carve(s.steps * s.value_row), V_columns = carve(s.values * s.step_row);
        G_columns = carve(s.values * s.step_row), A = carve(s.steps * s.step_row), turned = carve(s.steps * s.step_row);
        dQ = carve(s.steps * s.key_row);
        dK = carve(s.steps * s.key_row), dV = carve(s.steps * s.value_row), columns = carve(s.keys * s.step_row);
        dot = carve(s.steps), dsum = carve(s.steps);
        dC = carve(s.keys * s.value_row), dn = carve(s.keys);
        through_h = carve(s.steps), of_weights = carve(s.steps);
    }
};

template <class T>
INLINE T dot_of(const T* a, const T* b, int64_t n) {
    V<T> sum = splat(T(0));
    for (int64_t c = 0; c < n; c += Vec<T>::W) sum = fma(load(a + c), load(b + c), sum);
    return sum_of_lanes<T>(sum);
}

// to [steps][keys] = (matrix [keys][values]·columns [values][steps])ᵀ.
template <class T>
void multiply_columns(T* to, const Chunk<T>& s, T* scratch, const T* matrix, const T* columns, int64_t rows) {
    multiply(scratch, s.step_row, false, matrix, s.value_row, int64_t(1), columns, s.step_row, s.keys, rows, s.values);
    transposed(to, s.key_row, scratch, s.step_row, s.keys, rows);
}

// to [step] += Σ a[t][step]·panel[t] over the steps t from `step` on. `turned`: scratch for the transpose of a, along
// whose rows the sums then run: down the columns, each number would be in another line.
template <class T>
void multiply_later(T* to, int64_t to_row, const T* a, int64_t a_row, T* turned, const T* panel, int64_t panel_step,
                    int64_t steps, int64_t columns) {
    constexpr int W = Vec<T>::W;
    static constexpr Tiles<T> tiles = tiles_of<Plain<T>>();
    const int64_t rows = whole_vectors<T>(steps);
    transposed(turned, a_row, a, a_row, rows, rows);
    Tile<T> t{};
    t.a_step = 1, t.panel_step = panel_step, t.panel_vector = t.to_vector = W, t.to_row = to_row, t.add = true;
    each_tile(steps, [&](int64_t r, int R) INLINED {
        for (int k = 0; k < R; ++k) t.a[k] = turned + (r + k) * a_row + r;
        t.depth = steps - r;
        for (int64_t c = 0; c < columns; c += 4 * W) {
            t.panel = panel + r * panel_step + c, t.to = to + r * to_row + c;
            tiles.of[R - 1][(columns - c < 4 * W ? columns - c : 4 * W) / W - 1](t);
        }
    });
}

// The gradients of h at the steps of a chunk: G = dh/N, where h = (S·V + e∘(Q·C₋))/N, that of nᵀq in `dsum`, and that
// of m, through ε, in `through_h`.
template <class T>
void output_gradients(const MemoryHeadBack<T>& b, Chunk<T>& s, ChunkBack<T>& g, int64_t first, int64_t steps) {
    constexpr int W = Vec<T>::W;
    const MemoryHead<T>& d = b.head;
    const uint8_t* mask = d.mask ? d.mask + first : nullptr;
    const int64_t rows = whole_vectors<T>(steps);
    if (b.dy) {
        copy_rows(g.G, s.value_row, s.values, b.dy + first * d.y_time, d.y_time, steps, d.values, T(1), mask);
    } else {
        for (int64_t c = 0; c < rows * s.value_row; c += W) store(g.G + c, splat(T(0)));
    }
    for (int64_t t = 0; t < rows; ++t) {
        T dot = 0, dsum = 0, through = 0;
        if (t < steps && (!mask || mask[t])) {
            const T *y = d.y + (first + t) * d.y_time, *dh = g.G + t * s.value_row;
            V<T> sum = splat(T(0));
            for (int64_t c = 0; c < d.values; c += W)
                sum = fma(load_lanes(y + c, d.values - c < W ? int(d.values - c) : W), load(dh + c), sum);
            dot = sum_of_lanes<T>(sum);
            const T floor = d.gates[(first + t) * d.gate_step + kFloor * d.gate];
            const T size = s.sums[t] < 0 ? -s.sums[t] : s.sums[t],
                    by = T(1) / ((size < floor ? floor : size) + d.epsilon);
            dsum = size < floor ? T(0) : (s.sums[t] < 0 ? dot : -dot) * by;
            through = -dot * d.epsilon * by;
            const V<T> factor = splat(by);
            for (int64_t c = 0; c < s.values; c += W)
                store(g.G + t * s.value_row + c, factor * load(g.G + t * s.value_row + c));
        }
        g.dsum[t] = dsum, g.through_h[t] = through;
        const T e = t < steps ? s.e[t] : T(0);
        for (int64_t c = 0; c < s.values; c += W)
            store(g.GE + t * s.value_row + c, splat(e) * load(g.G + t * s.value_row + c));
    }
}

// The gradients of a chunk's ĩ and f̃, from those of D and e: of log D[t, s] in g.S, of log e[t] in g.dot, of the log of
// the weights of the steps in g.of_weights, of e of the last step, in the state after it, in `kept`.
template <class T>
void gate_gradients(const MemoryHeadBack<T>& b, Chunk<T>& s, ChunkBack<T>& g, int64_t first, int64_t steps, T kept,
                    T& through_m) {
    constexpr int W = Vec<T>::W;
    const MemoryHead<T>& d = b.head;
    // log D[t, s] = log i[s] + Σ log f over (s, t]: the sums over t ≥ τ of the gradients, for every s, while τ falls.
    T* of_step = g.of_weights;
    for (int64_t t = steps; t-- > 0;) {
        const int64_t at = first + t;
        const T* gates = d.gates + at * d.gate_step;
        for (int64_t c = 0; c <= t; c += W) store(of_step + c, load(of_step + c) + load(s.S + t * s.step_row + c));
        kept += g.dot[t];
        V<T> before = splat(T(0));
        int64_t c = 0;
        for (; c + W <= t; c += W) before = before + load(of_step + c);
        T dl = kept + sum_of_lanes<T>(before), di = of_step[t];
        for (; c < t; ++c) dl += of_step[c];
        const bool used = !d.mask || d.mask[at];
        T df = 0;
        if (used) {
            through_m += g.through_h[t];
            const T i = b.i[at * d.x_time];
            const bool from_input = gates[kStabiliser * d.gate] == i;
            (from_input ? di : dl) += through_m;
            if (from_input) through_m = 0;
            df = dl;
        } else {
            di = 0;
        }
        b.di[at * b.dx_time] = di, b.df[at * b.dx_time] = df;
    }
}

// `empty`: the state before the chunk is zeros, and its gradient isn't needed; `of_state`: that of the state after it
// isn't zero.
template <class T>
void memory_chunk_back(const MemoryHeadBack<T>& b, Chunk<T>& s, ChunkBack<T>& g, int64_t first, int64_t steps,
                       const T* C, const T* n, bool empty, bool of_state, T& through_m) {
    constexpr int W = Vec<T>::W;
    const MemoryHead<T>& d = b.head;
    const int64_t rows = whole_vectors<T>(steps);
    load_chunk(d, s, first, steps);
    scores(s, steps, n);
    output_gradients(b, s, g, first, steps);
    // A: the gradient of S, then of Q·Kᵀ; S: that of log D
    transposed(g.V_columns, s.step_row, s.V, s.value_row, rows, s.values);
    multiply_triangle(g.A, s.step_row, g.G, s.value_row, g.V_columns, steps, s.values);
    // dV = weights∘(K·dC) + Sᵀ·G
    if (of_state)
        multiply(g.dV, s.value_row, false, s.K, s.key_row, int64_t(1), g.dC, s.value_row, steps, s.values, s.keys);
    for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < s.values; c += W) {
            T* dV = g.dV + t * s.value_row + c;
            store(dV, of_state ? splat(s.weights[t]) * load(dV) : splat(T(0)));
        }
    multiply_later(g.dV, s.value_row, s.S, s.step_row, g.turned, g.G, s.value_row, steps, s.values);
    for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < rows; c += W) {
            T *A = g.A + t * s.step_row + c, *S = s.S + t * s.step_row + c;
            const V<T> share = load(s.D + t * s.step_row + c), score = load(S);
            const V<T> dS = load(A) + splat(g.dsum[t]), zero = splat(T(0));
            store(S, c <= t ? score * dS : zero);
            store(A, c <= t ? (share != zero ? share * dS : zero) : zero);
        }
    // dQ = A·K + e∘(G·C₋ᵀ) + e∘dsum·n
    if (!empty) {
        transposed(g.G_columns, s.step_row, g.GE, s.value_row, rows, s.values);
        multiply_columns(g.dQ, s, g.columns, C, g.G_columns, rows);
    }
    for (int64_t t = 0; t < steps; ++t) {
        const V<T> factor = splat(s.e[t] * g.dsum[t]);
        T* dQ = g.dQ + t * s.key_row;
        for (int64_t c = 0; c < s.keys; c += W)
            store(dQ + c, empty ? splat(T(0)) : fma(factor, load(n + c), load(dQ + c)));
        g.dot[t] = empty ? T(0) : dot_of(s.Q + t * s.key_row, dQ, s.keys);
    }
    multiply(g.dQ, s.key_row, true, g.A, s.step_row, int64_t(1), s.K, s.key_row, steps, s.keys, steps, true);
    // dK = weights∘(V·dCᵀ + dn) + Aᵀ·Q
    if (of_state) multiply_columns(g.dK, s, g.columns, g.dC, g.V_columns, rows);
    for (int64_t t = 0; t < rows; ++t) {
        const V<T> weight = splat(t < steps ? s.weights[t] : T(0));
        T* dK = g.dK + t * s.key_row;
        for (int64_t c = 0; c < s.keys; c += W)
            store(dK + c, of_state ? weight * (load(dK + c) + load(g.dn + c)) : splat(T(0)));
        g.of_weights[t] = of_state ? dot_of(s.K + t * s.key_row, dK, s.keys) : T(0);
    }
    multiply_later(g.dK, s.key_row, g.A, s.step_row, g.turned, s.Q, s.key_row, steps, s.keys);
    // the state before: dC₋ = e·dC + Qᵀ·(e∘G), dn₋ = e·dn + Qᵀ·(e∘dsum)
    T kept = 0;
    if (!empty) {
        const T e = s.e[steps - 1];
        if (of_state) {
            for (int64_t k = 0; k < s.keys; ++k) {
                T* dC = g.dC + k * s.value_row;
                kept += dot_of(C + k * s.value_row, dC, s.values);
                for (int64_t c = 0; c < s.values; c += W) store(dC + c, splat(e) * load(dC + c));
            }
            kept = e * (kept + dot_of(n, g.dn, s.keys));
        }
        multiply(g.dC, s.value_row, of_state, s.Q, int64_t(1), s.key_row, g.GE, s.value_row, s.keys, s.values, steps);
        for (int64_t c = 0; c < s.keys; c += W) {
            V<T> sum = of_state ? splat(e) * load(g.dn + c) : splat(T(0));
            for (int64_t t = 0; t < steps; ++t)
                sum = fma(splat(s.e[t] * g.dsum[t]), load(s.Q + t * s.key_row + c), sum);
            store(g.dn + c, sum);
        }
    }
    gate_gradients(b, s, g, first, steps, kept, through_m);
    for (int64_t t = 0; t < steps; ++t) {
        const bool used = !d.mask || d.mask[first + t];
        const int64_t at = (first + t) * b.dx_time;
        for (int64_t c = 0; c < d.keys; ++c) b.dq[at + c] = used ? g.dQ[t * s.key_row + c] : T(0);
        for (int64_t c = 0; c < d.keys; ++c) b.dk[at + c] = used ? d.scale * g.dK[t * s.key_row + c] : T(0);
        for (int64_t c = 0; c < d.values; ++c) b.dv[at + c] = used ? g.dV[t * s.value_row + c] : T(0);
    }
}

template <class T>
int64_t chunks_of(const MemoryHead<T>& d) {
    int64_t count = 0;
    for (int64_t first = 0; first < d.steps; first += chunk_of(d, first)) ++count;
    return count;
}

template <class T>
void memory_head_back(const MemoryHeadBack<T>& b) {
    constexpr int W = Vec<T>::W;
    const MemoryHead<T>& d = b.head;
    Carve<T> carve{d.scratch};
    Chunk<T> s(d, carve);
    ChunkBack<T> g(s, carve);
    const int64_t chunks = chunks_of(d), C_size = s.keys * s.value_row, size = C_size + s.keys;
    auto* starts = reinterpret_cast<int64_t*>(carve(2 * (chunks + 1)));
    T* states = carve((chunks + 1) * size);  // before each chunk, and after the last one
    const bool given = b.dC || b.dn;         // a gradient of the state after the last step
    const auto starts_empty = [&](int64_t first) {
        return (first == 0 && !d.C_before && !b.dC_before) || (d.reset && d.reset[first]);
    };
    starts[0] = 0;
    load_state(d, s, d.C_before, d.n_before, states, states + C_size);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        T* at = states + chunk * size;
        const int64_t first = starts[chunk], steps = chunk_of(d, first);
        starts[chunk + 1] = first + steps;
        if (d.reset && d.reset[first]) memset(at, 0, size_t(size) * sizeof(T));
        if (chunk + 1 == chunks && !given) break;
        load_chunk(d, s, first, steps);
        advance_state(s, steps, starts_empty(first), at, at + C_size, at + size, at + size + C_size);
    }
    const auto product = [&](const T* state) {  // of a state and its gradient
        T sum = dot_of(state + C_size, g.dn, s.keys);
        for (int64_t k = 0; k < s.keys; ++k) sum += dot_of(state + k * s.value_row, g.dC + k * s.value_row, s.values);
        return sum;
    };
    load_state(d, s, b.dC, b.dn, g.dC, g.dn);
    T through_m = (b.dm ? *b.dm : T(0)) - (given ? product(states + chunks * size) : T(0));
    bool of_state = given;
    for (int64_t chunk = chunks; chunk-- > 0;) {
        const T* at = states + chunk * size;
        const int64_t first = starts[chunk];
        const bool empty = starts_empty(first);
        memory_chunk_back(b, s, g, first, starts[chunk + 1] - first, at, at + C_size, empty, of_state, through_m);
        of_state = !empty;
        if (d.reset && d.reset[first]) through_m = 0;
    }
    if (!of_state) memset(g.dC, 0, size_t(C_size) * sizeof(T)), memset(g.dn, 0, size_t(s.keys) * sizeof(T));
    if (b.dm_before) *b.dm_before = through_m + product(states);
    for (int64_t k = 0; b.dC_before && k < d.keys; ++k)
        memcpy(b.dC_before + k * d.values, g.dC + k * s.value_row, size_t(d.values) * sizeof(T));
    if (b.dn_before) memcpy(b.dn_before, g.dn, size_t(d.keys) * sizeof(T));
    for (int64_t t = 0; t < d.steps; t += W) {  // the derivative of log σ(f̃) is σ(-f̃)
        const int lanes = d.steps - t < W ? int(d.steps - t) : W;
        T f[W];
        for (int l = 0; l < lanes; ++l) f[l] = b.f[(t + l) * d.x_time];
        const V<T> slope = sigmoid<T>(-load_lanes(f, lanes));
        for (int l = 0; l < lanes; ++l) b.df[(t + l) * b.dx_time] *= slope[l];
    }
}

// How many numbers of scratch memory a pass over a head needs.
template <class T>
int64_t memory_scratch(const MemoryHead<T>& d, bool backward) {
    Carve<T> carve{nullptr};
    const Chunk<T> s(d, carve);
    carve(s.keys), carve(s.values);
    if (backward) {
        const int64_t chunks = chunks_of(d);
        ChunkBack<T>(s, carve), carve(2 * (chunks + 1)), carve((chunks + 1) * (s.keys * s.value_row + s.keys));
    }
    return carve.taken;
}

}  // namespace
}  // namespace cellstack
