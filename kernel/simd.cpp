// The inner routines (leaf.h), compiled once per instruction set: the same source, other flags.
//
// Nothing here, nor in what is included, may be shared with another translation unit (an inline function compiled for
// AVX-512 must not be the copy that the linker keeps for all), hence the anonymous namespaces and no standard
// templates.
#include "backward.h"
#include "forward.h"

namespace cellstack {
namespace {

template <class T>
void pack(T* to, const T* from, int64_t rows, int64_t units) {
    constexpr int W = Vec<T>::W;
    const int64_t blocks = (units + W - 1) / W;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t left = units - block * W;
        const int lanes = left < W ? int(left) : W;
        for (int64_t k = 0; k < rows; ++k)
            for (int gate = 0; gate < 4; ++gate, to += W)
                store(to, load_lanes(from + k * 4 * units + gate * units + block * W, lanes));
    }
}

template <class T>
void pack_transposed(T* to, const T* from, int64_t rows, int64_t units) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const int64_t blocks = (units + W - 1) / W, panels = (rows + wide - 1) / wide;
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t block = 0; block < blocks; ++block)
            for (int gate = 0; gate < 4; ++gate)
                for (int lane = 0; lane < W; ++lane, to += wide) {
                    const int64_t unit = block * W + lane;
                    for (int k = 0; k < wide; ++k) {
                        const int64_t row = panel * wide + k;
                        to[k] = row < rows && unit < units ? from[row * 4 * units + gate * units + unit] : T(0);
                    }
                }
}

template <class T>
void activate(int activation, const T* x, T* y, int64_t n) {
    constexpr int W = Vec<T>::W;
    for (int64_t k = 0; k < n; k += W) {
        const int lanes = n - k < W ? int(n - k) : W;
        store_lanes(y + k, apply<T>(activation, load_lanes(x + k, lanes)), lanes);
    }
}

template <class T>
constexpr Leaf<T> leaf() {
    return {Vec<T>::W,   pack<T>,           pack_transposed<T>, forward<T>,
            backward<T>, input_gradient<T>, weight_gradient<T>, activate<T>};
}

// Four chains of lanes, each 31·lane + word: one word that differs always shows, and all words are read at about
// the speed of a load.
uint64_t digest(const void* data, int64_t words) {
    typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
    constexpr int W = kVectorBytes / 4;
    const char* p = static_cast<const char*>(data);
    U lanes[4] = {U{} + 1, U{} + 2, U{} + 3, U{} + 4};
    int64_t at = 0;
    for (; at + 4 * W <= words; at += 4 * W)
        unroll<4>([&](auto k) INLINED {
            U x;
            memcpy(&x, p + (at + k * W) * 4, sizeof x);
            lanes[k] = (lanes[k] << 5) - lanes[k] + x;
        });
    uint64_t all = uint64_t(words);
    const auto mix = [&](uint64_t x) { all = (all ^ x) * 0x9e3779b97f4a7c15u, all ^= all >> 29; };
    for (; at < words; ++at) {
        uint32_t x;
        memcpy(&x, p + at * 4, sizeof x);
        mix(x);
    }
    for (int k = 0; k < 4; ++k)
        for (int w = 0; w < W; ++w) mix(lanes[k][w]);
    return all;
}

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

}  // namespace

namespace CELLSTACK_ISA {
extern const InstructionSet set;
const InstructionSet set = {NAME(CELLSTACK_ISA), leaf<float>(), leaf<double>(), digest};
}  // namespace CELLSTACK_ISA

}  // namespace cellstack
