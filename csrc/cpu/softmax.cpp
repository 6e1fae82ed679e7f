// softmax and log_softmax over the last dimension, forward and backward.
//   out = exp(s − max s) / Σ exp(s − max s),  s = scale · x over the allowed entries
// One thread owns a run of whole rows. A row's scores are kept as float in thread scratch, so that
// the row is read from memory once: pass 1 scales, masks and finds the maximum, pass 2 takes
// exponentials and their sum, pass 3 writes. Bound by memory; by exp() when the row is in cache.
#include "params/softmax.h"

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it gives

// Scores of one row into `s`, −inf where not allowed; returns the maximum.
template <class T>
float scores(const T* x, const bool* mask, int64_t mask_stride, int64_t columns, int64_t allowed,
             float scale, float* s) {
  vf top = splat(-INFINITY);
  int64_t j = 0;
  for (; j + W <= allowed; j += W) {
    const vf v = load(x + j) * splat(scale);
    store(s + j, v);
    top = max(v, top);
  }
  float best = reduce_max(top);
  for (; j < allowed; ++j) {
    s[j] = to_float(x[j]) * scale;
    if (s[j] > best) best = s[j];
  }
  for (; j < columns; ++j) s[j] = -INFINITY;
  if (mask == nullptr) return best;
  best = -INFINITY;
  for (j = 0; j < allowed; ++j) {
    if (!mask[j * mask_stride]) s[j] = -INFINITY;
    if (s[j] > best) best = s[j];
  }
  return best;
}

template <class T>
void fill(T* out, int64_t n, float value) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(value);
}

template <class T>
void row(const SoftmaxParams& p, const T* x, const bool* mask, int64_t allowed, float* s, T* out) {
  const int64_t n = p.columns;
  const float top = scores(x, mask, p.mask_column_stride, n, allowed, p.scale, s);
  bool any = false;  // told by the mask, never by the sum: a row of −inf scores is NaN as in torch
  if (mask == nullptr) {
    any = allowed > 0;
  } else {
    for (int64_t j = 0; j < allowed && !any; ++j) any = mask[j * p.mask_column_stride];
  }
  if (!any) return fill(out, n, p.log ? -INFINITY : 0.f);
  vf total = zero();
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf e = exp(load(s + j) - splat(top));
    if (!p.log) store(s + j, e);
    total += e;
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    const vf e = select(lanes() < splat_int(rest), exp(load(s + j, rest) - splat(top)), zero());
    if (!p.log) store(s + j, e, rest);
    total += e;
  }
  const float sum = reduce_add(total);
  const vf scale = splat(p.log ? 1.f : 1.f / sum);
  // Near the top, log softmax is a small number: take the maximum off first, then the logarithm.
  const vf first = splat(p.log ? top : 0.f);
  const vf shift = splat(p.log ? -std::log(sum) : 0.f);
  for (j = 0; j + W <= n; j += W) store(out + j, fma(load(s + j) - first, scale, shift));
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    store(out + j, fma(load(s + j, rest) - first, scale, shift), rest);
  }
}

}  // namespace

void softmax(const SoftmaxParams& p) {
  with_type(p.dtype, [&]<class T>() {
    parallel_for(p.rows, kGrain / (p.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      float* s =
          static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * (p.columns + W)));
      for (int64_t r = begin; r < end; ++r) {
        int64_t rest = r, at = 0, mask_at = 0, position = 0;
        for (int d = p.dims - 1; d >= 0; --d) {
          const int64_t i = rest % p.sizes[d];
          rest /= p.sizes[d];
          at += i * p.input_strides[d];
          mask_at += i * p.mask_strides[d];
          if (d == p.dims - 1) position = i;
        }
        const int64_t allowed = p.is_causal && position + 1 < p.columns ? position + 1 : p.columns;
        row(p, static_cast<const T*>(p.input) + at, p.mask ? p.mask + mask_at : nullptr, allowed, s,
            static_cast<T*>(p.output) + r * p.columns);
      }
    });
  });
}

void softmax_backward(const SoftmaxBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    parallel_for(p.rows, kGrain / (p.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      const int64_t n = p.columns;
      const int64_t whole = n / W * W;
      const int rest = static_cast<int>(n - whole);
      for (int64_t r = begin; r < end; ++r) {
        const T* g = static_cast<const T*>(p.grad) + r * n;
        const T* y = static_cast<const T*>(p.output) + r * n;
        T* dx = static_cast<T*>(p.d_input) + r * n;
        vf total = zero();
        for (int64_t j = 0; j < whole; j += W) {
          total += p.log ? load(g + j) : load(g + j) * load(y + j);
        }
        if (rest)
          total += p.log ? load(g + whole, rest) : load(g + whole, rest) * load(y + whole, rest);
        const vf sum = splat(reduce_add(total));
        const vf scale = splat(p.scale);
        const auto derivative = [&](vf gj, vf yj) {
          return p.log ? scale * (gj - exp(yj) * sum) : scale * yj * (gj - sum);
        };
        for (int64_t j = 0; j < whole; j += W) store(dx + j, derivative(load(g + j), load(y + j)));
        if (rest) store(dx + whole, derivative(load(g + whole, rest), load(y + whole, rest)), rest);
      }
    });
  });
}

}  // namespace ft::FT_ISA
