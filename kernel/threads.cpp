#include "threads.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "leaf.h"
#include "platform.h"

namespace cellstack {
namespace {

// Spinning catches the next call of a loop without the few microseconds that waking a thread takes; then threads sleep.
constexpr int kSpins = 2000;

class Pool {
  public:
    void run(int count, void (*task)(void*, int), void* context) {
        std::lock_guard<std::mutex> one_call(calls_);
        try {
            while (int(workers_.size()) < count - 1)
                workers_.emplace_back([this, seen = call_of(claims_.load())] { work(seen); });
        } catch (const std::system_error&) {
            // the system allows no more threads: the existing ones do all tasks
        }
        task_ = task, context_ = context;
        avoid_caller();
        left_.store(count, std::memory_order_relaxed);
        const uint64_t call = call_of(claims_.load()) + 1;
        {
            std::lock_guard<std::mutex> lock(sleep_);
            claims_.store(call << 32 | uint64_t(count) << 16, std::memory_order_release);
        }
        wake_.notify_all();
        claim_tasks(call);
        for (int spin = 0; left_.load(std::memory_order_acquire) > 0; ++spin) {
            wait_a_moment(spin);
        }
    }

  private:
    static uint64_t call_of(uint64_t claims) { return claims >> 32; }

    // Threads claim tasks dynamically, in ascending order, so a thread that wakes late doesn't delay the others. A
    // claim contains the number of its call, and fails after that call has ended; while a claimed task runs, the call
    // can't end, so what is read here belongs to that call.
    void claim_tasks(uint64_t call) {
        uint64_t claims = claims_.load(std::memory_order_acquire);
        while (call_of(claims) == call && (claims & 0xffff) < (claims >> 16 & 0xffff))
            if (claims_.compare_exchange_weak(claims, claims + 1, std::memory_order_acq_rel)) {
                task_(context_, int(claims & 0xffff));
                left_.fetch_sub(1, std::memory_order_release);
                claims = claims_.load(std::memory_order_acquire);
            }
    }

    // Lets the workers run on all of the caller's processors except the current one. A virtual machine's scheduler
    // takes an idle processor for one that the host has withdrawn, and wakes a thread on the processor of the thread
    // that wakes it, which is busy: the worker would start milliseconds late.
    void avoid_caller() {
#ifdef __linux__
        const int here = sched_getcpu();
        if (here == caller_ && off_ == workers_.size()) return;
        cpu_set_t others;
        if (sched_getaffinity(0, sizeof others, &others)) return;
        if (here >= 0 && CPU_COUNT(&others) > 1) CPU_CLR(here, &others);
        for (std::thread& worker : workers_) pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
        caller_ = here, off_ = workers_.size();
#endif
    }

    void work(uint64_t seen) {
        const auto called = [&] { return call_of(claims_.load(std::memory_order_acquire)) != seen; };
        for (;;) {
            for (int spin = 0; spin < kSpins && !called(); ++spin) pause_a_moment();
            if (!called()) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, called);
            }
            seen = call_of(claims_.load(std::memory_order_acquire));
            claim_tasks(seen);
        }
    }

    std::mutex calls_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> claims_{0};  // the number of the call, of its tasks, and of those that are claimed
    std::atomic<int> left_{0};
    [[maybe_unused]] int caller_ = -1;  // the processor that the workers avoid, and how many workers do
    [[maybe_unused]] size_t off_ = 0;
    void (*task_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

// Never destroyed: workers sleep in it until the process ends. A forked child process has no workers and makes a new
// pool.
Pool* pool = nullptr;
std::once_flag pool_made;

Pool& the_pool() {
    std::call_once(pool_made, [] {
        pool = new Pool;
        after_fork([] { pool = new Pool; });
    });
    return *pool;
}

}  // namespace

void parallel(int count, void (*task)(void*, int), void* context) {
    if (count == 1)
        task(context, 0);
    else if (count > 1 && !run_on_open_mp(count, task, context))
        the_pool().run(count, task, context);
}

void wait_a_moment(int spin) {
    pause_a_moment();
    if (spin > kSpins) std::this_thread::yield();
}

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
    for (int spin = 0; counter.load(std::memory_order_acquire) < value; ++spin) {
        wait_a_moment(spin);
    }
}

// A thread that yields its core between two shares doesn't delay the others; one that loses it within a share, when its
// time slice ends and another program needs the core, delays them for milliseconds. So each thread yields its core at
// intervals.
constexpr int64_t kOffer = 500'000;  // nanoseconds

int64_t nanoseconds() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Lockstep::Lockstep(int shares, int64_t phases) : shares_(shares), phases_(phases), claims_(new Claims[shares]) {}

Lockstep::Waiter::Waiter(const Lockstep& lockstep) : lockstep_(lockstep), since_(nanoseconds()) {}

void Lockstep::Waiter::yield_core() {
    if (++phases_ % 16) return;
    const int64_t now = nanoseconds();
    if (now - since_ < kOffer) return;
    since_ = now;
    std::this_thread::yield();
}

double lockstep_latency() {
    static const double latency = [] {
        constexpr int rounds = 15, phases = 300, wanted = 5, numbers = 256;
        std::vector<double> taken;
        // what a step exchanges: each share writes some lines, and reads those that the other wrote in the previous
        // phase
        alignas(64) float passed[2][2][numbers] = {};
        for (int round = 0; round < rounds && int(taken.size()) < wanted; ++round) {
            Lockstep lockstep(2, phases);
            int own_shares = 0;  // that the second thread did
            const int64_t start = nanoseconds();
            parallel(2, [&](int own) {
                lockstep.run(own, [&](int64_t phase, int share) {
                    const float* from = passed[phase % 2][1 - share];
                    for (int k = 0; k < numbers; ++k) passed[1 - phase % 2][share][k] = from[k] + 1;
                    if (own && share == own) ++own_shares;
                });
            });
            // if the other thread was late, this one did its shares, and neither waited for the other
            if (own_shares > phases * 9 / 10) taken.push_back(double(nanoseconds() - start) / phases);
        }
        if (int(taken.size()) < wanted) return 500.0;  // the machine is busy
        std::sort(taken.begin(), taken.end());
        return std::max(200.0, taken[wanted / 2]);
    }();
    return latency;
}

FlushDenormals::FlushDenormals() : before_(float_mode()) { set_float_mode(before_ | kDenormalsAreZero); }
FlushDenormals::~FlushDenormals() { set_float_mode(before_); }

}  // namespace cellstack
