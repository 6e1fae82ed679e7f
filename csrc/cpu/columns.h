// Walking a row in vectors: whole ones, and what is left of one at the row's end.
//
// Rows of bf16 are walked in pairs where no instruction rounds to bf16. There, shifts and shuffles
// are what a row in cache is bound by, and a pair needs next to none: of 2W columns one vector
// holds the even ones and the other the odd ones, taken apart by a shift and a mask, joined again
// by one shift and a blend. Float vectors that go along with such a row lie in the walk's order.
#pragma once
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/vec.h"

#define FT_UNROLL _Pragma("GCC unroll 8")

namespace ft::FT_ISA {

struct Whole {};
struct Part {
  int count;
};
struct Pair {};

// The values of a Pair of vectors.
struct vf2 {
  vf even, odd;
  FT_INLINE vf2(vf x) : even(x), odd(x) {}
  FT_INLINE vf2(vf a, vf b) : even(a), odd(b) {}
};

template <class T>
inline constexpr bool kPaired = false;
#if defined(__AVX2__) && !defined(__AVX512BF16__)
template <>
inline constexpr bool kPaired<bf16> = true;
#endif

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
// A store that goes around the caches where `Past` says so.
template <bool Past, class T>
FT_INLINE void put(T* p, vf x, Whole) {
  Past ? store_past(p, x) : store(p, x);
}
template <bool Past, class T>
FT_INLINE void put(T* p, vf x, Part part) {
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

FT_INLINE vf2 operator+(vf2 a, vf2 b) { return {a.even + b.even, a.odd + b.odd}; }
FT_INLINE vf2 operator-(vf2 a, vf2 b) { return {a.even - b.even, a.odd - b.odd}; }
FT_INLINE vf2 operator*(vf2 a, vf2 b) { return {a.even * b.even, a.odd * b.odd}; }
FT_INLINE vf2 fma(vf2 a, vf2 b, vf2 c) {
  return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)};
}
FT_INLINE vf2 exp(vf2 x) { return {exp(x.even), exp(x.odd)}; }
template <class T>
FT_INLINE vf2 exp_for(vf2 x) {
  return {exp_for<T>(x.even), exp_for<T>(x.odd)};
}
template <class T>
FT_INLINE vf2 exp2_for(vf2 x) {
  return {exp2_for<T>(x.even), exp2_for<T>(x.odd)};
}
FT_INLINE vf2 load(const float* p, Pair) { return {load(p), load(p + W)}; }
FT_INLINE void store(float* p, vf2 x, Pair) {
  store(p, x.even);
  store(p + W, x.odd);
}
FT_INLINE vf2 keep(vf2 x, Pair) { return x; }
FT_INLINE vf2 keep(vf2 x, Pair, float) { return x; }

#if defined(__AVX2__) && !defined(__AVX512BF16__)
// The upper halves of `upper` beside the lower halves of `lower`.
FT_INLINE vu join_halves(vu upper, vu lower) {
#  if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(-0x10000);
  return (vu)_mm512_ternarylogic_epi32(mask, (__m512i)upper, (__m512i)lower, 0xca);
#  else
  return (vu)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
#  endif
}
FT_INLINE vf2 load(const bf16* p, Pair) {
  vu x;
  std::memcpy(&x, p, sizeof(x));
  return {(vf)(x << 16), (vf)(x & 0xffff0000u)};
}
// `x` must come from arithmetic on bf16 values and on float_vectors: a NaN then has nothing in its
// lower bits, which rounding would carry into the sign.
FT_INLINE void store(bf16* p, vf2 x, Pair) {
  const vu joined = join_halves(rounded(x.odd), rounded(x.even) >> 16);
  std::memcpy(p, &joined, sizeof(joined));
}
#endif

template <bool Past>
FT_INLINE void put(float* p, vf2 x, Pair) {
  put<Past>(p, x.even, Whole{});
  put<Past>(p + W, x.odd, Whole{});
}
#if defined(__AVX2__) && !defined(__AVX512BF16__)
template <bool Past>
FT_INLINE void put(bf16* p, vf2 x, Pair) {
  if constexpr (Past) {
    store_past((float*)p, (vf)join_halves(rounded(x.odd), rounded(x.even) >> 16));
  } else {
    store(p, x, Pair{});
  }
}
#endif

