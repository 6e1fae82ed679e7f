// What attention's backward pass knows of each row before it walks over the keys, and the sinks'
// gradients, which follow from that alone.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {

constexpr int64_t kGrain = 16384;

// lse is rounded to float, and with it every weight of a row by the same factor: beyond this, by
// more than torch's own error (at finfo.min it says nothing of the sum at all). The row's maximum
// and sum are found again then: weight = exp2((s − top)·log2(e) + shift).
constexpr float kCoarse = 64.f;

template <class T>
void find_sum(const AttentionBackwardParams& p, const Units& u, const Sequence& seq, int64_t b,
              int64_t h, int64_t i, float* top_out, float* shift_out) {
  alignas(64) float s[kKeys];
  Row row = make_row(p, seq, b, h, i);
  const int64_t g = h / p.group(), dim = p.head_dim, whole = dim / W * W;
  const T* query = at<T>(p.query, b, h, row.token);
  const int rest = static_cast<int>(dim - whole);
  float top = -__builtin_inff();
  vf total = zero();
  for (int64_t j = row.first / kKeys * kKeys; j < row.last; j += kKeys) {
    const int64_t n = min64(kKeys, row.last - j), end = round_up(n, W);
    for (int64_t k = 0; k < n; ++k) {
      const T* key = at<T>(p.key, b, g, seq.key_start + j + k);
      vf sum = rest ? load(query + whole, rest) * load(key + whole, rest) : zero();
      for (int64_t d = 0; d < whole; d += W) sum = fma(load(query + d), load(key + d), sum);
      s[k] = reduce_add(sum);
    }
    for (int64_t k = n; k < end; ++k) s[k] = 0.f;
    finish_scores<T>(p, u, row, j, 0, end, n, s);
    vf most = splat(top);
    for (int64_t k = 0; k < end; k += W) most = max(load(s + k), most);
    const float before = top;
    top = reduce_max(most);
    if (top == -__builtin_inff()) continue;
    total *= exp2(splat((before - top) * u.exponent));
    for (int64_t k = 0; k < end; k += W) {
      total += exp2((load(s + k) - splat(top)) * splat(u.exponent));
    }
  }
  top *= u.lse_scale;
  float sum = reduce_add(total);
  if (p.sinks) {
    const float most = p.sinks[h] > top ? p.sinks[h] : top;
    sum = sum * __builtin_expf(top - most) + __builtin_expf(p.sinks[h] - most);
    top = most;
  }
  *top_out = top;
  *shift_out = -__builtin_log2f(sum);
}

// delta = Σ dO·O − d_lse of every row, and what its weights are made with.
template <class T>
void prepare_rows(const AttentionBackwardParams& p, const Units& u) {
  parallel_for(p.rows(), kGrain / (p.value_dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r % p.head_rows, h = r / p.head_rows % p.heads;
      int64_t b = r / p.head_rows / p.heads;
      const T* grad = at<T>(p.grad_out, b, h, i);
      const T* out = at<T>(p.out, b, h, i);
      vf sum = zero();
      int64_t e = 0;
      for (; e + W <= p.value_dim; e += W) sum = fma(load(grad + e), load(out + e), sum);
      if (e < p.value_dim) {
        const int have = static_cast<int>(p.value_dim - e);
        sum = fma(load(grad + e, have), load(out + e, have), sum);
      }
      p.delta[r] = reduce_add(sum) - (p.grad_lse ? p.grad_lse[r] : 0.f);
      p.top[r] = p.lse[r];
      p.shift[r] = 0.f;
      const bool coarse = p.lse[r] > kCoarse || p.lse[r] < -kCoarse;
      if (coarse && p.lse[r] - p.lse[r] == 0.f) {
        if (p.cu_seqlens_q) {
          while (b + 1 < p.batch && p.cu_seqlens_q[b + 1] <= i) ++b;
        }
        const Sequence seq = sequence_of(p, b);
        find_sum<T>(p, u, seq, b, h, i - seq.query_start, p.top + r, p.shift + r);
      }
    }
  });
}

// The sink's value is 0: its score's gradient is −weight·delta.
inline void sink_gradients(const AttentionBackwardParams& p) {
  const int64_t rows = p.entries() * p.head_rows;
  parallel_for(p.heads, kGrain / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double total = 0.0;
      for (int64_t b = 0; b < p.entries(); ++b) {
        for (int64_t i = 0; i < p.head_rows; ++i) {
          const int64_t r = (b * p.heads + h) * p.head_rows + i;
          if (p.lse[r] == -__builtin_inff()) continue;
          const float power = (p.sinks[h] - p.top[r]) * kLog2E + p.shift[r];
          total -= double{__builtin_exp2f(power)} * double{p.delta[r]};
        }
      }
      p.d_sinks[h] = static_cast<float>(total);
    }
  });
}

}  // namespace ft::FT_ISA
