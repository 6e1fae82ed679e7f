#include "params/linear_softmax.h"

#include "bindings/output_layer.h"

namespace ft::bindings {

Tensor linear_softmax(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      double temperature) {
  LinearSoftmaxParams p = output_layer(input, weight, bias, temperature);
  Tensor output = make(input, {p.rows, p.classes});
  p.output = output.mutable_data_ptr();
  FT_LAUNCH(linear_softmax, p, input);
  return output;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) { m.impl("linear_softmax", TORCH_BOX(&ft::bindings::linear_softmax)); }
