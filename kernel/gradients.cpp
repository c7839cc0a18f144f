// The backward pass: processes a stack layer by layer, from the top, in chunks of steps that fit into a cache; divides
// rows or units among threads for the pass through time, and the gradients of x and of the weights into tasks.
#include <algorithm>
#include <deque>
#include <memory>
#include <utility>

#include "cell.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace cellstack {
namespace {

// Bytes of dz that stay in a second-level cache until the gradients have been computed from them. It is the same on
// every machine: the order of the sums, and so their bits, depends on it.
constexpr int64_t kGradientBytes = int64_t(1) << 20;
constexpr int64_t kInputRows = 96;   // most per task of the gradient of x
constexpr int64_t kAgainRows = 192;  // whose gates a thread recomputes at a time

template <class T>
bool any(T* const (&pointers)[kStates]) {
    return std::any_of(pointers, pointers + kStates, [](T* p) { return p; });
}

// Whether threads may divide the units of a layer: a unit depends on others only through their dz. The gradient of a
// scalar is a sum over units.
bool divides_back(const Description& d) { return !d.layer_norm && !d.projects() && !d.scalar && !d.backbone_units; }

// A rough estimate, in nanoseconds, of the time of some rows and panels of a step, to compare cuts. A tile of up to six
// rows processes `depth` vectors of a panel (half as many for pairs), and prefetches part of the next one; weights that
// don't fit into the core's own cache take at least the time of reading them from a slower level.
double step_cost_back(int64_t rows, int64_t panels, int64_t depth, int64_t panel_bytes) {
    const int64_t tiles = ceil_div(rows, 6), cycles = depth * std::max(2 * rows + tiles, 4 * tiles);
    const double weights = double(panels) * double(panel_bytes);
    return std::max(double(panels * cycles) / 3, weights > resident_bytes() ? weights / 30 : 0);
}

// How the pass through time is divided among threads: groups of rows, and shares of the units in each group.
Cut cut_back(const Description& d, int64_t B, int64_t chunk, int64_t width, size_t bytes, bool pairs, int threads) {
    const int64_t panels = ceil_div(d.output, 4 * width);
    const int64_t depth = ceil_div(d.units / d.heads, width) * d.gates() * width / (pairs ? 2 : 1);
    const auto cost = [&](const Cut& cut) {
        const double alone = step_cost_back(ceil_div(B, cut.groups), ceil_div(panels, cut.shares), depth,
                                            depth * 4 * width * int64_t(bytes));
        return alone + (cut.shares > 1 ? lockstep_latency() * phases_of_step(d) : 0);
    };
    Cut best{1, 1, 1, chunk};
    for (int groups = 1; groups <= std::min<int64_t>(B, threads); ++groups) {
        const int most = divides_back(d) ? int(std::min<int64_t>(panels, threads / groups)) : 1;
        for (const int shares : {1, most})
            if (const Cut cut{groups, 1, shares, chunk}; cost(cut) < cost(best)) best = cut;
    }
    return best;
}

// The backward pass of one layer, chunk by chunk from the last step to the first: each chunk first passes through time,
// and then the gradients that are sums over its dz are computed.
template <class T>
class BackwardLayer {
  public:
    BackwardLayer(const Sequences<T>& in, const Layer<T>& s, const Gradients<T>& g, int threads);
    void run();

  private:
    // Matrices whose gradients are computed from the same dz.
    struct Pass {
        const T* dz;
        int gates;
        int64_t units, blocks, tasks;
        struct {
            const std::vector<const T*>* rows;
            T* out;
            int64_t columns;
            int first_gate, last_gate;
            int64_t heads;
        } of[3];
        T *bias, *sums;
    };
    void clear() const;
    void take_memory();
    void transpose_weights();
    void list_passes();
    void add_pass(Pass pass);
    int64_t phases(int64_t first, int64_t last) const;
    const T* state_before(int state, int64_t b, int64_t n, int64_t t) const;
    void find_rows(int64_t first, int64_t last);
    void find_products(int64_t first, int64_t last);
    void make_gates(int64_t first, int64_t last);
    Backward<T> through_time(int group, int share, int64_t first, int64_t last) const;
    void go_back(int64_t first, int64_t last);
    void sum_gradients(int64_t first, int64_t last);
    void pass_on(int64_t rows, int64_t first, int64_t last) const;
    void sum_weights(int64_t task, int thread, size_t& copied_for, int64_t first, int64_t last);
    void sum_rows() const;
    void sum_initial(T* out, const T* fresh, const T* start, int64_t stride, int64_t width) const;

