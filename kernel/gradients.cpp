// The backward pass: goes down a stack layer by layer; cuts each into steps that fit a cache, rows for the way back
// through time, and tasks for the gradients of x and of the weights.
#include <algorithm>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {
namespace {

// As much dz as stays in a second-level cache until the gradients have been made of it.
constexpr int64_t kGradientBytes = int64_t(512) << 10;
constexpr int64_t kInputRows = 96;  // of a task of the gradient of x

template <class T>
void backward_layer(const Sequences<T>& in, const Layer<T>& s, const Gradients<T>& g, int threads) {
    const Leaf<T>& leaf = leaf_of<T>(current());
    const Description& d = s.weights->description();
    const Arrays<const T>& arrays = s.weights->arrays();
    const int64_t B = in.batch, steps = in.steps, I = d.input, H = d.units, P = d.output;
    const int G = d.gates();
    const int64_t W = leaf.width, wide = 4 * W, deep = G * W;
    const int64_t blocks = ceil_div(H, W), output_blocks = ceil_div(P, W);
    const auto columns_of = [&](int64_t n) { return ceil_div(n, wide) * wide; };
    const int64_t columns = columns_of(P), unit_columns = columns_of(H);
    const bool lstm = d.kind == kLstm, by_rows = !d.plain(), reset_before = d.kind == kGru && !d.reset_after;
    const auto wanted = [](const T* out, int64_t count) { return out ? count : 0; };
    // Each array of the cell, its size, and its place among the sums that rows keep for themselves (-1: none).
    struct Entry {
        T* out;
        int64_t count;
        int vector, gates;
    };
    const Arrays<T>& to = g.arrays;
    const Entry entries[] = {
        {to.kernel, I * G * H, -1, 0},
        {to.recurrent_kernel, P * G * H, -1, 0},
        {to.bias, G * H, d.layer_norm ? kBias : -1, G},
        {d.kind == kGru && d.reset_after && to.bias ? to.bias + G * H : nullptr, G * H,
         d.layer_norm ? kRecurrentBias : -1, G},
        {to.peepholes, int64_t(G - 1) * H, kPeepholes, G - 1},
        {to.projection, H * P, -1, 0},
        {to.kernel_gain, G * H, kKernelGain, G},
        {to.recurrent_gain, G * H, kRecurrentGain, G},
        {to.cell_gain, H, kCellGain, 1},
        {to.cell_bias, H, kCellBias, 1},
    };
    T* const recurrent_bias = entries[3].out;
    if (B * steps == 0)
        for (const Entry& e : entries) std::fill_n(e.out, wanted(e.out, e.count), T(0));
    threads = useful_threads(threads, B * steps * 2 * G * H * (I + P));
    const int groups = int(std::max<int64_t>(1, std::min<int64_t>(B, threads)));
    const int64_t chunk = std::max<int64_t>(
        1, std::min(steps, kGradientBytes / int64_t(blocks * deep * sizeof(T)) / std::max<int64_t>(B, 1)));

    const bool vectors_kept = d.peepholes || d.layer_norm;
    const auto if_ = [](bool needed, int64_t count) { return needed ? Parts<T>::size(count) : 0; };
    const int64_t rows_h = Parts<T>::size(B * columns), rows_c = if_(lstm, B * blocks * W);
    const int64_t transposed = Parts<T>::size(columns * blocks * deep);
    const int64_t transposed_in = if_(g.dx, columns_of(I) * blocks * deep);
    const int64_t transposed_out = if_(d.projects(), unit_columns * output_blocks * W);
    const int64_t chunk_dz = Parts<T>::size(blocks * chunk * B * deep);
    const int64_t chunk_dp = if_(d.projects(), output_blocks * chunk * B * W);
    const int64_t chunk_m = if_(d.projects() || reset_before, chunk * B * H);
    const int64_t dropped = if_(s.drops.recurrent, chunk * B * P);
    const int64_t rows_dm = if_(by_rows, B * unit_columns), lines = if_(by_rows, 2 * blocks * W);
    const int64_t vectors = if_(vectors_kept, B * kVectors * blocks * W);
    const int64_t sums = Parts<T>::size(blocks * (I + P + 2 + (reset_before ? P : 0)) * deep);
    const int64_t sums_out = if_(d.projects(), output_blocks * (H + 1) * W);
    const int64_t most = std::max({I, P, H});
    const int64_t copies = Parts<T>::size(gradient_copy(I) + 2 * gradient_copy(most));
    Scratch<T> scratch(3 * rows_h + 2 * rows_c + (1 + reset_before) * transposed + transposed_in + transposed_out +
                       (1 + d.apart()) * chunk_dz + chunk_dp + chunk_m + dropped + rows_dm + groups * lines + vectors +
                       sums + sums_out + threads * copies + Parts<T>::size(most));
    Parts<T> parts(scratch.get());
    const auto take = [&](int64_t count) { return count ? parts.take(count) : nullptr; };
    T *dh = take(rows_h), *dc = take(rows_c), *carry = take(rows_h);
    T *initial_h = take(rows_h), *initial_c = take(rows_c);
    T *recurrent_t = take(transposed), *candidate_t = reset_before ? take(transposed) : nullptr;
    T *kernel_t = take(transposed_in), *projection_t = take(transposed_out);
    T *dz = take(chunk_dz), *dq = d.apart() ? take(chunk_dz) : dz, *dp = take(chunk_dp), *m_rows_at = take(chunk_m);
    T *h_dropped = take(dropped), *dm = take(rows_dm), *line = take(groups * lines), *vector_sums = take(vectors);
    T *gradients = take(sums), *gradients_out = take(sums_out), *copied = take(threads * copies), *zeros = take(most);
    std::fill(zeros, zeros + most, T(0));
    std::fill_n(vector_sums, vectors, T(0));
    std::fill_n(initial_h, rows_h, T(0));
    std::fill_n(initial_c, rows_c, T(0));
    const Matrix<T> recurrent = matrix_of(d, arrays.recurrent_kernel, P, H, G);
    leaf.pack_transposed(recurrent_t, recurrent, 0, reset_before ? 2 : G);
    if (candidate_t) leaf.pack_transposed(candidate_t, recurrent, 2, 3);
    if (g.dx) leaf.pack_transposed(kernel_t, matrix_of(d, arrays.kernel, I, H, G), 0, G);
    if (projection_t) leaf.pack_transposed(projection_t, matrix_of(d, arrays.projection, H, P, 1), 0, 1);
    pad(dh, columns, g.dhn, B, P);
    if (dc) pad(dc, blocks * W, g.dcn, B, H);

    // Back through the time of a chunk, rows apart.
    const auto through_time = [&](int group, int64_t first_step, int64_t last_step) {
        const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first;
        const auto at = [&](auto* all, int64_t per_row) { return all ? all + first * per_row : nullptr; };
        Backward<T> f{};
        f.d = &d, f.arrays = arrays, f.blocks = blocks, f.output_blocks = output_blocks;
        f.rows = rows, f.steps = steps, f.batch = B, f.row0 = first;
        f.first = first_step, f.last = last_step, f.reverse = in.reverse;
        f.recurrent_t = recurrent_t, f.candidate_t = candidate_t, f.projection_t = projection_t;
        f.gates = at(s.gates, steps * d.planes() * H), f.cells = at(s.cells, steps * H);
        f.y_row = in.row_stride(P), f.y_time = in.time_stride(P), f.y = at(s.y, f.y_row), f.dy = at(g.dy, f.y_row);
        f.norms = at(s.norms, steps * d.norm_size()), f.h0 = at(s.h0, P), f.c0 = at(s.c0, H);
        f.mask = at(in.mask, steps), f.reset = at(in.reset, steps);
        f.recurrent_dropout = at(s.drops.recurrent, P);
        f.zoneout = at(s.drops.zoneout, steps * P), f.zoneout_cell = at(s.drops.zoneout_cell, steps * H);
        f.dgates = at(g.dgates, steps * d.planes() * H), f.dcells = at(g.dcells, steps * H);
        f.dh = at(dh, columns), f.dc = at(dc, blocks * W), f.carry = at(carry, columns), f.dm = at(dm, unit_columns);
        f.dinitial_h = at(initial_h, columns), f.dinitial_c = at(initial_c, blocks * W);
        f.vectors = at(vector_sums, kVectors * blocks * W);
        f.dz = dz, f.dq = dq, f.dp = dp, f.m = m_rows_at, f.line = line ? line + group * lines : nullptr;
        leaf.backward(f);
    };

    // Where the rows of dz came from, in its order: x, the h that went into the step, and dx.
    std::vector<const T*> x_rows(size_t(chunk * B)), h_rows(size_t(chunk * B)), m_rows(size_t(chunk * B));
    std::vector<T*> dx_rows(size_t(chunk * B));
    const T* initial = arrays.initial_h ? arrays.initial_h : zeros;
    const auto h_before = [&](int64_t b, int64_t n, int64_t t) -> const T* {
        if (in.reset && in.reset[b * steps + t]) return initial;
        if (n == 0) return s.h0 ? s.h0 + b * P : initial;
        return s.y + b * in.row_stride(P) + (in.reverse ? steps - n : n - 1) * in.time_stride(P);
    };
    const auto find_rows = [&](int64_t first, int64_t last) {
        for (int64_t n = first, m = 0; n < last; ++n)
            for (int64_t b = 0; b < B; ++b, ++m) {
                const int64_t t = in.reverse ? steps - 1 - n : n;
                // dz is zero where the mask leaves a step out; x and h may be anything there, NaN too, and must not
                // meet it
                const bool used = !in.mask || in.mask[b * steps + t];
                x_rows[m] = used ? in.x + b * in.stride_batch + t * in.stride_time : zeros;
                dx_rows[m] = g.dx ? g.dx + b * in.row_stride(I) + t * in.time_stride(I) : nullptr;
                h_rows[m] = used ? h_before(b, n, t) : zeros;
                if (s.drops.recurrent) {
                    T* product = h_dropped + m * P;
                    for (int64_t k = 0; k < P; ++k) product[k] = h_rows[m][k] * s.drops.recurrent[b * P + k];
                    h_rows[m] = product;
                }
                if (m_rows_at) m_rows[m] = m_rows_at + m * H;
                if (reset_before) {
                    const T* r = s.gates + ((b * steps + t) * 3 + 1) * H;
                    for (int64_t k = 0; k < H; ++k) m_rows_at[m * H + k] = r[k] * h_rows[m][k];
                }
            }
    };

    // Matrices whose gradients are made of the same dz.
    struct Pass {
        const T* dz;
        int gates;
        int64_t units, blocks, tasks;
        struct {
            const std::vector<const T*>* rows;
            T* out;
            int64_t columns;
            int first_gate, last_gate;
        } of[3];
        T *bias, *sums;
    };
    std::vector<Pass> passes;
    const auto add_pass = [&](Pass pass) {
        bool any = pass.bias;
        for (auto& of : pass.of) {
            if (!of.out) of.columns = 0;
            any = any || of.out;
        }
        pass.tasks = std::min<int64_t>(threads, pass.blocks);
        if (any) passes.push_back(pass);
    };
    T* const bias = d.layer_norm ? nullptr : to.bias;
    const int over_h = reset_before ? 2 : G;
    if (dq == dz)
        add_pass({dz,
                  G,
                  H,
                  blocks,
                  0,
                  {{&x_rows, to.kernel, I, 0, G},
                   {&h_rows, to.recurrent_kernel, P, 0, over_h},
                   {&m_rows, reset_before ? to.recurrent_kernel : nullptr, P, 2, 3}},
                  bias,
                  gradients});
    else {
        add_pass({dz, G, H, blocks, 0, {{&x_rows, to.kernel, I, 0, G}, {}, {}}, bias, gradients});
        add_pass({dq,
                  G,
                  H,
                  blocks,
                  0,
                  {{&h_rows, to.recurrent_kernel, P, 0, G}, {}, {}},
                  d.layer_norm ? nullptr : recurrent_bias,
                  gradients + blocks * (I + 1) * deep});
    }
    if (d.projects())
        add_pass({dp, 1, P, output_blocks, 0, {{&m_rows, to.projection, H, 0, 1}, {}, {}}, nullptr, gradients_out});
    int64_t weight_tasks = 0;
    for (const Pass& pass : passes) weight_tasks += pass.tasks;

    for (int64_t last = steps; last > 0 && B > 0; last -= std::min(chunk, last)) {
        const int64_t first = std::max<int64_t>(0, last - chunk), rows = (last - first) * B;
        parallel(groups, [&](int group) {
            FlushDenormals flush;
            through_time(group, first, last);
        });
        find_rows(first, last);
        // Every task writes a part of its own, so the bits do not depend on which thread takes it.
        const int64_t tasks = weight_tasks + (g.dx ? ceil_div(rows, kInputRows) : 0);
        std::atomic<int64_t> next{0};
        parallel(int(std::min<int64_t>(threads, tasks)), [&](int k) {
            FlushDenormals flush;
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
                if (task >= weight_tasks) {
                    const int64_t row = (task - weight_tasks) * kInputRows;
                    leaf.input_gradient(dz, G, blocks, rows, kernel_t, I, row, std::min(rows, row + kInputRows),
                                        dx_rows.data());
                    continue;
                }
                size_t which = 0;
                while (task >= passes[which].tasks) task -= passes[which++].tasks;
                const Pass& pass = passes[which];
                const int64_t panel = pass.gates * W;
                WeightGradient<T> f{};
                f.gates = pass.gates, f.rows = d.rows, f.dz = pass.dz, f.dz_rows = rows, f.units = pass.units;
                for (int gate = 0; gate < pass.gates; ++gate) f.places[gate] = pass.gates == 1 ? 0 : d.place(gate);
                f.first = pass.blocks * task / pass.tasks, f.last = pass.blocks * (task + 1) / pass.tasks;
                T *copy = copied + k * copies, *sum = pass.sums;
                for (int o = 0; o < 3; ++o) {
                    const auto& of = pass.of[o];
                    f.of[o] = {of.rows ? of.rows->data() : nullptr, of.columns, of.first_gate, of.last_gate, of.out,
                               sum + f.first * of.columns * panel,  copy};
                    sum += pass.blocks * of.columns * panel, copy += of.columns ? gradient_copy(of.columns) : 0;
                }
                f.bias = pass.bias, f.bias_sums = sum + f.first * panel;
                f.more = last < steps, f.write = first == 0;
                leaf.weight_gradient(f);
            }
        });
    }
    for (const Entry& e : entries) {
        if (!e.out || e.vector < 0 || B * steps == 0) continue;
        for (int gate = 0; gate < e.gates; ++gate)
            for (int64_t k = 0; k < H; ++k) {
                T sum = 0;
                for (int64_t b = 0; b < B; ++b) sum += vector_sums[(b * kVectors + e.vector + gate) * blocks * W + k];
                e.out[gate * H + k] = sum;
            }
    }
    // An initial state has a gradient from rows that started afresh, and from the start, where none was given.
    const auto total = [&](T* out, const T* fresh, const T* start, int64_t stride, int64_t width) {
        for (int64_t k = 0; out && k < width; ++k) {
            out[k] = 0;
            for (int64_t b = 0; b < B; ++b) out[k] += fresh[b * stride + k] + (start ? start[b * stride + k] : T(0));
        }
    };
    total(to.initial_h, initial_h, s.h0 ? nullptr : dh, columns, P);
    if (lstm) total(to.initial_c, initial_c, s.c0 ? nullptr : dc, blocks * W, H);
    if (g.dh0) unpad(g.dh0, dh, columns, B, P);
    if (g.dc0) unpad(g.dc0, dc, blocks * W, B, H);
}

