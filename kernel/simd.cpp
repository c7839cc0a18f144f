// The inner routines (leaf.h), compiled once per instruction set: the same source with different flags.
//
// Nothing here, or in the included headers, may be shared with another translation unit: of an inline function the
// linker keeps one copy for all of them, which may be the one compiled for AVX-512. Hence the anonymous namespaces, and
// no standard templates.
#include "backward.h"
#include "forward.h"
#include "mlstm_backward.h"

namespace cellstack {
namespace {

// W columns, starting at `k`, of W rows, starting at `row`, which are `stride` apart; zeros beyond `rows` and `depth`.
template <class T>
INLINE void load_square(V<T> (&square)[Vec<T>::W], const T* from, int64_t row, int64_t rows, int64_t k, int64_t depth,
                        int64_t stride) {
    constexpr int W = Vec<T>::W;
    const int lanes = depth - k < W ? int(depth - k) : W;
    UNROLL
    for (int r = 0; r < W; ++r)
        square[r] = row + r < rows ? load_lanes(from + (row + r) * stride + k, lanes) : splat(T(0));
}

// What a row of a matrix of heads has for a gate of a block's units: zeros for the units of other heads.
template <class T>
V<T> row_of_heads(const Matrix<T>& m, int64_t row, int gate, int64_t block) {
    constexpr int W = Vec<T>::W;
    alignas(kVectorBytes) T lanes[W] = {};
    const int64_t size = m.units / m.heads, head = row / size * size;  // units of a head; the row's first one
    const int64_t first = head > block * W ? head : block * W;
    const int64_t end = head + size < (block + 1) * W ? head + size : (block + 1) * W;
    if (row < m.depth && first < end)
        memcpy(lanes + first - block * W, m.at + (row * m.gates + m.places[gate]) * size + first - head,
               size_t(end - first) * sizeof(T));
    return load(lanes);
}

// What a diagonal matrix has for a gate of a block's units.
template <class T>
V<T> diagonal_of(const Matrix<T>& m, int gate, int64_t block) {
    constexpr int W = Vec<T>::W;
    V<T> lanes = splat(T(0));
    for (int k = 0; k < W && block * W + k < m.units; ++k) lanes[k] = m.at[(block * W + k) * m.gates + m.places[gate]];
    return lanes;
}

// Packs a block's panel, [rows][gates][W], whose band counts `step` rows as one.
template <class T>
void pack_block(T* to, const Matrix<T>& m, int64_t block, int64_t step) {
    constexpr int W = Vec<T>::W;
    const int64_t left = m.units - block * W;
    const int lanes = left < W ? int(left) : W;
    if (m.band.diagonal) {
        for (int gate = 0; gate < m.gates; ++gate) store(to + gate * W, diagonal_of(m, gate, block));
        return;
    }
    if (m.heads > 1) {
        for (int64_t k = 0; k < m.band.depth * step; ++k)
            for (int gate = 0; gate < m.gates; ++gate)
                store(to + (k * m.gates + gate) * W, row_of_heads(m, m.band.first[block] * step + k, gate, block));
        return;
    }
    if (!m.rows || m.depth == 1) {
        for (int64_t k = 0; k < m.depth; ++k)
            for (int gate = 0; gate < m.gates; ++gate)
                store(to + (k * m.gates + gate) * W,
                      load_lanes(m.at + (k * m.gates + m.places[gate]) * m.units + block * W, lanes));
        return;
    }
    for (int64_t k = 0; k < m.depth; k += W)
        for (int gate = 0; gate < m.gates; ++gate) {
            V<T> square[W];
            load_square<T>(square, m.at + m.places[gate] * m.units * m.depth, block * W, m.units, k, m.depth, m.depth);
            transpose<T>(square);
            T* column = to + (k * m.gates + gate) * W;
            UNROLL
            for (int c = 0; c < W; ++c)
                if (k + c < m.depth) store(column + c * m.gates * W, square[c]);
        }
}

// Makes the gates of the last block share vectors: [rows][gates][W] becomes [rows][vectors][W].
template <class T>
void pack_tail(T* panel, const Matrix<T>& m, int64_t rows) {
    constexpr int W = Vec<T>::W;
    const int64_t from = m.gates * W, to = m.tail.vectors * W;
    for (int64_t k = 0; k < rows; ++k) {
        alignas(kVectorBytes) T row[kMostGates * W] = {};
        for (int gate = 0; gate < m.gates; ++gate)
            store(row + gate * m.tail.units, load(panel + k * from + gate * W));  // zeros beyond its units
        memcpy(panel + k * to, row, size_t(to) * sizeof(T));
    }
}

template <class T>
void pack(T* to, const Matrix<T>& m, int64_t block, int64_t end_block) {
    constexpr int W = Vec<T>::W;
    const int64_t blocks = (m.units + W - 1) / W, rows = m.heads > 1 ? m.band.depth : m.depth,
                  size = rows * m.gates * W;
    for (; block < end_block; ++block) {
        pack_block(to + block * size, m, block, 1);
        if (m.tail.vectors && block == blocks - 1) pack_tail(to + block * size, m, rows);
    }
}

// For int8, the scales of all columns and their shifts follow the words.
template <class T>
void pack_narrow(T* to, const Matrix<T>& m, int64_t block, int64_t end_block, Element element, T* panel) {
    if constexpr (sizeof(T) == 4) {
        constexpr int W = Vec<T>::W;
        const int64_t blocks = (m.units + W - 1) / W, columns = m.gates * W;
        const int64_t step = 32 / bits_of(element), words = m.heads > 1 ? m.band.depth : (m.depth + step - 1) / step;
        const int64_t rows = m.heads > 1 ? words * step : m.depth;
        auto* at = reinterpret_cast<uint32_t*>(to);
        T* scales = to + blocks * words * columns;
        auto* shifts = reinterpret_cast<uint32_t*>(scales + blocks * columns);
        for (at += block * words * columns; block < end_block; ++block, at += words * columns) {
            pack_block(panel, m, block, step);
            const bool tail = m.tail.vectors && block == blocks - 1;
            const int vectors = tail ? m.tail.vectors : m.gates;
            if (tail) pack_tail(panel, m, rows);
            if (element == Element::kBfloat16)
                pack_bfloat16(at, panel, rows, vectors);
            else
                pack_bytes(at, panel, rows, vectors, scales + block * columns, shifts + block * columns);
        }
    }
}

template <class T>
void pack_transposed(T* to, const Matrix<T>& m, int first, int last, int64_t panel, int64_t end_panel,
                     const Tiles<T>& tiles) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    if (m.band.diagonal) {
        for (int64_t block = panel * 4; block < end_panel * 4; ++block)
            for (int gate = 0; gate < m.gates; ++gate)
                store(to + (block * m.gates + gate) * W,
                      gate >= first && gate < last ? diagonal_of(m, gate, block) : splat(T(0)));
        return;
    }
    const int64_t blocks = m.heads > 1 ? m.band.depth : (m.units + W - 1) / W, deep = tiles.pairs() ? W / 2 : W;
    // A quarter of a panel at a time: so few rows are read alternately that each read continues where the last one
    // ended.
    for (int64_t k = panel * wide; k < end_panel * wide; k += W) {
        T* row = to + (k / wide * blocks * m.gates * deep * 4 + k / W % 4) * W;
        for (int64_t block = 0; block < blocks; ++block)
            for (int gate = 0; gate < m.gates; ++gate, row += deep * wide) {
                V<T> square[W];
                UNROLL
                for (int r = 0; r < W; ++r) square[r] = splat(T(0));
                if (gate >= first && gate < last && k < m.depth) {
                    if (m.heads > 1) {
                        UNROLL
                        for (int c = 0; c < W; ++c)
                            square[c] = row_of_heads(m, k + c, gate, m.band.first[k / wide] + block);
                        transpose<T>(square);
                    } else if (m.rows) {
                        load_square<T>(square, m.at + m.places[gate] * m.units * m.depth, block * W, m.units, k,
                                       m.depth, m.depth);
                    } else {
                        load_square<T>(square, m.at + m.places[gate] * m.units, k, m.depth, block * W, m.units,
                                       m.gates * m.units);
                        transpose<T>(square);
                    }
                }
                if (tiles.pairs()) {
                    alignas(kVectorBytes) T rows[W * W];
                    UNROLL
                    for (int r = 0; r < W; ++r) store(rows + r * W, square[r]);
                    for (int r = 0; r < W; r += 2)
                        tiles.pair_rows(row + r / 2 * wide, rows + r * W, rows + (r + 1) * W, W);
                    continue;
                }
                UNROLL
                for (int r = 0; r < W; ++r) store(row + r * wide, square[r]);
            }
    }
}

template <class T>
void activate(const Activation& activation, const T* x, T* y, int64_t n) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; k += W) {
        const int lanes = n - k < W ? int(n - k) : W;
        store_lanes(y + k, apply<T>(activation, load_lanes(x + k, lanes)), lanes);
    }
}

