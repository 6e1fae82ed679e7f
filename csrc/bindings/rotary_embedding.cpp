#include "params/rotary_embedding.h"

#include "bindings/device.h"

namespace ft::bindings {

RotaryTensor rotary_tensor(const Tensor& input, Tensor& output) {
  return {data(input),     output.mutable_data_ptr(), input.size(1),
          input.stride(0), input.stride(1),           input.stride(2)};
}

RotaryTable rotary_table(const Tensor& table) {
  const int64_t dims = table.dim();
  RotaryTable out;
  out.data = {data(table), dtype_of(table)};
  out.row_stride = table.stride(dims - 2);
  if (dims == 3 && table.size(0) > 1) out.batch_stride = table.stride(0);
  return out;
}

std::tuple<Tensor, Tensor> rotate(const Tensor& query, const Tensor& key, const Tensor& cos,
                                  const Tensor& sin, bool interleaved,
                                  const OptionalTensor& position_ids, float sign) {
  Tensor turned_query = make(query, query.sizes());
  Tensor turned_key = make(key, key.sizes());
  RotaryEmbeddingParams p;
  p.query = rotary_tensor(query, turned_query);
  p.key = rotary_tensor(key, turned_key);
  p.cos = rotary_table(cos);
  p.sin = rotary_table(sin);
  p.position_ids = ids_arg(position_ids);
  p.dtype = dtype_of(query);
  p.interleaved = interleaved;
  p.sign = sign;
  p.batch = query.size(0);
  p.length = query.size(2);
  p.half = query.size(3) / 2;
  p.rows = cos.size(cos.dim() - 2);
  if (position_ids && position_ids->dim() == 2 && position_ids->size(0) > 1) {
    p.ids_stride = p.length;
  }
  FT_LAUNCH(rotary_embedding, p, query);
  return {turned_query, turned_key};
}

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& query, const Tensor& key,
                                            const Tensor& cos, const Tensor& sin, bool interleaved,
                                            const OptionalTensor& position_ids) {
  return rotate(query, key, cos, sin, interleaved, position_ids, 1.f);
}

std::tuple<Tensor, Tensor> rotary_embedding_backward(const Tensor& grad_query,
                                                     const Tensor& grad_key, const Tensor& cos,
                                                     const Tensor& sin, bool interleaved,
                                                     const OptionalTensor& position_ids) {
  return rotate(grad_query, grad_key, cos, sin, interleaved, position_ids, -1.f);
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("rotary_embedding", TORCH_BOX(&ft::bindings::rotary_embedding));
  m.impl("rotary_embedding_backward", TORCH_BOX(&ft::bindings::rotary_embedding_backward));
}
