// A row as chunks of 16 bytes. Chunk boundaries lie where memory is aligned, so that the first and
// the last chunk of a row may be partial: those, and chunks of a pointer that is aligned otherwise
// than its row's chunks, go element by element. A thread keeps a chunk as its 16 raw bytes (four
// registers whatever the type) and widens it to float when it computes.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

struct alignas(16) Chunk {
  uint32_t word[4];
};

#if defined(FT_SIMT)
FT_DEVICE float bits_to_float(uint32_t bits) { return simt::bits_to_float(bits); }
FT_DEVICE uint32_t float_to_bits(float x) { return simt::float_to_bits(x); }
FT_DEVICE float widen(f16 x) { return simt::half_to_float(x.bits); }
FT_DEVICE uint32_t narrow2(float low, float high, f16) {
  return simt::float_to_half(low) | static_cast<uint32_t>(simt::float_to_half(high)) << 16;
}
FT_DEVICE uint32_t narrow2(float low, float high, bf16) {
  return simt::float_to_bfloat(low) | static_cast<uint32_t>(simt::float_to_bfloat(high)) << 16;
}
FT_DEVICE Chunk load16(const void* p) { return simt::load<Chunk>(p); }
FT_DEVICE void store16(void* p, const Chunk& c) { simt::store(p, c); }
FT_DEVICE void keep_packed(Chunk&) {}
template <class U>
FT_DEVICE U load_scalar(const U* p) {
  return simt::load<U>(p);
}
template <class U>
FT_DEVICE void store_scalar(U* p, U value) {
  simt::store(p, value);
}
#else
FT_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
FT_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
FT_DEVICE float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
FT_DEVICE uint32_t narrow2(float low, float high, f16) {
  const __half2 both = __floats2half2_rn(low, high);
  return __half_as_ushort(both.x) | static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
}
FT_DEVICE uint32_t narrow2(float low, float high, bf16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(both.x) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
}
FT_DEVICE Chunk load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// In PTX, since nvcc (13.0) makes four stores of 4 bytes of most assignments of a uint4 beside a
// path that stores the elements one by one.
FT_DEVICE void store16(void* p, const Chunk& c) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(c.word[0]), "r"(c.word[1]), "r"(c.word[2]), "r"(c.word[3])
               : "memory");
}
// Makes the compiler forget what it unpacked from the chunk: a row that waits for a reduction then
// costs four registers per chunk, not the eight of its floats.
FT_DEVICE void keep_packed(Chunk& c) {
#  pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(c.word[i]));
}
template <class U>
FT_DEVICE U load_scalar(const U* p) {
  return *p;
}
template <class U>
FT_DEVICE void store_scalar(U* p, U value) {
  *p = value;
}
#endif

FT_DEVICE float widen(float x) { return x; }
FT_DEVICE float widen(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
FT_DEVICE void unpack(const Chunk& c, float (&out)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = bits_to_float(c.word[i]);
    } else {
      out[2 * i] = widen(T{static_cast<uint16_t>(c.word[i] & 0xffffu)});
      out[2 * i + 1] = widen(T{static_cast<uint16_t>(c.word[i] >> 16)});
    }
  }
}

template <class T>
FT_DEVICE Chunk pack(const float (&in)[kLanes<T>]) {
  Chunk c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      c.word[i] = float_to_bits(in[i]);
    } else {
      c.word[i] = narrow2(in[2 * i], in[2 * i + 1], T{});
    }
  }
  return c;
}

// Where row `r` of a contiguous (rows × columns) array starts within its first chunk.
template <class T>
FT_DEVICE int chunk_shift(int64_t row, int64_t columns) {
  return static_cast<int>((row * columns) & (kLanes<T> - 1));
}

// Whether the chunks of a row that starts `shift` elements into its first one are aligned in `row`.
template <class T>
FT_DEVICE bool chunks_aligned(const T* row, int shift) {
  return ((reinterpret_cast<uintptr_t>(row) - shift * sizeof(T)) & 15) == 0;
}

