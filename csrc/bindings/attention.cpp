#include "params/attention.h"

#include "bindings/device.h"

namespace ft::bindings {
namespace {

HeadsView heads_view(const Tensor& t) { return {data(t), t.stride(0), t.stride(1), t.stride(2)}; }

ScoresView scores_view(const OptionalTensor& t) {
  if (!t) return {};
  return {data(t), t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

// (batch, heads, length, dim) whose memory is (batch, length, heads, dim).
Tensor heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t dim) {
  return torch::stable::transpose(make(like, {batch, length, heads, dim}), 1, 2);
}

void fill_case(AttentionCase& p, const Tensor& query, const Tensor& key, const Tensor& value,
               const OptionalTensor& mask, const OptionalTensor& bias, bool is_causal,
               bool bottom_right, int64_t window_left, int64_t window_right, double softcap,
               const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
               const OptionalTensor& key_lengths, double scale, double dropout_p,
               const OptionalTensor& seed) {
  p.dtype = dtype_of(query);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.q_len = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key.size(1);
  p.kv_len = key.size(2);
  p.value_dim = value.size(3);
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.value = heads_view(value);
  p.mask = scores_view(mask);
  p.bias = scores_view(bias);
  if (bias) p.bias_dtype = dtype_of(*bias);
  p.is_causal = is_causal;
  p.bottom_right = bottom_right;
  p.window_left = window_left;
  p.window_right = window_right;
  p.softcap = static_cast<float>(softcap);
  p.alibi_slopes = static_cast<const float*>(data(alibi_slopes));
  p.sinks = static_cast<const float*>(data(sinks));
  p.key_lengths = static_cast<const int32_t*>(data(key_lengths));
  p.scale = static_cast<float>(scale);
  p.dropout = dropout_of(dropout_p, seed);
}

}  // namespace

std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
    const OptionalTensor& bias, bool is_causal, bool bottom_right, int64_t window_left,
    int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& key_lengths, double scale, double dropout_p,
    const OptionalTensor& seed) {
  AttentionParams p;
  fill_case(p, query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right,
            softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p, seed);
  Tensor out = heads_last(query, p.batch, p.heads, p.q_len, p.value_dim);
  Tensor lse = make(query, {p.batch, p.heads, p.q_len}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  FT_LAUNCH(attention, p, query);
  return {out, lse};
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("attention", TORCH_BOX(&ft::bindings::attention));
}
