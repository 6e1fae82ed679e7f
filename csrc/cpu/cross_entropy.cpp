// Cross entropy of logits against classes, per row, forward and backward.
//   loss = −(1 − s) · w[y] · log p[y] − s/C · Σ_c w[c] · log p[c],   log p = x − top − log_sum
// One thread owns a run of whole rows. Forward: a row is taken in blocks that stay in the nearest
// cache: a block's maximum, then the sum of its exponentials about that maximum (and with smoothing
// that of w · (x − maximum)); the blocks' sums are brought to one maximum as they come. So the
// logits are read from memory once and nothing is written but 20 bytes a row. Backward turns each
// logit into its gradient from 16 of these bytes, without another reduction. Rows that are left out
// are not read. Bound by memory; by exp() when the logits are in cache. Sources: Milakov and
// Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv:1805.02867), block by block;
// label smoothing: Szegedy et al., 2015 (arXiv:1512.00567).
#include "params/cross_entropy.h"

#include <cmath>

#include "cpu/columns.h"
#include "cpu/ids.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it gives
constexpr int64_t kBlock = 2048;   // columns of a block

// Σ exp(x − base), Σ w · (x − base) and Σ w over the blocks that were seen, with base the largest
// of their columns (0 while that is −inf, as −inf less −inf is NaN).
struct Sums {
  float top = -INFINITY, exponentials = 0.f, weighted = 0.f, weights = 0.f;
};
float base_of(float top) { return top == -INFINITY ? 0.f : top; }

// Adds `count` columns from `x` on. `w` holds their weights in the order of the walk, where the row
// is smoothed; null: all are 1.
template <bool Smooth, class T>
FT_INLINE void add_block(const T* x, const float* w, int64_t count, Sums& s) {
  vf high[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  over_columns<4, T>(count, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
    raise(high, u, keep(load(x + j, part), part, -INFINITY));
  });
  const float top = reduce_max(max(max(high[0], high[1]), max(high[2], high[3])));
  const vf about = splat(base_of(top));
  vf total[2] = {zero(), zero()}, weighted[2] = {zero(), zero()}, weights[2] = {zero(), zero()};
  over_columns<2, T>(count, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
    __builtin_prefetch(x + j + kBlock);  // of the next block: this one is bound by arithmetic
    const auto z = load(x + j, part) - about;
    accumulate(total, u, keep(exp2_for<T>(z * splat(kLog2E)), part));
    if constexpr (Smooth) {
      if (w != nullptr) {
        const auto wj = load(w + j, part);
        accumulate(weighted, u, keep(z, part), wj);
        accumulate(weights, u, wj);
      } else {
        accumulate(weighted, u, keep(z, part));
      }
    }
  });
  const float sum = reduce_add(total[0] + total[1]);
  const float before = base_of(s.top);
  if (top > s.top) {
    s.exponentials = s.exponentials * __builtin_expf(s.top - top) + sum;
    s.top = top;
  } else {
    s.exponentials += sum * (top == s.top ? 1.f : __builtin_expf(top - s.top));
  }
  // A NaN is not a maximum; it must stay in the sum when the maximum is −inf or infinite, too.
  if (sum != sum) s.exponentials = sum;
  if constexpr (Smooth) {
    const float here = base_of(s.top);
    const float own =
        w == nullptr ? static_cast<float>(count) : reduce_add(weights[0] + weights[1]);
    s.weighted += s.weights * (before - here) + reduce_add(weighted[0] + weighted[1]) +
                  own * (base_of(top) - here);
    s.weights += own;
  }
}

float weight_at(const VectorArg& weight, int64_t at) {
  float w = 1.f;
  if (weight.data == nullptr) return w;
  with_type(weight.dtype, [&]<class T>() { w = to_float(static_cast<const T*>(weight.data)[at]); });
  return w;
}

// The weights in the order of a walk over a row's blocks; null where each is 1. A block's length is
// a multiple of a pair's, so the blocks' order is that of the whole row's walk.
template <class T>
const float* block_weights(const CrossEntropyParams& p) {
  if (p.weight.data == nullptr || p.label_smoothing == 0.f) return nullptr;
  const size_t room = sizeof(float) * static_cast<size_t>(p.columns + 2 * W);
  return float_vector<T>(p.weight, p.columns, 1.f,
                         static_cast<float*>(thread_scratch(Scratch::tile, room)));
}

