// Runs a CUDA kernel's own source on the CPU, for tests on machines without a GPU. The threads of a
// block are fibers; one runs until it meets a barrier, a shuffle or its end, then the next has its
// turn. csrc/cuda/device/ takes its host twins from here. Reported, with kernel, block and thread:
//   a global access outside the call's tensors, a store to an input, a misaligned access,
//   a barrier or shuffle that some thread of the block or warp has left for good, a deadlock.
// Odd blocks run their threads in reverse order, so that a missing barrier shows as a wrong number;
// dynamic shared memory starts as NaN, so that a read of what nobody wrote does too.
// Not here yet: warp votes, cp.async, mma, atomics, clusters (they come with the kernels that need
// them).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define FT_GLOBAL
#define FT_SHARED static
#define FT_DEVICE inline
#define __launch_bounds__(...)

namespace ft::simt {

struct Index {
  unsigned x, y, z;
};
struct Place {
  Index thread, block, block_size, grid_size;
};
extern Place place;  // of the thread that runs now

// Runs `kernel` for every block of the grid, one after the other.
void launch(const std::string& name, int64_t grid, int block, int64_t shared,
            const std::function<void()>& kernel);

int64_t max_grid();           // small when a test says so, that kernels' loops over rows run
int64_t max_shared_memory();  // likewise, that rows don't fit
void set_limits(int64_t grid, int64_t shared_memory);

// Bytes that kernels may read, or write; with none allowed, accesses are not checked.
void allow(const void* begin, int64_t bytes, bool writable);
struct AllowedUntilHere {
  ~AllowedUntilHere();
};
void check_access(const void* at, int64_t bytes, bool write);

void block_barrier();
uint32_t shuffle_xor_bits(uint32_t value, int offset);
void* dynamic_shared_memory();

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float shuffle_xor(float v, int offset) {
  return bits_to_float(shuffle_xor_bits(float_to_bits(v), offset));
}
inline int shuffle_xor(int v, int offset) {
  return static_cast<int>(shuffle_xor_bits(static_cast<uint32_t>(v), offset));
}
template <class U>
U* dynamic_shared() {
  return static_cast<U*>(dynamic_shared_memory());
}

template <class U>
U load(const void* p) {
  check_access(p, sizeof(U), false);
  U value;
  std::memcpy(&value, p, sizeof(U));
  return value;
}
template <class U>
void store(void* p, const U& value) {
  check_access(p, sizeof(U), true);
  std::memcpy(p, &value, sizeof(U));
}

// Round to nearest even, NaN stays NaN (as the device's conversions do).
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t float_to_half(float);
float half_to_float(uint16_t);

}  // namespace ft::simt

#define threadIdx (::ft::simt::place.thread)
#define blockIdx (::ft::simt::place.block)
#define blockDim (::ft::simt::place.block_size)
#define gridDim (::ft::simt::place.grid_size)
