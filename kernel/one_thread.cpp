// What threads.h declares, for a machine without threads: the tasks of a call run one after the other.
#include "threads.h"

namespace cellstack {

// A task only waits for tasks with lower numbers, which have ended.
void parallel(int count, void (*task)(void*, int), void* context) {
    for (int k = 0; k < count; ++k) task(context, k);
}

void wait_a_moment(int) {}
void wait_for(const std::atomic<int64_t>&, int64_t) {}

Lockstep::Lockstep(int shares, int64_t phases) : shares_(shares), phases_(phases), claims_(new Claims[shares]) {}
Lockstep::Waiter::Waiter(const Lockstep& lockstep) : lockstep_(lockstep), since_(0) {}
void Lockstep::Waiter::yield_core() {}
double lockstep_latency() { return 0; }

// WebAssembly can't treat denormals as zeros.
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() {}

}  // namespace cellstack
