#include "params/embedding.h"

#include "bindings/device.h"

namespace ft::bindings {

Tensor embedding(const Tensor& input, const Tensor& weight, const OptionalTensor& positions,
                 const OptionalTensor& position_weight, bool sinusoidal, double scale) {
  constexpr size_t kMostDims = 64;
  const int64_t dims = input.dim();
  if (dims >= static_cast<int64_t>(kMostDims)) {
    throw std::invalid_argument("embedding: input has too many dimensions");
  }
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i < dims; ++i) sizes[i] = input.size(i);
  sizes[dims] = weight.size(1);
  Tensor output = make(weight, Sizes(sizes, static_cast<size_t>(dims + 1)));
  EmbeddingParams p;
  p.input = ids_arg(input);
  p.positions = ids_arg(positions);
  p.weight = data(weight);
  p.position_weight = data(position_weight);
  p.output = output.mutable_data_ptr();
  p.dtype = dtype_of(weight);
  p.sinusoidal = sinusoidal;
  p.scale = static_cast<float>(scale);
  p.tokens = input.numel();
  p.features = weight.size(1);
  p.period = positions ? positions->numel() : dims > 0 ? input.size(dims - 1) : 1;
  p.rows = weight.size(0);
  p.row_stride = weight.stride(0);
  if (position_weight) {
    p.positions_rows = position_weight->size(0);
    p.position_stride = position_weight->stride(0);
  }
  FT_LAUNCH(embedding, p, weight);
  return output;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, const Tensor& order, int64_t rows,
                          double scale, int64_t padding_idx) {
  EmbeddingBackwardParams p;
  p.tokens = grad.size(0);
  p.features = grad.size(1);
  Tensor d_table = make(grad, {rows, p.features});
#if defined(FT_CUDA) || defined(FT_SIMT)
  const int64_t tiles = (p.tokens + kEmbeddingTile - 1) / kEmbeddingTile;
#else
  const int64_t tiles = 0;
#endif
  Tensor partial = make(grad, {tiles, 2, p.features}, ScalarType::Float);
  p.grad = data(grad);
  p.grad_stride = grad.stride(0);
  p.ids = ids_arg(ids);
  p.order = ids_arg(order);
  p.d_table = d_table.mutable_data_ptr();
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.dtype = dtype_of(grad);
  p.scale = static_cast<float>(scale);
  p.rows = rows;
  p.padding_idx = padding_idx;
  FT_LAUNCH(embedding_backward, p, grad);
  return d_table;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("embedding", TORCH_BOX(&ft::bindings::embedding));
  m.impl("embedding_backward", TORCH_BOX(&ft::bindings::embedding_backward));
}
