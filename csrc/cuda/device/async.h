// cp.async: global memory to shared memory past the registers, in groups that a thread waits for.
// What a thread copied is its own until it has waited and a barrier has passed.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

#if defined(FT_SIMT)
template <int kBytes>
FT_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  simt::copy_async(shared, global, kBytes, valid ? kBytes : 0);
}
FT_DEVICE void copy_async_part(void* shared, const void* global, int bytes) {
  simt::copy_async(shared, global, 16, bytes);
}
FT_DEVICE void copy_async_commit() { simt::copy_async_commit(); }
template <int kGroupsLeft>
FT_DEVICE void copy_async_wait() {
  simt::copy_async_wait(kGroupsLeft);
}
FT_DEVICE void copy_async_wait(int groups_left) { simt::copy_async_wait(groups_left); }
#else
FT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 4, 8 or 16 bytes, aligned alike on both sides; zeros, and no access, where not `valid`. 16 bytes
// bypass L1, as what goes to shared memory is not read from L1 again.
template <int kBytes>
FT_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// 16 bytes, of which the first `bytes` are read and the others are zeros.
FT_DEVICE void copy_async_part(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
FT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroupsLeft of the thread's committed groups are under way.
template <int kGroupsLeft>
FT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}
// The same for a number that is known at run time, the same in all threads; over 3 counts as 3.
FT_DEVICE void copy_async_wait(int groups_left) {
  switch (groups_left) {
    case 0: return copy_async_wait<0>();
    case 1: return copy_async_wait<1>();
    case 2: return copy_async_wait<2>();
    default: return copy_async_wait<3>();
  }
}
#endif

}  // namespace ft::cuda
