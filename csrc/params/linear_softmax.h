#pragma once
#include "params/common.h"

namespace ft {

// output = softmax((input · weightᵀ + bias) / temperature) over the classes.
struct LinearSoftmaxParams {
  const void* input = nullptr;   // (rows, features), last stride 1
  const void* weight = nullptr;  // (classes, features), contiguous
  VectorArg bias;
  void* output = nullptr;  // (rows, classes), contiguous
  DType dtype = DType::f32;
  int64_t rows = 0, features = 0, classes = 0, row_stride = 0;
  float temperature = 1.f;
};

}  // namespace ft

FT_DECLARE_KERNEL(linear_softmax, LinearSoftmaxParams)
