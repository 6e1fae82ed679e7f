#include "params/linear_add_layer_norm.h"

#include "bindings/linear_input.h"

namespace ft::bindings {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_add_layer_norm(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, bool return_sum, double dropout_p,
    const OptionalTensor& seed) {
  LinearNormCall call(input, weight, bias, residual, norm_weight, norm_bias, eps, return_sum);
  call.p.linear.dropout = dropout_of(dropout_p, seed);
  Tensor mean = make(input, {call.p.norm.rows}, ScalarType::Float);
  call.p.norm.mean = static_cast<float*>(mean.mutable_data_ptr());
#if defined(FT_CUDA) || defined(FT_SIMT)
  Tensor workspace = make(input, {cuda::linear_add_norm_workspace(call.p)}, ScalarType::Float);
  call.p.linear.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  FT_LAUNCH(linear_add_layer_norm, call.p, input);
  return {call.normed, call.summed, mean, call.rstd};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("linear_add_layer_norm", TORCH_BOX(&ft::bindings::linear_add_layer_norm));
}
