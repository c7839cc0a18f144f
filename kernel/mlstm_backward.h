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
    T *Q, *K, *G, *GE, *V_columns, *G_columns, *X, *A, *dQ, *dK, *dV, *columns, *dsum, *dot, *dC, *dn;
    T *through_h, *of_weights;
    ChunkBack(const Chunk<T>& s, Carve<T>& carve) {
        Q = carve(s.steps * s.key_row), K = carve(s.steps * s.key_row);
        G = carve(s.steps * s.value_row), GE = carve(s.steps * s.value_row), V_columns = carve(s.values * s.step_row);
        G_columns = carve(s.values * s.step_row), X = carve(s.steps * s.step_row), A = carve(s.steps * s.step_row);
        dQ = carve(s.steps * s.key_row), dK = carve(s.steps * s.key_row), dV = carve(s.steps * s.value_row);
        columns = carve(s.keys * s.step_row), dsum = carve(s.steps), dot = carve(s.steps);
        dC = carve(s.keys * s.value_row), dn = carve(s.keys);
        through_h = carve(s.steps), of_weights = carve(s.steps);
    }
};

// to [steps][keys] = (matrix [keys][values]·columns [values][steps])ᵀ.
template <class T>
void multiply_columns(const Result<T>& to, const Chunk<T>& s, T* scratch, const T* matrix, const T* columns,
                      int64_t steps) {
    constexpr int W = Vec<T>::W;
    multiply<Range::kAll>(scratch, s.step_row, false, {matrix, s.value_row, 1, columns, s.step_row}, s.keys, steps,
                          s.values);
    for (int64_t k = 0; k < s.keys; k += W)
        for (int64_t t = 0; t < steps; t += W) {
            V<T> square[W];
            UNROLL
            for (int r = 0; r < W; ++r) square[r] = load(scratch + (k + r) * s.step_row + t);
            transpose<T>(square);
            for (int r = 0; r < W && t + r < steps; ++r) store(to.at + (t + r) * to.row + k, square[r]);
        }
}

// S that the forward pass kept of a chunk; null: none.
template <class T>
const T* kept_scores(const MemoryHead<T>& d, const Chunk<T>& s, int64_t first) {
    const T* rows = d.scores ? d.scores + first * s.step_row : nullptr;
    return rows && rows[s.step_row - 1] == rows[s.step_row - 1] ? rows : nullptr;
}

// What one pass over the steps of a chunk computes: S = (Q·Kᵀ)∘D/N, unless it was kept, X, the gradients of log D, A,
// those of Q·Kᵀ, and by step the gradients of nᵀq in `dsum`, and of m, through ε, in `through_h`. s.e becomes e/N.
template <class T>
void scores_back(const MemoryHead<T>& d, Chunk<T>& s, ChunkBack<T>& g, const Source<T>& q, const Source<T>& dy,
                 int64_t first, int64_t steps, const T* n, bool empty, const T* kept) {
    constexpr int W = Vec<T>::W;
    const uint8_t* mask = d.mask ? d.mask + first : nullptr;
    const Factors<T> of_scores{q.at, q.row, 1, s.K_columns, s.step_row};
    const Factors<T> of_h{dy.at, dy.row, 1, g.V_columns, s.step_row};
    T e = 1;
    memset(s.shares, 0, size_t(s.steps) * sizeof(T));
    for (int64_t r = 0; r < steps; r += kBlock) {
        const int64_t end = r + kBlock < steps ? r + kBlock : steps;
        if (!kept) multiply_triangle(s.S, s.step_row, of_scores, r, end, s.keys);
        multiply_triangle(g.A, s.step_row, of_h, r, end, s.values);
        for (int64_t t = r; t < end; ++t) {
            const T* gates = d.gates + (first + t) * d.gate_step;
            T *A = g.A + t * s.step_row, *X = g.X + t * s.step_row, *own = s.S + t * s.step_row;
            const T *S = kept ? kept + t * s.step_row : own, floor = gates[kFloor * d.gate];
            e *= gates[kForgetGate * d.gate];
            next_shares(s.shares, t, d.scale * gates[kInputGate * d.gate], gates[kForgetGate * d.gate]);
            T sum = kept ? S[s.step_row - 1] : apply_shares(own, s.shares, t);
            if (!kept && !empty) sum += e * dot_of(q.at + t * q.row, n, s.keys);
            const T by = divided(d, sum, floor), size = sum < 0 ? -sum : sum;
            if (!kept) scale_row(own, by, t + 1);
            const bool used = !mask || mask[t];
            const T dot = used ? dot_of(d.y + (first + t) * d.y_time, dy.at + t * dy.row, d.values) : T(0);
            const T through_sum = size < floor ? T(0) : sum < 0 ? dot : -dot;
            int64_t c = 0;
            for (; c <= t; c += W) {
                const V<T> share = load(s.shares + c), zero = splat(T(0));
                const V<T> given = load(A + c) + splat(through_sum);
                store(X + c, load(S + c) * given);
                store(A + c, share != zero ? share * splat(by) * given : zero);
            }
            for (; c < t + kRows; c += W) store(A + c, splat(T(0)));
            s.e[t] = e * by, g.dsum[t] = through_sum * by, g.through_h[t] = -dot * d.epsilon * by;
        }
    }
}

