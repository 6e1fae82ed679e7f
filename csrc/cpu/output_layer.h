// The output layer's product, and where its logits go.
#pragma once
#include "cpu/gemm.h"
#include "cpu/linear_epilogue.h"
#include "cpu/parallel.h"
#include "params/linear_softmax.h"

namespace ft::FT_ISA {

constexpr int64_t kLogitsBytes = int64_t{16} << 20;  // that wait in cache for the second pass

// Rows [row, row + rows) × classes [first, first + classes).
inline Gemm output_product(const LinearSoftmaxParams& p, int64_t row, int64_t rows, int64_t first,
                           int64_t classes) {
  const int64_t bytes = p.dtype == DType::f32 ? 4 : 2;
  Gemm g;
  g.dtype = p.dtype;
  g.rows = rows;
  g.columns = classes;
  g.depth = p.features;
  g.a.data = static_cast<const char*>(p.input) + row * p.row_stride * bytes;
  g.a.row_stride = p.row_stride;
  g.b = {static_cast<const char*>(p.weight) + first * p.features * bytes, true, p.features};
  return g;
}

// The bias as floats that last until the calling thread's next kernel; null without one.
inline const float* wide_bias(const LinearSoftmaxParams& p) {
  if (p.bias.data == nullptr) return nullptr;
  float* bias = static_cast<float*>(
      thread_scratch(Scratch::gradient, sizeof(float) * static_cast<size_t>(p.classes + W)));
  widen_vector(p.bias, p.classes, bias);
  return bias;
}

// An epilogue's context: (rows, classes) of floats.
struct Logits {
  float* out;
  int64_t stride;
  const float* bias;
};

inline void store_logits(const GemmTile& tile, const void* context) {
  const Logits& l = *static_cast<const Logits*>(context);
  for (int64_t i = 0; i < tile.rows; ++i) {
    finish_row<float, Activation::none>(
        tile.data + i * tile.stride, l.bias ? l.bias + tile.column : nullptr, nullptr,
        l.out + (tile.row + i) * l.stride + tile.column, tile.columns);
  }
}

// Rows whose logits fit in kLogitsBytes; at least one.
inline int64_t rows_at_once(const LinearSoftmaxParams& p) {
  const int64_t fit = kLogitsBytes / static_cast<int64_t>(sizeof(float)) / (p.classes + 1);
  return fit < 1 ? 1 : fit < p.rows ? fit : p.rows;
}

}  // namespace ft::FT_ISA