// Whether any gradient of a layer is wanted.
template <class T>
bool wanted(const Gradients<T>& g) {
    const Arrays<T>& a = g.arrays;
    for (const T* out : {g.dx, g.dh0, g.dc0, a.kernel, a.recurrent_kernel, a.bias, a.peepholes, a.projection,
                         a.kernel_gain, a.recurrent_gain, a.cell_gain, a.cell_bias, a.initial_h, a.initial_c})
        if (out) return true;
    return false;
}

}  // namespace

template <class T>
void backward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const std::vector<Gradients<T>>& gradients,
              int threads) {
    const int depth = int(layers.size());
    int lowest = 0;
    while (lowest < depth && !wanted(gradients[lowest])) ++lowest;
    // What comes down from layer to layer, the gradient of x of the one and of y of the other: in two places in turn.
    const auto numbers = [&](int l) { return in.batch * in.steps * layers[l].weights->description().output; };
    int64_t most = 0;
    for (int l = lowest; l + 1 < depth; ++l) most = std::max(most, Parts<T>::size(numbers(l)));
    Scratch<T> between(2 * most);
    const T* above = nullptr;
    for (int l = depth - 1; l >= lowest; --l) {
        Sequences<T> own = in;
        Gradients<T> g = gradients[l];
        if (l) {
            const int64_t width = layers[l].weights->description().input;
            own.x = layers[l - 1].y, own.stride_time = in.time_stride(width), own.stride_batch = in.row_stride(width);
        }
        if (above) {
            T* sum = between.get() + (l + 1) % 2 * most;
            for (int64_t k = 0; g.dy && k < numbers(l); ++k) sum[k] += g.dy[k];
            g.dy = above;
        }
        if (l > lowest) above = g.dx = between.get() + l % 2 * most;
        backward_layer(own, layers[l], g, threads);
    }
}

template void backward(const Sequences<float>&, const std::vector<Layer<float>>&, const std::vector<Gradients<float>>&,
                       int);
template void backward(const Sequences<double>&, const std::vector<Layer<double>>&,
                       const std::vector<Gradients<double>>&, int);

}  // namespace cellstack
