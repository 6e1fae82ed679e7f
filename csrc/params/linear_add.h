#pragma once
#include "params/common.h"

namespace ft {

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

// out = dropout(act(input · weightᵀ + bias)) + residual.
// Input rows: row r is at input + (r / inner_rows) * outer_stride + (r % inner_rows) * row_stride;
// its in_features come in heads of `head_dim` elements, `head_stride` apart (attention's output
// read in place), or in one run when heads == 1.
struct LinearAddParams {
  const void* input = nullptr;
  const void* weight = nullptr;  // (out_features, in_features), contiguous
  const void* residual = nullptr;
  VectorArg bias;
  void* output = nullptr;
  DType dtype = DType::f32;
  Activation activation = Activation::none;
  int64_t rows = 0, in_features = 0, out_features = 0;
  int64_t row_stride = 0, inner_rows = INT64_MAX, outer_stride = 0;
  int64_t heads = 1, head_dim = 0, head_stride = 0;
  int64_t residual_stride = 0;
  Dropout dropout;             // an element's position: row · out_features + column
  float* workspace = nullptr;  // CUDA: …_workspace() floats of scratch memory
};

// d_input = grad · weight, d_weight = gradᵀ · input, d_bias = Σ rows of grad; null = not wanted.
struct LinearAddBackwardParams {
  LinearAddParams linear;  // input, weight and their layout
  const void* grad = nullptr;
  int64_t grad_stride = 0;
  void* d_input = nullptr;  // contiguous, in the input's shape
  void* d_weight = nullptr;
  void* d_bias = nullptr;
};

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace cuda {
// Floats that the operators need in `workspace`.
int64_t linear_add_workspace(const LinearAddParams&);
int64_t linear_add_backward_workspace(const LinearAddBackwardParams&);
}  // namespace cuda
#endif

}  // namespace ft

FT_DECLARE_KERNEL(linear_add, LinearAddParams)
FT_DECLARE_KERNEL(linear_add_backward, LinearAddBackwardParams)