#ifdef CELLSTACK_FORWARD_ONLY  // in float32: less than half the size
template <class T>
constexpr Leaf<T> leaf(const Tiles<T>& plain, const Tiles<T>& bfloat16, const Tiles<T>& int8) {
    return {Vec<T>::W,         plain,           bfloat16,       int8,    pack<T>, pack_narrow<T>,
            nullptr,           forward<T>,      nullptr,        nullptr, nullptr, activate<T>,
            memory_scratch<T>, memory_gates<T>, memory_head<T>, nullptr, nullptr, nullptr};
}
constexpr Leaf<double> kDouble{};
#else
template <class T>
constexpr Leaf<T> leaf(const Tiles<T>& plain, const Tiles<T>& bfloat16, const Tiles<T>& int8) {
    return {Vec<T>::W,
            plain,
            bfloat16,
            int8,
            pack<T>,
            pack_narrow<T>,
            pack_transposed<T>,
            forward<T>,
            backward<T>,
            input_gradient<T>,
            weight_gradient<T>,
            activate<T>,
            memory_scratch<T>,
            memory_gates<T>,
            memory_head<T>,
            memory_head_back<T>,
            norm_rows<T>,
            convolve_rows<T>};
}
constexpr Leaf<double> kDouble = leaf<double>(tiles_of<Plain<double>>(), {}, {});
#endif

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

}  // namespace

namespace CELLSTACK_ISA {
extern const InstructionSet set;
const InstructionSet set = {
    NAME(CELLSTACK_ISA), CELLSTACK_NEEDS,
    leaf<float>(plain_lstm_tiles<Plain<float>>(), plain_lstm_tiles<Widened>(), tiles_of<Int8>()), kDouble};
}  // namespace CELLSTACK_ISA

}  // namespace cellstack
