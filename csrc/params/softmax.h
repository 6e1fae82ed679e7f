#pragma once
#include "params/common.h"

namespace ft {

constexpr int kSoftmaxDims = 6;  // leading dimensions that a strided input may have

// out[r] = softmax(scale * in[r]) over the allowed entries of each row. Row r of the (rows ×
// columns) problem lies at the strided offset of its index in `sizes`; the last dimension has
// stride 1 in `input` and stride `mask_column_stride` in `mask`.
struct SoftmaxParams {
  const void* input = nullptr;
  const bool* mask = nullptr;  // true: takes part
  void* output = nullptr;      // contiguous
  DType dtype = DType::f32;
  bool is_causal = false, log = false;
  float scale = 1.f;
  int64_t rows = 0, columns = 0;
  int dims = 0;  // leading dimensions in use, outermost first
  int64_t sizes[kSoftmaxDims] = {};
  int64_t input_strides[kSoftmaxDims] = {};
  int64_t mask_strides[kSoftmaxDims] = {};
  int64_t mask_column_stride = 0;
};

// d_input = scale * output * (grad − Σ grad·output), or for log softmax
// d_input = scale * (grad − exp(output) · Σ grad). All contiguous.
struct SoftmaxBackwardParams {
  const void* grad = nullptr;
  const void* output = nullptr;
  void* d_input = nullptr;
  DType dtype = DType::f32;
  bool log = false;
  float scale = 1.f;
  int64_t rows = 0, columns = 0;
};

}  // namespace ft

FT_DECLARE_KERNEL(softmax, SoftmaxParams)
FT_DECLARE_KERNEL(softmax_backward, SoftmaxBackwardParams)
