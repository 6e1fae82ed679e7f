// linear_add_layer_norm and linear_add_rms_norm: summed = input · weightᵀ + bias + residual, and
// normed = norm(summed), in one pass: tasks of the product own whole rows, so a row is normed while
// its sum is in L1. Rows too wide or too few for
// that are summed first and normed in a second pass.
#include "cpu/linear_epilogue.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "params/linear_add.h"

namespace ft::FT_ISA {
namespace {

struct Finish {
  const LinearAddNormParams& p;
  const float* bias;
  const float* weight;  // of the norm
  const float* shift;
};

FT_INLINE vf load_part(const float* p, int64_t n) {
  return n >= W ? load(p) : load(p, static_cast<int>(n));
}

// normed = norm(x) of one row of float values; the deviation is taken from the mean, in two passes.
template <class T>
void norm_row(const Finish& f, const float* x, int64_t row, int64_t n) {
  const LinearAddNormParams& p = f.p;
  float mean = 0.f;
  if (p.norm == Norm::layer) {
    vf sum0 = zero(), sum1 = zero();
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      sum0 += load(x + j);
      sum1 += load(x + j + W);
    }
    for (; j < n; j += W) sum0 += load_part(x + j, n - j);
    mean = reduce_add(sum0 + sum1) / static_cast<float>(n);
    p.mean[row] = mean;
  }
  const vf center = splat(mean);
  vf square0 = zero(), square1 = zero();
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    const vf a = load(x + j) - center, b = load(x + j + W) - center;
    square0 = fma(a, a, square0);
    square1 = fma(b, b, square1);
  }
  for (; j < n; j += W) {
    const vf a = load_part(x + j, n - j) - center;
    const vf d = n - j >= W ? a : select(lanes() < splat_int(static_cast<int>(n - j)), a, zero());
    square0 = fma(d, d, square0);
  }
  const float variance = reduce_add(square0 + square1) / static_cast<float>(n);
  const float rstd = 1.f / __builtin_sqrtf(variance + p.eps);
  p.rstd[row] = rstd;
  T* out = static_cast<T*>(p.normed) + row * n;
  const vf scale = splat(rstd);
  for (j = 0; j < n; j += W) {
    vf y = (load_part(x + j, n - j) - center) * scale;
    if (f.weight) y = y * load_part(f.weight + j, n - j);
    if (f.shift) y += load_part(f.shift + j, n - j);
    if (n - j >= W) {
      store(out + j, y);
    } else {
      store(out + j, y, static_cast<int>(n - j));
    }
  }
}

template <class T, bool norm>
void finish(const GemmTile& tile, const void* context) {
  const Finish& f = *static_cast<const Finish*>(context);
  const LinearAddParams& p = f.p.linear;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t row = tile.row + i;
    float* acc = tile.data + i * tile.stride;
    const T* residual = static_cast<const T*>(p.residual);
    finish_row<T, Activation::none, norm>(
        acc, f.bias ? f.bias + tile.column : nullptr,
        residual ? residual + row * p.residual_stride + tile.column : nullptr,
        static_cast<T*>(p.output) + row * p.out_features + tile.column, tile.columns);
    if constexpr (norm) norm_row<T>(f, acc, row, p.out_features);
  }
}

template <class T>
void norm_pass(const Finish& f) {
  const LinearAddParams& p = f.p.linear;
  const int64_t n = p.out_features;
  parallel_for(p.rows, 16384 / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    float* x = static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * (n + W)));
    for (int64_t row = begin; row < end; ++row) {
      const T* in = static_cast<const T*>(p.output) + row * n;
      for (int64_t j = 0; j < n; j += W) {
        if (n - j >= W) {
          store(x + j, load(in + j));
        } else {
          store(x + j, load(in + j, static_cast<int>(n - j)));
        }
      }
      norm_row<T>(f, x, row, n);
    }
  });
}

}  // namespace

void linear_add_norm(const LinearAddNormParams& p) {
  const LinearAddParams& l = p.linear;
  const int64_t n = l.out_features, padded = n + W;
  float* vectors =
      static_cast<float*>(thread_scratch(Scratch::gradient, sizeof(float) * 3 * padded));
  Finish context{p, nullptr, nullptr, nullptr};
  const auto widened = [&](const VectorArg& v, int slot) -> const float* {
    if (v.data == nullptr) return nullptr;
    widen_vector(v, n, vectors + slot * padded);
    return vectors + slot * padded;
  };
  context.bias = widened(l.bias, 0);
  context.weight = widened(p.norm_weight, 1);
  context.shift = widened(p.norm_bias, 2);

  Gemm g;
  g.dtype = l.dtype;
  g.rows = l.rows;
  g.columns = n;
  g.depth = l.in_features;
  g.a = input_of(l);
  g.b = {l.weight, true, l.in_features};
  // With few rows, tasks of whole rows would leave threads idle: split columns, norm afterwards.
  const bool whole_rows = can_own_whole_rows(g) && l.rows >= 2 * kBlockRows * num_threads() / 3;
  g.whole_rows = whole_rows;
  g.context = &context;
  with_type(l.dtype, [&]<class T>() {
    g.epilogue = whole_rows ? finish<T, true> : finish<T, false>;
    gemm(g);
    if (!whole_rows) norm_pass<T>(context);
  });
}

}  // namespace ft::FT_ISA
