#include "params/cross_entropy.h"

#include "bindings/device.h"

namespace ft::bindings {

constexpr int64_t kMostClasses = int64_t{1} << 30;  // columns are 32-bit within a row
constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(float);

CrossEntropyParams cross_entropy_params(const Tensor& input, const Tensor& target,
                                        const OptionalTensor& weight, int64_t ignore_index,
                                        double label_smoothing) {
  CrossEntropyParams p;
  p.input = data(input);
  p.target = ids_arg(target);
  p.weight = vector_arg(weight);
  p.dtype = dtype_of(input);
  p.rows = input.size(0);
  p.columns = input.size(1);
  if (p.columns > kMostClasses) throw std::invalid_argument("cross_entropy: over 2^30 classes");
  p.row_stride = input.stride(0);
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  return p;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target,
                                         const OptionalTensor& weight, int64_t ignore_index,
                                         double label_smoothing) {
  CrossEntropyParams p = cross_entropy_params(input, target, weight, ignore_index, label_smoothing);
  Tensor losses = make(input, {p.rows}, ScalarType::Float);
  Tensor statistics = make(input, {p.rows, kStatistics}, ScalarType::Float);
  p.losses = static_cast<float*>(losses.mutable_data_ptr());
  p.statistics = static_cast<RowStatistics*>(statistics.mutable_data_ptr());
  FT_LAUNCH(cross_entropy, p, input);
  return {losses, statistics};
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& statistics,
                              int64_t ignore_index, double label_smoothing) {
  Tensor d_input = make(input, input.sizes());
  CrossEntropyBackwardParams p;
  p.forward = cross_entropy_params(input, target, weight, ignore_index, label_smoothing);
  p.forward.statistics =
      const_cast<RowStatistics*>(static_cast<const RowStatistics*>(data(statistics)));
  p.grad = static_cast<const float*>(data(grad));
  p.grad_stride = grad.stride(0);
  p.d_input = d_input.mutable_data_ptr();
  FT_LAUNCH(cross_entropy_backward, p, input);
  return d_input;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("cross_entropy", TORCH_BOX(&ft::bindings::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&ft::bindings::cross_entropy_backward));
}
