#pragma once
#include "params/cross_entropy.h"

namespace ft {

// The loss of cross_entropy (params/cross_entropy.h) with x = input · weightᵀ + bias, and gradients
// of Σ_r grad[r] · loss[r].
struct LinearCrossEntropyParams {
  const void* input = nullptr;   // (rows, features), last stride 1
  const void* weight = nullptr;  // (classes, features), contiguous
  VectorArg bias;
  IdsArg target;
  VectorArg class_weight;               // absent: ones
  float* losses = nullptr;              // forward only
  RowStatistics* statistics = nullptr;  // written forward, read backward
  DType dtype = DType::f32;
  int64_t rows = 0, features = 0, classes = 0, row_stride = 0, ignore_index = -100;
  float label_smoothing = 0.f;
  // Gradients, of `dtype`, contiguous; null = not wanted. Forward, every row's grad is 1, or with
  // `mean` 1 / Σ of the targets' weights; backward they are given.
  void* d_input = nullptr;
  void* d_weight = nullptr;
  void* d_bias = nullptr;
  bool mean = false;
  const float* grad = nullptr;
  int64_t grad_stride = 0;
};

}  // namespace ft

FT_DECLARE_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)
FT_DECLARE_KERNEL(linear_cross_entropy_backward, LinearCrossEntropyParams)
