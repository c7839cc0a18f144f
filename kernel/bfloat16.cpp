// Products with bfloat16 weights for processors with an instruction for pairs of bfloat16, and rows of such pairs.
#include "one_row.h"

namespace cellstack {
namespace {

void pair_lanes(float* to, const float* from, int64_t n) {
    constexpr int W = Vec<float>::W;
    for (int64_t k = 0; k < n; k += W) {
        const __m256i pairs = pairs_of(load_lanes(from + k, n - k < W ? int(n - k) : W));
        memcpy(to + k / 2, &pairs, sizeof pairs);
    }
}
void pair_rows(float* to, const float* row, const float* next, int64_t n) {
    constexpr int W = Vec<float>::W;
    for (int64_t k = 0; k < n; k += W) {
        const int lanes = n - k < W ? int(n - k) : W;
        const V<float> second = next ? load_lanes(next + k, lanes) : splat(0.0f);
        store_lanes(to + k, pairs_of(load_lanes(row + k, lanes), second), lanes);
    }
}

constexpr Tiles<float> tiles_of_pairs() {
    Tiles<float> tiles = plain_lstm_tiles<Pairs>();
    tiles.pair_lanes = pair_lanes, tiles.pair_rows = pair_rows;
    return tiles;
}

}  // namespace

namespace CELLSTACK_ISA {
extern const Replacement bfloat16;
const Replacement bfloat16 = {"avx512bf16", CELLSTACK_NEEDS, tiles_of_pairs()};
}  // namespace CELLSTACK_ISA
}  // namespace cellstack
