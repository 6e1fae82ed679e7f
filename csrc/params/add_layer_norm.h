#pragma once
#include "params/common.h"

namespace ft {

// summed = residual + dropout(input), rounded to the dtype; normed = layer_norm(summed)·weight + bias.
// Rows of `input` and `residual` have stride 1 inside and their own stride between; outputs are
// contiguous. Dropout's position is row * features + column.
struct AddLayerNormParams {
  const void* input = nullptr;
  const void* residual = nullptr;
  void* normed = nullptr;
  void* summed = nullptr;
  float* mean = nullptr;  // (rows,)
  float* rstd = nullptr;
  VectorArg weight, bias;
  DType dtype = DType::f32;
  float eps = 0.f;
  int64_t rows = 0, features = 0;
  int64_t input_stride = 0, residual_stride = 0;
  Dropout dropout;
};

// With x̂ = (summed − mean)·rstd and g = grad_normed·weight:
//   d_residual = rstd·(g − mean(g) − x̂·mean(g·x̂)) + grad_summed
//   d_input    = d_residual where dropout kept, scaled; 0 elsewhere (only written with dropout)
//   d_weight   = Σ_rows grad_normed·x̂,   d_bias = Σ_rows grad_normed
struct AddLayerNormBackwardParams {
  const void* grad_normed = nullptr;
  const void* grad_summed = nullptr;  // null: absent
  const void* summed = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  VectorArg weight;
  void* d_residual = nullptr;
  void* d_input = nullptr;   // null without dropout
  void* d_weight = nullptr;  // null: not wanted; else of weight_dtype
  void* d_bias = nullptr;
  DType dtype = DType::f32;
  DType weight_dtype = DType::f32;  // of d_weight and d_bias, too when weight is absent
  int64_t rows = 0, features = 0;
  int64_t grad_normed_stride = 0, grad_summed_stride = 0, summed_stride = 0;
  Dropout dropout;
  float* workspace = nullptr;  // CUDA: add_layer_norm_workspace() floats of scratch memory
};

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace cuda {
// Floats that add_layer_norm_backward needs in `workspace` for the weight gradients' first stage.
int64_t add_layer_norm_workspace(const AddLayerNormBackwardParams&);
}  // namespace cuda
#endif

}  // namespace ft

FT_DECLARE_KERNEL(add_layer_norm, AddLayerNormParams)
FT_DECLARE_KERNEL(add_layer_norm_backward, AddLayerNormBackwardParams)
