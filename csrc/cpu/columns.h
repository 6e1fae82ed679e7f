// Walking a row in vectors: whole ones, and what is left of one at the row's end.
#pragma once
#include "cpu/vec.h"

#define FT_UNROLL _Pragma("GCC unroll 8")

namespace ft::FT_ISA {

struct Whole {};
struct Part {
  int count;
};

template <class T>
FT_INLINE vf load(const T* p, Whole) {
  return load(p);
}
template <class T>
FT_INLINE vf load(const T* p, Part part) {
  return load(p, part.count);
}
template <class T>
FT_INLINE void store(T* p, vf x, Whole) {
  store(p, x);
}
template <class T>
FT_INLINE void store(T* p, vf x, Part part) {
  store(p, x, part.count);
}
FT_INLINE vf keep(vf x, Whole, float) { return x; }
FT_INLINE vf keep(vf x, Part part, float other) {
  return select(lanes() < splat_int(part.count), x, splat(other));
}
// `x` in the row's lanes, `other` (0 unless given) behind its end.
template <class P>
FT_INLINE vf keep(vf x, P part) {
  return keep(x, part, 0.f);
}

// Calls f(column, u, Whole or Part) over n columns, u going round 0 … U−1.
template <int U, class F>
FT_INLINE void over_columns(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + U * W <= n; j += U * W) {
    FT_UNROLL for (int u = 0; u < U; ++u) f(j + u * W, u, Whole{});
  }
  for (; j + W <= n; j += W) f(j, 0, Whole{});
  if (j < n) f(j, 0, Part{static_cast<int>(n - j)});
}

// The same from the last column to the first: what was read last is still in the nearest cache.
template <int U, class F>
FT_INLINE void back_over_columns(int64_t n, const F& f) {
  int64_t j = n / W * W;
  if (j < n) f(j, 0, Part{static_cast<int>(n - j)});
  for (; j >= U * W; j -= U * W) {
    FT_UNROLL for (int u = 1; u <= U; ++u) f(j - u * W, u - 1, Whole{});
  }
  for (; j >= W; j -= W) f(j - W, 0, Whole{});
}

// a · b rounded: kept from being fused into a later addition, so that equal factors give equal
// products wherever they are needed again.
FT_INLINE vf product(vf a, vf b) {
  vf p = a * b;
#if defined(__AVX2__)
  __asm__("" : "+v"(p));
#elif defined(__x86_64__)
  __asm__("" : "+x"(p));
#elif defined(__aarch64__)
  __asm__("" : "+w"(p));
#endif
  return p;
}

// All bits set in the lanes whose flag is true.
FT_INLINE vi load_flags(const bool* p, Whole) {
#if defined(__AVX512F__)
  return (vi)_mm512_movm_epi32(
      _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-1)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return (vi)_mm256_cmpgt_epi32(wide, _mm256_setzero_si256());
#else
  vi out;
  for (int i = 0; i < W; ++i) out[i] = -static_cast<int32_t>(p[i]);
  return out;
#endif
}
FT_INLINE vi load_flags(const bool* p, Part part) {
  bool lane[W] = {};
  std::memcpy(lane, p, static_cast<size_t>(part.count));
  return load_flags(lane, Whole{});
}

}  // namespace ft::FT_ISA
