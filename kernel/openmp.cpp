// Runs tasks on PyTorch's threads, if PyTorch is in this process and its threads are awake.
#include "threads.h"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#include <time.h>

#include <mutex>

#include "platform.h"

namespace cellstack {
namespace {

using Parallel = void (*)(void (*function)(void* context), void* context, unsigned threads, unsigned flags);
using Count = int (*)();

struct OpenMp {
    Parallel parallel = nullptr;  // GOMP_parallel, which LLVM's and Intel's libraries also provide
    Count threads = nullptr;      // omp_get_max_threads
};

unsigned long long libraries_loaded() {
    unsigned long long count = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* to) {
            *static_cast<unsigned long long*>(to) = info->dlpi_adds;
            return 1;
        },
        &count);
    return count;
}

// The OpenMP library of PyTorch's threads; searched for again after other libraries were loaded.
OpenMp open_mp() {
    static std::mutex one;
    static unsigned long long seen = 0;
    static OpenMp found;
    std::lock_guard<std::mutex> lock(one);
    if (found.parallel) return found;
    if (const auto loaded = libraries_loaded(); loaded != seen) {
        seen = loaded;
        if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
            const auto parallel = reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
            const auto threads = reinterpret_cast<Count>(dlsym(torch, "omp_get_max_threads"));
            if (parallel && threads) found = {parallel, threads};
        }
    }
    return found;
}

constexpr clockid_t kUnknown = 0, kNone = 1;  // no thread has these ids

// The CPU time of a thread in nanoseconds; -1 if the thread has ended.
int64_t time_of(clockid_t thread) {
    timespec time;
    return clock_gettime(thread, &time) ? -1 : int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// Threads claim tasks dynamically, in ascending order, so a team of fewer threads than tasks does all of them too.
struct Team {
    void (*task)(void*, int);
    void* context;
    int count;
    pthread_t caller;
    std::atomic<int> next{0};
    std::atomic<clockid_t> other{kNone};

    static void work(void* team) {
        Team& t = *static_cast<Team*>(team);
        clockid_t own;
        if (!pthread_equal(pthread_self(), t.caller) && !pthread_getcpuclockid(pthread_self(), &own)) t.other = own;
        for (int k; (k = t.next.fetch_add(1, std::memory_order_relaxed)) < t.count;) t.task(t.context, k);
    }
};

std::atomic<bool> forked{false};  // a forked child process doesn't have its parent's threads

}  // namespace

bool run_on_open_mp(int count, void (*task)(void*, int), void* context) {
    static const bool registered = after_fork([] { forked = true; });
    if (!registered || forked) return false;
    const OpenMp with = open_mp();
    if (!with.parallel || with.threads() < count) return false;
    // Another thread of the team that OpenMP keeps for this thread; unknown until its first call.
    thread_local clockid_t other = kUnknown;
    if (other == kNone) return false;
    if (other != kUnknown) {
        const int64_t before = time_of(other);
        if (before >= 0 && time_of(other) == before) return false;  // it sleeps, or waits for a processor
    }
    Team team{task, context, count, pthread_self()};
    with.parallel(Team::work, &team, 0, 0);
    other = team.other;
    return true;
}

}  // namespace cellstack
#else
namespace cellstack {
bool run_on_open_mp(int, void (*)(void*, int), void*) { return false; }
}  // namespace cellstack
#endif
