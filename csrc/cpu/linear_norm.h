// linear_add_layer_norm and linear_add_rms_norm: summed = dropout(input · weightᵀ + bias) +
// residual and normed = norm(summed), in one pass: tasks of the product own whole rows, so a row is
// normed while its sum is in cache. Rows too wide or too few for that are summed first and normed
// in a second pass. The norm itself is row_norm.h's, the product gemm.cpp's.
#pragma once
#include "cpu/linear_epilogue.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"
#include "cpu/tile.h"
#include "params/linear_add_layer_norm.h"

namespace ft::FT_ISA {

struct FinishNorm {
  const LinearAddNormParams& p;
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
};

template <class T, bool Center, bool whole_rows>
void finish_norm(const GemmTile& tile, const void* context) {
  const FinishNorm& f = *static_cast<const FinishNorm*>(context);
  const int64_t end = tile.row + tile.rows;
  for (int64_t row = tile.row; row < end; row += kRows) {
    const int64_t last = row + kRows < end ? row + kRows : end;
    for (int64_t r = row; r < last; ++r) {
      finish_row_of<T, Activation::none>(f.p.linear, tile, r - tile.row, f.bias);
    }
    if constexpr (whole_rows) {
      if (last - row == kRows) {
        norm_rows<T, Center, Add::none, kRows>(f.p.norm, row, f.norm_weight, f.norm_bias, nullptr);
      } else {
        for (int64_t r = row; r < last; ++r) {
          norm_rows<T, Center, Add::none, 1>(f.p.norm, r, f.norm_weight, f.norm_bias, nullptr);
        }
      }
    }
  }
}

template <bool Center>
void linear_norm(const LinearAddNormParams& p) {
  const LinearAddParams& l = p.linear;
  const int64_t n = l.out_features, room = (n + W - 1) / W * W;
  float* vectors = static_cast<float*>(thread_scratch(Scratch::gradient, sizeof(float) * 3 * room));
  FinishNorm context{p, l.bias.data ? float_vector<float>(l.bias, n, 0.f, vectors) : nullptr,
                     nullptr, nullptr};
  Gemm g = forward_product(l);
  g.context = &context;
  // With few rows, tasks of whole rows would leave threads idle: split columns, norm afterwards.
  g.whole_rows = can_own_whole_rows(g) && l.rows >= 2 * kBlockRows * num_threads() / 3;
  with_type(l.dtype, [&]<class T>() {
    context.norm_weight = float_vector<T>(p.norm.weight, n, 1.f, vectors + room);
    if (Center) context.norm_bias = float_vector<T>(p.norm.bias, n, 0.f, vectors + 2 * room);
    g.epilogue = g.whole_rows ? finish_norm<T, Center, true> : finish_norm<T, Center, false>;
  });
  gemm(g);
  if (!g.whole_rows) norm_forward<Center, Add::none>(p.norm);
}

}  // namespace ft::FT_ISA
