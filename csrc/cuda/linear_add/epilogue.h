// What follows a sum: bias, activation, dropout, residual, rounding, the store, and the moments of
// the rounded row. A lane has a chunk (16 bytes of the output) of one row at a time.
#pragma once
#include "cuda/device/activation.h"
#include "cuda/device/dropout.h"
#include "cuda/device/reduce.h"
#include "cuda/linear_add/matmul.h"
#include "cuda/norm_scale.h"

namespace ft::cuda {

// x → the rounded chunk at (row, column), columns ≥ n of no meaning. `bias` is loaded already.
template <bool kActivation, class T>
FT_DEVICE Chunk finish(const Epilogue& e, float (&x)[kLanes<T>], const float (&bias)[kLanes<T>],
                       int64_t row, int64_t column, int64_t n) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] += bias[i];
  if constexpr (kActivation) { activate(e.activation, x); }
  drop(e.dropout, seed_of(e.dropout), row * n + column, x);
  if (e.residual != nullptr) {
    const T* residual = static_cast<const T*>(e.residual) + row * e.residual_stride;
    float r[kLanes<T>];
    unpack<T>(load_chunk(residual, column, n, e.residual_aligned), r);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] += r[i];
  }
  return pack<T>(x);
}

template <class T>
FT_DEVICE void store_out(const Matrix& out, int64_t row, int64_t column, int64_t n,
                         const Chunk& c) {
  T* to = static_cast<T*>(const_cast<void*>(out.data)) + out.row_offset(row);
  if (out.head_dim == 0) return store_chunk(to, column, n, out.width == 16, c);
  if (out.width == 16) return store16(to + out.column_offset(column), c);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (column + i >= n) continue;
    if constexpr (sizeof(T) == 4) {
      store_scalar(to + out.column_offset(column + i), bits_to_float(c.word[i]));
    } else {
      store_scalar(to + out.column_offset(column + i),
                   T{static_cast<uint16_t>(c.word[i / 2] >> (i % 2 * 16))});
    }
  }
}

// (mean, m2) of a strip: kGroup neighbouring lanes have a chunk each, of which `count` elements are
// of the row, `total` in all lanes together. m2 is negative where squares overflow: it is that of
// the elements times kDownscale.
template <int kGroup, class T>
FT_DEVICE Pair strip_moments(const Chunk& c, int count, float total, bool centred) {
  float y[kLanes<T>];
  unpack<T>(c, y);
  float mean = 0.f, m2 = 0.f;
  if (centred) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) mean += i < count ? y[i] : 0.f;
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) mean += shuffle_xor(mean, offset);
    mean = total > 0.f ? mean / total : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) m2 += i < count ? (y[i] - mean) * (y[i] - mean) : 0.f;
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) m2 += shuffle_xor(m2, offset);
  if (any_lane(!(m2 <= kMostVariance))) {
    float small = 0.f;
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const float apart = (y[i] - mean) * kDownscale;
      small += i < count ? apart * apart : 0.f;
    }
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) small += shuffle_xor(small, offset);
    if (!(m2 <= kMostVariance)) m2 = -small;
  }
  return {mean, m2};
}

// A strip's moments as those of its elements times `scale`, which is 1 or kDownscale.
FT_DEVICE Moments scaled_moments(float count, float mean, float m2, float scale) {
  if (m2 < 0.f) {
    m2 = scale == 1.f ? infinity() : -m2;
  } else {
    m2 = m2 * scale * scale;
  }
  return {count, mean * scale, m2};
}

// (mean, rstd) of a row of n elements from its moments, of elements times `scale`.
FT_DEVICE Pair row_statistics(const Moments& row, int64_t n, float eps, float scale) {
  return {row.mean / scale, scaled_rstd(row.m2 / static_cast<float>(n), eps, scale)};
}

template <class T>
FT_DEVICE Chunk norm_chunk(const Chunk& c, const Pair& statistics, const float (&weight)[kLanes<T>],
                           const float (&bias)[kLanes<T>]) {
  float y[kLanes<T>];
  unpack<T>(c, y);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    y[i] = (y[i] - statistics.a) * statistics.b * weight[i] + bias[i];
  }
  return pack<T>(y);
}

}  // namespace ft::cuda
