// Atomic additions of integers. Sums of floats are never made with them: their order, and with it
// the result, would change from run to run.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

#if defined(FT_SIMT)
FT_DEVICE uint32_t atomic_add(uint32_t* global, uint32_t value) {
  return simt::atomic_add(global, value);
}
FT_DEVICE uint32_t shared_atomic_add(uint32_t* shared, uint32_t value) {
  return simt::shared_atomic_add(shared, value);
}
FT_DEVICE void memory_fence() { simt::memory_fence(); }
#else
// Each returns what was there before.
FT_DEVICE uint32_t atomic_add(uint32_t* global, uint32_t value) { return atomicAdd(global, value); }
FT_DEVICE uint32_t shared_atomic_add(uint32_t* shared, uint32_t value) {
  return atomicAdd(shared, value);
}
// What this thread wrote to global memory is seen by whoever sees what it writes after.
FT_DEVICE void memory_fence() { __threadfence(); }
#endif

}  // namespace ft::cuda
