// The output layer's common arguments as params.
#pragma once
#include "bindings/device.h"
#include "params/linear_softmax.h"

namespace ft::bindings {

// The product's operands, of any params that have one.
template <class Params>
void fill_product(Params& p, const Tensor& input, const Tensor& weight,
                  const OptionalTensor& bias) {
  p.input = data(input);
  p.weight = data(weight);
  p.bias = vector_arg(bias);
  p.dtype = dtype_of(input);
  p.rows = input.size(0);
  p.features = input.size(1);
  p.row_stride = input.stride(0);
  p.classes = weight.size(0);
}

inline LinearSoftmaxParams output_layer(const Tensor& input, const Tensor& weight,
                                        const OptionalTensor& bias, double temperature) {
  LinearSoftmaxParams p;
  fill_product(p, input, weight, bias);
  p.temperature = static_cast<float>(temperature);
  return p;
}

}  // namespace ft::bindings