template <bool Smooth, class T>
void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  static_assert(kBlock % (2 * W) == 0);
  const float* w = block_weights<T>(p);
  const float count = static_cast<float>(p.columns);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = id_at(p.target, r);
    if (y == p.ignore_index) {
      p.losses[r] = 0.f;
      p.statistics[r] = {0.f, 0.f, 0.f, 0.f};
      continue;
    }
    const T* x = static_cast<const T*>(p.input) + r * p.row_stride;
    Sums s;
    for (int64_t first = 0; first < p.columns; first += kBlock) {
      const int64_t left = p.columns - first;
      add_block<Smooth>(x + first, w == nullptr ? w : w + first, left < kBlock ? left : kBlock, s);
    }
    // Nothing but −inf: NaN, as in torch.
    const float log_sum = s.top == -INFINITY ? NAN : __builtin_logf(s.exponentials);
    const float target_weight = weight_at(p.weight, y);
    p.statistics[r] = {s.top, log_sum, target_weight, Smooth ? s.weights : count};
    // Less the maximum first: what is left is exact where it is small.
    const float log_p = (to_float(x[y]) - s.top) - log_sum;
    float loss = -(1.f - p.label_smoothing) * target_weight * log_p;
    if (Smooth) loss -= p.label_smoothing / count * (s.weighted - log_sum * s.weights);
    p.losses[r] = loss;
  }
}

// Where the gradients of a row go; the weights' share is absent without smoothing.
template <bool Weighted, bool Past, class T>
void grad_row(const T* x, const float* w, int64_t n, float top, float log_sum, float by_p,
              float by_w, T* dx) {
  const vf high = splat(top), log_of = splat(log_sum), scale = splat(by_p), share = splat(by_w);
  over_columns<2, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto z = (load(x + j, part) - high) - log_of;
    const auto p = exp_for<T>(z);
    if constexpr (Weighted) {
      put<Past>(dx + j, scale * p - share * load(w + j, part), part);
    } else {
      put<Past>(dx + j, scale * p - share, part);
    }
  });
}

template <class T>
void fill_zero(T* out, int64_t n) {
  std::memset(static_cast<void*>(out), 0, static_cast<size_t>(n) * sizeof(T));
}

template <bool Past, class T>
void grad_rows(const CrossEntropyBackwardParams& p, int64_t begin, int64_t end) {
  const CrossEntropyParams& f = p.forward;
  const int64_t n = f.columns;
  const float* w = block_weights<T>(f);
  // The targets' own numbers are written when the rows before them are, whichever way those go.
  constexpr int kTargets = 64;
  struct Target {
    T* at;
    T value;
  } targets[kTargets];
  int count = 0;
  const auto write_targets = [&] {
    if (Past) end_past();
    for (int i = 0; i < count; ++i) *targets[i].at = targets[i].value;
    count = 0;
  };
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = id_at(f.target, r);
    T* dx = static_cast<T*>(p.d_input) + r * n;
    if (y == f.ignore_index) {
      fill_zero(dx, n);
      continue;
    }
    const T* x = static_cast<const T*>(f.input) + r * f.row_stride;
    const RowStatistics s = f.statistics[r];
    float grad = p.grad[r * p.grad_stride];
    if (grad != grad) grad = NAN;  // without low bits, which a pair's rounding would carry
    const float uniform = grad * (f.label_smoothing / static_cast<float>(n));
    const float hit = grad * (1.f - f.label_smoothing) * s.target_weight;
    const float by_p = hit + uniform * s.weight_sum;
    // The target's logit before the row is written: the two may be one memory.
    const float p_y = exp(splat((to_float(x[y]) - s.top) - s.log_sum))[0];
    w == nullptr ? grad_row<false, Past>(x, w, n, s.top, s.log_sum, by_p, uniform, dx)
                 : grad_row<true, Past>(x, w, n, s.top, s.log_sum, by_p, uniform, dx);
    const float w_y = w == nullptr ? 1.f : s.target_weight;
    targets[count++] = {dx + y,
                        from_float<T>(hit * (p_y - 1.f) + uniform * (p_y * s.weight_sum - w_y))};
    if (count == kTargets) write_targets();
  }
  write_targets();
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p) {
  with_type(p.dtype, [&]<class T>() {
    parallel_for(p.rows, kGrain / (p.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      p.label_smoothing != 0.f ? rows<true, T>(p, begin, end) : rows<false, T>(p, begin, end);
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p) {
  if (p.forward.columns == 0) return;
  with_type(p.forward.dtype, [&]<class T>() {
    const bool past = goes_past(static_cast<T*>(p.d_input), p.forward.rows, p.forward.columns, 2);
    parallel_for(p.forward.rows, kGrain / (p.forward.columns + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   past ? grad_rows<true, T>(p, begin, end) : grad_rows<false, T>(p, begin, end);
                 });
  });
}

}  // namespace ft::FT_ISA
