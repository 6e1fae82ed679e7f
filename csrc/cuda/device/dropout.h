// Dropout's keep bits for a chunk of consecutive positions.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

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

}  // namespace ft::cuda