template <class T>
FT_DEVICE bool is_aligned(const T* chunk) {
  return (reinterpret_cast<uintptr_t>(chunk) & 15) == 0;
}

// The chunk at `column`; only elements of [0, end) are read, the others are 0.
template <class T, class Index>
FT_DEVICE Chunk load_chunk(const T* row, Index column, Index end, bool aligned) {
  if (aligned && column >= 0 && column + kLanes<T> <= end) return load16(row + column);
  Chunk c = {};
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (column + i < 0 || column + i >= end) continue;
    if constexpr (sizeof(T) == 4) {
      c.word[i] = float_to_bits(load_scalar(row + column + i));
    } else {
      const uint32_t bits = load_scalar(row + column + i).bits;
      c.word[i / 2] |= bits << (i % 2 * 16);
    }
  }
  return c;
}

// Writes the elements of [0, end) of the chunk at `column`.
template <class T, class Index>
FT_DEVICE void store_chunk(T* row, Index column, Index end, bool aligned, const Chunk& c) {
  if (aligned && column >= 0 && column + kLanes<T> <= end) return store16(row + column, c);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (column + i < 0 || column + i >= end) continue;
    if constexpr (sizeof(T) == 4) {
      store_scalar(row + column + i, bits_to_float(c.word[i]));
    } else {
      store_scalar(row + column + i, T{static_cast<uint16_t>(c.word[i / 2] >> (i % 2 * 16))});
    }
  }
}

// One bit per element of the chunk at `column` that lies in [0, end).
template <class T, class Index>
FT_DEVICE uint32_t inside(Index column, Index end) {
  const Index low = column < 0 ? -column : 0;
  const Index rest = end - column;
  const Index high = rest < 0 ? 0 : rest > kLanes<T> ? kLanes<T> : rest;
  return low >= high ? 0u : ((1u << high) - 1u) & ~((1u << low) - 1u);
}

// kCount floats of a vector of any float type from `column` on (weights of a norm), `otherwise`
// where there is no vector or no element.
template <class T, int kCount, class Index>
FT_DEVICE void load_as(const void* data, Index column, Index end, float otherwise,
                       float (&out)[kCount]) {
  const T* row = static_cast<const T*>(data);
  constexpr int kStep = kLanes<T> < kCount ? kLanes<T> : kCount;
  const bool fast = kStep == kLanes<T> && column >= 0 && column + kCount <= end &&
                    (reinterpret_cast<uintptr_t>(row + column) & 15) == 0;
  if (fast) {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      float part[kLanes<T>];
      unpack<T>(load16(row + column + i), part);
#pragma unroll
      for (int j = 0; j < kStep; ++j) out[i + j] = part[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    out[i] = otherwise;
    if (column + i >= 0 && column + i < end) out[i] = widen(load_scalar(row + column + i));
  }
}

template <int kCount, class Index>
FT_DEVICE void load_vector(const VectorArg& v, Index column, Index end, float otherwise,
                           float (&out)[kCount]) {
  if (v.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = otherwise;
    return;
  }
  if (v.dtype == DType::f32) return load_as<float>(v.data, column, end, otherwise, out);
  if (v.dtype == DType::f16) return load_as<f16>(v.data, column, end, otherwise, out);
  return load_as<bf16>(v.data, column, end, otherwise, out);
}

FT_DEVICE void store_as(void* data, DType dtype, int64_t at, float value) {
  if (dtype == DType::f32) return store_scalar(static_cast<float*>(data) + at, value);
  const uint32_t bits =
      dtype == DType::f16 ? narrow2(value, 0.f, f16{}) : narrow2(value, 0.f, bf16{});
  store_scalar(static_cast<uint16_t*>(data) + at, static_cast<uint16_t>(bits & 0xffffu));
}

}  // namespace ft::cuda
