// Threads, scratch memory and the size of the cache for the CPU kernels. Work runs on torch's own
// thread pool, so torch.set_num_threads, OMP_NUM_THREADS and nested parallel regions mean what
// users expect.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ft {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into one contiguous range per thread, no range shorter than `grain`.
void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* context);
int num_threads();

// Bytes of last-level cache that num_threads() threads have together.
int64_t last_level_cache();

// A call that moves more bytes than this takes rows one by one from the first column to the last:
// from memory, the hardware's prefetcher follows one forward stream twice as fast as several or a
// backward one. Rows in cache are taken several at a time. A number, not the machine's, since the
// order of a sum of rows hangs on it.
constexpr int64_t kFewStreamsBytes = int64_t{16} << 20;

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
