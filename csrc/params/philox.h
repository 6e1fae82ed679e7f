// philox4x32-10 and the dropout rule built on it, for the host and for CUDA devices. The mask is a
// pure function of (seed, position); fasttransformer/reference/dropout.py is the same in Python.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#  define FT_HD __host__ __device__ __forceinline__
#else
#  define FT_HD inline
#endif

namespace ft {

struct PhiloxWords {
  uint32_t word[4];
};

FT_HD PhiloxWords philox4x32(uint64_t seed, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Four keep bits for the positions 4*block … 4*block + 3, the lowest bit first.
FT_HD uint32_t dropout_keep4(uint64_t seed, uint64_t block, uint32_t threshold) {
  const PhiloxWords random = philox4x32(seed, block);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(random.word[i] >= threshold) << i;
  return bits;
}

FT_HD bool dropout_keep(uint64_t seed, uint64_t position, uint32_t threshold) {
  return (dropout_keep4(seed, position >> 2, threshold) >> (position & 3)) & 1;
}

}  // namespace ft
