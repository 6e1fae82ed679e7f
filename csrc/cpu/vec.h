// The vector layer: everything in csrc/cpu that depends on the instruction set stands here, in
// columns.h and in tile.h. A `vf` holds W floats (GCC/Clang vector extension, so + - * and
// comparisons are native; a*b+c contracts to a fused multiply-add). Loads widen bf16 and f16 to
// float, stores round to nearest even. `exp` is a base-2 range reduction with a minimax polynomial
// (our own fit, relative error 3e-9 before rounding); every function lets NaN through.
#pragma once
#include <cstdint>
#include <cstring>

#include "params/common.h"

#if !defined(FT_ISA)
#  error "vec.h is compiled once per instruction set; define FT_ISA"
#endif
#if defined(__AVX2__)
#  include <immintrin.h>
#elif defined(__SSE2__)
#  include <emmintrin.h>
#endif

#define FT_INLINE inline __attribute__((always_inline))

namespace ft::FT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- scalars ----------------------------------------------------------------------------------

template <class To, class From>
FT_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FT_INLINE float to_float(float x) { return x; }
FT_INLINE float to_float(bf16 x) { return bit_copy<float>(uint32_t{x.bits} << 16); }
FT_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent's bias over and makes half subnormals normal.
  return bit_copy<float>(sign | bit_copy<uint32_t>(bit_copy<float>(rest << 13) * 0x1p112f));
}

template <class T>
FT_INLINE T from_float(float x);
template <>
FT_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FT_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FT_INLINE f16 from_float<f16>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {  // subnormal half: the float adder rounds for us
    const float shifted = bit_copy<float>(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// ---- vectors ----------------------------------------------------------------------------------

#if defined(__AVX512F__)
FT_INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
FT_INLINE vi splat_int(int32_t x) { return (vi)_mm512_set1_epi32(x); }
#elif defined(__AVX2__)
FT_INLINE vf splat(float x) { return (vf)_mm256_set1_ps(x); }
FT_INLINE vi splat_int(int32_t x) { return (vi)_mm256_set1_epi32(x); }
#else
FT_INLINE vf splat(float x) { return vf{x, x, x, x}; }
FT_INLINE vi splat_int(int32_t x) { return vi{x, x, x, x}; }
#endif
FT_INLINE vf zero() { return vf{}; }

// The index of each lane, 0 … W−1.
FT_INLINE vi lanes() {
  vi out;
  for (int i = 0; i < W; ++i) out[i] = i;
  return out;
}

template <class T>
FT_INLINE vf load(const T* p);
template <class T>
FT_INLINE void store(T* p, vf x);

#if defined(__AVX512F__)

FT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

template <>
FT_INLINE vf load<float>(const float* p) {
  return (vf)_mm512_loadu_ps(p);
}
// One permutation puts each word into the upper half of its lane, over zeros.
FT_INLINE vf widen(__m256i x, bf16) {
  const __m512i to =
      _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000,
                       0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, to, _mm512_castsi256_si512(x));
}
FT_INLINE vf widen(__m256i x, f16) { return (vf)_mm512_cvtph_ps(x); }
template <>
FT_INLINE vf load<bf16>(const bf16* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), bf16{});
}
template <>
FT_INLINE vf load<f16>(const f16* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), f16{});
}
FT_INLINE vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
FT_INLINE vf load(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), bf16{});
}
FT_INLINE vf load(const f16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), f16{});
}

