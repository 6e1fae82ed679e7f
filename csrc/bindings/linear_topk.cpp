#include "params/linear_topk.h"

#include "bindings/output_layer.h"

namespace ft::bindings {

std::tuple<Tensor, Tensor> linear_topk(const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& bias, int64_t k, double temperature) {
  LinearTopkParams p;
  p.linear = output_layer(input, weight, bias, temperature);
  p.k = k;
  if (p.linear.classes > INT32_MAX) {
    throw std::invalid_argument("linear_topk: over 2^31 classes");
  }
  Tensor values = make(input, {p.linear.rows, k});
  Tensor indices = make(input, {p.linear.rows, k}, ScalarType::Long);
  p.values = values.mutable_data_ptr();
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  FT_LAUNCH(linear_topk, p, input);
  return {values, indices};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) { m.impl("linear_topk", TORCH_BOX(&ft::bindings::linear_topk)); }
