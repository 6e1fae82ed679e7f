#include "params/rms_norm.h"

#include "bindings/row_norm.h"

namespace ft::bindings {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, const OptionalTensor& weight, double eps) {
  RowNormParams p = row_norm_params(input, weight, eps);
  Tensor out = make(input, input.sizes());
  Tensor rstd = make(input, {p.rows}, ScalarType::Float);
  p.normed = out.mutable_data_ptr();
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  FT_LAUNCH(rms_norm, p, input);
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input,
                                             const OptionalTensor& weight, const Tensor& rstd,
                                             bool weight_grad) {
  RowNormBackwardParams p = row_norm_backward_params(grad, input, weight);
  Tensor d_input = make(input, input.sizes());
  Tensor d_weight = vector_grad(input, weight, weight_grad, &p.d_weight);
  p.rstd = static_cast<const float*>(data(rstd));
  p.d_residual = d_input.mutable_data_ptr();
  const OptionalTensor workspace = workspace_for(p, input);
  FT_LAUNCH(rms_norm_backward, p, input);
  return {d_input, d_weight};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("rms_norm", TORCH_BOX(&ft::bindings::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&ft::bindings::rms_norm_backward));
}
