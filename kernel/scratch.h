// Memory for a call, and what it is measured by: sizes that can't wrap, parts on lines of their own, rows with padding.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace cellstack {

// Sizes are products of what a caller asks for: whatever is beyond this would wrap around sooner or later.
constexpr int64_t kMostNumbers = int64_t(1) << 44;

inline int64_t checked(int64_t a, int64_t b) {
    if (b && a > kMostNumbers / b) throw std::bad_alloc();
    return a * b;
}

// Memory for the length of a call or an object, aligned to a cache line. A block that a thread gave back is kept for
// its next call: fresh pages cost more than the sums that go into them.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : bytes_(bytes_of(count)) {
        Kept& kept = spare();
        if (kept.memory && kept.bytes >= bytes_ && kept.bytes <= 4 * bytes_ + 4096) {
            memory_ = kept.memory, bytes_ = kept.bytes, kept.memory = nullptr;
        } else {
            memory_ = aligned_alloc(64, bytes_);
            if (!memory_) throw std::bad_alloc();
        }
    }
    ~Scratch() {
        Kept& kept = spare();
        if (bytes_ <= kMost && (!kept.memory || kept.bytes < bytes_)) {
            std::swap(kept.memory, memory_);
            std::swap(kept.bytes, bytes_);
        }
        free(memory_);
    }
    Scratch(const Scratch&) = delete;
    T* get() const { return static_cast<T*>(memory_); }

  private:
    static constexpr size_t kMost = size_t(64) << 20;
    static size_t bytes_of(int64_t count) {
        if (count < 0 || count > kMostNumbers) throw std::bad_alloc();
        return (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    }
    struct Kept {
        void* memory = nullptr;
        size_t bytes = 0;
        ~Kept() { free(memory); }
    };
    static Kept& spare() {
        static thread_local Kept kept;
        return kept;
    }
    void* memory_;
    size_t bytes_;
};

// Hands out parts of one scratch block, each on a cache line of its own.
template <class T>
class Parts {
  public:
    explicit Parts(T* memory) : next_(memory) {}
    static int64_t size(int64_t count) { return (count + 15) / 16 * 16; }
    T* take(int64_t count) {
        T* part = next_;
        next_ += size(count);
        return part;
    }

  private:
    T* next_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMostThreads = 256;

inline int useful_threads(int asked, int64_t multiplications) {
    return int(std::max<int64_t>(1, std::min<int64_t>({asked, multiplications / kThreadWork, kMostThreads})));
}

// [rows][units] between the caller's arrays and the padded ones that the inner routines use.
template <class T>
void pad(T* to, int64_t stride, const T* from, int64_t rows, int64_t units) {
    for (int64_t r = 0; r < rows; ++r) {
        if (from) memcpy(to + r * stride, from + r * units, size_t(units) * sizeof(T));
        std::fill(to + r * stride + (from ? units : 0), to + (r + 1) * stride, T(0));
    }
}
template <class T>
void unpad(T* to, const T* from, int64_t stride, int64_t rows, int64_t units) {
    for (int64_t r = 0; r < rows; ++r) memcpy(to + r * units, from + r * stride, size_t(units) * sizeof(T));
}

}  // namespace cellstack
