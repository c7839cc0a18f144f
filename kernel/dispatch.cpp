// Selects the instruction set: the best one that the machine supports, unless another one is requested.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "cell.h"
#include "platform.h"

namespace cellstack {
namespace {

std::vector<const InstructionSet*> find() {
    std::vector<const InstructionSet*> sets;
#ifdef CELLSTACK_HAS_avx512
    if (cpu_supports("avx512f") && cpu_supports("avx512vl") && cpu_supports("avx512dq") && cpu_supports("avx512bw")) {
        if (cpu_supports("avx512vnni")) {
            sets.push_back(&avx512::vnni);
            // On some processors a pair takes four times as long as a multiply-add, on others equally long.
            if (cpu_supports("avx512bf16"))
                sets.insert(avx512::pairs_pay() ? sets.begin() : sets.end(), &avx512::pairs);
        }
        sets.push_back(&avx512::set);
    }
#endif
#ifdef CELLSTACK_HAS_avx2
    if (cpu_supports("avx2") && cpu_supports("fma")) sets.push_back(&avx2::set);
#endif
#ifdef CELLSTACK_HAS_simd128
    sets.push_back(&simd128::set);
#endif
#ifdef CELLSTACK_HAS_baseline
    sets.push_back(&baseline::set);
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
