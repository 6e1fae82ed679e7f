#include "params/linear_add.h"

#include "bindings/activation_code.h"
#include "bindings/device.h"
#include "bindings/linear_input.h"

namespace ft::bindings {
Tensor linear_add(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, int64_t activation, double dropout_p,
                  const OptionalTensor& seed) {
  LinearAddParams p = linear_input(input, weight, bias, residual);
  p.activation = activation_of(activation);
  p.dropout = dropout_of(dropout_p, seed);
  Tensor output = make_output(input, p.out_features);
  p.output = output.mutable_data_ptr();
#if defined(FT_CUDA) || defined(FT_SIMT)
  Tensor workspace = make(input, {cuda::linear_add_workspace(p)}, ScalarType::Float);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  FT_LAUNCH(linear_add, p, input);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_add_backward(const Tensor& grad, const Tensor& input,
                                                       const Tensor& weight, bool input_grad,
                                                       bool weight_grad, bool bias_grad) {
  LinearAddBackwardParams p;
  p.linear = linear_input(input, weight, std::nullopt, std::nullopt);
  p.grad = data(grad);
  p.grad_stride = row_stride(grad);
  Tensor d_input = make_if(input_grad, input, input.sizes());
  Tensor d_weight = make_if(weight_grad, weight, {p.linear.out_features, p.linear.in_features});
  Tensor d_bias = make_if(bias_grad, weight, {p.linear.out_features});
  if (input_grad) p.d_input = d_input.mutable_data_ptr();
  if (weight_grad) p.d_weight = d_weight.mutable_data_ptr();
  if (bias_grad) p.d_bias = d_bias.mutable_data_ptr();
#if defined(FT_CUDA) || defined(FT_SIMT)
  Tensor workspace = make(input, {cuda::linear_add_backward_workspace(p)}, ScalarType::Float);
  p.linear.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  FT_LAUNCH(linear_add_backward, p, input);
  return {d_input, d_weight, d_bias};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("linear_add", TORCH_BOX(&ft::bindings::linear_add));
  m.impl("linear_add_backward", TORCH_BOX(&ft::bindings::linear_add_backward));
}