// f.operator()<a, b>().
template <class F>
FT_INLINE void with_flags(bool a, bool b, const F& f) {
  if (a) return b ? f.template operator()<true, true>() : f.template operator()<true, false>();
  b ? f.template operator()<false, true>() : f.template operator()<false, false>();
}

// Whether an output of `rows` rows of n elements is written by put<true>: where the call's
// `tensors` of that size don't fit the last cache together, so that its reader would not find it
// there, and lines begin and end with rows.
template <class T>
bool goes_past(const T* p, int64_t rows, int64_t n, int64_t tensors) {
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(T));
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
         rows * row_bytes * tensors > last_level_cache();
}

// Adds x, or a · b, to the partial sum that a walk's u names; a pair goes to two of them.
template <int U>
FT_INLINE void accumulate(vf (&sums)[U], int u, vf x) {
  sums[u] += x;
}
template <int U>
FT_INLINE void accumulate(vf (&sums)[U], int u, vf2 x) {
  sums[u] += x.even;
  sums[(u + 1) % U] += x.odd;
}
template <int U>
FT_INLINE void accumulate(vf (&sums)[U], int u, vf a, vf b) {
  sums[u] = fma(a, b, sums[u]);
}
template <int U>
FT_INLINE void accumulate(vf (&sums)[U], int u, vf2 a, vf2 b) {
  sums[u] = fma(a.even, b.even, sums[u]);
  sums[(u + 1) % U] = fma(a.odd, b.odd, sums[(u + 1) % U]);
}

// Raises the partial maxima that a walk's u names; a NaN is no maximum.
template <int U>
FT_INLINE void raise(vf (&high)[U], int u, vf x) {
  high[u] = max(x, high[u]);
}
template <int U>
FT_INLINE void raise(vf (&high)[U], int u, vf2 x) {
  high[u] = max(x.even, high[u]);
  high[(u + 1) % U] = max(x.odd, high[(u + 1) % U]);
}

// Calls f(column, u, Whole or Part) over n columns of a row of T, u going round 0 … U−1; where T is
// paired, f(column, u, Pair) over as many pairs as fit.
template <int U, class T = float, class F>
FT_INLINE void over_columns(int64_t n, const F& f) {
  int64_t j = 0;
  if constexpr (kPaired<T>) {
    constexpr int block = U < 2 ? 2 : U;
    for (; j + block * W <= n; j += block * W) {
      FT_UNROLL for (int u = 0; u < block; u += 2) f(j + u * W, u % U, Pair{});
    }
    for (; j + 2 * W <= n; j += 2 * W) f(j, 0, Pair{});
  } else {
    for (; j + U * W <= n; j += U * W) {
      FT_UNROLL for (int u = 0; u < U; ++u) f(j + u * W, u, Whole{});
    }
  }
  for (; j + W <= n; j += W) f(j, 0, Whole{});
  if (j < n) f(j, 0, Part{static_cast<int>(n - j)});
}

// The same from the last column to the first: what was read last is still in the nearest cache.
template <class T, class F>
FT_INLINE void back_over_columns(int64_t n, const F& f) {
  int64_t j = n / W * W;
  if (j < n) f(j, Part{static_cast<int>(n - j)});
  if (j % (2 * W) != 0) f(j -= W, Whole{});
  for (; j > 0; j -= 2 * W) {
    if constexpr (kPaired<T>) {
      f(j - 2 * W, Pair{});
    } else {
      f(j - W, Whole{});
      f(j - 2 * W, Whole{});
    }
  }
}