    // The tasks of the gradient of x for some rows: a few of equal size per thread.
    int64_t input_tasks(int64_t rows) const {
        if (!g.dx) return 0;
        const int64_t few = threads == 1 ? 1 : std::min<int64_t>(4 * threads, ceil_div(rows, 6));
        return std::max(ceil_div(rows, kInputRows), few);
    }
    T* pairs_of(int thread) const { return pairs ? rows_in_pairs + thread * paired : nullptr; }
    // The time of the n-th step processed.
    int64_t time_of(int64_t n) const { return in.reverse ? steps - 1 - n : n; }
    int64_t columns_of(int64_t n) const { return ceil_div(n, wide) * wide; }

    const Sequences<T>& in;
    const Layer<T>& s;
    const Gradients<T>& g;
    const Leaf<T>& leaf = leaf_of<T>(current());
    const Description& d = s.weights->description();
    const Arrays<const T>& arrays = s.weights->arrays();
    const Arrays<T>& to = g.arrays;
    const int64_t B = in.batch, steps = in.steps, I = d.multiplied(), X = d.x_width(), H = d.units, P = d.output;
    const int G = d.gates(), sum_gates = d.sum_gates();
    const int64_t W = leaf.width, wide = 4 * W, deep = G * W;
    const int64_t blocks = ceil_div(H, W), output_blocks = ceil_div(P, W);
    const int64_t columns = columns_of(P), unit_columns = columns_of(H);
    // Of the sums over x and h: of the gates, or of the backbone.
    const int64_t U = d.sum_units(), sum_blocks = ceil_div(U, W), sum_deep = sum_gates * W;
    const int64_t layers = d.backbone_layers;
    const int64_t planes = d.planes(), intermediate_size = d.intermediate_size();
    const int inner = d.inner_states();
    const bool by_rows = !d.plain(), reset_before = d.resets_before();
    const bool again = !s.gates;  // gates are recomputed, a chunk at a time
    const bool pairs = s.weights->element() == Element::kBfloat16 && leaf.bfloat16.pairs();  // products of bfloat16
    // Blocks of the gradient of the sums.
    const Bands bands = bands_of(d, wide, sum_blocks* W, W, pairs ? Element::kBfloat16 : element_of<T>());
    const Tiles<T>& tiles = pairs ? leaf.bfloat16 : leaf.plain;
    // Whether any gradient from before the first step is requested; if not, its product is skipped.
    const bool to_start = any(g.dbefore) || any(to.initial);
    const int threads;
    const int64_t chunk;
    const Cut cut;

