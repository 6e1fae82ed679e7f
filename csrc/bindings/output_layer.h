// The output layer's common arguments as params.
#pragma once
#include "bindings/device.h"
#include "params/linear_softmax.h"

namespace ft::bindings {

inline LinearSoftmaxParams output_layer(const Tensor& input, const Tensor& weight,
                                        const OptionalTensor& bias, double temperature) {
  LinearSoftmaxParams p;
  p.input = data(input);
  p.weight = data(weight);
  p.bias = vector_arg(bias);
  p.dtype = dtype_of(input);
  p.rows = input.size(0);
  p.features = input.size(1);
  p.row_stride = input.stride(0);
  p.classes = weight.size(0);
  p.temperature = static_cast<float>(temperature);
  return p;
}

}  // namespace ft::bindings
