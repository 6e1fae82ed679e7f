#pragma once
#include "params/common.h"

namespace ft {

// (batch, heads, sequence, dim) with last stride 1; strides count elements and may be 0.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A view of the scores' shape (batch, heads, q_len, kv_len); stride 0 where it broadcasts.
struct ScoresView {
  const void* data = nullptr;  // null: absent
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// What forward and backward share: inputs and every option. See fasttransformer/reference/
// attention.py for the meaning; query head h reads key head h / group().
struct AttentionCase {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, kv_len = 0;
  int64_t head_dim = 0, value_dim = 0;
  HeadsView query, key, value;
  ScoresView mask;  // bool, true: takes part
  ScoresView bias;
  DType bias_dtype = DType::f32;
  bool is_causal = false, bottom_right = false;
  int64_t window_left = -1, window_right = -1;  // −1: unbounded
  float softcap = 0.f;                          // 0: off
  const float* alibi_slopes = nullptr;          // (batch, heads)
  const float* sinks = nullptr;                 // (heads,)
  const int32_t* key_lengths = nullptr;         // (batch,)
  float scale = 1.f;
  Dropout dropout;
  // Query i stands at key i + key_lengths − q_len, as the last tokens of a cache do.
  bool query_at_end = false;
  // Packed sequences: (batch + 1,) each, where the rows of each batch entry begin in query and key,
  // which then have a batch stride of 0; q_len and kv_len are the longest lengths.
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  // What there is one of per query (lse, and what backward keeps) lies as (entries(), heads,
  // head_rows): head_rows is q_len, or where sequences are packed the number of all tokens.
  int64_t head_rows = 0;
  int64_t key_rows = 0;  // of key: kv_len, or all tokens
  constexpr int64_t entries() const { return cu_seqlens_q != nullptr ? 1 : batch; }
  constexpr int64_t rows() const { return entries() * heads * head_rows; }
  constexpr int64_t group() const { return kv_heads == 0 ? 0 : heads / kv_heads; }
};

struct AttentionParams : AttentionCase {
  void* out = nullptr;   // memory (batch, q_len, heads, value_dim); packed: (tokens, heads, …)
  float* lse = nullptr;  // (entries(), heads, head_rows)
  // CUDA: into how many parts the keys of a row are cut, and attention_workspace() floats for them.
  int64_t splits = 1;
  float* workspace = nullptr;
};

struct AttentionBackwardParams : AttentionCase {
  HeadsView grad_out, out;
  const float* grad_lse = nullptr;  // like lse, or null
  const float* lse = nullptr;
  // Laid out like out: a token's heads beside each other.
  void *d_query = nullptr, *d_key = nullptr, *d_value = nullptr;
  float* d_bias = nullptr;  // contiguous, size 1 where the bias has stride 0; null: not wanted
  int64_t d_bias_sizes[4] = {};
  float* d_sinks = nullptr;  // (heads,); null: not wanted
  // Workspace of rows() each: delta, and the two parts of lse that weights are made of.
  float *delta = nullptr, *top = nullptr, *shift = nullptr;
  // Keys are split into this many parts that run in parallel, each with its own sum of d_query (and
  // of d_bias where that broadcasts over keys) in `partial`; the sums are added in order.
  int64_t parts = 1;
  float* partial = nullptr;       // parts × (batch, heads, q_len, head_dim), if parts > 1
  float* partial_bias = nullptr;  // parts × the shape of d_bias, if parts > 1 and it broadcasts
  // On CUDA the parts are those of d_bias alone, in `partial_bias`.
};

}  // namespace ft

FT_DECLARE_KERNEL(attention, AttentionParams)
FT_DECLARE_KERNEL(attention_backward, AttentionBackwardParams)

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace ft::cuda {
int64_t attention_splits(const AttentionParams&);
int64_t attention_workspace(const AttentionParams&);  // floats, once `splits` is set
}  // namespace ft::cuda
#endif