// `vector` as floats in the order of a walk over a row of T: itself, or a copy in `room`; `absent`
// everywhere if there is none. No NaN of a paired walk's has anything in its lower half.
template <class T>
const float* float_vector(const VectorArg& vector, int64_t n, float absent, float* room) {
  if (vector.data == nullptr) {
    over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      store(room + j, splat(absent), part);
    });
    return room;
  }
  if constexpr (!kPaired<T>) {
    if (vector.dtype == DType::f32) return static_cast<const float*>(vector.data);
    widen_vector(vector, n, room);
  } else if (vector.dtype == DType::bf16) {
    const bf16* p = static_cast<const bf16*>(vector.data);
    over_columns<1, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      store(room + j, load(p + j, part), part);
    });
  } else {
    widen_vector(vector, n, room);
    for (int64_t j = 0; j < n; ++j) room[j] = room[j] == room[j] ? room[j] : NAN;
    for (int64_t j = 0; j + 2 * W <= n; j += 2 * W) {
      float pair[2 * W];
      for (int i = 0; i < W; ++i) {
        pair[i] = room[j + 2 * i];
        pair[W + i] = room[j + 2 * i + 1];
      }
      std::memcpy(room + j, pair, sizeof(pair));
    }
  }
  return room;
}

// Stores what a walk's order holds at p's columns in the order of memory.
template <class T, class P>
FT_INLINE void store_in_order(T* p, vf x, P part) {
  store(p, x, part);
}
template <class T>
FT_INLINE void store_in_order(T* p, vf2 x, Pair) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(p, (vf)_mm512_permutex2var_ps((__m512)x.even, low, (__m512)x.odd));
  store(p + W, (vf)_mm512_permutex2var_ps((__m512)x.even, high, (__m512)x.odd));
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)x.even, (__m256)x.odd);
  const __m256 b = _mm256_unpackhi_ps((__m256)x.even, (__m256)x.odd);
  store(p, (vf)_mm256_permute2f128_ps(a, b, 0x20));
  store(p + W, (vf)_mm256_permute2f128_ps(a, b, 0x31));
#else
  float lane[2 * W];
  for (int i = 0; i < W; ++i) {
    lane[2 * i] = x.even[i];
    lane[2 * i + 1] = x.odd[i];
  }
  store(p, load(lane));
  store(p + W, load(lane + W));
#endif
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

// a / b to the last bit or next to it, without a division where there is a fused multiply-add;
// `inverse` is 1 / b.
FT_INLINE vf divide(vf a, vf b, vf inverse) {
#if defined(__AVX2__) || defined(__aarch64__)
  const vf q = a * inverse;
  return fma(fma(zero() - q, b, a), inverse, q);
#else
  (void)inverse;
  return a / b;
#endif
}

FT_INLINE vf2 product(vf2 a, vf2 b) { return {product(a.even, b.even), product(a.odd, b.odd)}; }
FT_INLINE vf2 divide(vf2 a, vf b, vf inverse) {
  return {divide(a.even, b, inverse), divide(a.odd, b, inverse)};
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
struct FlagPair {
  vi even, odd;
};
FT_INLINE FlagPair load_flags(const bool* p, Pair) {
#if defined(__AVX512F__)
  const __m256i flags = _mm256_loadu_si256((const __m256i*)p);
  const __m512i even = _mm512_cvtepu16_epi32(_mm256_and_si256(flags, _mm256_set1_epi16(0xff)));
  const __m512i odd = _mm512_cvtepu16_epi32(_mm256_srli_epi16(flags, 8));
  return {(vi)_mm512_movm_epi32(_mm512_test_epi32_mask(even, even)),
          (vi)_mm512_movm_epi32(_mm512_test_epi32_mask(odd, odd))};
#elif defined(__AVX2__)
  const __m128i flags = _mm_loadu_si128((const __m128i*)p);
  const __m256i even = _mm256_cvtepu16_epi32(_mm_and_si128(flags, _mm_set1_epi16(0xff)));
  const __m256i odd = _mm256_cvtepu16_epi32(_mm_srli_epi16(flags, 8));
  const __m256i none = _mm256_setzero_si256();
  return {(vi)_mm256_cmpgt_epi32(even, none), (vi)_mm256_cmpgt_epi32(odd, none)};
#else
  (void)p;
  return {vi{}, vi{}};
#endif
}

}  // namespace ft::FT_ISA
