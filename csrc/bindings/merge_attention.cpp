#include "params/merge_attention.h"

#include "bindings/device.h"

namespace ft::bindings {
namespace {

// Of (…, columns) or, without columns, (…): up to three dimensions of rows, ones in front.
RowsView rows_view(const Tensor& t, int64_t dims) {
  RowsView v;
  v.data = data(t);
  for (int64_t d = 0; d < dims; ++d) v.strides[3 - dims + d] = t.stride(d);
  return v;
}

void fill(MergeAttentionParams& p, const std::vector<Tensor>& outs,
          const std::vector<Tensor>& lses) {
  const Tensor& first = outs[0];
  const int64_t dims = first.dim() - 1;
  p.dtype = dtype_of(first);
  p.parts = static_cast<int>(outs.size());
  p.columns = first.size(dims);
  for (int64_t d = 0; d < dims; ++d) p.sizes[3 - dims + d] = first.size(d);
  for (int i = 0; i < p.parts; ++i) {
    p.outs[i] = rows_view(outs[i], dims);
    p.lses[i] = rows_view(lses[i], dims);
  }
}

// t's sizes, behind the number of `parts` if there are such.
std::vector<int64_t> sizes_of(const Tensor& t, int parts = 0) {
  std::vector<int64_t> sizes;
  if (parts > 0) sizes.push_back(parts);
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention(const std::vector<Tensor>& outs,
                                           const std::vector<Tensor>& lses) {
  MergeAttentionParams p;
  fill(p, outs, lses);
  const Tensor& first = outs[0];
  // Attention's own outputs have a token's heads beside each other, and so has their merge.
  const bool heads_last = first.dim() == 4 && !first.is_contiguous();
  Tensor out =
      heads_last ? torch::stable::transpose(
                       make(first, {first.size(0), first.size(2), first.size(1), p.columns}), 1, 2)
                 : make(first, sizes_of(first));
  Tensor lse = make(first, sizes_of(lses[0]), ScalarType::Float);
  p.out = out.mutable_data_ptr();
  const RowsView view = rows_view(out, first.dim() - 1);
  for (int d = 0; d < 3; ++d) p.out_strides[d] = view.strides[d];
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  FT_LAUNCH(merge_attention, p, first);
  return {out, lse};
}

// The gradients of all parts, (parts, …).
std::tuple<Tensor, Tensor> merge_attention_backward(const Tensor& grad_out,
                                                    const OptionalTensor& grad_lse,
                                                    const std::vector<Tensor>& outs,
                                                    const std::vector<Tensor>& lses) {
  MergeAttentionBackwardParams p;
  fill(p, outs, lses);
  p.grad_out = rows_view(grad_out, grad_out.dim() - 1);
  p.grad_lse = static_cast<const float*>(data(grad_lse));
  const Tensor& first = outs[0];
  Tensor d_outs = make(first, sizes_of(first, p.parts));
  Tensor d_lses = make(first, sizes_of(lses[0], p.parts), ScalarType::Float);
  const int64_t part_bytes = p.rows() * p.columns * first.element_size();
  for (int i = 0; i < p.parts; ++i) {
    p.d_outs[i] = static_cast<char*>(d_outs.mutable_data_ptr()) + i * part_bytes;
    p.d_lses[i] = static_cast<float*>(d_lses.mutable_data_ptr()) + i * p.rows();
  }
  FT_LAUNCH(merge_attention_backward, p, grad_out);
  return {d_outs, d_lses};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("merge_attention", TORCH_BOX(&ft::bindings::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&ft::bindings::merge_attention_backward));
}
