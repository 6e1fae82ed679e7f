#include "params/add_layer_norm.h"

#include "bindings/row_norm.h"

namespace ft::bindings {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, double dropout_p, const OptionalTensor& seed) {
  RowNormParams p = row_norm_params(input, weight, eps);
  p.bias = vector_arg(bias);
  p.residual = data(residual);
  p.residual_stride = row_stride(residual);
  p.dropout = dropout_of(dropout_p, seed);
  Tensor normed = make(input, input.sizes());
  Tensor summed = make(input, input.sizes());
  Tensor mean = make(input, {p.rows}, ScalarType::Float);
  Tensor rstd = make(input, {p.rows}, ScalarType::Float);
  p.normed = normed.mutable_data_ptr();
  p.summed = summed.mutable_data_ptr();
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  FT_LAUNCH(add_layer_norm, p, input);
  return {normed, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_normed, const OptionalTensor& grad_summed, const Tensor& summed,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd, double dropout_p,
    const OptionalTensor& seed, bool weight_grad, bool bias_grad, bool wide_bias) {
  RowNormBackwardParams p = row_norm_backward_params(grad_normed, summed, weight);
  p.grad_summed = data(grad_summed);
  if (grad_summed) p.grad_summed_stride = row_stride(*grad_summed);
  p.dropout = dropout_of(dropout_p, seed);
  Tensor d_residual = make(summed, summed.sizes());
  Tensor d_input = make_if(seed.has_value(), summed, summed.sizes());
  Tensor d_weight = vector_grad(summed, weight, weight_grad, &p.d_weight);
  Tensor d_bias = bias_grad_of(p, summed, weight, bias_grad, wide_bias);
  p.mean = static_cast<const float*>(data(mean));
  p.rstd = static_cast<const float*>(data(rstd));
  p.d_residual = d_residual.mutable_data_ptr();
  if (seed) p.d_input = d_input.mutable_data_ptr();
  const OptionalTensor workspace = workspace_for(p, summed);
  FT_LAUNCH(add_layer_norm_backward, p, summed);
  return {d_residual, d_input, d_weight, d_bias};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("add_layer_norm", TORCH_BOX(&ft::bindings::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&ft::bindings::add_layer_norm_backward));
}
