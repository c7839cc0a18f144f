// What differs between compilers, processors and operating systems. The rest of the kernel is standard C++17 with the
// vector extension and the builtin functions that GCC and Clang share; on Windows, clang-cl compiles it.
//
// Like all that kernel/simd.cpp includes, nothing here is shared between translation units.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // the same, for a lambda
#define NOINLINE __attribute__((noinline))
// Unrolls a loop with a small constant count: then every index is a constant, and arrays of vectors are in registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace cellstack {
namespace {

// Reads a cache line into the second-level cache ahead of its use.
INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Tells the processor that a loop waits for another thread.
INLINE void pause_a_moment() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The floating-point mode of this thread: rounding, exceptions, and whether denormal numbers are treated as zero.
#if defined(__SSE2__)
constexpr uint64_t kDenormalsAreZero = 0x8040;
INLINE uint64_t float_mode() { return _mm_getcsr(); }
INLINE void set_float_mode(uint64_t mode) { _mm_setcsr(unsigned(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kDenormalsAreZero = uint64_t(1) << 24;
INLINE uint64_t float_mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
INLINE void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#else
constexpr uint64_t kDenormalsAreZero = 0;  // such processors keep denormal numbers
INLINE uint64_t float_mode() { return 0; }
INLINE void set_float_mode(uint64_t) {}
#endif

#if defined(__x86_64__)
// Whether the processor and the system support these instructions of x86-64. The compilers' __builtin_cpu_supports
// needs their own libraries, which Microsoft's linker doesn't find and Zig's doesn't initialise.
inline bool cpu_supports(const char* name) {
    constexpr struct {
        const char* name;
        int leaf, subleaf, word, bit, saved;  // where CPUID reports it, and what the system must save
    } features[] = {{"fma", 1, 0, 2, 12, 6},           {"avx2", 7, 0, 1, 5, 6},         {"avx512f", 7, 0, 1, 16, 0xe6},
                    {"avx512dq", 7, 0, 1, 17, 0xe6},   {"avx512bw", 7, 0, 1, 30, 0xe6}, {"avx512vl", 7, 0, 1, 31, 0xe6},
                    {"avx512vnni", 7, 0, 2, 11, 0xe6}, {"avx512bf16", 7, 1, 0, 5, 0xe6}};
    unsigned words[4];  // eax, ebx, ecx, edx
    const auto identify = [&](int leaf, int subleaf) {
        asm("cpuid" : "=a"(words[0]), "=b"(words[1]), "=c"(words[2]), "=d"(words[3]) : "a"(leaf), "c"(subleaf));
    };
    identify(0, 0);
    if (words[0] < 7) return false;
    identify(1, 0);
    if (!(words[2] >> 27 & 1)) return false;  // the system saves no vector registers
    unsigned saved, upper;
    asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    for (const auto& feature : features) {
        if (strcmp(feature.name, name)) continue;
        identify(feature.leaf, feature.subleaf);
        return (saved & unsigned(feature.saved)) == unsigned(feature.saved) && (words[feature.word] >> feature.bit & 1);
    }
    return false;
}
#else
inline bool cpu_supports(const char*) { return false; }
#endif

// The bytes of a core's second-level cache; 0: the system doesn't say.
inline int64_t level2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    return 0;
#endif
}

// Calls the function in each child process that this one forks; returns whether the system will do so. Processes don't
// fork on Windows.
inline bool after_fork(void (*in_child)()) {
#if defined(_WIN32)
    (void)in_child;
    return true;
#else
    return !pthread_atfork(nullptr, nullptr, in_child);
#endif
}

}  // namespace
}  // namespace cellstack
