// The backward pass of a layer: cuts it into steps that fit a cache, rows for the way back through time, and tasks for
// the gradients of x and of the weights.
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

}  // namespace

template <class T>
void lstm_backward(const Sequences<T>& in, const Saved<T>& s, const Gradients<T>& g, int threads) {
    const Leaf<T>& leaf = leaf_of<T>(current());
    const int64_t B = in.batch, steps = in.steps, I = s.input, H = s.units;
    const int64_t W = leaf.width, wide = 4 * W, blocks = ceil_div(H, W);
    const int64_t columns = ceil_div(H, wide) * wide, input_columns = ceil_div(I, wide) * wide;
    const auto wanted = [](T* out, int64_t count) { return out ? count : 0; };
    if (B * steps == 0) {
        std::fill_n(g.dkernel, wanted(g.dkernel, I * 4 * H), T(0));
        std::fill_n(g.drecurrent_kernel, wanted(g.drecurrent_kernel, H * 4 * H), T(0));
        std::fill_n(g.dbias, wanted(g.dbias, 4 * H), T(0));
    }
    threads = useful_threads(threads, B * steps * 8 * H * (I + H));
    const int groups = int(std::max<int64_t>(1, std::min<int64_t>(B, threads)));
    const int64_t chunk = std::max<int64_t>(
        1, std::min(steps, kGradientBytes / int64_t(blocks * wide * sizeof(T)) / std::max<int64_t>(B, 1)));

    const int64_t state = Parts<T>::size(B * columns), transposed = Parts<T>::size(columns * blocks * wide);
    const int64_t transposed_in = Parts<T>::size(wanted(g.dx, input_columns * blocks * wide));
    const int64_t chunk_dz = Parts<T>::size(blocks * chunk * B * wide);
    const int64_t dropped = s.recurrent_dropout ? Parts<T>::size(chunk * B * H) : 0;
    const int64_t sums = Parts<T>::size(blocks * (I + H + 1) * wide);
    const int64_t copies = Parts<T>::size(gradient_copy(I) + gradient_copy(H));
    Scratch<T> scratch(2 * state + transposed + transposed_in + chunk_dz + dropped + sums + threads * copies +
                       Parts<T>::size(std::max(I, H)));
    Parts<T> parts(scratch.get());
    T *dh = parts.take(state), *dc = parts.take(state);
    T *recurrent_t = parts.take(transposed), *kernel_t = parts.take(transposed_in), *dz = parts.take(chunk_dz);
    T *h_dropped = parts.take(dropped), *gradients = parts.take(sums), *copied = parts.take(threads * copies);
    T* zeros = parts.take(std::max(I, H));
    std::fill(zeros, zeros + std::max(I, H), T(0));
    leaf.pack_transposed(recurrent_t, s.recurrent_kernel, H, H);
    if (g.dx) leaf.pack_transposed(kernel_t, s.kernel, I, H);
    pad(dh, columns, g.dhn, B, H);
    pad(dc, blocks * W, g.dcn, B, H);

    // Back through the time of a chunk, rows apart.
    const auto through_time = [&](int group, int64_t first_step, int64_t last_step) {
        const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first;
        const auto at = [&](const T* all, int64_t per_row) { return all ? all + first * per_row : nullptr; };
        Backward<T> f{};
        f.units = H, f.blocks = blocks, f.rows = rows, f.steps = steps, f.batch = B, f.row0 = first;
        f.first = first_step, f.last = last_step;
        f.activation = s.activation, f.recurrent_activation = s.recurrent_activation, f.reverse = in.reverse;
        f.recurrent_t = recurrent_t;
        f.gates = at(s.gates, steps * 4 * H), f.cells = at(s.cells, steps * H), f.c0 = at(s.c0, H);
        f.mask = in.mask ? in.mask + first * steps : nullptr;
        f.recurrent_dropout = at(s.recurrent_dropout, H);
        f.dy = at(g.dy, steps * H), f.dgates = at(g.dgates, steps * 4 * H), f.dcells = at(g.dcells, steps * H);
        f.dh = dh + first * columns, f.dc = dc + first * blocks * W;
        f.dz = dz;
        leaf.backward(f);
    };

    // Where the rows of dz came from, in its order: x, the h that went into the step, and dx.
    std::vector<const T*> x_rows(size_t(chunk * B)), h_rows(size_t(chunk * B));
    std::vector<T*> dx_rows(size_t(chunk * B));
    const auto h_before = [&](int64_t b, int64_t n) -> const T* {
        if (n == 0) return s.h0 ? s.h0 + b * H : zeros;
        return s.y + (b * steps + (in.reverse ? steps - n : n - 1)) * H;
    };
    const auto find_rows = [&](int64_t first, int64_t last) {
        for (int64_t n = first, m = 0; n < last; ++n)
            for (int64_t b = 0; b < B; ++b, ++m) {
                const int64_t t = in.reverse ? steps - 1 - n : n;
                // dz is zero where the mask leaves a step out; x and h may be anything there, NaN too, and must not
                // meet it
                const bool used = !in.mask || in.mask[b * steps + t];
                x_rows[m] = used ? in.x + b * in.stride_batch + t * in.stride_time : zeros;
                dx_rows[m] = g.dx ? g.dx + (b * steps + t) * I : nullptr;
                h_rows[m] = used ? h_before(b, n) : zeros;
                if (s.recurrent_dropout) {
                    T* product = h_dropped + m * H;
                    for (int64_t k = 0; k < H; ++k) product[k] = h_rows[m][k] * s.recurrent_dropout[b * H + k];
                    h_rows[m] = product;
                }
            }
    };

    const int64_t weight_tasks = g.dkernel || g.drecurrent_kernel || g.dbias ? std::min<int64_t>(threads, blocks) : 0;
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
                    leaf.input_gradient(dz, blocks, rows, kernel_t, I, row, std::min(rows, row + kInputRows),
                                        dx_rows.data());
                    continue;
                }
                WeightGradient<T> f{};
                f.dz = dz, f.dz_rows = rows, f.units = H;
                f.first = blocks * task / weight_tasks, f.last = blocks * (task + 1) / weight_tasks;
                T* copy = copied + k * copies;
                f.of[0] = {x_rows.data(), wanted(g.dkernel, I), g.dkernel, gradients + f.first * I * wide, copy};
                f.of[1] = {h_rows.data(), wanted(g.drecurrent_kernel, H), g.drecurrent_kernel,
                           gradients + (blocks * I + f.first * H) * wide, copy + gradient_copy(I)};
                f.bias = g.dbias, f.bias_sums = gradients + (blocks * (I + H) + f.first) * wide;
                f.more = last < steps, f.write = first == 0;
                leaf.weight_gradient(f);
            }
        });
    }
    if (g.dh0) unpad(g.dh0, dh, columns, B, H);
    if (g.dc0) unpad(g.dc0, dc, blocks * W, B, H);
}

template void lstm_backward(const Sequences<float>&, const Saved<float>&, const Gradients<float>&, int);
template void lstm_backward(const Sequences<double>&, const Saved<double>&, const Gradients<double>&, int);

}  // namespace cellstack
