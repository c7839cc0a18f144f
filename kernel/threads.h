// A pool of worker threads for calls that ask for more than one.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace cellstack {

// Runs task(k) for k in [0, count), on up to `count` threads, the caller's among them; returns when all are done.
// A task may wait for one with a lower number, never for one with a higher.
void parallel(int count, void (*task)(void* context, int k), void* context);

template <class F>
void parallel(int count, F&& body) {
    parallel(count, [](void* context, int k) { (*static_cast<F*>(context))(k); }, &body);
}

// Runs the tasks likewise, on the threads of PyTorch, and returns true; or returns false, as it isn't in this process,
// or has too few of them, or they sleep. For some milliseconds after an operation of PyTorch they spin, and threads of
// our own would have to share processors with them. Once they sleep, they are no help: a call of OpenMP ends when the
// last of its threads has come, which may be milliseconds later.
bool run_on_open_mp(int count, void (*task)(void* context, int k), void* context);

// A turn of a loop that waits for what is nearly there; after some turns others may have the core.
void wait_a_moment(int spin);

// Waits until `counter` reaches `value`.
void wait_for(const std::atomic<int64_t>& counter, int64_t value);

// Work in phases, each cut into the same shares: a phase begins when all shares of the one before are done. The threads
// of a team call `run`, each with a share of its own, which stays in its cache; a thread that comes late, or that the
// system has put to sleep between two shares, holds nobody up: the others do its shares.
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
        std::atomic<int64_t> phases{0};  // in how many phases somebody has taken this share
    };
    // How long a thread waits for the others before it does their shares, and when it lets other programs have its
    // core.
    class Waiter {
      public:
        explicit Waiter(const Lockstep& lockstep);
        template <class F>
        void until(int64_t count, F&& help) {
            for (int spin = 0; lockstep_.done_.load(std::memory_order_acquire) < count; ++spin) {
                if (spin == patience_) patience_ = help() ? 0 : kPatience;
                wait_a_moment(spin);
            }
            give_way();
        }

      private:
        static constexpr int kPatience = 64;
        void give_way();
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
    alignas(64) std::atomic<int64_t> done_{0};  // shares, of all phases
};

// Nanoseconds that a phase of a Lockstep of two threads takes beside its work, with what a step passes on: measured
// once.
double lockstep_latency();

// Within its scope, results and operands that are denormal count as zero; the thread's own mode comes back after.
class FlushDenormals {
  public:
    FlushDenormals();
    ~FlushDenormals();

  private:
    uint64_t before_;
};

}  // namespace cellstack
