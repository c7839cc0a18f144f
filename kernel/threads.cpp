#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cellstack {
namespace {

void pause_a_moment() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spinning catches the next call of a loop without the few microseconds that waking a thread takes; after that, sleep.
constexpr int kSpins = 2000;

class Pool {
  public:
    void run(int count, void (*task)(void*, int), void* context) {
        std::lock_guard<std::mutex> one_call(calls_);
        while (int(workers_.size()) < count - 1) {
            const int k = int(workers_.size()) + 1;
            workers_.emplace_back([this, k, seen = signal_.load()] { work(k, seen); });
        }
        task_ = task, context_ = context;
        left_.store(count - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            signal_.store(((signal_.load() >> kCountBits) + 1) << kCountBits | uint64_t(count));
        }
        wake_.notify_all();
        task(context, 0);
        for (int spin = 0; left_.load(std::memory_order_acquire) > 0; ++spin) {
            pause_a_moment();
            if (spin > kSpins) sched_yield();
        }
    }

  private:
    static constexpr int kCountBits = 16;

    // Worker k has task k of every call with more than k tasks. No call ends before its workers have, so what a worker
    // with a task reads is of that call; one without a task only notes the signal.
    void work(int k, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < kSpins && signal_.load(std::memory_order_acquire) == seen; ++spin)
                pause_a_moment();
            if (signal_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return signal_.load(std::memory_order_acquire) != seen; });
            }
            seen = signal_.load(std::memory_order_acquire);
            if (uint64_t(k) < (seen & ((1u << kCountBits) - 1))) {
                task_(context_, k);
                left_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    std::mutex calls_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> signal_{0};  // number of the call, and how many tasks it has
    std::atomic<int> left_{0};
    void (*task_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

// Never destroyed: workers sleep in it until the process ends. A forked child has no workers and starts a pool anew.
Pool* pool = nullptr;
std::once_flag pool_made;

Pool& the_pool() {
    std::call_once(pool_made, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    return *pool;
}

}  // namespace

void parallel(int count, void (*task)(void*, int), void* context) {
    if (count == 1)
        task(context, 0);
    else if (count > 1)
        the_pool().run(count, task, context);
}

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
    for (int spin = 0; counter.load(std::memory_order_acquire) < value; ++spin) {
        pause_a_moment();
        if (spin > kSpins) sched_yield();
    }
}

#if defined(__SSE2__)
FlushDenormals::FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(unsigned(before_) | 0x8040u); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(unsigned(before_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() {}
#endif

}  // namespace cellstack
