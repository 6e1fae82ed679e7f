// linear_add: out = dropout(act(input · weightᵀ + bias)) + residual, and its gradients.
// The product is gemm.cpp's; here is what happens to a finished tile of it, and the bias gradient,
// a column sum over fixed blocks of rows, so that its value does not depend on the thread count.
#include "params/linear_add.h"

#include "cpu/linear_epilogue.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

struct Finish {
  const LinearAddParams& p;
  const float* bias;
};

template <class T, Activation activation>
void finish(const GemmTile& tile, const void* context) {
  const Finish& f = *static_cast<const Finish*>(context);
  for (int64_t i = 0; i < tile.rows; ++i) finish_row_of<T, activation>(f.p, tile, i, f.bias);
}

struct Plain {
  void* out;
  int64_t row_stride;
};

template <class T>
void store_plain(const GemmTile& tile, const void* context) {
  const Plain& p = *static_cast<const Plain*>(context);
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* out = static_cast<T*>(p.out) + (tile.row + i) * p.row_stride + tile.column;
    finish_row<T, Activation::none>(tile.data + i * tile.stride, nullptr, nullptr, out,
                                    tile.columns);
  }
}

// d_bias[j] = Σ_i grad[i][j]: each task owns a stretch of columns and reads all rows of it, in
// blocks whose sums are added up, so that float rounding stays small.
template <class T>
void column_sum(const T* grad, int64_t stride, int64_t rows, int64_t columns, T* out) {
  constexpr int kVectors = 8;
  constexpr int64_t kStretch = kVectors * W, kRowBlock = 16;
  parallel_for((columns + kStretch - 1) / kStretch, 65536 / (rows * kStretch + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t j = begin * kStretch; j < end * kStretch && j < columns;) {
                   const bool whole = j + kStretch <= columns;
                   const int n = whole ? W : static_cast<int>(columns - j < W ? columns - j : W);
                   const int vectors = whole ? kVectors : 1;
                   vf total[kVectors] = {};
                   for (int64_t i = 0; i < rows; i += kRowBlock) {
                     const int64_t last = i + kRowBlock < rows ? i + kRowBlock : rows;
                     vf sum[kVectors] = {};
                     for (int64_t r = i; r < last; ++r) {
                       const T* row = grad + r * stride + j;
                       if (whole) {
#pragma GCC unroll 8
                         for (int v = 0; v < kVectors; ++v) sum[v] += load(row + v * W);
                       } else {
                         sum[0] += load(row, n);
                       }
                     }
#pragma GCC unroll 8
                     for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
                   }
                   for (int v = 0; v < vectors; ++v) store(out + j + v * W, total[v], n);
                   j += vectors * n;
                 }
               });
}

}  // namespace

void linear_add(const LinearAddParams& p) {
  Finish context{p, nullptr};
  if (p.bias.data) {
    float* bias = static_cast<float*>(
        thread_scratch(Scratch::gradient, sizeof(float) * (p.out_features + W)));
    widen_vector(p.bias, p.out_features, bias);
    context.bias = bias;
  }
  Gemm g = forward_product(p);
  g.context = &context;
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation,
                    [&]<Activation activation>() { g.epilogue = finish<T, activation>; });
  });
  gemm(g);
}

void linear_add_backward(const LinearAddBackwardParams& p) {
  const LinearAddParams& l = p.linear;
  with_type(l.dtype, [&]<class T>() {
    Gemm g;
    g.dtype = l.dtype;
    g.epilogue = store_plain<T>;
    if (p.d_input) {
      const Plain out{p.d_input, l.in_features};
      g.rows = l.rows;
      g.columns = l.in_features;
      g.depth = l.out_features;
      g.a.data = p.grad;
      g.a.row_stride = p.grad_stride;
      g.b = {l.weight, false, l.in_features};
      g.context = &out;
      gemm(g);
    }
    if (p.d_weight) {
      const Plain out{p.d_weight, l.in_features};
      g.rows = l.out_features;
      g.columns = l.in_features;
      g.depth = l.rows;
      g.a = GemmA{};
      g.a.data = p.grad;
      g.a.transposed = true;
      g.a.row_stride = p.grad_stride;
      g.b = {l.input, false, l.row_stride};
      g.context = &out;
      gemm(g);
    }
    if (p.d_bias) {
      column_sum(static_cast<const T*>(p.grad), p.grad_stride, l.rows, l.out_features,
                 static_cast<T*>(p.d_bias));
    }
  });
}

}  // namespace ft::FT_ISA