    std::unique_ptr<Scratch<T>> scratch;
    T *dh, *dinner[kInner]{}, *carry, *initial[kStates]{};  // initial: gradients of initial states, per row
    T *recurrent_t, *candidate_t, *kernel_t, *projection_t, *gates_t, *backbone_t;  // transposed
    T *dz, *dq, *db, *dp, *dm, *m_rows_at, *h_dropped, *line, *vector_sums, *zeros;
    T *gradients, *gradients_out, *gradients_gates, *copied;
    T* rows_in_pairs;  // `paired` numbers per thread: operands as pairs of bfloat16
    T *made_gates, *made_intermediate, *x_in, *states_in[kStates]{};        // for recomputed gates
    int64_t rows_again, lines, copies, paired, chunk_db, transposed_layer;  // the last two: of a layer of a backbone
    // For each row of dz, in its order: x, h before the step, r·h, the output of each layer of a backbone, and dx.
    std::vector<const T*> x_rows, h_rows, m_rows;
    std::vector<std::vector<const T*>> b_rows;
    std::vector<T*> dx_rows;
    std::unique_ptr<Weights<T>> packed;
    std::vector<uint8_t> mask_in;
    std::vector<Pass> passes;
    int64_t weight_tasks = 0;
};

// The number of steps per chunk: their dz, with this many numbers per row, stays in the cache. Each chunk also reads
// and writes the gradients of the matrices. Where these are larger than the cache, longer chunks take less time,
// although dz is then read from a slower level.
template <class T>
int64_t chunk_of(const Sequences<T>& in, const Description& d, int64_t numbers) {
    const int64_t sums = d.sum_gates() * d.sum_units() * (d.multiplied() + d.recurrent()) * int64_t(sizeof(T));
    const int64_t bytes = std::max(kGradientBytes, sums / 2);
    const int64_t steps = bytes / int64_t(numbers * sizeof(T)) / std::max<int64_t>(in.batch, 1);
    return std::max<int64_t>(1, std::min(in.steps, steps));
}

template <class T>
BackwardLayer<T>::BackwardLayer(const Sequences<T>& in, const Layer<T>& s, const Gradients<T>& g, int most_threads)
    : in(in),
      s(s),
      g(g),
      threads(useful_threads(
          most_threads,
          B * steps * 2 * (sum_gates * U * (I + d.recurrent()) + G * H * d.backbone_units + d.more_layers() * U * U))),
      chunk(chunk_of(in, d, blocks * deep + (d.backbone_units ? layers * sum_blocks * W : 0))),
      cut(threads > 1 ? cut_back(d, B, chunk, W, sizeof(T), pairs, threads) : Cut{1, 1, 1, chunk}) {}

// Without steps, the gradients of matrices and biases are zero.
template <class T>
void BackwardLayer<T>::clear() const {
    each_array(to, d, [](T* out, const Layout& layout) {
        if (out && layout.form != Form::kVectors) std::fill_n(out, layout.numbers, T(0));
    });
}

template <class T>
void BackwardLayer<T>::take_memory() {
    const int64_t chunk_rows = chunk * B;
    rows_again = std::min<int64_t>(chunk_rows, kAgainRows * threads);
    const auto if_ = [](bool needed, int64_t count) { return needed ? Parts<T>::size(count) : 0; };
    const int64_t rows_h = Parts<T>::size(B * columns), rows_c = Parts<T>::size(B * blocks * W);
    const int64_t transposed = if_(d.kind->recurrent, columns * bands.depth * sum_deep);
    const int64_t transposed_in = if_(g.dx, columns_of(I) * sum_blocks * sum_deep);
    const int64_t transposed_gates = if_(d.backbone_units, columns_of(U) * blocks * deep);
    const int64_t transposed_out = if_(d.projects(), unit_columns * output_blocks * W);
    transposed_layer = if_(layers > 1, columns_of(U) * sum_blocks * W);
    const int64_t chunk_dz = Parts<T>::size(blocks * chunk_rows * deep);
    chunk_db = if_(d.backbone_units, sum_blocks * chunk_rows * W);
    const int64_t chunk_dp = if_(d.projects(), output_blocks * chunk_rows * W);
    const int64_t chunk_m = if_(d.projects() || reset_before, chunk_rows * H);
    const int64_t dropped = if_(s.dropped_h(), chunk_rows * P);
    const int64_t rows_dm = if_(by_rows, B * unit_columns);
    lines = if_(by_rows, 2 * blocks * W);
    bool summed = false;
    each_array(arrays, d,
               [&](const T* array, const Layout& layout) { summed |= array && layout.form == Form::kVectors; });
    const int64_t vectors = if_(summed, B * kSums * blocks * W);
    // Columns whose sums are in scratch until they are written.
    const int64_t matrices = d.rows ? I + (1 + reset_before) * d.recurrent() : 0;
    const int64_t sums = Parts<T>::size(sum_blocks * (matrices + 2) * sum_deep);
    const int64_t sums_gates = if_(d.backbone_units, blocks * deep + d.more_layers() * sum_blocks * W);
    const int64_t sums_out = if_(d.projects() && d.rows, output_blocks * H * W);
    const int64_t most = std::max({X, P, H, d.backbone_units});
    const int64_t gates_again = if_(again, chunk_rows * planes * H),
                  intermediate_again = if_(again, chunk_rows * intermediate_size);
    const int64_t x_again = if_(again, rows_again * X), h_again = if_(again, rows_again * P);
    const int64_t c_again = if_(again, rows_again * H);
    // Rows of a step or of a task of the gradient of x; or all rows of some blocks, two rows in one.
    const int64_t paired_rows = std::max(ceil_div(B, cut.groups), std::min(kInputRows, chunk_rows));
    paired = if_(pairs, std::max(paired_rows * std::max({blocks * deep, sum_blocks * sum_deep, output_blocks * W}) / 2,
                                 kBlocksOfPanel * ceil_div(chunk_rows, 2) * deep));
    copies = Parts<T>::size(chunk_rows * (gradient_stride(I) + gradient_stride(most) * (reset_before ? 2 : 1)));
    scratch.reset(new Scratch<T>(3 * rows_h + 2 * inner * rows_c + (1 + reset_before) * transposed + transposed_in +
                                 transposed_out + transposed_gates + d.more_layers() * transposed_layer +
                                 (1 + d.apart()) * chunk_dz + layers * chunk_db + chunk_dp + chunk_m + dropped +
                                 rows_dm + cut.groups * lines + vectors + sums + sums_gates + sums_out +
                                 threads * (copies + paired) + Parts<T>::size(most) + gates_again + intermediate_again +
                                 x_again + h_again + inner * c_again));
    Parts<T> parts(scratch->get());
    const auto take = [&](int64_t count) { return count ? parts.take(count) : nullptr; };
    dh = take(rows_h), carry = take(rows_h), initial[0] = take(rows_h);
    for (int s = 0; s < inner; ++s) dinner[s] = take(rows_c), initial[1 + s] = take(rows_c);
    recurrent_t = take(transposed), candidate_t = reset_before ? take(transposed) : nullptr;
    kernel_t = take(transposed_in), projection_t = take(transposed_out), gates_t = take(transposed_gates);
    dz = take(chunk_dz), dq = d.apart() ? take(chunk_dz) : dz, dp = take(chunk_dp), m_rows_at = take(chunk_m);
    db = take(layers * chunk_db), backbone_t = take(d.more_layers() * transposed_layer);
    h_dropped = take(dropped), dm = take(rows_dm), line = take(cut.groups * lines), vector_sums = take(vectors);
    gradients = take(sums), gradients_out = take(sums_out), gradients_gates = take(sums_gates),
    copied = take(threads * copies), zeros = take(most);
    rows_in_pairs = take(threads * paired);
    made_gates = take(gates_again), made_intermediate = take(intermediate_again);
    x_in = take(x_again), states_in[0] = take(h_again);
    for (int s = 0; s < inner; ++s) states_in[1 + s] = take(c_again);
    std::fill_n(zeros, most, T(0));
    std::fill_n(vector_sums, vectors, T(0));
    for (int s = 0; s <= inner; ++s) std::fill_n(initial[s], s ? rows_c : rows_h, T(0));
    for (auto* rows : {&x_rows, &h_rows, &m_rows}) rows->resize(size_t(chunk_rows));
    b_rows.assign(size_t(layers), std::vector<const T*>(size_t(chunk_rows)));
    dx_rows.resize(size_t(chunk_rows));
    mask_in.resize(again && in.mask ? size_t(rows_again) : 0);
}

template <class T>
void BackwardLayer<T>::transpose_weights() {
    const Matrix<T> recurrent = recurrent_of(d, arrays.recurrent_kernel, bands.band());
    struct Pack {
        T* to;
        Matrix<T> from;
        int first, last;
        int64_t panels;
    };
    std::vector<Pack> packs{
        {d.kind->recurrent && (steps > 1 || to_start) ? recurrent_t : nullptr, recurrent, 0,
         reset_before ? 2 : sum_gates, ceil_div(P, wide)},
        {candidate_t, recurrent, 2, 3, ceil_div(P, wide)},
        {I ? kernel_t : nullptr, matrix_of(d, arrays.kernel, I, U, sum_gates), 0, sum_gates, ceil_div(I, wide)},
        {gates_t, matrix_of(d, arrays.gate_kernel, U, H, G), 0, G, ceil_div(U, wide)},
        {projection_t, matrix_of(d, arrays.projection, H, P, 1), 0, 1, ceil_div(H, wide)}};
    for (int64_t k = 0; k < d.more_layers(); ++k)
        packs.push_back({backbone_t + k * transposed_layer, matrix_of(d, arrays.backbone_kernel + k * U * U, U, U, 1),
                         0, 1, ceil_div(U, wide)});
    parallel(threads, [&](int k) {
        for (const auto& pack : packs)
            if (pack.to)
                leaf.pack_transposed(pack.to, pack.from, pack.first, pack.last, pack.panels * k / threads,
                                     pack.panels * (k + 1) / threads, tiles);
    });
}

template <class T>
void BackwardLayer<T>::add_pass(Pass pass) {
    bool any = pass.bias;
    for (auto& of : pass.of) {
        if (!of.out) of.columns = 0;
        any = any || of.out;
    }
    if (!any) return;
    // Small pieces: a thread whose core another program uses too computes fewer of them.
    pass.tasks = threads == 1 ? 1 : std::min<int64_t>(4 * threads, pass.blocks);
    weight_tasks += pass.tasks;
    passes.push_back(pass);
}

template <class T>
void BackwardLayer<T>::list_passes() {
    T* const bias = d.layer_norm ? nullptr : to.bias;
    if (!d.apart()) {
        add_pass({d.backbone_units ? db : dz,
                  sum_gates,
                  U,
                  sum_blocks,
                  0,
                  {{&x_rows, to.kernel, I, 0, sum_gates, 1},
                   {&h_rows, to.recurrent_kernel, P, 0, reset_before ? 2 : sum_gates, d.heads},
                   {&m_rows, reset_before ? to.recurrent_kernel : nullptr, P, 2, 3, d.heads}},
                  bias,
                  gradients});
    } else {
        add_pass({dz, G, H, blocks, 0, {{&x_rows, to.kernel, I, 0, G, 1}, {}, {}}, bias, gradients});
        T* const recurrent_bias = bias && d.two_biases() ? bias + G * H : nullptr;
        add_pass({dq,
                  G,
                  H,
                  blocks,
                  0,
                  {{&h_rows, to.recurrent_kernel, P, 0, G, d.heads}, {}, {}},
                  recurrent_bias,
                  gradients + blocks * ((d.rows ? I : 0) + 1) * deep});
    }
    for (int64_t k = 0; k < d.more_layers(); ++k)
        add_pass(
            {db + (k + 1) * chunk_db,
             1,
             U,
             sum_blocks,
             0,
             {{&b_rows[size_t(k)], to.backbone_kernel ? to.backbone_kernel + k * U * U : nullptr, U, 0, 1, 1}, {}, {}},
             to.backbone_bias ? to.backbone_bias + k * U : nullptr,
             gradients_gates + blocks * deep + k * sum_blocks * W});
    if (d.backbone_units)
        add_pass({dz,
                  G,
                  H,
                  blocks,
                  0,
                  {{&b_rows.back(), to.gate_kernel, U, 0, G, 1}, {}, {}},
                  to.gate_bias,
                  gradients_gates});
    if (d.projects())
        add_pass({dp, 1, P, output_blocks, 0, {{&m_rows, to.projection, H, 0, 1, 1}, {}, {}}, nullptr, gradients_out});
}

template <class T>
int64_t BackwardLayer<T>::phases(int64_t first, int64_t last) const {
    return phases_back(d, last - first) - !(first || to_start);
}

// The pass through time of a chunk, for some rows and some of the blocks.
template <class T>
Backward<T> BackwardLayer<T>::through_time(int group, int share, int64_t first_step, int64_t last_step) const {
    const int64_t first = B * group / cut.groups, rows = B * (group + 1) / cut.groups - first;
    const auto at = [&](auto* all, int64_t per_row) { return all ? all + first * per_row : nullptr; };
    Backward<T> f{};
    f.d = &d, f.arrays = arrays, f.blocks = blocks, f.output_blocks = output_blocks;
    f.rows = rows, f.steps = steps, f.batch = B, f.row0 = first;
    const int64_t panels = ceil_div(blocks, kBlocksOfPanel);
    f.phase = 0, f.end_phase = phases(first_step, last_step);
    f.block = panels * share / cut.shares * kBlocksOfPanel;
    f.end_block = std::min(blocks, panels * (share + 1) / cut.shares * kBlocksOfPanel);
    f.first = first_step, f.last = last_step, f.reverse = in.reverse;
    f.recurrent_t = recurrent_t, f.candidate_t = candidate_t, f.projection_t = projection_t, f.gates_t = gates_t;
    f.band = bands.band();
    f.gates = again ? made_gates : at(s.gates, steps * planes * H);
    f.intermediate = again ? made_intermediate : at(s.intermediate, steps * intermediate_size);
    f.kept_first = 0, f.kept_row = steps, f.kept_time = 1;
    if (again) {  // rows of a chunk, step by step in the processing order, like those of dz
        f.kept_row = 1, f.kept_time = in.reverse ? -B : B;
        f.kept_first = first + (in.reverse ? steps - 1 - first_step : -first_step) * B;
    }
    f.y_row = in.row_stride(P), f.y_time = in.time_stride(P), f.y = at(s.y, f.y_row), f.dy = at(g.dy, f.y_row);
    for (int k = 0; k <= inner; ++k) {
        f.before[k] = at(s.before[k], d.width(k));
        f.dinitial[k] = at(initial[k], k ? blocks * W : columns);
    }
    for (int k = 0; k < inner; ++k) {
        f.states[k] = at(s.states[k], steps * H), f.dstates[k] = at(g.dstates[k], steps * H);
        f.dinner[k] = at(dinner[k], blocks * W);
    }
    f.mask = at(in.mask, steps), f.reset = at(in.reset, steps);
    f.recurrent_dropout = at(s.dropped_h(), P), f.candidate_dropout = at(s.dropped_candidate(), P);
    f.scalar_row = in.stride_batch, f.scalar_time = in.stride_time, f.scalar = at(in.x + d.input, in.stride_batch);
    f.dscalar_row = in.row_stride(X), f.dscalar_time = in.time_stride(X);
    f.dscalar = at(g.dx ? g.dx + d.input : nullptr, f.dscalar_row);
    f.zoneout = at(s.drops.zoneout, steps * P), f.zoneout_cell = at(s.drops.zoneout_cell, steps * H);
    f.dgates = at(g.dgates, steps * planes * H), f.dh = at(dh, columns), f.carry = at(carry, columns),
    f.dm = at(dm, unit_columns);
    f.vectors = at(vector_sums, kSums * blocks * W);
    f.db_step = chunk_db, f.backbone_t = backbone_t, f.backbone_step = transposed_layer;
    f.db = db, f.dsums = d.backbone_units ? db : dq, f.sum_gates = sum_gates, f.sum_blocks = sum_blocks;
    f.dz = dz, f.dq = dq, f.dp = dp, f.m = m_rows_at, f.line = line ? line + group * lines : nullptr;
    f.tiles = &tiles, f.pairs = pairs_of(share * cut.groups + group);
    return f;
}

template <class T>
const T* BackwardLayer<T>::state_before(int state, int64_t b, int64_t n, int64_t t) const {
    const T* start = arrays.initial[state] ? arrays.initial[state] : zeros;
    if (in.reset && in.reset[b * steps + t]) return start;
    if (n == 0) return s.before[state] ? s.before[state] + b * d.width(state) : start;
    if (state) return s.states[state - 1] + (b * steps + time_of(n - 1)) * H;
    return s.y + b * in.row_stride(P) + time_of(n - 1) * in.time_stride(P);
}

template <class T>
void BackwardLayer<T>::find_rows(int64_t first, int64_t last) {
    for (int64_t n = first, m = 0; n < last; ++n)
        for (int64_t b = 0; b < B; ++b, ++m) {
            const int64_t t = time_of(n);
            // dz is zero at masked steps, but x and h may be anything there, even NaN, and must not be multiplied by it
            const bool used = !in.mask || in.mask[b * steps + t];
            x_rows[m] = used ? in.x + b * in.stride_batch + t * in.stride_time : zeros;
            dx_rows[m] = g.dx ? g.dx + b * in.row_stride(X) + t * in.time_stride(X) : nullptr;
            if (g.dx && d.scalar) dx_rows[m][d.input] = 0;  // that of a step that is used is computed later
            h_rows[m] = used ? state_before(0, b, n, t) : zeros;
            if (const T* drops = s.dropped_h()) {
                T* product = h_dropped + m * P;
                for (int64_t k = 0; k < P; ++k) product[k] = h_rows[m][k] * drops[b * P + k];
                h_rows[m] = product;
            }
            if (m_rows_at) m_rows[m] = m_rows_at + m * H;
            for (int64_t k = 0; d.backbone_units && k < layers; ++k)
                b_rows[size_t(k)][size_t(m)] = (again ? made_intermediate + m * intermediate_size
                                                      : s.intermediate + (b * steps + t) * intermediate_size) +
                                               k * d.layer_size();
        }
}

// r·h, the input of the candidate's product.
template <class T>
void BackwardLayer<T>::find_products(int64_t first, int64_t last) {
    for (int64_t n = first, m = 0; n < last; ++n)
        for (int64_t b = 0; b < B; ++b, ++m) {
            const T* r =
                again ? made_gates + (m * planes + 1) * H : s.gates + ((b * steps + time_of(n)) * planes + 1) * H;
            for (int64_t k = 0; k < H; ++k) m_rows_at[m * H + k] = r[k] * h_rows[m][k];
        }
}

// Recomputes the gates of a chunk, with the bits of the forward pass. All states are known, so all rows and steps of
// the chunk are computed as rows of a single step. The weights are packed as in the forward pass.
template <class T>
void BackwardLayer<T>::make_gates(int64_t first, int64_t last) {
    if (!packed) packed.reset(new Weights<T>(d, arrays, true, s.weights->element()));
    const int64_t all = (last - first) * B;
    for (int64_t from = 0; from < all; from += rows_again) {
        const int64_t rows = std::min(rows_again, all - from);
        for (int64_t k = 0; k < rows; ++k) {
            const int64_t m = from + k, n = first + m / B, b = m % B, t = time_of(n);
            memcpy(x_in + k * X, x_rows[m], size_t(X) * sizeof(T));
            memcpy(states_in[0] + k * P, h_rows[m], size_t(P) * sizeof(T));
            if (in.mask) mask_in[k] = in.mask[b * steps + t];
            for (int state = 1; state <= inner; ++state)
                memcpy(states_in[state] + k * H, state_before(state, b, n, t), size_t(H) * sizeof(T));
        }
        Layer<T> layer{};
        layer.weights = packed.get();
        std::copy_n(states_in, kStates, layer.before);
        layer.gates = made_gates + from * planes * H;
        layer.intermediate = made_intermediate ? made_intermediate + from * intermediate_size : nullptr;
        forward<T>({rows, 1, x_in, X, X, in.mask ? mask_in.data() : nullptr, nullptr, false}, {layer}, threads);
    }
}

template <class T>
void BackwardLayer<T>::go_back(int64_t first, int64_t last) {
    if (cut.shares == 1)
        return parallel(cut.groups, [&](int group) {
            FlushDenormals flush;
            Backward<T> f = through_time(group, 0, first, last);
            leaf.backward(f);
        });
    std::deque<Lockstep> teams;
    for (int group = 0; group < cut.groups; ++group) teams.emplace_back(cut.shares, phases(first, last));
    parallel(cut.groups * cut.shares, [&](int k) {
        FlushDenormals flush;
        teams[k % cut.groups].run(k / cut.groups, [&](int64_t phase, int share) {
            Backward<T> f = through_time(k % cut.groups, share, first, last);
            f.phase = phase, f.end_phase = phase + 1;
            leaf.backward(f);
        });
    });
}

// The gradients of x and of the weights. Every task writes a separate part, so the bits don't depend on which thread
// runs it.
template <class T>
void BackwardLayer<T>::sum_gradients(int64_t first, int64_t last) {
    const int64_t rows = (last - first) * B;
    const int64_t inputs = input_tasks(rows), tasks = weight_tasks + inputs;
    std::atomic<int64_t> next{0};
    parallel(int(std::min<int64_t>(threads, tasks)), [&](int k) {
        FlushDenormals flush;
        size_t copied_for = passes.size();  // none yet
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            if (task < weight_tasks) {
                sum_weights(task, k, copied_for, first, last);
                continue;
            }
            const int64_t n = task - weight_tasks;
            if (!d.use_kernel)
                pass_on(rows, rows * n / inputs, rows * (n + 1) / inputs);
            else
                leaf.input_gradient(tiles, d.backbone_units ? db : dz, sum_gates, sum_blocks, rows, kernel_t, I,
                                    rows * n / inputs, rows * (n + 1) / inputs, dx_rows.data(), pairs_of(k));
        }
    });
}

