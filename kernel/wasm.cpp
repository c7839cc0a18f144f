// The C functions that JavaScript calls in a WebAssembly build (web/src/kernel.js). Pointers are addresses in the
// module's memory; shapes are checked by the caller; see cell.h for what each pointer means. Every call has one thread.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

#include "cell.h"
#include "mlstm.h"

#define EXPORT extern "C" __attribute__((used, visibility("default")))

using namespace cellstack;

namespace {

// The fields of a description, as cellstack.native passes them.
struct Numbers {
    double input, units, output;
#define CELLSTACK_FLAG(type, name, value) double name;
    CELLSTACK_FLAGS(CELLSTACK_FLAG)
#undef CELLSTACK_FLAG
    double activations[kMostGates + 1][3];  // code, alpha and beta
};

// A layer of a stack: see Layer in cell.h.
struct LayerOf {
    const Weights<float>* weights;
    const float* before[kStates];
    float* after[kStates];
    float *y, *gates, *states[kInner];
};

}  // namespace

// Aligned memory for the caller's arrays; null if there is none.
EXPORT void* allocate(int bytes) { return aligned_alloc(64, (size_t(bytes) + 63) / 64 * 64); }
EXPORT void release(void* memory) { free(memory); }

// The weights of a cell of this kind, packed; null if there is no such kind. `element`: the format of the matrices, an
// index in `Element`. `given`: the arrays, in the order of `Arrays`, of which those at the end may be left out.
EXPORT const Weights<float>* weights(const char* kind, const Numbers* numbers, int element, const float* const* given,
                                     int count) {
    Arrays<const float> arrays{};
    memcpy(&arrays, given, size_t(count) * sizeof *given);
    Description d{};
    d.kind = kind_named(kind);
    if (!d.kind) return nullptr;
    d.input = int64_t(numbers->input), d.units = int64_t(numbers->units), d.output = int64_t(numbers->output);
    for (size_t k = 0; k < std::size(d.activations); ++k) {
        const double* of = numbers->activations[k];
        d.activations[k] = {int(of[0]), of[1], of[2]};
    }
#define CELLSTACK_FLAG(type, name, value) d.name = type(numbers->name);
    CELLSTACK_FLAGS(CELLSTACK_FLAG)
#undef CELLSTACK_FLAG
    return new Weights<float>(d, arrays, true, Element(element));
}

// The number of planes [H] that `forward` writes to `gates` per step.
EXPORT int planes(const Weights<float>* weights) { return weights->description().planes(); }

// x [B, T, I]; mask and reset [B, T], or null.
EXPORT void forward(int batch, int steps, const float* x, const uint8_t* mask, const uint8_t* reset, int reverse,
                    const LayerOf* of) {
    const int64_t width = of->weights->description().x_width();
    const Sequences<float> in{batch, steps, x, steps * width, width, mask, reset, reverse != 0};
    Layer<float> layer{};
    layer.weights = of->weights, layer.y = of->y, layer.gates = of->gates;
    for (int s = 0; s < kStates; ++s) layer.before[s] = of->before[s], layer.after[s] = of->after[s];
    for (int s = 0; s < kInner; ++s) layer.states[s] = of->states[s];
    forward<float>(in, {layer}, 1);
}

// The memory of an mLSTM over x [B, T, width]. `numbers`: heads, keys, values, epsilon, and 1 with an output gate. The
// states are updated in place. `stepwise`: not in chunks, so that any division of the steps among calls has the same
// bits.
EXPORT void run_memory(int batch, int steps, const float* x, const uint8_t* mask, const uint8_t* reset,
                       const double* numbers, float* const* states, float* y, int stepwise) {
    const MatrixMemory of{int64_t(numbers[0]), int64_t(numbers[1]), int64_t(numbers[2]), numbers[3]};
    const bool gated = numbers[4] != 0;
    const int64_t width = of.width() + (gated ? of.output() : 0);
    MemorySequences<float> in{of,
                              batch,
                              steps,
                              x,
                              steps * width,
                              width,
                              mask,
                              reset,
                              {},
                              {},
                              nullptr,
                              y,
                              stepwise ? MemoryForm::kSteps : MemoryForm::kFastest};
    in.gated = gated;
    for (int k = 0; k < kMatrixStates; ++k) in.before[k] = in.after[k] = states[k];
    memory_forward<float>(in, 1);
}

EXPORT Stream<float>* stream(const Weights<float>* weights, int batch) { return new Stream<float>({weights}, batch); }
EXPORT void delete_stream(Stream<float>* stream) { delete stream; }
EXPORT void stream_run(Stream<float>* stream, const float* x, float* y, int steps) { stream->run(x, y, steps); }
EXPORT void stream_reset(Stream<float>* stream) { stream->reset(); }
EXPORT void stream_get_state(const Stream<float>* stream, float* const* states) { stream->get_state(0, states); }
EXPORT void stream_set_state(Stream<float>* stream, const float* const* states) { stream->set_state(0, states); }