// x rounded to bf16, which is the upper half of each lane; of a NaN with bits in its lower half the
// carry may make anything.
FT_INLINE vu rounded(vf x) {
  const __m512i bits = (__m512i)x, up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return (vu)_mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
}
FT_INLINE __m256i narrow(vf x, bf16) {
#  if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
#  else
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_set1_epi32(0x400000);
  const __m512i out = _mm512_mask_or_epi32((__m512i)rounded(x), nan, (__m512i)x, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
#  endif
}
FT_INLINE __m256i narrow(vf x, f16) {
  return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <>
FT_INLINE void store<float>(float* p, vf x) {
  _mm512_storeu_ps(p, (__m512)x);
}
template <>
FT_INLINE void store<bf16>(bf16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, narrow(x, bf16{}));
}
template <>
FT_INLINE void store<f16>(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, narrow(x, f16{}));
}
FT_INLINE void store_past(float* p, vf x) { _mm512_stream_ps(p, (__m512)x); }
template <class T>
FT_INLINE void store_past(T* p, vf x) {
  _mm256_stream_si256((__m256i*)p, narrow(x, T{}));
}
FT_INLINE void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
template <class T>
FT_INLINE void store(T* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, T{}));
}

// max(a, b) and min(a, b) give b where either is NaN.
FT_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FT_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
FT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FT_INLINE vf select(vi mask, vf a, vf b) {
  return (vf)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)b, (__m512)a);
}
FT_INLINE vf round_even(vf x) {
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FT_INLINE float reduce_add(vf x) { return _mm512_reduce_add_ps((__m512)x); }
FT_INLINE float reduce_max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
FT_INLINE vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
// x * 2^n for an integral n in [kLowestPower, kHighestPower], whose ends give 0 and infinity.
constexpr float kLowestPower = -200.f, kHighestPower = 200.f;
FT_INLINE vf scale_by_power(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }

#elif defined(__AVX2__)

FT_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <>
FT_INLINE vf load<float>(const float* p) {
  return (vf)_mm256_loadu_ps(p);
}
// Both halves of a register get all the words, then each picks its own into the upper half of its
// lanes: one shuffle, and shifts and shuffles are what bf16 is bound by.
FT_INLINE vf widen(__m128i x, bf16) {
  const __m256i to = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                      -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (vf)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(x), to);
}
FT_INLINE vf widen(__m128i x, f16) { return (vf)_mm256_cvtph_ps(x); }
template <>
FT_INLINE vf load<bf16>(const bf16* p) {
  return widen(_mm_loadu_si128((const __m128i*)p), bf16{});
}
template <>
FT_INLINE vf load<f16>(const f16* p) {
  return widen(_mm_loadu_si128((const __m128i*)p), f16{});
}
FT_INLINE vf load(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first(n)); }
template <class T>
FT_INLINE vf load(const T* p, int n) {
  alignas(16) T lane[W] = {};
  std::memcpy(lane, p, static_cast<size_t>(n) * sizeof(T));
  return load(lane);
}

// As with AVX-512.
FT_INLINE vu rounded(vf x) {
  const __m256i bits = (__m256i)x, bit = _mm256_set1_epi32(0x10000);
  const __m256i odd = _mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit);
  return (vu)_mm256_sub_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
FT_INLINE __m128i narrow(vf x, bf16) {
  const __m256 nan = _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);  // all bits set: a NaN too
  __m256i out = _mm256_or_si256((__m256i)rounded(x), _mm256_castps_si256(nan));
  const __m256i upper =
      _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                       2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  out = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(out, upper), 0x08);
  return _mm256_castsi256_si128(out);
}
FT_INLINE __m128i narrow(vf x, f16) {
  return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <>
FT_INLINE void store<float>(float* p, vf x) {
  _mm256_storeu_ps(p, (__m256)x);
}
template <>
FT_INLINE void store<bf16>(bf16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, narrow(x, bf16{}));
}
template <>
FT_INLINE void store<f16>(f16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, narrow(x, f16{}));
}
FT_INLINE void store_past(float* p, vf x) { _mm256_stream_ps(p, (__m256)x); }
template <class T>
FT_INLINE void store_past(T* p, vf x) {
  _mm_stream_si128((__m128i*)p, narrow(x, T{}));
}
FT_INLINE void store(float* p, vf x, int n) { _mm256_maskstore_ps(p, first(n), (__m256)x); }
template <class T>
FT_INLINE void store(T* p, vf x, int n) {
  alignas(16) T lane[W];
  store(lane, x);
  std::memcpy(p, lane, static_cast<size_t>(n) * sizeof(T));
}