// Without a kernel, the gradient of x is dz, for these rows of a chunk.
template <class T>
void BackwardLayer<T>::pass_on(int64_t rows, int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; ++m)
        for (int gate = 0; gate < G; ++gate)
            for (int64_t k = 0; k < H; ++k) dx_rows[m][gate * H + k] = dz[((k / W * rows + m) * G + gate) * W + k % W];
}

// The weight gradients of some blocks of a pass. A thread copies the rows of x and h only for its first task of a pass.
template <class T>
void BackwardLayer<T>::sum_weights(int64_t task, int thread, size_t& copied_for, int64_t first, int64_t last) {
    size_t which = 0;
    while (task >= passes[which].tasks) task -= passes[which++].tasks;
    const Pass& pass = passes[which];
    const int64_t panel = pass.gates * W, rows = (last - first) * B;
    WeightGradient<T> f{};
    f.gates = pass.gates, f.rows = d.rows, f.dz = pass.dz, f.dz_rows = rows, f.units = pass.units;
    for (int gate = 0; gate < pass.gates; ++gate) f.places[gate] = pass.gates == 1 ? 0 : d.place(gate);
    f.first = pass.blocks * task / pass.tasks, f.last = pass.blocks * (task + 1) / pass.tasks;
    T *copy = copied + thread * copies, *sum = pass.sums;
    for (int o = 0; o < 3; ++o) {
        const auto& of = pass.of[o];
        const int64_t summed = d.rows ? of.columns * panel : 0;
        f.of[o] = {of.rows ? of.rows->data() : nullptr,
                   of.columns,
                   of.first_gate,
                   of.last_gate,
                   of.out,
                   of.heads,
                   sum + f.first * summed,
                   copy};
        sum += pass.blocks * summed, copy += of.columns ? rows * gradient_stride(of.columns) : 0;
    }
    f.bias = pass.bias, f.bias_sums = pass.bias ? sum + f.first * panel : nullptr;
    f.more = last < steps, f.write = first == 0, f.copied = copied_for == which;
    f.tiles = &tiles, f.dz_pairs = pairs_of(thread);
    copied_for = which;
    leaf.weight_gradient(f);
}

