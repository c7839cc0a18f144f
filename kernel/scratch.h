// Memory for a call, and the arithmetic of sizes: sizes that can't overflow, parts that start at a cache line, rows
// with padding.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace cellstack {

// Sizes are products of numbers that a caller chooses. Larger ones than this are refused before they can overflow.
constexpr int64_t kMostNumbers = int64_t(1) << 44;

inline int64_t checked(int64_t a, int64_t b) {
    if (b && a > kMostNumbers / b) throw std::bad_alloc();
    return a * b;
}

// Memory for the lifetime of a call or an object, aligned to a cache line. A thread keeps the largest of its freed
// blocks for its next calls: fresh pages cost more than the sums that are written to them.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) {
        const size_t bytes = bytes_of(count);
        Block* best = nullptr;
        for (Block& block : spare().blocks)
            if (block.bytes >= bytes && block.bytes <= 4 * bytes + 4096 && (!best || block.bytes < best->bytes))
                best = &block;
        if (best) {
            std::swap(own_, *best);
        } else {
            own_ = {::operator new(bytes, kLine), bytes};
        }
    }
    ~Scratch() {
        // A larger block replaces a smaller one, which in turn may replace another; the smallest is freed.
        size_t left = kMost;
        for (Block& block : spare().blocks) {
            if (block.bytes < own_.bytes && own_.bytes <= left) std::swap(block, own_);
            if (block.bytes > left) ::operator delete(std::exchange(block, {}).memory, kLine);
            left -= block.bytes;
        }
        ::operator delete(own_.memory, kLine);
    }
    Scratch(const Scratch&) = delete;
    T* get() const { return static_cast<T*>(own_.memory); }

  private:
    static constexpr std::align_val_t kLine{64};
    static constexpr size_t kMost = size_t(64) << 20;  // bytes that a thread keeps
    static size_t bytes_of(int64_t count) {
        if (count < 0 || count > kMostNumbers) throw std::bad_alloc();
        return (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    }
    struct Block {
        void* memory = nullptr;
        size_t bytes = 0;
    };
    struct Spare {
        Block blocks[4];
        ~Spare() {
            for (Block& block : blocks) ::operator delete(block.memory, kLine);
        }
    };
    static Spare& spare() {
        static thread_local Spare kept;
        return kept;
    }
    Block own_;
};

// Divides one scratch block into parts that start at a cache line.
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

// Copies [rows][units] between the caller's arrays and the padded ones of the inner routines.
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
