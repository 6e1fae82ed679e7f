// What follows the matrix product while its tile is in cache: bias, activation, residual, rounding.
#pragma once
#include "cpu/gemm.h"
#include "cpu/vec.h"
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

// One row's stretch of `n` columns: out = act(acc + bias) + residual, rounded to T. Null bias
// or residual: absent.
template <class T, Activation activation>
FT_INLINE void finish_row(const float* acc, const float* bias, const T* residual, T* out,
                          int64_t n) {
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    vf x = load(acc + j);
    if (bias) x += load(bias + j);
    x = activate<T>(activation, x);
    if (residual) x += load(residual + j);
    store(out + j, x);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    vf x = load(acc + j, rest);
    if (bias) x += load(bias + j, rest);
    x = activate<T>(activation, x);
    if (residual) x += load(residual + j, rest);
    store(out + j, x, rest);
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