// The gradients of arrays that aren't matrices: summed per row during the pass through time, and here over rows.
template <class T>
void BackwardLayer<T>::sum_rows() const {
    const auto sum = [&](T* out, int vector, int64_t count) {
        for (int64_t n = 0; out && n < count; ++n)
            for (int64_t k = 0; k < H; ++k) {
                T sum = 0;
                for (int64_t b = 0; b < B; ++b) sum += vector_sums[(b * kSums + vector + n) * blocks * W + k];
                out[n * H + k] = sum;
            }
    };
    each_array(to, d, [&](T* out, const Layout& layout) {
        if (layout.form == Form::kVectors) sum(out, layout.sums, layout.numbers / H);
    });
    if (!d.layer_norm || !to.bias) return;
    sum(to.bias, sums_of::bias, G);
    if (d.two_biases()) sum(to.bias + G * H, sums_of::recurrent_bias, G);
}

// The gradient of an initial state: from rows that were reset and, if no state was passed, from the start.
template <class T>
void BackwardLayer<T>::sum_initial(T* out, const T* fresh, const T* start, int64_t stride, int64_t width) const {
    for (int64_t k = 0; out && k < width; ++k) {
        out[k] = 0;
        for (int64_t b = 0; b < B; ++b) out[k] += fresh[b * stride + k] + (start ? start[b * stride + k] : T(0));
    }
}

