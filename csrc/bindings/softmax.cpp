#include "params/softmax.h"

#include "bindings/device.h"

namespace ft::bindings {

Tensor softmax(const Tensor& input, double scale, const OptionalTensor& mask, bool is_causal,
               bool log) {
  const int64_t dims = input.dim() - 1;
  const Sizes sizes = input.sizes();
  Tensor output = make(input, sizes);
  SoftmaxParams p;
  p.input = data(input);
  p.output = output.mutable_data_ptr();
  p.dtype = dtype_of(input);
  p.is_causal = is_causal;
  p.log = log;
  p.scale = static_cast<float>(scale);
  p.columns = sizes[dims];
  p.rows = p.columns == 0 ? 0 : input.numel() / p.columns;
  if (dims > kSoftmaxDims) throw std::invalid_argument("softmax: input has too many dimensions");
  p.dims = static_cast<int>(dims);
  for (int64_t i = 0; i < dims; ++i) {
    p.sizes[i] = sizes[i];
    p.input_strides[i] = input.stride(i);
    if (mask) p.mask_strides[i] = mask->stride(i);
  }
  if (mask) {
    p.mask = static_cast<const bool*>(data(mask));
    p.mask_column_stride = mask->stride(dims);
  }
  FT_LAUNCH(softmax, p, input);
  return output;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, double scale, bool log) {
  Tensor d_input = make(output, output.sizes());
  SoftmaxBackwardParams p;
  p.grad = data(grad);
  p.output = data(output);
  p.d_input = d_input.mutable_data_ptr();
  p.dtype = dtype_of(output);
  p.log = log;
  p.scale = static_cast<float>(scale);
  p.columns = output.size(output.dim() - 1);
  p.rows = p.columns == 0 ? 0 : output.numel() / p.columns;
  FT_LAUNCH(softmax_backward, p, output);
  return d_input;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("softmax", TORCH_BOX(&ft::bindings::softmax));
  m.impl("softmax_backward", TORCH_BOX(&ft::bindings::softmax_backward));
}
