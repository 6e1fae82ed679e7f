// merge_attention: attention over all keys from attention over parts of them.
//   lse = log Σ_p exp(lse_p)    w_p = exp(lse_p − lse)    out = Σ_p w_p · out_p
//   d_out_p = w_p · g    d_lse_p = w_p · (g·out_p − Σ_q w_q g·out_q + g_lse)
// A thread owns rows; bound by memory. Source: Milakov and Gimelshein, 2018 (arXiv:1805.02867).
#include "params/merge_attention.h"

#include "cpu/columns.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 16384;

struct Place {
  int64_t at[3];
  int64_t in(const int64_t (&strides)[3]) const {
    return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
  }
};

Place place_of(const MergeAttentionParams& p, int64_t row) {
  const int64_t outer = row / p.sizes[2];
  return {{outer / p.sizes[1], outer % p.sizes[1], row % p.sizes[2]}};
}

// The parts' weights, 0 of those without a key; returns lse, −inf if none has one.
float weigh(const MergeAttentionParams& p, const Place& at, float (&weights)[kMostMergedParts]) {
  float top = -__builtin_inff();
  bool some = false, lost = false;
  for (int i = 0; i < p.parts; ++i) {
    const float lse = static_cast<const float*>(p.lses[i].data)[at.in(p.lses[i].strides)];
    weights[i] = lse;
    some |= lse != -__builtin_inff();
    lost |= lse != lse;
    top = lse > top ? lse : top;
  }
  float total = 0.f;
  for (int i = 0; i < p.parts; ++i) {
    weights[i] = weights[i] == -__builtin_inff() ? 0.f : __builtin_expf(weights[i] - top);
    total += weights[i];
  }
  for (int i = 0; some && i < p.parts; ++i) weights[i] /= total;
  if (!some) return -__builtin_inff();
  return lost ? __builtin_nanf("") : top == __builtin_inff() ? top : top + __builtin_logf(total);
}

template <class T>
void forward(const MergeAttentionParams& p) {
  parallel_for(p.rows(), kGrain / (p.columns * p.parts + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Place at = place_of(p, row);
      float weights[kMostMergedParts];
      p.lse[row] = weigh(p, at, weights);
      const T* parts[kMostMergedParts];
      for (int i = 0; i < p.parts; ++i) {
        parts[i] = static_cast<const T*>(p.outs[i].data) + at.in(p.outs[i].strides);
      }
      T* out = static_cast<T*>(p.out) + at.in(p.out_strides);
      over_columns<1>(p.columns, [&](int64_t e, int, auto part) __attribute__((always_inline)) {
        vf sum = zero();
        for (int i = 0; i < p.parts; ++i) {
          if (weights[i] == 0.f) continue;
          sum = fma(load(parts[i] + e, part), splat(weights[i]), sum);
        }
        store(out + e, sum, part);
      });
    }
  });
}

template <class T>
void backward(const MergeAttentionBackwardParams& p) {
  parallel_for(p.rows(), kGrain / (p.columns * p.parts + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Place at = place_of(p, row);
      float weights[kMostMergedParts], products[kMostMergedParts] = {}, mean = 0.f;
      weigh(p, at, weights);
      const T* grad = static_cast<const T*>(p.grad_out.data) + at.in(p.grad_out.strides);
      for (int i = 0; i < p.parts; ++i) {
        const T* from = static_cast<const T*>(p.outs[i].data) + at.in(p.outs[i].strides);
        T* d_part = static_cast<T*>(p.d_outs[i]) + row * p.columns;
        const bool absent = weights[i] == 0.f;
        vf sum = zero();
        over_columns<1>(p.columns, [&](int64_t e, int, auto part) __attribute__((always_inline)) {
          if (absent) return store(d_part + e, zero(), part);
          const vf g = load(grad + e, part);
          sum = fma(g, load(from + e, part), sum);
          store(d_part + e, g * splat(weights[i]), part);
        });
        products[i] = reduce_add(sum);
        if (!absent) mean += weights[i] * products[i];
      }
      const float rest = p.grad_lse ? p.grad_lse[row] : 0.f;
      for (int i = 0; i < p.parts; ++i) {
        p.d_lses[i][row] = weights[i] == 0.f ? 0.f : weights[i] * ((products[i] - mean) + rest);
      }
    }
  });
}

}  // namespace

void merge_attention(const MergeAttentionParams& p) {
  with_type(p.dtype, [&]<class T>() { forward<T>(p); });
}

void merge_attention_backward(const MergeAttentionBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { backward<T>(p); });
}

}  // namespace ft::FT_ISA