template <class T>
void BackwardLayer<T>::run() {
    take_memory();
    transpose_weights();
    list_passes();
    if (B * steps == 0) clear();
    pad(dh, columns, g.dafter[0], B, P);
    for (int k = 0; k < inner; ++k) pad(dinner[k], blocks * W, g.dafter[1 + k], B, H);
    for (int64_t last = steps; last > 0 && B > 0; last -= std::min(chunk, last)) {
        const int64_t first = std::max<int64_t>(0, last - chunk);
        find_rows(first, last);
        if (again) make_gates(first, last);
        go_back(first, last);
        if (reset_before) find_products(first, last);
        sum_gradients(first, last);
    }
    sum_rows();
    for (int k = 0; k <= inner; ++k) {
        const T* start = k ? dinner[k - 1] : dh;
        const int64_t stride = k ? blocks * W : columns;
        sum_initial(to.initial[k], initial[k], s.before[k] ? nullptr : start, stride, d.width(k));
        if (g.dbefore[k]) unpad(g.dbefore[k], start, stride, B, d.width(k));
    }
}

// Whether any gradient of a layer is requested.
template <class T>
bool wanted(const Gradients<T>& g, const Description& d) {
    bool found = g.dx || any(g.dbefore) || any(g.arrays.initial);
    each_array(g.arrays, d, [&](const T* out, const Layout&) { found |= out != nullptr; });
    return found;
}

}  // namespace

