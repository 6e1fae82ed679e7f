// merge_attention: attention over all keys from attention over parts of them.
//   lse = log Σ_p exp(lse_p)    w_p = exp(lse_p − lse)    out = Σ_p w_p · out_p
//   d_out_p = w_p · g    d_lse_p = w_p · (g·out_p − Σ_q w_q g·out_q + g_lse)
// A group of lanes owns a row, each a column of 16-byte chunks; weights are made again by every
// lane that asks. Bound by memory. Source: Milakov and Gimelshein, 2018 (arXiv:1805.02867).
#include <stdexcept>

#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "params/merge_attention.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kBlocks =
    8;  // on an SM: 64 registers a thread; without a number ptxas spills for more

template <class Params>
struct MergeArgs {
  Params p;
  int group = 1;  // lanes of a row
};

struct Place {
  int64_t at[3];
};
FT_DEVICE int64_t offset(const Place& place, const int64_t (&strides)[3]) {
  return place.at[0] * strides[0] + place.at[1] * strides[1] + place.at[2] * strides[2];
}

// In 32 bits: the launcher refuses more rows.
FT_DEVICE Place place_of(const MergeAttentionParams& p, int64_t row) {
  const uint32_t inner = static_cast<uint32_t>(p.sizes[2]);
  const uint32_t middle = static_cast<uint32_t>(p.sizes[1]);
  const uint32_t at = static_cast<uint32_t>(row), outer = at / inner;
  return {{outer / middle, outer % middle, at % inner}};
}

// Of the parts' lse: the largest, Σ exp(lse − top) and its reciprocal, and whether any part has a
// key.
struct Whole {
  float top, total, share;
  bool some;
};
FT_DEVICE float part_lse(const MergeAttentionParams& p, const Place& at, int part) {
  return load_scalar(static_cast<const float*>(p.lses[part].data) +
                     offset(at, p.lses[part].strides));
}
FT_DEVICE Whole whole_of(const MergeAttentionParams& p, const Place& at) {
  Whole w = {-infinity(), 0.f, 0.f, false};
  for (int i = 0; i < p.parts; ++i) w.top = maximum(w.top, part_lse(p, at, i));
  for (int i = 0; i < p.parts; ++i) {
    const float lse = part_lse(p, at, i);
    if (lse == -infinity()) continue;
    w.some = true;
    w.total += exponential<float>(lse - w.top);
  }
  w.share = 1.f / w.total;
  return w;
}
FT_DEVICE float weight_of(const MergeAttentionParams& p, const Place& at, const Whole& w,
                          int part) {
  const float lse = part_lse(p, at, part);
  return lse == -infinity() ? 0.f : exponential<float>(lse - w.top) * w.share;
}

