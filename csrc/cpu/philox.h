// philox4x32-10, many counters at once, for dropout whose mask is a function of (seed, position).
// A 64-bit lane holds one of the cipher's 32-bit words, so that one multiplication gives both
// halves of the product; what lies above a word's 32 bits is never read. Lanes are dealt to
// counters such that the words leave in the order of their positions with two unpacks. Source:
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include "cpu/vec.h"

namespace ft::FT_ISA {

typedef uint64_t vu64 __attribute__((vector_size(W * 4)));  // W / 2 lanes

constexpr int kPhiloxWords = 2 * W;  // words that one call of philox_words makes

// Low 32 bits of each lane times m, all 64 bits of it.
FT_INLINE vu64 multiply_words(vu64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * (vu64{} + m);
#endif
}

// The kPhiloxWords random words of positions 4·block, 4·block + 1, …
FT_INLINE void philox_words(uint64_t seed, uint64_t block, uint32_t* out) {
  vu64 counter;
  for (int lane = 0; lane < W / 2; ++lane) counter[lane] = (lane & 1) * (W / 4) + lane / 2;
  counter += block;
  vu64 c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const vu64 product0 = multiply_words(c0, 0xD2511F53u);
    const vu64 product1 = multiply_words(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c1 = product1;
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const vu64 first = (c0 & 0xffffffffu) | (c1 << 32);
  const vu64 second = (c2 & 0xffffffffu) | (c3 << 32);
#if defined(__AVX512F__)
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64((__m512i)first, (__m512i)second));
  _mm512_storeu_si512(out + W, _mm512_unpackhi_epi64((__m512i)first, (__m512i)second));
#elif defined(__AVX2__)
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi64((__m256i)first, (__m256i)second));
  _mm256_storeu_si256((__m256i*)(out + W), _mm256_unpackhi_epi64((__m256i)first, (__m256i)second));
#else
  const uint64_t words[4] = {first[0], second[0], first[1], second[1]};
  std::memcpy(out, words, sizeof(words));
#endif
}

// Room that random_words needs for `count` positions, in words.
constexpr int64_t random_words_room(int64_t count) { return count + kPhiloxWords + W + 4; }

// The random words of `count` positions from `position` on; they stand in `buffer`, which may be
// read up to W words past the last.
FT_INLINE const uint32_t* random_words(uint64_t seed, uint64_t position, int64_t count,
                                       uint32_t* buffer) {
  const int64_t skip = static_cast<int64_t>(position & 3);
  for (int64_t j = 0; j < skip + count; j += kPhiloxWords) {
    philox_words(seed, (position >> 2) + static_cast<uint64_t>(j) / 4, buffer + j);
  }
  return buffer + skip;
}

// x · scale where the position's word is `threshold` or more, else 0 (of a NaN, too).
FT_INLINE vf dropped(vf x, const uint32_t* words, uint32_t threshold, float scale) {
  vu word;
  std::memcpy(&word, words, sizeof(word));
  return select((vi)(word >= threshold), x * splat(scale), zero());
}

}  // namespace ft::FT_ISA
