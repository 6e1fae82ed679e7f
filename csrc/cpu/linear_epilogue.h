// What follows the matrix product while its tile is in cache: bias, activation, residual, rounding.
#pragma once
#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "params/linear_add.h"

namespace ft::FT_ISA {

// As exact as rounding to T asks for.
template <class T>
FT_INLINE vf activate(Activation activation, vf x) {
  switch (activation) {
    case Activation::relu: return relu(x);
    case Activation::gelu: return gelu<T>(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::silu: return silu(x);
    default: return x;
  }
}

// One row's stretch of `n` columns: out = dropout(act(acc + bias)) + residual, rounded to T. Null
// bias, residual or words: absent. `words` are the random ones of the stretch.
template <class T, Activation activation>
FT_INLINE void finish_row(const float* acc, const float* bias, const T* residual, T* out, int64_t n,
                          const uint32_t* words = nullptr, const Dropout& d = {}) {
  const auto finish = [&](int64_t j, auto part) __attribute__((always_inline)) {
    vf x = load(acc + j, part);
    if (bias) x += load(bias + j, part);
    x = activate<T>(activation, x);
    if (words) x = dropped(x, words + j, part, d);
    if (residual) x += load(residual + j, part);
    store(out + j, x, part);
  };
  int64_t j = 0;
  for (; j + W <= n; j += W) finish(j, Whole{});
  if (j < n) finish(j, Part{static_cast<int>(n - j)});
}

// Row `i` of a finished tile. Null bias: absent.
template <class T, Activation activation>
FT_INLINE void finish_row_of(const LinearAddParams& p, const GemmTile& tile, int64_t i,
                             const float* bias) {
  const int64_t row = tile.row + i, n = tile.columns;
  const float* acc = tile.data + i * tile.stride;
  const T* residual = static_cast<const T*>(p.residual);
  if (bias) bias += tile.column;
  if (residual) residual += row * p.residual_stride + tile.column;
  T* out = static_cast<T*>(p.output) + row * p.out_features + tile.column;
  if (!p.dropout.on()) return finish_row<T, activation>(acc, bias, residual, out, n);
  uint32_t buffer[random_words_room(kDropoutRun)];
  for (int64_t j = 0; j < n; j += kDropoutRun) {
    const int64_t run = n - j < kDropoutRun ? n - j : kDropoutRun;
    const uint64_t position = static_cast<uint64_t>(row * p.out_features + tile.column + j);
    finish_row<T, activation>(acc + j, bias ? bias + j : nullptr, residual ? residual + j : nullptr,
                              out + j, run, random_words(p.dropout.seed, position, run, buffer),
                              p.dropout);
  }
}

// Calls f.template operator()<activation>().
template <class F>
FT_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu: return f.template operator()<Activation::silu>();
  }
}

// input · weightᵀ, for the caller to add an epilogue.
inline Gemm forward_product(const LinearAddParams& p) {
  Gemm g;
  g.dtype = p.dtype;
  g.rows = p.rows;
  g.columns = p.out_features;
  g.depth = p.in_features;
  g.a.data = p.input;
  g.a.row_stride = p.row_stride;
  g.a.inner_rows = p.inner_rows;
  g.a.outer_stride = p.outer_stride;
  if (p.heads > 1) {
    g.a.segment = p.head_dim;
    g.a.segment_stride = p.head_stride;
  }
  g.b = {p.weight, true, p.in_features};
  return g;
}

}  // namespace ft::FT_ISA
