// The C functions that JavaScript calls in a WebAssembly build (web/src/kernel.js). Pointers are addresses in the
// module's memory; shapes are checked by the caller; see cell.h for what each pointer means. Every call has one thread.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

#include "cell.h"

#define EXPORT extern "C" __attribute__((used, visibility("default")))

using namespace cellstack;

namespace {

// The fields of a description, as cellstack.native passes them: integers and numbers in this order.
struct Integers {
    int32_t input, units, output;
    int32_t use_bias, peepholes, coupled, layer_norm, joint, reset_after, scalar, no_gate, exponential_forget, heads,
        backbone;
    int32_t activations[kMostGates + 1];
};
struct Numbers {
    double norm_epsilon, clip, cell_clip, zoneout, zoneout_cell;
    double alphas_and_betas[kMostGates + 1][2];
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
EXPORT const Weights<float>* weights(const char* kind, const Integers* integers, const Numbers* numbers, int element,
                                     const float* const* given, int count) {
    Arrays<const float> arrays{};
    memcpy(&arrays, given, size_t(count) * sizeof *given);
    Description d{};
    d.kind = kind_named(kind);
    if (!d.kind) return nullptr;
    d.input = integers->input, d.units = integers->units, d.output = integers->output;
    for (size_t k = 0; k < std::size(d.activations); ++k)
        d.activations[k] = {integers->activations[k], numbers->alphas_and_betas[k][0], numbers->alphas_and_betas[k][1]};
    d.use_bias = integers->use_bias, d.peepholes = integers->peepholes, d.coupled = integers->coupled;
    d.layer_norm = integers->layer_norm, d.joint = integers->joint, d.reset_after = integers->reset_after;
    d.scalar = integers->scalar, d.no_gate = integers->no_gate, d.exponential_forget = integers->exponential_forget;
    d.heads = integers->heads, d.backbone = integers->backbone, d.use_kernel = arrays.kernel;
    d.norm_epsilon = numbers->norm_epsilon, d.clip = numbers->clip, d.cell_clip = numbers->cell_clip;
    d.zoneout = numbers->zoneout, d.zoneout_cell = numbers->zoneout_cell;
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

EXPORT Stream<float>* stream(const Weights<float>* weights, int batch) { return new Stream<float>({weights}, batch); }
EXPORT void delete_stream(Stream<float>* stream) { delete stream; }
EXPORT void stream_run(Stream<float>* stream, const float* x, float* y, int steps) { stream->run(x, y, steps); }
EXPORT void stream_reset(Stream<float>* stream) { stream->reset(); }
EXPORT void stream_get_state(const Stream<float>* stream, float* const* states) { stream->get_state(0, states); }
EXPORT void stream_set_state(Stream<float>* stream, const float* const* states) { stream->set_state(0, states); }
