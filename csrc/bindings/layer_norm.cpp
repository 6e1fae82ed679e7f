#include "params/layer_norm.h"

#include "bindings/row_norm.h"

namespace ft::bindings {

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps) {
  RowNormParams p = row_norm_params(input, weight, eps);
  p.bias = vector_arg(bias);
  Tensor out = make(input, input.sizes());
  Tensor mean = make(input, {p.rows}, ScalarType::Float);
  Tensor rstd = make(input, {p.rows}, ScalarType::Float);
  p.normed = out.mutable_data_ptr();
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  FT_LAUNCH(layer_norm, p, input);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       bool weight_grad, bool bias_grad, bool wide_bias) {
  RowNormBackwardParams p = row_norm_backward_params(grad, input, weight);
  Tensor d_input = make(input, input.sizes());
  Tensor d_weight = vector_grad(input, weight, weight_grad, &p.d_weight);
  Tensor d_bias = bias_grad_of(p, input, weight, bias_grad, wide_bias);
  p.mean = static_cast<const float*>(data(mean));
  p.rstd = static_cast<const float*>(data(rstd));
  p.d_residual = d_input.mutable_data_ptr();
  const OptionalTensor workspace = workspace_for(p, input);
  FT_LAUNCH(layer_norm_backward, p, input);
  return {d_input, d_weight, d_bias};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("layer_norm", TORCH_BOX(&ft::bindings::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&ft::bindings::layer_norm_backward));
}
