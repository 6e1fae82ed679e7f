// The softmax of one row, for softmax.cpp and for rows of logits that a product has just made.
#pragma once
#include <cmath>

#include "cpu/columns.h"

namespace ft::FT_ISA {

constexpr int64_t kSoftmaxBlock = 4096;  // columns of a block; timed on a Zen 4

struct AllAllowed {};

template <class P>
FT_INLINE vf masked(vf s, AllAllowed, int64_t, P part) {
  return keep(s, part, -INFINITY);
}
FT_INLINE vf2 masked(vf2 s, AllAllowed, int64_t, Pair) { return s; }
template <class P>
FT_INLINE vf masked(vf s, const bool* mask, int64_t j, P part) {
  return select(load_flags(mask + j, part), s, splat(-INFINITY));
}
FT_INLINE vf2 masked(vf2 s, const bool* mask, int64_t j, Pair) {
  const FlagPair flags = load_flags(mask + j, Pair{});
  const vf nothing = splat(-INFINITY);
  return {select(flags.even, s.even, nothing), select(flags.odd, s.odd, nothing)};
}

// One row of n columns of X, all or some (by `mask`) of which take part, times `factor`. `e` holds
// the exponentials (`out` itself for float rows, unless that is written past the caches; `x` itself
// if that is float), `tops` the blocks' maxima.
template <bool Log, bool Past = false, class X, class T, class Mask>
void softmax_row(const X* x, Mask mask, int64_t n, float factor, float* e, float* tops, T* out) {
  const auto score = [&](int64_t j, auto part) __attribute__((always_inline)) {
    return masked(product(load(x + j, part), splat(factor)), mask, j, part);
  };
  float top = -INFINITY, sum = 0.f;
  for (int64_t first = 0, b = 0; first < n; first += kSoftmaxBlock, ++b) {
    const int64_t count = n - first < kSoftmaxBlock ? n - first : kSoftmaxBlock;
    vf high[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    float block_top;
    if (factor > 0.f) {  // rounding keeps the order, so that the largest score is the largest x's
      over_columns<4, X>(count, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
        raise(high, u, masked(load(x + first + j, part), mask, first + j, part));
      });
      block_top = reduce_max(max(max(high[0], high[1]), max(high[2], high[3]))) * factor;
    } else {
      over_columns<4, X>(count, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
        raise(high, u, score(first + j, part));
      });
      block_top = reduce_max(max(max(high[0], high[1]), max(high[2], high[3])));
    }
    const float about = block_top == -INFINITY ? 0.f : block_top;  // −inf less −inf is NaN
    vf total[2] = {zero(), zero()};
    over_columns<2, X>(count, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
      const auto y = exp_for<T>(score(first + j, part) - splat(about));
      if constexpr (!Log) store(e + first + j, y, part);
      accumulate(total, u, y);
    });
    const float block_sum = reduce_add(total[0] + total[1]);
    tops[b] = about;
    if (block_top > top) {
      sum = sum * __builtin_expf(top - block_top) + block_sum;
      top = block_top;
    } else {
      sum += block_sum * (block_top == top ? 1.f : __builtin_expf(block_top - top));
    }
    // A NaN is not a maximum; it must stay in the sum when the maximum is −inf or infinite, too.
    if (block_sum != block_sum) sum = block_sum;
  }
  if constexpr (Log) {
    const float log_sum = __builtin_logf(sum);
    over_columns<2, X>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      // Less the maximum first: what is left is exact where it is small.
      const auto y = (product(load(x + j, part), splat(factor)) - splat(top)) - splat(log_sum);
      put<Past>(out + j, masked(y, mask, j, part), part);
    });
    return;
  }
  // Nothing but −inf allowed (sum 0): NaN, as in torch. It is told by the mask that a row is empty,
  // never by the sum.
  if (top == -INFINITY) sum = NAN;
  for (int64_t first = 0, b = 0; first < n; first += kSoftmaxBlock, ++b) {
    const int64_t count = n - first < kSoftmaxBlock ? n - first : kSoftmaxBlock;
    const float shrink = n <= kSoftmaxBlock || tops[b] == top ? 1.f : __builtin_expf(tops[b] - top);
    const vf by = splat(shrink), of = splat(sum), inverse = splat(1.f / sum);
    over_columns<2, X>(count, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      const auto y = load(e + first + j, part) * by;
      put<Past>(out + first + j, sizeof(T) < sizeof(float) ? y * inverse : divide(y, of, inverse),
                part);
    });
  }
}

}  // namespace ft::FT_ISA
