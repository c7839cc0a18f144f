// A pool of worker threads for calls that ask for more than one.
#pragma once
#include <atomic>
#include <cstdint>

namespace cellstack {

// Runs task(k) for k in [0, count), on up to `count` threads, the caller's among them; returns when all are done.
// A task may wait for one with a lower number, never for one with a higher.
void parallel(int count, void (*task)(void* context, int k), void* context);

template <class F>
void parallel(int count, F&& body) {
    parallel(count, [](void* context, int k) { (*static_cast<F*>(context))(k); }, &body);
}

// Waits until `counter` reaches `value`.
void wait_for(const std::atomic<int64_t>& counter, int64_t value);

// Within its scope, results and operands that are denormal count as zero; the thread's own mode comes back after.
class FlushDenormals {
  public:
    FlushDenormals();
    ~FlushDenormals();

  private:
    uint64_t before_;
};

}  // namespace cellstack
