// The linear operators' common arguments as params: rows, or attention's (B, H, S, E) read in place.
#pragma once
#include "bindings/device.h"
#include "params/linear_add.h"

namespace ft::bindings {

inline LinearAddParams linear_input(const Tensor& input, const Tensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual) {
  LinearAddParams p;
  p.input = data(input);
  p.weight = data(weight);
  p.bias = vector_arg(bias);
  p.dtype = dtype_of(input);
  p.out_features = weight.size(0);
  p.in_features = weight.size(1);
  if (input.dim() == 2) {
    p.rows = input.size(0);
    p.row_stride = input.stride(0);
  } else {
    p.rows = input.size(0) * input.size(2);
    p.inner_rows = input.size(2) > 0 ? input.size(2) : 1;
    p.outer_stride = input.stride(0);
    p.row_stride = input.stride(2);
    p.heads = input.size(1);
    p.head_dim = input.size(3);
    p.head_stride = input.stride(1);
  }
  if (residual) {
    p.residual = data(residual);
    p.residual_stride = residual->stride(0);
  }
  return p;
}

}  // namespace ft::bindings
