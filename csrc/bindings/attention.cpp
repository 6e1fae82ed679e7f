#include "params/attention.h"

#include <algorithm>

#include "bindings/device.h"

#if !defined(FT_CUDA) && !defined(FT_SIMT)
#  include "cpu/parallel.h"
#endif

namespace ft::bindings {
namespace {

// Of (batch, heads, length, dim), or packed (tokens, heads, dim).
HeadsView heads_view(const Tensor& t) {
  if (t.dim() == 3) return {data(t), 0, t.stride(1), t.stride(0)};
  return {data(t), t.stride(0), t.stride(1), t.stride(2)};
}

ScoresView scores_view(const OptionalTensor& t) {
  if (!t) return {};
  return {data(t), t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

// Like a query, key or value but for the dim, its memory (batch, length, heads, dim) or, packed,
// (tokens, heads, dim).
Tensor heads_last(const Tensor& of, int64_t dim) {
  if (of.dim() == 3) return make(of, {of.size(0), of.size(1), dim});
  return torch::stable::transpose(make(of, {of.size(0), of.size(2), of.size(1), dim}), 1, 2);
}

// What an operator gets beside tensors to attend with.
struct Options {
  const OptionalTensor &mask, &bias;
  bool is_causal, bottom_right;
  int64_t window_left, window_right;
  double softcap;
  const OptionalTensor &alibi_slopes, &sinks;
  double scale, dropout_p;
  const OptionalTensor& seed;
};

// And where sequences begin, of packed ones.
struct Packing {
  const Tensor &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

#if !defined(FT_CUDA) && !defined(FT_SIMT)
// The front has looked already, but under torch.compile, where it can't. On CUDA a kernel looks.
void check_boundaries(const int32_t* starts, int64_t sequences, int64_t most, int64_t tokens,
                      const char* name) {
  bool right = starts[0] == 0 && starts[sequences] == tokens;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t length = int64_t{starts[b + 1]} - starts[b];
    right = right && length >= 0 && length <= most;
  }
  if (right) return;
  throw std::invalid_argument(
      std::string("attention_varlen: ") + name +
      " does not rise from 0 to the number of tokens, or a sequence is longer than its maximum");
}
#endif

void fill_case(AttentionCase& p, const Tensor& query, const Tensor& key, const Tensor& value,
               const OptionalTensor& key_lengths, const Packing* packing, const Options& o) {
  p.dtype = dtype_of(query);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  if (packing) {
    p.cu_seqlens_q = static_cast<const int32_t*>(data(packing->cu_seqlens_q));
    p.cu_seqlens_k = static_cast<const int32_t*>(data(packing->cu_seqlens_k));
    p.batch = packing->cu_seqlens_q.size(0) - 1;
    p.q_len = packing->max_seqlen_q;
    p.kv_len = packing->max_seqlen_k;
    p.head_rows = query.size(0);
    p.key_rows = key.size(0);
#if !defined(FT_CUDA) && !defined(FT_SIMT)
    check_boundaries(p.cu_seqlens_q, p.batch, p.q_len, p.head_rows, "cu_seqlens_q");
    check_boundaries(p.cu_seqlens_k, p.batch, p.kv_len, p.key_rows, "cu_seqlens_k");
#endif
  } else {
    p.batch = query.size(0);
    p.q_len = p.head_rows = query.size(2);
    p.kv_len = p.key_rows = key.size(2);
  }
  p.head_dim = query.size(query.dim() - 1);
  p.value_dim = value.size(value.dim() - 1);
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.value = heads_view(value);
  p.mask = scores_view(o.mask);
  p.bias = scores_view(o.bias);
  if (o.bias) p.bias_dtype = dtype_of(*o.bias);
  p.is_causal = o.is_causal;
  p.bottom_right = o.bottom_right;
  p.window_left = o.window_left;
  p.window_right = o.window_right;
  p.softcap = static_cast<float>(o.softcap);
  p.alibi_slopes = static_cast<const float*>(data(o.alibi_slopes));
  p.sinks = static_cast<const float*>(data(o.sinks));
  p.key_lengths = static_cast<const int32_t*>(data(key_lengths));
  p.scale = static_cast<float>(o.scale);
  p.dropout = dropout_of(o.dropout_p, o.seed);
}

std::tuple<Tensor, Tensor> forward(AttentionParams& p, const Tensor& query) {
  Tensor out = heads_last(query, p.value_dim);
  Tensor lse = p.cu_seqlens_q ? make(query, {p.heads, p.head_rows}, ScalarType::Float)
                              : make(query, {p.batch, p.heads, p.q_len}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
#if defined(FT_CUDA) || defined(FT_SIMT)
  p.splits = ft::cuda::attention_splits(p);
  std::optional<Tensor> workspace;
  if (p.splits > 1) {
    workspace = make(query, {ft::cuda::attention_workspace(p)}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
#endif
  FT_LAUNCH(attention, p, query);
  return {out, lse};
}

#if !defined(FT_CUDA) && !defined(FT_SIMT)
// Into how many parts the CPU kernel splits the keys so that every thread has work; see its file.
int64_t key_parts(const AttentionBackwardParams& p) {
  const int64_t batches = p.d_bias && p.d_bias_sizes[0] == 1 ? 1 : p.batch;
  const int64_t heads = p.d_bias && p.d_bias_sizes[1] == 1 ? 1 : p.kv_heads;
  const int64_t items = batches * heads, threads = num_threads(), tiles = (p.kv_len + 127) / 128;
  const int64_t work = p.batch * p.heads * p.q_len * p.kv_len * (p.head_dim + p.value_dim);
  if (threads == 1 || items == 0 || tiles < 2 || work < 400'000) return 1;
  if (items >= 4 * threads || items % threads == 0) return 1;
  return std::min(tiles, (2 * threads + items - 1) / items);
}
#else
// Into how many parts the CUDA kernel cuts the sums of each tile of d_bias, so that some 512 blocks
// work; by shapes alone, as sums then have one order on every GPU.
int64_t bias_parts(const AttentionBackwardParams& p) {
  const auto tiles = [](int64_t length) { return (length + 63) / 64; };
  const int64_t* n = p.d_bias_sizes;
  const int64_t items = n[0] * n[1] * tiles(n[2]) * tiles(n[3]);
  const int64_t over = (n[0] == 1 ? p.batch : 1) * (n[1] == 1 ? p.heads : 1) *
                       (n[2] == 1 ? tiles(p.q_len) : 1) * (n[3] == 1 ? tiles(p.kv_len) : 1);
  if (items == 0) return 1;
  return std::max<int64_t>(1, std::min((512 + items - 1) / items, over));
}
#endif

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(AttentionBackwardParams& p, const Tensor& grad_out,
                   const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& out, const Tensor& lse,
                   const OptionalTensor& bias, bool sinks_grad) {
  p.grad_out = heads_view(grad_out);
  p.out = heads_view(out);
  p.grad_lse = static_cast<const float*>(data(grad_lse));
  p.lse = static_cast<const float*>(data(lse));
  Tensor d_query = heads_last(query, p.head_dim), d_key = heads_last(key, p.head_dim);
  Tensor d_value = heads_last(value, p.value_dim);
  std::vector<int64_t> bias_sizes{0};
  if (bias) {
    bias_sizes.resize(4);
    for (int i = 0; i < 4; ++i) {
      bias_sizes[i] = bias->stride(i) == 0 && bias->size(i) > 1 ? 1 : bias->size(i);
      p.d_bias_sizes[i] = bias_sizes[i];
    }
  }
  Tensor d_bias = make(query, bias_sizes, ScalarType::Float);
  Tensor d_sinks = make_if(sinks_grad, query, {p.heads}, ScalarType::Float);
  const int64_t rows = p.rows();
  Tensor workspace = make(query, {3, rows}, ScalarType::Float);
  p.d_query = d_query.mutable_data_ptr();
  p.d_key = d_key.mutable_data_ptr();
  p.d_value = d_value.mutable_data_ptr();
  if (bias) p.d_bias = static_cast<float*>(d_bias.mutable_data_ptr());
  if (sinks_grad) p.d_sinks = static_cast<float*>(d_sinks.mutable_data_ptr());
  p.delta = static_cast<float*>(workspace.mutable_data_ptr());
  p.top = p.delta + rows;
  p.shift = p.top + rows;
  std::optional<Tensor> partial, partial_bias;
#if defined(FT_CUDA) || defined(FT_SIMT)
  if (bias) p.parts = bias_parts(p);
  if (p.parts > 1) {
    partial_bias = make(query, {p.parts, d_bias.numel()}, ScalarType::Float);
    p.partial_bias = static_cast<float*>(partial_bias->mutable_data_ptr());
  }
#else
  p.parts = key_parts(p);
  if (p.parts > 1) {
    const int64_t columns = (p.head_dim + 15) / 16 * 16;
    partial = make(query, {p.parts, p.batch, p.heads, p.q_len, columns}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
    if (bias && bias_sizes[3] == 1) {
      partial_bias = make(query, {p.parts, d_bias.numel()}, ScalarType::Float);
      p.partial_bias = static_cast<float*>(partial_bias->mutable_data_ptr());
    }
  }
#endif
  FT_LAUNCH(attention_backward, p, query);
  return {d_query, d_key, d_value, d_bias, d_sinks};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& mask, const OptionalTensor& bias,
                                     bool is_causal, bool bottom_right, int64_t window_left,
                                     int64_t window_right, double softcap,
                                     const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& key_lengths,
                                     double scale, double dropout_p, const OptionalTensor& seed) {
  AttentionParams p;
  fill_case(p, query, key, value, key_lengths, nullptr,
            {mask, bias, is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes,
             sinks, scale, dropout_p, seed});
  return forward(p, query);
}

Gradients attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& out, const Tensor& lse, const OptionalTensor& mask,
                             const OptionalTensor& bias, bool is_causal, bool bottom_right,
                             int64_t window_left, int64_t window_right, double softcap,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                             const OptionalTensor& key_lengths, double scale, double dropout_p,
                             const OptionalTensor& seed, bool bias_grad, bool sinks_grad) {
  AttentionBackwardParams p;
  fill_case(p, query, key, value, key_lengths, nullptr,
            {mask, bias, is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes,
             sinks, scale, dropout_p, seed});
  return backward(p, grad_out, grad_lse, query, key, value, out, lse,
                  bias_grad ? bias : std::nullopt, sinks_grad);
}

std::tuple<Tensor, Tensor> attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& mask, const OptionalTensor& bias, bool is_causal, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double scale, double dropout_p, const OptionalTensor& seed) {
  AttentionParams p;
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  fill_case(p, query, key, value, std::nullopt, &packing,
            {mask, bias, is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes,
             sinks, scale, dropout_p, seed});
  return forward(p, query);
}

Gradients attention_varlen_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& mask, const OptionalTensor& bias, bool is_causal, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double scale, double dropout_p, const OptionalTensor& seed,
    bool bias_grad, bool sinks_grad) {
  AttentionBackwardParams p;
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  fill_case(p, query, key, value, std::nullopt, &packing,
            {mask, bias, is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes,
             sinks, scale, dropout_p, seed});
  return backward(p, grad_out, grad_lse, query, key, value, out, lse,
                  bias_grad ? bias : std::nullopt, sinks_grad);
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& key_lengths,
                                            const OptionalTensor& mask, const OptionalTensor& bias,
                                            bool is_causal, int64_t window_left,
                                            int64_t window_right, double softcap,
                                            const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sinks, double scale) {
  AttentionParams p;
  fill_case(p, query, key, value, key_lengths, nullptr,
            {mask, bias, is_causal, false, window_left, window_right, softcap, alibi_slopes, sinks,
             scale, 0.0, std::nullopt});
  p.query_at_end = true;
  return forward(p, query);
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) {
  m.impl("attention_backward", TORCH_BOX(&ft::bindings::attention_backward));
  m.impl("attention", TORCH_BOX(&ft::bindings::attention));
  m.impl("attention_varlen", TORCH_BOX(&ft::bindings::attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&ft::bindings::attention_varlen_backward));
  m.impl("attention_decode", TORCH_BOX(&ft::bindings::attention_decode));
}
