#include "params/linear_cross_entropy.h"

#include "bindings/output_layer.h"

namespace ft::bindings {

constexpr int64_t kMostClasses = int64_t{1} << 30;  // classes are 32-bit within a row
constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(float);

LinearCrossEntropyParams linear_cross_entropy_params(const Tensor& input, const Tensor& weight,
                                                     const OptionalTensor& bias,
                                                     const Tensor& target,
                                                     const OptionalTensor& class_weight,
                                                     int64_t ignore_index, double label_smoothing) {
  LinearCrossEntropyParams p;
  fill_product(p, input, weight, bias);
  p.target = ids_arg(target);
  p.class_weight = vector_arg(class_weight);
  if (p.classes > kMostClasses) {
    throw std::invalid_argument("linear_cross_entropy: over 2^30 classes");
  }
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  return p;
}

// d_input, d_weight and d_bias, named in the params where they are wanted.
std::tuple<Tensor, Tensor, Tensor> make_gradients(LinearCrossEntropyParams& p, const Tensor& input,
                                                  bool input_grad, bool weight_grad,
                                                  bool bias_grad) {
  Tensor d_input = make_if(input_grad, input, {p.rows, p.features});
  Tensor d_weight = make_if(weight_grad, input, {p.classes, p.features});
  Tensor d_bias = make_if(bias_grad, input, {p.classes});
  if (input_grad) p.d_input = d_input.mutable_data_ptr();
  if (weight_grad) p.d_weight = d_weight.mutable_data_ptr();
  if (bias_grad) p.d_bias = d_bias.mutable_data_ptr();
  return {d_input, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& class_weight, int64_t ignore_index, double label_smoothing, bool mean,
    bool input_grad, bool weight_grad, bool bias_grad) {
  LinearCrossEntropyParams p = linear_cross_entropy_params(
      input, weight, bias, target, class_weight, ignore_index, label_smoothing);
  Tensor losses = make(input, {p.rows}, ScalarType::Float);
  Tensor statistics = make(input, {p.rows, kStatistics}, ScalarType::Float);
  p.losses = static_cast<float*>(losses.mutable_data_ptr());
  p.statistics = static_cast<RowStatistics*>(statistics.mutable_data_ptr());
  p.mean = mean;
  auto [d_input, d_weight, d_bias] = make_gradients(p, input, input_grad, weight_grad, bias_grad);
  FT_LAUNCH(linear_cross_entropy, p, input);
  return {losses, statistics, d_input, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& target, const OptionalTensor& class_weight, const Tensor& statistics,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool weight_grad,
    bool bias_grad) {
  LinearCrossEntropyParams p = linear_cross_entropy_params(
      input, weight, bias, target, class_weight, ignore_index, label_smoothing);
  p.statistics = const_cast<RowStatistics*>(static_cast<const RowStatistics*>(data(statistics)));
  p.grad = static_cast<const float*>(data(grad));
  p.grad_stride = grad.stride(0);
  auto gradients = make_gradients(p, input, input_grad, weight_grad, bias_grad);
  FT_LAUNCH(linear_cross_entropy_backward, p, input);
  return gradients;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&ft::bindings::linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&ft::bindings::linear_cross_entropy_backward));
}
