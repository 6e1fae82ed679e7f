#pragma once
#include "params/linear_add.h"

namespace ft {

// out = dropout(act(x)), or gated out = dropout(act(gate) · up), where a row of the input is the
// `features` numbers of the gate and then those of the other half.
struct ActivationParams {
  const void* input = nullptr;
  void* output = nullptr;  // contiguous
  DType dtype = DType::f32;
  Activation activation = Activation::none;
  bool gated = false;
  int64_t rows = 0, features = 0, row_stride = 0;  // features of the output
  Dropout dropout;                                 // an element's position: row · features + column
};

// d_input = g · act'(x); gated d_gate = g · up · act'(gate), d_up = g · act(gate); g =
// dropout(grad).
struct ActivationBackwardParams {
  ActivationParams forward;  // without output
  const void* grad = nullptr;
  int64_t grad_stride = 0;
  void* d_input = nullptr;  // contiguous, in the input's shape
};

}  // namespace ft

FT_DECLARE_KERNEL(activation, ActivationParams)
FT_DECLARE_KERNEL(activation_backward, ActivationBackwardParams)
