// Attention backward: what its kernels share. With P = exp(s − lse), made again from the saved lse,
// and delta = Σ_e dO·O − d_lse:
//   dV = Pᵀ·dO    dS = P ∘ (dO·Vᵀ − delta)    dK = scale·dSᵀ·Q    dQ = scale·dS·K    d_bias = dS
// Kernels in this order, each a function of what the ones before left in memory:
//   rows    lse and delta of every query (backward.cu)
//   walk    dQ: a block owns queries and walks the keys; where lse is too coarse it first finds the
//           rows' maximum, sum and delta again (backward_walk.h)
//   walk    dK, dV: a block owns keys and walks the queries of all heads that read them
//   bias    d_bias, if wanted: a block owns a tile of it (backward_bias.h)
//   sinks   d_sinks, if wanted (backward.cu)
// No two blocks write the same place and no atomics are used: gradients are the same from run to
// run, whatever the grid. The price is that scores are made twice: 7 tile products where one kernel
// that adds dQ in memory has 5 (docs/attention.md compares the two).
// Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 3.2; split as in Triton's
// tutorial.
#pragma once
#include "cuda/attention_scores.h"
#include "cuda/device/launch.h"

namespace ft::cuda {

struct BackwardArgs {
  AttentionBackwardParams p;
  Units units;
  int group = 1;                 // query heads of a key head
  int warps = 0, stages = 0;     // of a walk: warps of a block, and buffers for what it walks over
  int64_t tiles = 0, items = 0;  // tiles of a head's rows; of all heads, and passes
  bool own_aligned[2] = {}, walked_aligned[2] = {};  // rows begin on 16 bytes, see walk
};

// Whether the rows of a tensor of heads, of elements of `size` bytes, all begin on 16 bytes.
inline bool rows_on_16_bytes(const HeadsView& v, int64_t size) {
  return (reinterpret_cast<uintptr_t>(v.data) |
          static_cast<uintptr_t>((v.row | v.head | v.batch) * size)) %
             16 ==
         0;
}

// The power of 2 that is a weight. p.top holds lse or the row's maximum, and +inf for a query
// without keys, which makes weights 0; plain kernels take exp2(s·exponent − top) instead, with
// lse·log2(e) in p.top.
FT_DEVICE float weight_of(const Units& u, float s, float top, float shift) {
  return multiply_add(multiply_add(s, u.lse_scale, -top), kLog2E, shift);
}

// Kernels of one element type, in files of their own so that they compile side by side.
template <class T>
void backward_queries(const BackwardArgs& args, bool plain, void* stream);
template <class T>
void backward_keys(const BackwardArgs& args, bool plain, void* stream);
template <class T>
void backward_bias(const BackwardArgs& args, void* stream);

}  // namespace ft::cuda
