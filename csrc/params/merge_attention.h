#pragma once
#include "params/common.h"

namespace ft {

constexpr int kMostMergedParts = 16;

// What lies by rows: (sizes[0], sizes[1], sizes[2], …), the last stride of what has columns 1.
struct RowsView {
  const void* data = nullptr;
  int64_t strides[3] = {};
};

struct MergeAttentionParams {
  DType dtype = DType::f32;
  int parts = 0;
  int64_t sizes[3] = {1, 1, 1}, columns = 0;
  RowsView outs[kMostMergedParts], lses[kMostMergedParts];
  void* out = nullptr;
  int64_t out_strides[3] = {};
  float* lse = nullptr;  // contiguous
  constexpr int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }
};

struct MergeAttentionBackwardParams : MergeAttentionParams {  // out and lse are not used
  RowsView grad_out;
  const float* grad_lse = nullptr;  // contiguous, or null
  void* d_outs[kMostMergedParts];   // contiguous
  float* d_lses[kMostMergedParts];  // contiguous
};

}  // namespace ft

FT_DECLARE_KERNEL(merge_attention, MergeAttentionParams)
FT_DECLARE_KERNEL(merge_attention_backward, MergeAttentionBackwardParams)
