#include "params/activation.h"

#include "bindings/activation_code.h"
#include "bindings/device.h"

namespace ft::bindings {

ActivationParams activation_params(const Tensor& input, int64_t code, double dropout_p,
                                   const OptionalTensor& seed) {
  ActivationParams p;
  p.input = data(input);
  p.dtype = dtype_of(input);
  p.gated = code == kSwiglu || code == kGeglu;
  p.activation = code == kSwiglu  ? Activation::silu
                 : code == kGeglu ? Activation::gelu
                                  : activation_of(code);
  p.rows = rows_of(input);
  p.features = p.gated ? features_of(input) / 2 : features_of(input);
  p.row_stride = row_stride(input);
  p.dropout = dropout_of(dropout_p, seed);
  return p;
}

Tensor activation(const Tensor& input, int64_t activation, double dropout_p,
                  const OptionalTensor& seed) {
  ActivationParams p = activation_params(input, activation, dropout_p, seed);
  constexpr size_t kMostDims = 64;
  const size_t dims = static_cast<size_t>(input.dim());
  if (dims > kMostDims) throw std::invalid_argument("activation: input has too many dimensions");
  int64_t sizes[kMostDims];
  for (size_t i = 0; i < dims; ++i) sizes[i] = input.size(static_cast<int64_t>(i));
  sizes[dims - 1] = p.features;
  Tensor output = make(input, Sizes(sizes, dims));
  p.output = output.mutable_data_ptr();
  FT_LAUNCH(activation, p, input);
  return output;
}

Tensor activation_backward(const Tensor& grad, const Tensor& input, int64_t activation,
                           double dropout_p, const OptionalTensor& seed) {
  Tensor d_input = make(input, input.sizes());
  ActivationBackwardParams p;
  p.forward = activation_params(input, activation, dropout_p, seed);
  p.grad = data(grad);
  p.grad_stride = row_stride(grad);
  p.d_input = d_input.mutable_data_ptr();
  FT_LAUNCH(activation_backward, p, input);
  return d_input;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("activation", TORCH_BOX(&ft::bindings::activation));
  m.impl("activation_backward", TORCH_BOX(&ft::bindings::activation_backward));
}
