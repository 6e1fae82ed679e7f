#include "bindings/device.h"
#include "bindings/linear_input.h"
#include "params/linear_add.h"

namespace ft::bindings {
namespace {

struct Outputs {
  Tensor normed, summed, mean, rstd;
};

Outputs run(Norm norm, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, const OptionalTensor& norm_weight,
            const OptionalTensor& norm_bias, double eps) {
  LinearAddNormParams p;
  p.linear = linear_input(input, weight, bias, residual);
  p.norm = norm;
  p.norm_weight = vector_arg(norm_weight);
  p.norm_bias = vector_arg(norm_bias);
  p.eps = static_cast<float>(eps);
  const int64_t rows = p.linear.rows;
  Outputs out{make(input, {rows, p.linear.out_features}), make(input, {rows, p.linear.out_features}),
              make_if(norm == Norm::layer, input, {rows}, ScalarType::Float),
              make(input, {rows}, ScalarType::Float)};
  p.linear.output = out.summed.mutable_data_ptr();
  p.normed = out.normed.mutable_data_ptr();
  p.mean = static_cast<float*>(out.mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  FT_LAUNCH(linear_add_norm, p, input);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_add_layer_norm(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps) {
  Outputs out = run(Norm::layer, input, weight, bias, residual, norm_weight, norm_bias, eps);
  return {out.normed, out.summed, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> linear_add_rms_norm(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& norm_weight, double eps) {
  Outputs out = run(Norm::rms, input, weight, bias, residual, norm_weight, std::nullopt, eps);
  return {out.normed, out.summed, out.rstd};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("linear_add_layer_norm", TORCH_BOX(&ft::bindings::linear_add_layer_norm));
  m.impl("linear_add_rms_norm", TORCH_BOX(&ft::bindings::linear_add_rms_norm));
}
