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
constexpr int kRows = W;  // whose weights are made at once, a row in each lane

struct Place {
  int64_t at[3];
  int64_t in(const int64_t (&strides)[3]) const {
    return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
  }
};

// Rows that lie one behind the other, the parts' weights, 0 of those without a key, and lse, −inf
// where none has one.
struct Rows {
  int count;
  Place places[kRows];
  alignas(64) float weights[kMostMergedParts][kRows];
  alignas(64) float lse[kRows];

  Rows(const MergeAttentionParams& p, int64_t first, int64_t end) {
    count = static_cast<int>(end - first < kRows ? end - first : kRows);
    const int64_t outer = first / p.sizes[2];
    Place at = {{outer / p.sizes[1], outer % p.sizes[1], first % p.sizes[2]}};
    for (int r = 0; r < count; ++r) {
      places[r] = at;
      for (int d = 2; d > 0 && ++at.at[d] == p.sizes[d]; --d) {
        at.at[d] = 0;
        if (d == 1) ++at.at[0];
      }
    }
    weigh(p);
  }

 private:
  void weigh(const MergeAttentionParams& p) {
    const vf nothing = splat(-__builtin_inff());
    vf top = nothing, total = zero();
    vi lost = {};
    for (int i = 0; i < p.parts; ++i) {
      const float* lses = static_cast<const float*>(p.lses[i].data);
      for (int r = 0; r < kRows; ++r) {
        weights[i][r] = lses[places[r < count ? r : 0].in(p.lses[i].strides)];
      }
      const vf of_part = load(weights[i]);
      lost |= of_part != of_part;
      top = max(of_part, top);
    }
    for (int i = 0; i < p.parts; ++i) {
      const vf of_part = load(weights[i]);
      const vf weight = select(of_part == nothing, zero(), exp_below(of_part - top));
      store(weights[i], weight);
      total += weight;
    }
    // The largest part has 1, so that the sum is 0 where there is none.
    const vf divisor = select(total == zero(), splat(1.f), total);
    for (int i = 0; i < p.parts; ++i) store(weights[i], load(weights[i]) / divisor);
    for (int r = 0; r < count; ++r) {
      const float of_row = top[r];
      lse[r] = lost[r]                   ? __builtin_nanf("")
               : __builtin_isinf(of_row) ? of_row
                                         : of_row + __builtin_logf(total[r]);
    }
  }
};

template <class T>
void forward(const MergeAttentionParams& p) {
  parallel_for(p.rows(), kGrain / (p.columns * p.parts + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) {
      const Rows rows(p, row, end);
      for (int r = 0; r < rows.count; ++r) {
        const Place& at = rows.places[r];
        p.lse[row + r] = rows.lse[r];
        const T* parts[kMostMergedParts];
        float weights[kMostMergedParts];
        int count = 0;
        for (int i = 0; i < p.parts; ++i) {
          if (rows.weights[i][r] == 0.f) continue;  // not felt, whatever it holds
          parts[count] = static_cast<const T*>(p.outs[i].data) + at.in(p.outs[i].strides);
          weights[count++] = rows.weights[i][r];
        }
        T* out = static_cast<T*>(p.out) + at.in(p.out_strides);
        over_columns<2>(p.columns, [&](int64_t e, int, auto part) __attribute__((always_inline)) {
          vf sum = zero();
          for (int i = 0; i < count; ++i) {
            sum = fma(load(parts[i] + e, part), splat(weights[i]), sum);
          }
          store(out + e, sum, part);
        });
      }
    }
  });
}

template <class T>
void grad_row(const MergeAttentionBackwardParams& p, const Rows& rows, int r, int64_t row) {
  const Place& at = rows.places[r];
  float products[kMostMergedParts], mean = 0.f;
  const T* grad = static_cast<const T*>(p.grad_out.data) + at.in(p.grad_out.strides);
  for (int i = 0; i < p.parts; ++i) {
    const float weight = rows.weights[i][r];
    const T* from = static_cast<const T*>(p.outs[i].data) + at.in(p.outs[i].strides);
    T* d_part = static_cast<T*>(p.d_outs[i]) + row * p.columns;
    if (weight == 0.f) {
      std::memset(static_cast<void*>(d_part), 0, static_cast<size_t>(p.columns) * sizeof(T));
      products[i] = 0.f;
      continue;
    }
    vf sum[2] = {zero(), zero()};
    over_columns<2>(p.columns, [&](int64_t e, int u, auto part) __attribute__((always_inline)) {
      const vf g = load(grad + e, part);
      sum[u] = fma(g, load(from + e, part), sum[u]);
      store(d_part + e, g * splat(weight), part);
    });
    products[i] = reduce_add(sum[0] + sum[1]);
    mean += weight * products[i];
  }
  const float rest = p.grad_lse ? p.grad_lse[row] : 0.f;
  for (int i = 0; i < p.parts; ++i) {
    const float weight = rows.weights[i][r];
    p.d_lses[i][row] = weight == 0.f ? 0.f : weight * ((products[i] - mean) + rest);
  }
}

template <class T>
void backward(const MergeAttentionBackwardParams& p) {
  parallel_for(p.rows(), kGrain / (p.columns * p.parts + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kRows) {
      const Rows rows(p, first, end);
      for (int r = 0; r < rows.count; ++r) grad_row<T>(p, rows, r, first + r);
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
