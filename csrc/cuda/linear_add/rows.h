// What follows a product by a kernel of its own: the sums of its splits, the norm of its rows; and
// the column sums of a bias gradient. A warp has a strip of a row, 16 bytes of output a lane.
// Bound: memory, mostly L2's.
#pragma once
#include "cuda/device/launch.h"
#include "cuda/linear_add/epilogue.h"

namespace ft::cuda {

constexpr int kRowBlock = 256;
template <class T>
constexpr int kStripOf = kWarp * kLanes<T>;

struct SumArgs {
  Epilogue epilogue;
  const float* sums = nullptr;  // [split][m][stride]
  int splits = 0;
  int64_t m = 0, n = 0, stride = 0;
};

template <class T>
FT_GLOBAL void __launch_bounds__(kRowBlock, 2) linear_sum_splits(const SumArgs a) {
  constexpr int kWarps = kRowBlock / kWarp;
  const Epilogue& e = a.epilogue;
  const int64_t strips = (a.n + kStripOf<T> - 1) / kStripOf<T>;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp_index(); item < a.m * strips;
       item += int64_t{gridDim.x} * kWarps) {
    const int64_t row = item / strips, first = item % strips * kStripOf<T>;
    const int64_t column = first + lane_index() * kLanes<T>;
    const int64_t left = a.n - column;
    const int count = left <= 0 ? 0 : left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
    const float total = static_cast<float>(a.n - first < kStripOf<T> ? a.n - first : kStripOf<T>);
    Chunk y = {};
    if (count > 0) {
      float x[kLanes<T>] = {}, bias[kLanes<T>];
      const float* from = a.sums + row * a.stride + column;
#pragma unroll 4
      for (int s = 0; s < a.splits; ++s) {
#pragma unroll
        for (int i = 0; i < kLanes<T>; i += 4) {
          float four[4];
          unpack<float>(load16(from + s * (a.m * a.stride) + i), four);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[i + j] += four[j];
        }
      }
      load_vector(e.bias, column, a.n, 0.f, bias);
      y = finish<true, T>(e, x, bias, row, column, a.n);
      store_out<T>(e.out, row, column, a.n, y);
    }
    if (e.moments != nullptr) {
      const Pair moments = strip_moments<kWarp, T>(y, count, total, e.centred);
      if (lane_index() == 0) {
        store_scalar(e.moments + 2 * item, moments.a);
        store_scalar(e.moments + 2 * item + 1, moments.b);
      }
    }
  }
}

struct NormRowsArgs {
  RowNorm norm;
  const void* rows = nullptr;  // contiguous (m × n); may be `normed` itself
  const float* moments = nullptr;
  int strip = 0;
  bool rows_aligned = false;
  int64_t m = 0, n = 0;
};

constexpr int kNormTurns = 4;  // chunks of a lane

template <class T>
FT_GLOBAL void __launch_bounds__(kRowBlock, 2) linear_norm_rows(const NormRowsArgs a) {
  constexpr int kWarps = kRowBlock / kWarp;
  constexpr int64_t kSegment = int64_t{kStripOf<T>} * kNormTurns;
  const int64_t segments = (a.n + kSegment - 1) / kSegment;
  const int64_t strips = (a.n + a.strip - 1) / a.strip;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp_index(); item < a.m * segments;
       item += int64_t{gridDim.x} * kWarps) {
    const int64_t row = item / segments, segment = item % segments;
    const T* from = static_cast<const T*>(a.rows) + row * a.n;
    const int64_t column = segment * kSegment + lane_index() * kLanes<T>;
    Chunk held[kNormTurns];
#pragma unroll
    for (int i = 0; i < kNormTurns; ++i) {
      held[i] = load_chunk(from, column + i * kStripOf<T>, a.n, a.rows_aligned);
    }
    Moments all;
    float scale = 1.f;
    for (;;) {  // once, but for rows whose squares overflow
      all = {0.f, 0.f, 0.f};
      for (int64_t s = lane_index(); s < strips; s += kWarp) {
        const float* at = a.moments + 2 * (row * strips + s);
        const int64_t left = a.n - s * a.strip;
        const Moments next = scaled_moments(static_cast<float>(left < a.strip ? left : a.strip),
                                            load_scalar(at), load_scalar(at + 1), scale);
        all = s < kWarp ? next : merge(all, next);
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        all = merge(all, shuffle_xor(all, offset));
      }
      if (all.m2 <= kMostVariance || scale != 1.f) break;
      scale = kDownscale;
    }
    const Pair statistics = row_statistics(all, a.n, a.norm.eps, scale);
    if (segment == 0 && lane_index() == 0) {
      if (a.norm.mean != nullptr) store_scalar(a.norm.mean + row, statistics.a);
      store_scalar(a.norm.rstd + row, statistics.b);
    }
#pragma unroll
    for (int i = 0; i < kNormTurns; ++i) {
      const int64_t at = column + i * kStripOf<T>;
      if (at >= a.n) continue;
      float weight[kLanes<T>], bias[kLanes<T>];
      load_vector(a.norm.weight, at, a.n, 1.f, weight);
      load_vector(a.norm.bias, at, a.n, 0.f, bias);
      store_chunk(static_cast<T*>(a.norm.normed) + row * a.n, at, a.n, a.norm.aligned,
                  norm_chunk<T>(held[i], statistics, weight, bias));
    }
  }
}

struct ColumnArgs {
  const void* rows = nullptr;
  int64_t m = 0, n = 0, row_stride = 0;
  bool aligned = false;
  int splits = 0;
  int64_t per_split = 0, stride = 0;
  float* sums = nullptr;  // [split][stride]
};

// A block sums per_split rows of a strip of columns, its warps every eighth of them.
template <class T>
FT_GLOBAL void __launch_bounds__(kRowBlock, 2) linear_column_sums(const ColumnArgs a) {
  constexpr int kWarps = kRowBlock / kWarp;
  FT_SHARED_ARRAY(float, parts, kWarps* kStripOf<T>);
  const int64_t strips = (a.n + kStripOf<T> - 1) / kStripOf<T>;
  for (int64_t item = blockIdx.x; item < strips * a.splits; item += gridDim.x) {
    const int64_t split = item / strips, first = item % strips * kStripOf<T>;
    const int64_t column = first + lane_index() * kLanes<T>;
    const int64_t begin = split * a.per_split;
    const int64_t end = begin + a.per_split < a.m ? begin + a.per_split : a.m;
    float sum[kLanes<T>] = {};
#pragma unroll 4
    for (int64_t row = begin + warp_index(); row < end; row += kWarps) {
      float x[kLanes<T>];
      unpack<T>(
          load_chunk(static_cast<const T*>(a.rows) + row * a.row_stride, column, a.n, a.aligned),
          x);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) sum[i] += x[i];
    }
    // Element i of all lanes behind one another, so that lanes meet in different banks.
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      shared_store(parts + warp_index() * kStripOf<T> + i * kWarp + lane_index(), sum[i]);
    }
    block_barrier();
    for (int at = thread_index(); at < kStripOf<T>; at += kRowBlock) {
      float all = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += shared_load(parts + w * kStripOf<T> + at);
      const int64_t to = first + at % kWarp * kLanes<T> + at / kWarp;
      if (to < a.stride) store_scalar(a.sums + split * a.stride + to, all);
    }
    block_barrier();
  }
}

}  // namespace ft::cuda
