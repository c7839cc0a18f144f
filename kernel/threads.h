// A pool of worker threads, and ways for threads to wait for each other.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace cellstack {

// Runs task(k) for k in [0, count) on up to `count` threads, including the caller's; returns when all are done. A task
// may wait for one with a lower number, never for one with a higher number.
void parallel(int count, void (*task)(void* context, int k), void* context);

template <class F>
void parallel(int count, F&& body) {
    parallel(count, [](void* context, int k) { (*static_cast<F*>(context))(k); }, &body);
}

// Runs the tasks in the same way on PyTorch's threads, and returns true; or returns false if PyTorch isn't in this
// process, or its threads are too few or asleep. For some milliseconds after an operation of PyTorch they spin, and
// would compete with the pool's threads for processors. Once they sleep, using them would be slow: an OpenMP call only
// ends when the last of its threads has arrived, which may be milliseconds later.
bool run_on_open_mp(int count, void (*task)(void* context, int k), void* context);

// One iteration of a loop that waits for a short time; after some iterations other threads may take the core.
void wait_a_moment(int spin);

// Waits until `counter` reaches `value`.
void wait_for(const std::atomic<int64_t>& counter, int64_t value);

// Work in phases, each divided into the same shares: a phase begins when all shares of the previous one are done. The
// threads of a team call `run`, each with its own share, whose data stays in its cache. If a thread is late, or the
// system suspends it between two shares, the others do its share.
class Lockstep {
  public:
    Lockstep(int shares, int64_t phases);

    // body(phase, share). Returns when all phases are done.
    template <class F>
    void run(int own, F&& body) {
        Waiter waiter(*this);
        for (int64_t phase; (phase = done_.load(std::memory_order_acquire) / shares_) < phases_;) {
            const auto work = [&](int share) {
                if (!claim(share, phase)) return false;
                body(phase, share);
                done_.fetch_add(1, std::memory_order_acq_rel);
                return true;
            };
            work(own);
            waiter.until((phase + 1) * shares_, [&] {
                bool any = false;
                for (int share = 0; share < shares_; ++share) any = work(share) || any;
                return any;
            });
        }
    }

  private:
    struct alignas(64) Claims {
        std::atomic<int64_t> phases{0};  // in how many phases a thread has claimed this share
    };
    // Decides how long a thread waits for the others before it does their shares, and when it yields its core to other
    // programs.
    class Waiter {
      public:
        explicit Waiter(const Lockstep& lockstep);
        template <class F>
        void until(int64_t count, F&& help) {
            for (int spin = 0; lockstep_.done_.load(std::memory_order_acquire) < count; ++spin) {
                if (spin == patience_) patience_ = help() ? 0 : kPatience;
                wait_a_moment(spin);
            }
            yield_core();
        }

      private:
        static constexpr int kPatience = 64;
        void yield_core();
        const Lockstep& lockstep_;
        int patience_ = kPatience, phases_ = 0;
        int64_t since_;
    };

    bool claim(int share, int64_t phase) {
        std::atomic<int64_t>& claims = claims_[share].phases;
        return claims.load(std::memory_order_relaxed) == phase &&
               claims.compare_exchange_strong(phase, phase + 1, std::memory_order_acq_rel);
    }

    const int shares_;
    const int64_t phases_;
    std::unique_ptr<Claims[]> claims_;
    alignas(64) std::atomic<int64_t> done_{0};  // shares done, over all phases
};

// The overhead of a phase of a Lockstep of two threads in nanoseconds, including the exchange of a step's results;
// measured once.
double lockstep_latency();

// Within its scope, denormal results and operands are treated as zero; the thread's previous mode is restored
// afterwards.
class FlushDenormals {
  public:
    FlushDenormals();
    ~FlushDenormals();

  private:
    uint64_t before_;
};

}  // namespace cellstack