FT_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FT_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
FT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FT_INLINE vf select(vi mask, vf a, vf b) {
  return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, _mm256_castsi256_ps((__m256i)mask));
}
FT_INLINE vf round_even(vf x) {
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FT_INLINE float reduce_add(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FT_INLINE float reduce_max(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
FT_INLINE vf sqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
// By a factor whose exponent is n's: 0 at −127, infinity at 128. Subnormal products are not made
// but next to 2^−126, as they cost some 100 cycles each, and masked scores would all be such.
constexpr float kLowestPower = -127.f, kHighestPower = 128.f;
FT_INLINE vf scale_by_power(vf x, vf n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)n), _mm256_set1_epi32(127));
  return (vf)_mm256_mul_ps((__m256)x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

#else  // portable: the vector extension alone; the compiler maps it to NEON or SSE2

typedef uint16_t vhalf __attribute__((vector_size(W * 2)));

// Four 16-bit words as 32-bit lanes and back. SSE2 has one instruction each, which the compiler
// does not find.
FT_INLINE vu spread(const void* p) {
#  if defined(__SSE2__)
  return (vu)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#  else
  vhalf half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, vu);
#  endif
}
FT_INLINE void gather(void* p, vu x) {
#  if defined(__SSE2__)
  const __m128i signed_words = _mm_srai_epi32(_mm_slli_epi32((__m128i)x, 16), 16);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(signed_words, signed_words));
#  else
  const vhalf half = __builtin_convertvector(x, vhalf);
  std::memcpy(p, &half, sizeof(half));
#  endif
}

