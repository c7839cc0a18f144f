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
void pack(T* to, const T* from, int64_t rows, int64_t units, int gates) {
    constexpr int W = Vec<T>::W;
    const int64_t blocks = (units + W - 1) / W;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t left = units - block * W;
        const int lanes = left < W ? int(left) : W;
        for (int64_t k = 0; k < rows; ++k)
            for (int gate = 0; gate < gates; ++gate, to += W)
                store(to, load_lanes(from + (k * gates + gate) * units + block * W, lanes));
    }
}

template <class T>
void pack_transposed(T* to, const T* from, int64_t rows, int64_t units, int gates, int first, int last) {
    constexpr int W = Vec<T>::W, wide = 4 * W;
    const int64_t blocks = (units + W - 1) / W, panels = (rows + wide - 1) / wide;
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t block = 0; block < blocks; ++block)
            for (int gate = 0; gate < gates; ++gate)
                for (int lane = 0; lane < W; ++lane, to += wide) {
                    const int64_t unit = block * W + lane;
                    const bool used = unit < units && gate >= first && gate < last;
                    for (int k = 0; k < wide; ++k) {
                        const int64_t row = panel * wide + k;
                        to[k] = used && row < rows ? from[(row * gates + gate) * units + unit] : T(0);
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

template <class T>
constexpr Leaf<T> leaf() {
    return {Vec<T>::W,   pack<T>,           pack_transposed<T>, forward<T>,
            backward<T>, input_gradient<T>, weight_gradient<T>, activate<T>};
}

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

}  // namespace

namespace CELLSTACK_ISA {
extern const InstructionSet set;
const InstructionSet set = {NAME(CELLSTACK_ISA), leaf<float>(), leaf<double>()};
}  // namespace CELLSTACK_ISA

}  // namespace cellstack