template <class T>
FT_DEVICE void load_columns(const RowsView& view, const Place& at, int column, int end,
                            float (&x)[kLanes<T>]) {
  const T* row = static_cast<const T*>(view.data) + offset(at, view.strides);
  unpack<T>(load_chunk(row, column, end, chunks_aligned(row, 0)), x);
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock, kBlocks)
    merge_attention_forward(const MergeArgs<MergeAttentionParams> a) {
  const MergeAttentionParams& p = a.p;
  const int64_t rows = p.rows(), per_block = kBlock / a.group;
  const int lane = thread_index() & (a.group - 1), end = static_cast<int>(p.columns);
  for (int64_t first = blockIdx.x * per_block; first < rows; first += gridDim.x * per_block) {
    const int64_t row = first + thread_index() / a.group;
    if (row >= rows) continue;
    const Place at = place_of(p, row);
    const Whole w = whole_of(p, at);
    if (lane == 0) {
      const float lse = w.top == infinity() ? w.top : w.top + natural_log(w.total);
      store_scalar(p.lse + row, w.some ? lse : -infinity());
    }
    T* out = static_cast<T*>(p.out) + offset(at, p.out_strides);
    const bool aligned = chunks_aligned(out, 0);
    for (int c = lane * kLanes<T>; c < end; c += a.group * kLanes<T>) {
      float sum[kLanes<T>] = {}, x[kLanes<T>];
      for (int i = 0; i < p.parts; ++i) {
        const float weight = weight_of(p, at, w, i);
        if (weight == 0.f) continue;
        load_columns<T>(p.outs[i], at, c, end, x);
#pragma unroll
        for (int k = 0; k < kLanes<T>; ++k) sum[k] += x[k] * weight;
      }
      store_chunk(out, c, end, aligned, pack<T>(sum));
    }
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock, kBlocks)
    merge_attention_backward_kernel(const MergeArgs<MergeAttentionBackwardParams> a) {
  const MergeAttentionBackwardParams& p = a.p;
  const int64_t rows = p.rows(), per_block = kBlock / a.group;
  const int lane = thread_index() & (a.group - 1), end = static_cast<int>(p.columns);
  for (int64_t first = blockIdx.x * per_block; first < rows; first += gridDim.x * per_block) {
    const int64_t row = first + thread_index() / a.group;
    const bool exists = row < rows;
    const Place at = place_of(p, exists ? row : 0);
    const Whole w = whole_of(p, at);
    float mean = 0.f;
#pragma unroll 1
    for (int i = 0; i < p.parts; ++i) {
      const float weight = weight_of(p, at, w, i);
      T* d_out = static_cast<T*>(p.d_outs[i]) + row * p.columns;
      float product = 0.f;
      for (int c = lane * kLanes<T>; exists && c < end; c += a.group * kLanes<T>) {
        float g[kLanes<T>], x[kLanes<T>];
        load_columns<T>(p.grad_out, at, c, end, g);
        load_columns<T>(p.outs[i], at, c, end, x);
#pragma unroll
        for (int k = 0; k < kLanes<T>; ++k) {
          product += weight == 0.f ? 0.f : g[k] * x[k];
          g[k] = weight == 0.f ? 0.f : g[k] * weight;
        }
        store_chunk(d_out, c, end, chunks_aligned(d_out, 0), pack<T>(g));
      }
      product = group_sum(product, a.group, nullptr);
      if (weight != 0.f) mean += weight * product;
      if (exists && lane == 0) store_scalar(p.d_lses[i] + row, product);
    }
    if (!exists || lane != 0) continue;
    const float rest = p.grad_lse == nullptr ? 0.f : load_scalar(p.grad_lse + row);
#pragma unroll 1
    for (int i = 0; i < p.parts; ++i) {
      const float weight = weight_of(p, at, w, i), product = load_scalar(p.d_lses[i] + row);
      store_scalar(p.d_lses[i] + row, weight == 0.f ? 0.f : weight * ((product - mean) + rest));
    }
  }
}

// Lanes of a row: one per chunk, up to a warp.
template <class T>
int group_of(int64_t rows, int64_t columns) {
  if (rows >= int64_t{1} << 31) {
    throw std::invalid_argument("fasttransformer: merge_attention takes less than 2^31 rows");
  }
  int group = 1;
  while (group < kWarp && group * kLanes<T> < columns) group *= 2;
  return group;
}

}  // namespace

void merge_attention(const MergeAttentionParams& p, void* stream) {
  if (p.rows() == 0) return;
  with_type(p.dtype, [&]<class T>() {
    const int group = group_of<T>(p.rows(), p.columns);
    launch("merge_attention", merge_attention_forward<T>, grid_for(p.rows(), kBlock / group),
           kBlock, 0, stream, {p, group});
  });
}

void merge_attention_backward(const MergeAttentionBackwardParams& p, void* stream) {
  if (p.rows() == 0) return;
  with_type(p.dtype, [&]<class T>() {
    const int group = group_of<T>(p.rows(), p.columns);
    launch("merge_attention_backward", merge_attention_backward_kernel<T>,
           grid_for(p.rows(), kBlock / group), kBlock, 0, stream, {p, group});
  });
}

}  // namespace ft::cuda