// The gradients of a chunk's ĩ and f̃, from those of D and e: of log D[t, s] in g.X, of log e[t] in g.dot, of the log of
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
        for (int64_t c = 0; c <= t; c += W) store(of_step + c, load(of_step + c) + load(g.X + t * s.step_row + c));
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
    const uint8_t* mask = d.mask ? d.mask + first : nullptr;
    const int64_t at = first * d.x_time, to = first * b.dx_time;
    find_weights(d, s, first, steps);
    const T carried = s.e[steps - 1];
    const Source<T> q(d.q + at, d.x_time, d.keys, steps, mask, g.Q, s.key_row);
    const Source<T> k(d.k + at, d.x_time, d.keys, steps, mask, g.K, s.key_row);
    if (!b.dy) memset(g.G, 0, size_t(s.steps * s.value_row) * sizeof(T));
    const Source<T> dy = b.dy ? Source<T>(b.dy + first * d.y_time, d.y_time, d.values, steps, mask, g.G, s.value_row)
                              : Source<T>(g.G, s.value_row, s.values, steps, nullptr, nullptr, 0);
    const T* kept = kept_scores(d, s, first);
    if (!kept) read_columns(s.K_columns, s.step_row, d.k + at, d.x_time, d.keys, steps, mask);
    read_columns(g.V_columns, s.step_row, d.v + at, d.x_time, d.values, steps, mask);
    scores_back(d, s, g, q, dy, first, steps, n, empty, kept);
    if (!empty) {  // the gradients of Q·C₋
        for (int64_t t = 0; t < s.steps; ++t)
            for (int64_t c = 0; c < s.values; c += W)
                store(g.GE + t * s.value_row + c,
                      t < steps ? splat(s.e[t]) * load(dy.at + t * dy.row + c) : splat(T(0)));
    }
    // dV = weights∘(K·dC) + Sᵀ·G
    const Result<T> dV(b.dv + to, b.dx_time, d.values, g.dV, s.value_row);
    if (of_state) {
        multiply<Range::kAll>(dV.at, dV.row, false, {k.at, k.row, 1, g.dC, s.value_row}, steps, s.values, s.keys);
        for (int64_t t = 0; t < steps; ++t) scale_row(dV.at + t * dV.row, s.weights[t], s.values);
    }
    multiply<Range::kFromRow>(dV.at, dV.row, of_state, {kept ? kept : s.S, 1, s.step_row, dy.at, dy.row}, steps,
                              s.values, steps);
    dV.finish(b.dv + to, b.dx_time, d.values, steps);
    // dQ = A·K + e∘(G·C₋ᵀ) + e∘dsum·n
    const Result<T> dQ(b.dq + to, b.dx_time, d.keys, g.dQ, s.key_row);
    if (!empty) {
        transposed(g.G_columns, s.step_row, g.GE, s.value_row, s.steps, s.values);
        multiply_columns(dQ, s, g.columns, C, g.G_columns, steps);
    }
    T e = 1;
    for (int64_t t = 0; t < steps; ++t) {
        e *= d.gates[(first + t) * d.gate_step + kForgetGate * d.gate];
        g.dot[t] = 0;
        if (empty) continue;
        T* row = dQ.at + t * dQ.row;
        for (int64_t c = 0; c < s.keys; c += W) store(row + c, fma(splat(e * g.dsum[t]), load(n + c), load(row + c)));
        g.dot[t] = dot_of(q.at + t * q.row, row, s.keys), g.dsum[t] *= e;
    }
    multiply<Range::kUpToRow>(dQ.at, dQ.row, !empty, {g.A, s.step_row, 1, k.at, k.row}, steps, s.keys, steps);
    dQ.finish(b.dq + to, b.dx_time, d.keys, steps);
    // dK = weights∘(V·dCᵀ + dn) + Aᵀ·Q
    const Result<T> dK(b.dk + to, b.dx_time, d.keys, g.dK, s.key_row);
    memset(g.of_weights, 0, size_t(s.steps) * sizeof(T));
    if (of_state) {
        multiply_columns(dK, s, g.columns, g.dC, g.V_columns, steps);
        for (int64_t t = 0; t < steps; ++t) {
            T* row = dK.at + t * dK.row;
            for (int64_t c = 0; c < s.keys; c += W)
                store(row + c, splat(s.weights[t]) * (load(row + c) + load(g.dn + c)));
            g.of_weights[t] = dot_of(k.at + t * k.row, row, s.keys);
        }
    }
    multiply<Range::kFromRow>(dK.at, dK.row, of_state, {g.A, 1, s.step_row, q.at, q.row}, steps, s.keys, steps);
    dK.finish(b.dk + to, b.dx_time, d.keys, steps);
    // the state before: dC₋ = e·dC + Qᵀ·(e∘G), dn₋ = e·dn + Qᵀ·(e∘dsum)
    T of_carried = 0;
    if (!empty) {
        if (of_state) {
            for (int64_t k = 0; k < s.keys; ++k) {
                of_carried += dot_of(C + k * s.value_row, g.dC + k * s.value_row, s.values);
                scale_row(g.dC + k * s.value_row, carried, s.values);
            }
            of_carried = carried * (of_carried + dot_of(n, g.dn, s.keys));
        }
        multiply<Range::kAll>(g.dC, s.value_row, of_state, {q.at, 1, q.row, g.GE, s.value_row}, s.keys, s.values,
                              steps);
        for (int64_t c = 0; c < s.keys; c += W) {
            V<T> sum = of_state ? splat(carried) * load(g.dn + c) : splat(T(0));
            for (int64_t t = 0; t < steps; ++t) sum = fma(splat(g.dsum[t]), load(q.at + t * q.row + c), sum);
            store(g.dn + c, sum);
        }
    }
    gate_gradients(b, s, g, first, steps, of_carried, through_m);
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
    if (!starts_empty(0)) load_state(d, s, d.C_before, d.n_before, states, states + C_size);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        T* at = states + chunk * size;
        const int64_t first = starts[chunk], steps = chunk_of(d, first);
        starts[chunk + 1] = first + steps;
        if (chunk + 1 == chunks && !given) break;
        const uint8_t* mask = d.mask ? d.mask + first : nullptr;
        find_weights(d, s, first, steps);
        read_columns(s.K_columns, s.step_row, d.k + first * d.x_time, d.x_time, d.keys, steps, mask, s.weights,
                     s.weighted);
        const Source<T> values(d.v + first * d.x_time, d.x_time, d.values, steps, mask, s.V, s.value_row);
        advance_state(s, values, steps, starts_empty(first), s.e[steps - 1], at, at + C_size, at + size,
                      at + size + C_size);
    }
    const auto product = [&](const T* state) {  // of a state and its gradient
        T sum = dot_of(state + C_size, g.dn, s.keys);
        for (int64_t k = 0; k < s.keys; ++k) sum += dot_of(state + k * s.value_row, g.dC + k * s.value_row, s.values);
        return sum;
    };
    if (given) load_state(d, s, b.dC, b.dn, g.dC, g.dn);
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
    if (!of_state && b.dC_before) load_state<T>(d, s, nullptr, nullptr, g.dC, g.dn);
    if (b.dm_before) *b.dm_before = through_m + (of_state ? product(states) : T(0));
    if (b.dC_before) store_state(d, s, g.dC, g.dn, b.dC_before, b.dn_before);
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
    if (!backward && runs_in_steps(d)) return StepScratch<T>(d, carve), carve.taken;
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
