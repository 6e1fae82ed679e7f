// What the lanes of a warp do together, and barriers. All 32 lanes of a warp take part in each.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

FT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
FT_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

#if defined(FT_SIMT)
FT_DEVICE int hidden(int x) { return x; }
FT_DEVICE uint32_t shuffle_bits(uint32_t v, int from) { return simt::shuffle_bits(v, from); }
FT_DEVICE uint32_t shuffle_xor_bits(uint32_t v, int offset) {
  return simt::shuffle_bits(v, lane_index() ^ offset);
}
FT_DEVICE float from_bits(uint32_t bits) { return simt::bits_to_float(bits); }
FT_DEVICE uint32_t to_bits(float x) { return simt::float_to_bits(x); }
FT_DEVICE uint32_t ballot(bool vote) { return simt::ballot(vote); }

// Orders shared memory among the lanes of a warp; shuffles, votes and mma don't.
FT_DEVICE void warp_barrier() { simt::warp_barrier(); }
FT_DEVICE void block_barrier() { simt::block_barrier(); }
FT_DEVICE void barrier_sync(int id, int threads) { simt::barrier_sync(id, threads); }
FT_DEVICE void barrier_arrive(int id, int threads) { simt::barrier_arrive(id, threads); }
#else
// x, of which the compiler does not know that it is the same each time: what is computed from it is
// not kept in registers from one turn of a loop to the next.
FT_DEVICE int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
FT_DEVICE uint32_t shuffle_bits(uint32_t v, int from) { return __shfl_sync(0xffffffffu, v, from); }
FT_DEVICE uint32_t shuffle_xor_bits(uint32_t v, int offset) {
  return __shfl_xor_sync(0xffffffffu, v, offset);
}
FT_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
FT_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
FT_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

FT_DEVICE void warp_barrier() { __syncwarp(); }
FT_DEVICE void block_barrier() { __syncthreads(); }
// The hardware's barriers 1 … 15 (0 is block_barrier's), among `threads` threads of whole warps.
// arrive counts the warp in without waiting.
FT_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FT_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

FT_DEVICE float shuffle_xor(float v, int offset) {
  return from_bits(shuffle_xor_bits(to_bits(v), offset));
}
FT_DEVICE int shuffle_xor(int v, int offset) {
  return static_cast<int>(shuffle_xor_bits(static_cast<uint32_t>(v), offset));
}
FT_DEVICE float shuffle(float v, int from) { return from_bits(shuffle_bits(to_bits(v), from)); }
FT_DEVICE int shuffle(int v, int from) {
  return static_cast<int>(shuffle_bits(static_cast<uint32_t>(v), from));
}
FT_DEVICE bool any_lane(bool vote) { return ballot(vote) != 0; }
FT_DEVICE bool all_lanes(bool vote) { return ballot(!vote) == 0; }

}  // namespace ft::cuda
