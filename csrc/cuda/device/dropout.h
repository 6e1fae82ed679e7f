// Dropout's seed, and its keep bits for a chunk of consecutive positions.
#pragma once
#include "cuda/device/vector.h"

namespace ft::cuda {

// Read by the kernel, so that the host need not wait for it; without dropout there may be none.
FT_DEVICE uint64_t seed_of(const Dropout& dropout) {
  return dropout.threshold == 0 ? 0 : static_cast<uint64_t>(load_scalar(dropout.seed_ptr));
}

// Bit i says whether position + i is kept, for i < kCount. One philox call serves four positions.
template <int kCount>
FT_DEVICE uint32_t keep_bits(uint64_t seed, int64_t position, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll 1
  for (int at = -static_cast<int>(position & 3); at < kCount; at += 4) {
    const uint32_t four = dropout_keep4(seed, static_cast<uint64_t>(position + at) >> 2, threshold);
    bits |= at < 0 ? four >> -at : four << at;
  }
  return bits;
}

// Dropout of a chunk of consecutive elements, the first at `position`.
template <int kCount>
FT_DEVICE void drop(const Dropout& dropout, uint64_t seed, int64_t position, float (&x)[kCount]) {
  if (dropout.threshold == 0) return;
  const uint32_t keep = keep_bits<kCount>(seed, position, dropout.threshold);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = keep >> i & 1 ? x[i] * dropout.scale : 0.f;
}

}  // namespace ft::cuda