template <class T>
void backward(const Sequences<T>& in, const std::vector<Layer<T>>& layers, const std::vector<Gradients<T>>& gradients,
              int threads) {
    const int depth = int(layers.size());
    int lowest = 0;
    while (lowest < depth && !wanted(gradients[lowest], layers[lowest].weights->description())) ++lowest;
    // The gradient of a layer's x is that of the y below; two buffers for it alternate.
    const auto numbers = [&](int l) { return in.batch * in.steps * layers[l].weights->description().output; };
    int64_t most = 0;
    for (int l = lowest; l + 1 < depth; ++l) most = std::max(most, Parts<T>::size(numbers(l)));
    Scratch<T> between(2 * most);
    const T* above = nullptr;
    for (int l = depth - 1; l >= lowest; --l) {
        Sequences<T> own = in;
        Gradients<T> g = gradients[l];
        if (l) {
            const int64_t width = layers[l].weights->description().x_width();
            own.x = layers[l - 1].y, own.stride_time = in.time_stride(width), own.stride_batch = in.row_stride(width);
        }
        if (above) {
            T* sum = between.get() + (l + 1) % 2 * most;
            for (int64_t k = 0; g.dy && k < numbers(l); ++k) sum[k] += g.dy[k];
            g.dy = above;
        }
        if (l > lowest) above = g.dx = between.get() + l % 2 * most;
        BackwardLayer<T>(own, layers[l], g, threads).run();
    }
}

template void backward(const Sequences<float>&, const std::vector<Layer<float>>&, const std::vector<Gradients<float>>&,
                       int);
template void backward(const Sequences<double>&, const std::vector<Layer<double>>&,
                       const std::vector<Gradients<double>>&, int);

}  // namespace cellstack
