// Memory of results that a training makes and lets go at every step, kept from step to step: a system takes longer to
// make its pages anew than the kernel to fill them.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cellstack {

// Blocks, aligned to a cache line. One thread at a time may call it.
class Reused {
  public:
    struct Block {
        void* memory;
        size_t bytes;
    };

    // The smallest of the kept blocks that fits and isn't half as large again, else a new one.
    Block take(size_t bytes) {
        auto best = kept_.end();
        for (auto block = kept_.begin(); block != kept_.end(); ++block)
            if (block->bytes >= bytes && block->bytes - bytes <= bytes / 2 &&
                (best == kept_.end() || block->bytes < best->bytes))
                best = block;
        if (best == kept_.end()) return fresh(bytes);
        const Block found = *best;
        kept_.erase(best);
        bytes_ -= found.bytes;
        return found;
    }

    // Keeps it, in the place of those that have lain idle for longest.
    void give(Block block) {
        kept_.push_back(block);
        for (bytes_ += block.bytes; bytes_ > kMost; kept_.pop_front()) {
            bytes_ -= kept_.front().bytes;
            free(kept_.front().memory);
        }
    }

  private:
    static constexpr size_t kMost = size_t(256) << 20;  // bytes that are kept
    static constexpr size_t kLarge = size_t(4) << 20;   // from where large pages pay; NumPy asks for them likewise
    static constexpr size_t kPage = 4096;

    static Block fresh(size_t bytes) {
        const size_t whole = (bytes + kPage - 1) / kPage * kPage;
        void* memory = aligned_alloc(kPage, whole);
        if (!memory) throw std::bad_alloc();
#ifdef __linux__
        if (whole >= kLarge) madvise(memory, whole, MADV_HUGEPAGE);  // a wish: the system may say no
#endif
        return {memory, whole};
    }

    std::deque<Block> kept_;  // the one that has lain idle for longest first
    size_t bytes_ = 0;
};

}  // namespace cellstack
