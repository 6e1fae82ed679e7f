#pragma once
#include "params/common.h"

namespace ft {

// A tensor (batch, heads, length, head_dim) whose pairs are turned; the last stride is 1.
struct RotaryTensor {
  const void* input = nullptr;
  void* output = nullptr;  // contiguous
  int64_t heads = 0;
  int64_t batch_stride = 0, head_stride = 0, position_stride = 0;
};

// Cosines or sines: (batch or 1, rows, half or more) of any float type; the last stride is 1, and
// the others may be 0. Only the first `half` numbers of a row are read.
struct RotaryTable {
  VectorArg data;
  int64_t batch_stride = 0, row_stride = 0;
};

// (a, b) → (a · cos − b · sin, b · cos + a · sin), with sin · `sign`, for the pairs (i, i + half),
// or interleaved (2i, 2i + 1). Token (b, s) has the tables' row position_ids[b · ids_stride + s],
// or s. A row outside the tables is an error, and nothing is read with it.
struct RotaryEmbeddingParams {
  RotaryTensor query, key;
  RotaryTable cos, sin;
  IdsArg position_ids;
  DType dtype = DType::f32;
  bool interleaved = false;
  float sign = 1.f;  // −1: the way back
  int64_t batch = 0, length = 0, half = 0, rows = 0, ids_stride = 0;
};

}  // namespace ft

FT_DECLARE_KERNEL(rotary_embedding, RotaryEmbeddingParams)
