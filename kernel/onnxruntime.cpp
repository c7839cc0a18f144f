// The operators of onnxruntime.h, and RegisterCustomOps, which ONNX Runtime calls for a library of custom operators.
//
// ONNX Runtime's header isn't needed to build: what is used of its C API is declared here. Its table of functions and
// the fields of a custom operator only ever grow at the end.
// Ref: ONNX Runtime, include/onnxruntime/core/session/onnxruntime_c_api.h, version 17 of the API (OrtApi, OrtCustomOp).
#include "onnxruntime.h"

#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstring>
#include <exception>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

namespace cellstack {
namespace {

// ── ONNX Runtime's C API ─────────────────────────────────────────────────────────────────────────────────────────────

constexpr uint32_t kApiVersion = 17;  // the first one with everything below

struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Attribute;

enum : int { kFail = 1, kInvalidArgument = 2 };                      // OrtErrorCode
enum Type : int { kAny = 0, kFloat = 1, kInt32 = 6, kDouble = 11 };  // ONNXTensorElementDataType
enum Presence : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum : int { kIntAttribute = 1 };  // OrtOpAttrType

// The table of functions, OrtApi. A function returns null, or a status that the caller owns.
struct Api {
    Status* (*create_status)(int code, const char* message);
    void* others1[25];
    Status* (*create_domain)(const char* name, Domain** domain);
    Status* (*add_to_domain)(Domain*, const struct CustomOp*);
    Status* (*add_domain)(SessionOptions*, Domain*);
    void* others29[22];
    Status* (*data)(Value*, void** data);
    void* others52[5];
    Status* (*create_tensor_info)(TensorInfo**);
    Status* (*set_type)(TensorInfo*, Type);
    Status* (*set_dims)(TensorInfo*, const int64_t*, size_t count);
    Status* (*get_type)(const TensorInfo*, Type*);
    Status* (*count_dims)(const TensorInfo*, size_t*);
    Status* (*get_dims)(const TensorInfo*, int64_t*, size_t count);
    Status* (*get_names)(const TensorInfo*, const char** names, size_t count);
    void* others64[1];
    Status* (*tensor_info)(const Value*, TensorInfo**);
    void* others66[20];
    Status* (*int_attribute)(const KernelInfo*, const char* name, int64_t*);
    void* others87[3];
    Status* (*input)(const KernelContext*, size_t index, const Value**);
    Status* (*output)(KernelContext*, size_t index, const int64_t* dims, size_t count, Value**);
    void* others92[1];
    void (*release_status)(Status*);
    void* others94[5];
    void (*release_tensor_info)(TensorInfo*);
    void* others100[144];
    Status* (*node_name)(const KernelInfo*, char* name, size_t* size);
    void* others245[23];
    Status* (*input_info)(const ShapeContext*, size_t index, TensorInfo**);
    Status* (*attribute)(const ShapeContext*, const char* name, const Attribute**);
    Status* (*set_output_info)(const ShapeContext*, size_t index, const TensorInfo*);
    Status* (*set_names)(TensorInfo*, const char** names, size_t count);
    Status* (*read_attribute)(const Attribute*, int type, void* data, size_t size, size_t* written);
};
static_assert(offsetof(Api, read_attribute) == 272 * sizeof(void*));

struct ApiBase {
    const Api* (*api)(uint32_t version);
    const char* (*version)();
};

// OrtCustomOp: callbacks, each of which gets the operator itself.
struct CustomOp {
    using Op = const CustomOp*;
    uint32_t version;
    void* (*create)(Op, const Api*, const KernelInfo*);  // not called if the second version is there
    const char* (*name)(Op);
    const char* (*provider)(Op);  // null: the CPU
    Type (*input_type)(Op, size_t);
    size_t (*inputs)(Op);
    Type (*output_type)(Op, size_t);
    size_t (*outputs)(Op);
    void (*compute)(void* kernel, KernelContext*);  // likewise
    void (*destroy)(void* kernel);
    Presence (*input_presence)(Op, size_t);
    Presence (*output_presence)(Op, size_t);
    int (*memory)(Op, size_t);
    int (*least_variadic_inputs)(Op);
    int (*same_variadic_inputs)(Op);
    int (*least_variadic_outputs)(Op);
    int (*same_variadic_outputs)(Op);
    Status* (*create_with_status)(Op, const Api*, const KernelInfo*, void** kernel);
    Status* (*compute_with_status)(void* kernel, KernelContext*);
    Status* (*infer_shapes)(Op, ShapeContext*);
    int (*first_opset)(Op);
    int (*last_opset)(Op);
};

const Api* api = nullptr;  // set before any operator exists

// Throws for an error, with ONNX Runtime's message replaced by the name of what failed.
void need(Status* status, const char* what) {
    if (!status) return;
    api->release_status(status);
    throw std::runtime_error(std::string("ONNX Runtime's C API: ") + what + " failed");
}

// An input that doesn't fit, with ONNX Runtime's code for it.
struct Unfit : std::invalid_argument {
    int code;
    Unfit(int of, const std::string& message) : std::invalid_argument(message), code(of) {}
};

// ── Operators that sessions may use ──────────────────────────────────────────────────────────────────────────────────

struct Published {
    std::mutex lock;
    std::unordered_map<int64_t, std::shared_ptr<const Recurrent>> all;
};

// Never destroyed: an object of Python may be released when the process ends.
Published& published() {
    static auto* const one = new Published;
    return *one;
}

std::shared_ptr<const Recurrent> recurrent_of(int64_t handle) {
    Published& of = published();
    const std::lock_guard<std::mutex> locked(of.lock);
    const auto found = of.all.find(handle);
    return found == of.all.end() ? nullptr : found->second;
}

// A node of a session's graph.
struct Node {
    std::string name;
    std::shared_ptr<const Recurrent> of;
};

// ── A call ───────────────────────────────────────────────────────────────────────────────────────────────────────────

constexpr int64_t kEveryLength = -1;

std::string text(const std::vector<int64_t>& dims) {
    std::string all = "[";
    for (size_t k = 0; k < dims.size(); ++k)
        all += (k ? ", " : "") + (dims[k] == kEveryLength ? "any" : std::to_string(dims[k]));
    return all + "]";
}

struct InfoOf {
    TensorInfo* of = nullptr;
    ~InfoOf() {
        if (of) api->release_tensor_info(of);
    }
};

// An input after its type and shape were checked; `dims` may have kEveryLength, which its lengths replace. Of one that
// doesn't fit, `code` is the error's.
void* checked_input(const Node& node, const KernelContext* context, size_t index, const std::string& name, Type type,
                    std::vector<int64_t>& dims, int code = kInvalidArgument) {
    const Value* value = nullptr;
    need(api->input(context, index, &value), "KernelContext_GetInput");
    if (!value) throw Unfit(code, node.name + ": expected the input " + name + ", found none");
    InfoOf info;
    need(api->tensor_info(value, &info.of), "GetTensorTypeAndShape");
    Type found{};
    need(api->get_type(info.of, &found), "GetTensorElementType");
    if (found != type)
        throw Unfit(code, node.name + ": expected " + name + " of ONNX's type " + std::to_string(type) +
                              ", found type " + std::to_string(found));
    size_t count = 0;
    need(api->count_dims(info.of, &count), "GetDimensionsCount");
    std::vector<int64_t> own(count);
    need(api->get_dims(info.of, own.data(), count), "GetDimensions");
    const bool fits = std::equal(own.begin(), own.end(), dims.begin(), dims.end(),
                                 [](int64_t got, int64_t wanted) { return wanted == kEveryLength || got == wanted; });
    if (!fits) throw Unfit(code, node.name + ": expected " + name + " of shape " + text(dims) + ", found " + text(own));
    dims = own;
    void* at = nullptr;
    need(api->data(const_cast<Value*>(value), &at), "GetTensorMutableData");
    return at;
}

// The memory of an output; null if nothing uses it.
void* output(KernelContext* context, size_t index, const std::vector<int64_t>& dims) {
    Value* value = nullptr;
    need(api->output(context, index, dims.data(), dims.size(), &value), "KernelContext_GetOutput");
    void* at = nullptr;
    if (value) need(api->data(value, &at), "GetTensorMutableData");
    return at;
}

// Inserts the axis of directions, if there is one, before the axis `place` or, with batch_first, after it.
template <class D>
void add_directions(const Recurrent& r, std::vector<D>& dims, int place, const D& ways) {
    if (r.directions) dims.insert(dims.begin() + place + r.batch_first, ways);
}

// Copies [first, second, width] to [second, first, width].
template <class T>
void swap_ends(T* to, const T* from, int64_t first, int64_t second, int64_t width) {
    for (int64_t a = 0; a < first; ++a)
        for (int64_t b = 0; b < second; ++b)
            memcpy(to + (b * first + a) * width, from + (a * second + b) * width, size_t(width) * sizeof(T));
}

template <class T>
void compute(const Node& node, KernelContext* context) {
    const Recurrent& r = *node.of;
    const auto& cells = r.cells<T>();
    const Description& d = cells[0]->description();
    constexpr Type type = sizeof(T) == 8 ? kDouble : kFloat;
    constexpr const char* starts[] = {"initial_h", "initial_c"};
    const int states = d.kind->states;
    const auto ways = int64_t(cells.size());

    const int64_t width_x = d.x_width();
    std::vector<int64_t> of_x{kEveryLength, kEveryLength, width_x};
    size_t next = 0;
    const auto* x = static_cast<const T*>(checked_input(node, context, next++, "X", type, of_x));
    const int64_t batch = of_x[r.batch_first ? 0 : 1], steps = of_x[r.batch_first ? 1 : 0];

    const int32_t* lengths = nullptr;
    std::vector<uint8_t> mask;  // [B, T]; empty if every row has all steps
    if (r.lengths) {
        std::vector<int64_t> of_lengths{batch};
        lengths =
            static_cast<const int32_t*>(checked_input(node, context, next++, "sequence_lens", kInt32, of_lengths));
        for (int64_t b = 0; b < batch; ++b) {
            if (lengths[b] < 0 || lengths[b] > steps)
                throw std::invalid_argument(node.name + ": expected sequence_lens from 0 to " + std::to_string(steps) +
                                            ", found " + std::to_string(lengths[b]));
            if (lengths[b] < steps) mask.resize(size_t(batch * steps));
        }
        for (int64_t b = 0; b < batch && !mask.empty(); ++b)
            std::fill_n(mask.begin() + b * steps, lengths[b], uint8_t(1));
    }

    const int64_t step = r.batch_first ? width_x : batch * width_x, row = r.batch_first ? steps * width_x : width_x;
    std::vector<Run<T>> runs;
    for (int64_t way = 0; way < ways; ++way) {
        const Sequences<T> in{batch,   steps,
                              x,       row,
                              step,    mask.empty() ? nullptr : mask.data(),
                              nullptr, way == 1 || r.reverse,
                              nullptr, !r.batch_first,
                              ways};
        Layer<T> layer{};
        layer.weights = cells[size_t(way)].get();
        runs.push_back({in, {layer}});
    }

    // The states of a direction are contiguous, except with layout 1 and two directions.
    const bool swapped = r.batch_first && ways > 1;
    std::vector<T> before[kStates], after[kStates];
    T* ends[kStates] = {};
    for (int s = 0; s < states; ++s) {
        const int64_t width = d.width(s), size = batch * width;
        std::vector<int64_t> of_state{batch, width};
        add_directions(r, of_state, 0, ways);
        const T* from = nullptr;
        if (r.started[s]) {
            const std::string name = s < 2 ? starts[s] : "initial state " + std::to_string(s);
            from = static_cast<const T*>(checked_input(node, context, next++, name, type, of_state, kFail));
            if (swapped) {
                before[s].resize(size_t(ways * size));
                swap_ends(before[s].data(), from, batch, ways, width);
                from = before[s].data();
            }
        }
        T* to = ends[s] = static_cast<T*>(output(context, size_t(1 + s), of_state));
        if (to && swapped) after[s].resize(size_t(ways * size)), to = after[s].data();
        for (int64_t way = 0; way < ways; ++way) {
            Layer<T>& layer = runs[size_t(way)].layers[0];
            layer.before[s] = from ? from + way * size : nullptr;
            layer.after[s] = to ? to + way * size : nullptr;
        }
    }

    const int64_t P = d.output;
    std::vector<int64_t> of_y{of_x[0], of_x[1], P};
    add_directions(r, of_y, 1, ways);
    auto* y = static_cast<T*>(output(context, 0, of_y));
    for (int64_t way = 0; y && way < ways; ++way)
        runs[size_t(way)].layers[0].y = y + way * (r.batch_first ? P : batch * P);
    forward<T>(runs, r.threads);

    for (int64_t b = 0; b < batch && !mask.empty(); ++b)  // as in ONNX Runtime, a row without steps loses its states
        for (int s = 0; s < states && lengths[b] == 0; ++s)
            for (const Run<T>& run : runs)
                if (T* const to = run.layers[0].after[s]) std::fill_n(to + b * d.width(s), d.width(s), T(0));
    for (int s = 0; s < states; ++s)
        if (!after[s].empty()) swap_ends(ends[s], after[s].data(), ways, batch, d.width(s));
    if (!y || mask.empty()) return;
    for (int64_t b = 0; b < batch; ++b)  // ONNX returns zeros past the end of a row
        for (int64_t t = lengths[b]; t < steps; ++t)
            for (int64_t way = 0; way < ways; ++way) {
                const int64_t at = r.batch_first ? (b * steps + t) * ways + way : (t * ways + way) * batch + b;
                std::fill_n(y + at * P, P, T(0));
            }
}

// ── Callbacks ────────────────────────────────────────────────────────────────────────────────────────────────────────

// Returns what `body` throws as a status.
template <class F>
Status* as_status(F&& body) {
    try {
        body();
        return nullptr;
    } catch (const Unfit& error) {
        return api->create_status(error.code, error.what());
    } catch (const std::exception& error) {
        return api->create_status(kInvalidArgument, error.what());
    }
}

template <class T>
Status* create_node(const CustomOp*, const Api*, const KernelInfo* info, void** kernel) {
    return as_status([&] {
        int64_t handle = 0;
        need(api->int_attribute(info, "handle", &handle), "KernelInfoGetAttribute_int64");
        auto node = std::make_unique<Node>();
        size_t size = 0;
        need(api->node_name(info, nullptr, &size), "KernelInfo_GetNodeName");
        node->name.resize(size);
        need(api->node_name(info, &node->name[0], &size), "KernelInfo_GetNodeName");
        node->name.resize(size ? size - 1 : 0);  // without the final zero
        if (node->name.empty()) node->name = "a recurrent operator without a name";
        node->of = recurrent_of(handle);
        if (!node->of || node->of->cells<T>().empty())
            throw std::invalid_argument(node->name + ": found no weights of this type under the handle " +
                                        std::to_string(handle));
        *kernel = node.release();
    });
}

template <class T>
Status* compute_node(void* kernel, KernelContext* context) {
    return as_status([&] { compute<T>(*static_cast<const Node*>(kernel), context); });
}

// Sets the shapes of the outputs as far as that of X is known: ONNX Runtime then plans memory as for its own operators.
// The node has an entry for each output, also for those that nothing uses: ONNX Runtime doesn't check the index.
void infer(ShapeContext* context, Type type) {
    const Attribute* attribute = nullptr;
    int64_t handle = 0;
    size_t size = 0;
    need(api->attribute(context, "handle", &attribute), "ShapeInferContext_GetAttribute");
    need(api->read_attribute(attribute, kIntAttribute, &handle, sizeof handle, &size), "ReadOpAttr");
    const auto r = recurrent_of(handle);
    if (!r || (r->single.empty() && r->twice.empty())) return;  // the error is reported when the node is created
    TensorInfo* x = nullptr;
    need(api->input_info(context, 0, &x), "ShapeInferContext_GetInputTypeShape");
    size_t count = 0;
    need(api->count_dims(x, &count), "GetDimensionsCount");
    int64_t dims[] = {kEveryLength, kEveryLength, kEveryLength};
    const char* names[] = {"", "", ""};
    if (count == 3) {  // 0: nothing is known of X
        need(api->get_dims(x, dims, count), "GetDimensions");
        need(api->get_names(x, names, count), "GetSymbolicDimensions");
    }
    struct Dim {
        int64_t length;
        std::string name;  // of an unknown length
    };
    const Description& d = r->single.empty() ? r->twice[0]->description() : r->single[0]->description();
    const auto of_x = [&](int k) -> Dim {
        if (dims[k] >= 0) return {dims[k], ""};
        return {-1, *names[k] ? names[k] : "recurrent" + std::to_string(handle) + "_" + std::to_string(k)};
    };
    const auto put = [&](size_t index, std::vector<Dim> all, int place) {
        add_directions(*r, all, place, {int64_t(r->single.size() + r->twice.size()), ""});
        std::vector<int64_t> lengths;
        std::vector<const char*> called;
        for (const Dim& dim : all) lengths.push_back(dim.length), called.push_back(dim.name.c_str());
        InfoOf info;
        need(api->create_tensor_info(&info.of), "CreateTensorTypeAndShapeInfo");
        need(api->set_type(info.of, type), "SetTensorElementType");
        need(api->set_dims(info.of, lengths.data(), all.size()), "SetDimensions");
        need(api->set_names(info.of, called.data(), all.size()), "SetSymbolicDimensions");
        need(api->set_output_info(context, index, info.of), "ShapeInferContext_SetOutputTypeShape");
    };
    const Dim first = of_x(0), second = of_x(1), rows = r->batch_first ? first : second;
    put(0, {first, second, {d.output, ""}}, 1);
    for (int s = 0; s < d.kind->states; ++s) put(size_t(1 + s), {rows, {d.width(s), ""}}, 0);
}

template <class T>
constexpr CustomOp custom_op() {
    using Op = CustomOp::Op;
    constexpr Type type = sizeof(T) == 8 ? kDouble : kFloat;
    CustomOp op{};
    op.version = kApiVersion;
    op.name = [](Op) { return sizeof(T) == 8 ? "RecurrentDouble" : "Recurrent"; };
    op.provider = [](Op) -> const char* { return nullptr; };
    // X, then those of the lengths and the initial states that there are
    op.inputs = [](Op) -> size_t { return 2; };
    op.input_type = [](Op, size_t index) { return index ? kAny : type; };
    op.input_presence = [](Op, size_t index) { return index ? kVariadic : kRequired; };
    op.least_variadic_inputs = [](Op) { return 0; };
    op.same_variadic_inputs = [](Op) { return 0; };
    // Y and the states
    op.outputs = [](Op) -> size_t { return 1 + kStates; };
    op.output_type = [](Op, size_t) { return type; };
    op.output_presence = [](Op, size_t) { return kOptional; };
    op.least_variadic_outputs = [](Op) { return 0; };
    op.same_variadic_outputs = [](Op) { return 0; };
    op.memory = [](Op, size_t) { return 0; };  // the provider's own
    op.first_opset = [](Op) { return 1; };
    op.last_opset = [](Op) { return INT_MAX; };
    op.create_with_status = create_node<T>;
    op.compute_with_status = compute_node<T>;
    op.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    op.infer_shapes = [](Op, ShapeContext* context) { return as_status([&] { infer(context, type); }); };
    return op;
}

const CustomOp kSingle = custom_op<float>(), kTwice = custom_op<double>();

}  // namespace

int64_t publish(std::shared_ptr<const Recurrent> recurrent) {
    Published& to = published();
    const std::lock_guard<std::mutex> locked(to.lock);
    // Random numbers: a file can't name the operator of another one.
    std::random_device draw;
    for (;;) {
        const auto handle = int64_t((uint64_t(draw()) << 32 | draw()) >> 1);
        if (to.all.emplace(handle, recurrent).second) return handle;
    }
}

void withdraw(int64_t handle) {
    Published& from = published();
    const std::lock_guard<std::mutex> locked(from.lock);
    from.all.erase(handle);
}

}  // namespace cellstack

// Adds the operators to an OrtSessionOptions, in the domain "cellstack"; returns null or a status.
extern "C" EXPORTED void* RegisterCustomOps(void* options, const void* base) {
    using namespace cellstack;
    static std::mutex lock;
    static Domain* domain = nullptr;  // sessions use it until the process ends
    const std::lock_guard<std::mutex> locked(lock);
    if (!domain) {
        api = static_cast<const ApiBase*>(base)->api(kApiVersion);
        Domain* made = nullptr;
        if (Status* status = api->create_domain("cellstack", &made)) return status;
        for (const CustomOp* op : {&kSingle, &kTwice})
            if (Status* status = api->add_to_domain(made, op)) return status;
        domain = made;
    }
    return api->add_domain(static_cast<SessionOptions*>(options), domain);
}