FT_INLINE vf widen(vu x, bf16) { return (vf)(x << 16); }
FT_INLINE vf widen(vu x, f16) {  // as to_float(f16)
  const vu rest = x & 0x7fffu;   // compared as signed, which SSE2 can
  const vf number = (vf)(rest << 13) * splat(0x1p112f);
  const vu special = 0x7f800000u | (rest << 13);
  return (vf)(((x & 0x8000u) << 16) | ((vi)rest >= 0x7c00 ? special : (vu)number));
}
FT_INLINE vu narrow(vf x, bf16) {  // as from_float<bf16>
  const vu bits = (vu)x;
  return (x != x ? (bits | 0x400000u) : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
FT_INLINE vu narrow(vf x, f16) {  // as from_float<f16>
  const vu bits = (vu)x, rest = bits & 0x7fffffffu;
  const vu normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const vu subnormal = (vu)((vf)rest + splat(0.5f)) - 0x3f000000u;
  const vu infinite = vu{} + 0x7c00u, nan = vu{} + 0x7e00u;
  vu out = (vi)rest < 0x38800000 ? subnormal : normal;
  out = (vi)rest >= 0x477ff000 ? infinite : out;
  out = (vi)rest > 0x7f800000 ? nan : out;
  return ((bits >> 16) & 0x8000u) | out;
}

template <class T>
FT_INLINE vf load(const T* p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    vf out;
    std::memcpy(&out, p, sizeof(out));
    return out;
  } else {
    return widen(spread(p), T{});
  }
}
template <class T>
FT_INLINE void store(T* p, vf x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    std::memcpy(p, &x, sizeof(x));
  } else {
    gather(p, narrow(x, T{}));
  }
}
template <class T>
FT_INLINE void store_past(T* p, vf x) {
  store(p, x);
}
template <class T>
FT_INLINE vf load(const T* p, int n) {
  T lane[W] = {};
  std::memcpy(lane, p, static_cast<size_t>(n) * sizeof(T));
  return load(lane);
}
template <class T>
FT_INLINE void store(T* p, vf x, int n) {
  T lane[W];
  store(lane, x);
  std::memcpy(p, lane, static_cast<size_t>(n) * sizeof(T));
}
FT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
FT_INLINE vf round_even(vf x) {
  // Adding and taking away 1.5·2^23 rounds to an integer for |x| < 2^22; beyond, x goes through.
  const vf magic = splat(12582912.f);
  vf shifted = x + magic;
  __asm__ volatile("" : "+m"(shifted));  // keeps the compiler from folding the pair away
  const vf rounded = shifted - magic;
  return select((x < splat(4194304.f)) & (x > splat(-4194304.f)), rounded, x);
}
FT_INLINE float reduce_add(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
FT_INLINE float reduce_max(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
FT_INLINE vf sqrt(vf x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
constexpr float kLowestPower = -127.f, kHighestPower = 128.f;  // as with AVX2
FT_INLINE vf scale_by_power(vf x, vf n) {
  return x * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

#endif

// store_past writes a whole vector around the caches, which spares reading the lines that are
// overwritten; p has the alignment of a vector in memory. What was written so is seen by other
// threads after end_past().
FT_INLINE void end_past() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Each two neighbouring lanes, the other way round.
FT_INLINE vf swap_pairs(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)x, 0xb1);
#else
  return vf{x[1], x[0], x[3], x[2]};
#endif
}

// Bit i is lane i of a mask.
FT_INLINE uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// ---- functions --------------------------------------------------------------------------------

// 2^x. Cody–Waite reduction to [−1/2, 1/2]; the clamp keeps NaN (it is the second operand).
FT_INLINE vf exp2(vf x) {
  x = min(splat(kHighestPower), max(splat(kLowestPower), x));
  const vf n = round_even(x);
  const vf f = x - n;
  vf p = splat(1.5345808e-4f);
  p = fma(p, f, splat(1.33999309e-3f));
  p = fma(p, f, splat(9.61848907e-3f));
  p = fma(p, f, splat(5.55032864e-2f));
  p = fma(p, f, splat(2.40226462e-1f));
  p = fma(p, f, splat(6.93147182e-1f));
  p = fma(p, f, splat(1.f));
  return scale_by_power(p, n);
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// e^x for x below kHighestPower · ln 2, anything above. n·ln2 is taken off in two parts, so the
// reduced argument is exact to float; the polynomial is our own fit, relative error 3e-9.
FT_INLINE vf exp_below(vf x) {
  x = max(splat(kLowestPower * kLn2), x);
  const vf n = round_even(x * splat(kLog2E));
  vf f = fma(n, splat(-0.693145751953125f), x);
  f = fma(n, splat(-1.42860682030941723e-6f), f);
  vf p = splat(1.38210424e-3f);
  p = fma(p, f, splat(8.36867094e-3f));
  p = fma(p, f, splat(4.16682623e-2f));
  p = fma(p, f, splat(1.66665211e-1f));
  p = fma(p, f, splat(4.9999994e-1f));
  p = fma(p, f, splat(1.f));
  p = fma(p, f, splat(1.f));
  return scale_by_power(p, n);
}
FT_INLINE vf exp(vf x) { return exp_below(min(splat(kHighestPower * kLn2), x)); }

// 2^x for x ≤ 0, to a quarter of T's rounding: terms of a sum, or numbers that are rounded to T.
// Our own fits on [−1/2, 1/2], with 1 at 0: relative errors 9e-8 for float, 3e-6 for 16 bits.
template <class T>
FT_INLINE vf exp2_for(vf x) {
  x = max(splat(kLowestPower), x);
  const vf n = round_even(x);
  const vf f = x - n;
  vf p;
  if constexpr (sizeof(T) == sizeof(float)) {
    p = splat(1.32647273e-3f);
    p = fma(p, f, splat(9.67151299e-3f));
    p = fma(p, f, splat(5.55073358e-2f));
    p = fma(p, f, splat(2.40222424e-1f));
    p = fma(p, f, splat(6.93147004e-1f));
  } else {
    p = splat(9.58285294e-3f);
    p = fma(p, f, splat(5.59064262e-2f));
    p = fma(p, f, splat(2.40240991e-1f));
    p = fma(p, f, splat(6.93124175e-1f));
  }
  return scale_by_power(fma(p, f, splat(1.f)), n);
}

// e^x for x ≤ 0, or above by a rounding, where the result is rounded to T: of float the last bit or
// the one before is right, of 16 bits as in exp2_for.
template <class T>
FT_INLINE vf exp_for(vf x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return exp_below(x);
  } else {
    return exp2_for<T>(x * splat(kLog2E));
  }
}

// Φ(−|x|), Φ the normal distribution: the tail's log2 is a polynomial, which falls to −inf beyond
// its range. Our own fits on [0, 5.5]: for float the product x · Φ is off by 4e-8, for 16 bits by
// 6e-5 of itself or 2e-8.
template <class T>
FT_INLINE vf normal_tail(vf x) {
  const vf a = select(x < zero(), zero() - x, x);
  vf q;
  if constexpr (sizeof(T) == sizeof(float)) {
    q = splat(-2.096443949994864e-06f);
    q = fma(q, a, splat(3.0661038181278855e-05f));
    q = fma(q, a, splat(-1.4548659964930266e-04f));
    q = fma(q, a, splat(-2.3314969439525157e-04f));
    q = fma(q, a, splat(7.185846101492643e-03f));
    q = fma(q, a, splat(-5.2578240633010864e-02f));
    q = fma(q, a, splat(-4.5918202400207520e-01f));
    q = fma(q, a, splat(-1.1511082649230957f));
  } else {
    q = splat(-3.54926393e-04f);
    q = fma(q, a, splat(6.16811682e-03f));
    q = fma(q, a, splat(-4.94254418e-02f));
    q = fma(q, a, splat(-4.62394685e-01f));
    q = fma(q, a, splat(-1.15011895f));
  }
  // No subnormal numbers: products with them take Intel's CPUs a hundred cycles.
  const vf power = fma(q, a, splat(-9.999999403953552e-01f));
  const vf least = splat(-126.f);
  return select(power < least, zero(), exp2_for<T>(max(least, power)));
}
FT_INLINE vf gelu_of_tail(vf x, vf tail) {  // x·Φ(x)
  const vf bounded = min(splat(100.f), x);  // where the tail is 0 long since: keeps inf · 0 away
  return select(x < zero(), x * tail, fma(zero() - bounded, tail, x));
}
template <class T = float>
FT_INLINE vf gelu(vf x) {
  return gelu_of_tail(x, normal_tail<T>(x));
}
FT_INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + exp(zero() - x)); }
FT_INLINE vf silu(vf x) { return x / (splat(1.f) + exp(zero() - x)); }
FT_INLINE vf gelu_tanh(vf x) {  // ½x(1 + tanh u) = x / (1 + e^(−2u)), u = √(2/π)(x + 0.044715x³)
  const vf u = fma(x * x, splat(0.044715f), splat(1.f)) * x;
  return x / (splat(1.f) + exp(u * splat(-1.5957691216057308f)));
}
FT_INLINE vf relu(vf x) { return max(zero(), x); }

// ---- element types ----------------------------------------------------------------------------

// Calls f.template operator()<T>() with the C++ type of a DType.
template <class F>
FT_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
  }
}

// Reads a vector of `n` elements of any float type into float scratch.
inline void widen_vector(const VectorArg& in, int64_t n, float* out) {
  with_type(in.dtype, [&]<class T>() {
    const T* p = static_cast<const T*>(in.data);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(p + i));
    if (i < n) store(out + i, load(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  });
}

}  // namespace ft::FT_ISA
