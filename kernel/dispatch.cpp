// Selects the instruction set: the best one that the machine supports, unless another one is requested.
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cell.h"
#include "platform.h"

namespace cellstack {
namespace {

// Whether the processor has all these features.
bool supported(const char* needs) {
    for (std::string left = needs; !left.empty();) {
        const size_t end = std::min(left.find(','), left.size());
        if (!cpu_supports(left.substr(0, end).c_str())) return false;
        left.erase(0, end + 1);
    }
    return true;
}

#ifdef CELLSTACK_HAS_avx512bf16
// The time of some tiles of sums in nanoseconds: the least of several measurements.
double time_of_sums(const Tiles<float>& tiles) {
    constexpr int rows = 6, depth = 64, wide = 4 * 16;
    alignas(64) static float a[rows * depth], panel[depth * wide], sums[rows * wide];
    Tile<float> t{};
    t.a_step = 1, t.depth = depth;
    for (int r = 0; r < rows; ++r) t.a[r] = a + r * depth;
    t.panel = panel, t.panel_step = wide, t.panel_vector = wide / 4;
    t.to = sums, t.to_row = wide, t.to_vector = wide / 4;
    double least = 1e9;
    for (int time = 0; time < 8; ++time) {
        const int64_t begin = nanoseconds();
        for (int n = 0; n < 8; ++n) tiles.of[rows - 1][3](t);
        least = std::min(least, double(nanoseconds() - begin));
    }
    return least;
}
// Whether pairs are the faster ones: on some processors a pair takes four times as long as a multiply-add, on others
// equally long.
bool pairs_pay(const Leaf<float>& leaf) { return time_of_sums(leaf.bfloat16) < 1.5 * time_of_sums(leaf.plain); }
#endif

// Those that the processor supports, the fastest first.
std::vector<const InstructionSet*> find() {
    std::vector<const InstructionSet*> sets;
    const auto add = [&](const InstructionSet& set) {
        if (supported(set.needs)) sets.push_back(&set);
    };
#ifdef CELLSTACK_HAS_avx512
#ifdef CELLSTACK_HAS_avx512vnni
    static InstructionSet vnni = avx512::set;
    vnni.name = avx512vnni::int8.name, vnni.needs = avx512vnni::int8.needs, vnni.single.int8 = avx512vnni::int8.tiles;
    add(vnni);
#ifdef CELLSTACK_HAS_avx512bf16
    static InstructionSet pairs = vnni;
    pairs.name = avx512bf16::bfloat16.name, pairs.needs = avx512bf16::bfloat16.needs;
    pairs.single.bfloat16 = avx512bf16::bfloat16.tiles;
    if (supported(pairs.needs)) sets.insert(pairs_pay(pairs.single) ? sets.begin() : sets.end(), &pairs);
#endif
#endif
    add(avx512::set);
#endif
#ifdef CELLSTACK_HAS_avx2
    add(avx2::set);
#endif
#ifdef CELLSTACK_HAS_simd128
    add(simd128::set);
#endif
#ifdef CELLSTACK_HAS_baseline
    add(baseline::set);
#endif
    return sets;
}

const std::vector<const InstructionSet*>& available() {
    static const std::vector<const InstructionSet*> sets = find();
    return sets;
}

const InstructionSet* named(const char* name) {
    for (const InstructionSet* set : available())
        if (!strcmp(set->name, name)) return set;
    return nullptr;
}

std::atomic<const InstructionSet*>& in_use() {
    static std::atomic<const InstructionSet*> set{available().front()};
    return set;
}

std::atomic<bool> by_name{false};

}  // namespace

double resident_bytes() {
    static const double bytes = [] {
        const int64_t size = level2_cache_bytes();
        return size > 0 ? 0.75 * double(size) : 0.75e6;  // of a megabyte, where the system doesn't say
    }();
    return bytes;
}

const InstructionSet& current() { return *in_use().load(std::memory_order_relaxed); }

std::vector<const char*> instruction_sets() {
    std::vector<const char*> names;
    for (const InstructionSet* set : available()) names.push_back(set->name);
    return names;
}

const char* instruction_set() { return current().name; }

bool set_instruction_set(const char* name) {
    const InstructionSet* set = *name ? named(name) : available().front();
    if (set) in_use().store(set), by_name.store(*name);
    return set != nullptr;
}

template <class T>
const Leaf<T>& leaf_for(int64_t units) {
    static const InstructionSet* const narrower = named("avx2");
    const Leaf<T>& leaf = leaf_of<T>(current());
    if (!narrower || by_name.load(std::memory_order_relaxed)) return leaf;
    const Leaf<T>& narrow = leaf_of<T>(*narrower);
    return units <= narrow.width && narrow.width < leaf.width ? narrow : leaf;
}
template const Leaf<float>& leaf_for(int64_t);
template const Leaf<double>& leaf_for(int64_t);

void activate(const Activation& activation, const float* x, float* y, int64_t n) {
    current().single.activate(activation, x, y, n);
}
void activate(const Activation& activation, const double* x, double* y, int64_t n) {
    current().twice.activate(activation, x, y, n);
}

}  // namespace cellstack
