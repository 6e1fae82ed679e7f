// Threads and scratch memory for the CPU kernels. Work runs on torch's own thread pool, so
// torch.set_num_threads, OMP_NUM_THREADS and nested parallel regions mean what users expect.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ft {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into one contiguous range per thread, no range shorter than `grain`.
void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* context);
int num_threads();

// A 64-byte aligned block that belongs to this thread and is reused from call to call, so that a
// kernel neither allocates nor pays page faults in the steady state. One block per slot.
enum class Scratch { tile, pack, accumulate, gradient, shared, rows, logits, sums, count };
void* thread_scratch(Scratch slot, size_t bytes);

}  // namespace ft

#if defined(FT_ISA)
namespace ft::FT_ISA {

template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  parallel_ranges(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace ft::FT_ISA
#endif
