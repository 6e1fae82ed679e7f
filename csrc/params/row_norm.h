// What the norms' operators share on every device: layer_norm, rms_norm and their add_* forms
// differ in which of these fields they use. Rows have last stride 1 and any row stride; outputs are
// contiguous (rows × features).
#pragma once
#include "params/common.h"

namespace ft {

// summed = residual + dropout(input), rounded to its dtype (without add_*: summed is the input)
// normed = (summed − mean) · rstd · weight + bias          (rms: mean = 0, no bias)
struct RowNormParams {
  const void* input = nullptr;
  const void* residual = nullptr;  // add_* only
  void* normed = nullptr;
  void* summed = nullptr;  // add_* only
  float* mean = nullptr;   // (rows,), layer norms only
  float* rstd = nullptr;   // (rows,)
  VectorArg weight, bias;  // absent: 1 and 0
  DType dtype = DType::f32;
  float eps = 0.f;
  int64_t rows = 0, features = 0;
  int64_t input_stride = 0, residual_stride = 0;
  Dropout dropout;  // an element's position: row · features + column
};

// With x̂ = (summed − mean) · rstd, g = grad_normed · weight and means over a row's features:
//   d_residual = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + grad_summed      (rms: no mean(g) term)
//   d_input    = d_residual where dropout kept, scaled; 0 elsewhere
//   d_weight   = Σ over rows of grad_normed · x̂,   d_bias = Σ over rows of grad_normed
// layer_norm and rms_norm: `summed` is the input, and d_residual is the input's gradient.
struct RowNormBackwardParams {
  const void* grad_normed = nullptr;
  const void* grad_summed = nullptr;  // null: absent
  const void* summed = nullptr;
  const float* mean = nullptr;  // layer norms only
  const float* rstd = nullptr;
  VectorArg weight;
  void* d_residual = nullptr;
  void* d_input = nullptr;   // null without dropout
  void* d_weight = nullptr;  // null: not wanted; else of weight_dtype
  void* d_bias = nullptr;
  DType dtype = DType::f32;
  DType weight_dtype = DType::f32;  // of d_weight: weight's, float32 without a weight
  DType bias_dtype = DType::f32;    // of d_bias: the same, or float32 where the two differ
  int64_t rows = 0, features = 0;
  int64_t grad_normed_stride = 0, grad_summed_stride = 0, summed_stride = 0;
  Dropout dropout;
  float* workspace = nullptr;  // CUDA: row_norm_workspace() floats of scratch memory
};

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace cuda {
// Floats that the backward pass of any norm needs in `workspace`, for the weight gradients' first
// stage.
int64_t row_norm_workspace(const RowNormBackwardParams&);
}  // namespace cuda
#endif

}  // namespace ft
