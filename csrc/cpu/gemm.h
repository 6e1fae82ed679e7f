// C = A · B with an epilogue that sees each finished tile of C while it is in cache. One engine for
// the forward product (B is a weight, transposed while packing) and both gradients.
#pragma once
#include <cstdint>

#include "params/common.h"

namespace ft::FT_ISA {

// A: row i of the product is at data + (i / inner_rows) * outer_stride + (i % inner_rows) *
// row_stride (in elements); its elements are contiguous in runs of `segment`, `segment_stride`
// apart (attention's heads). With `transposed`, element (i, k) is at data + k * row_stride + i.
struct GemmA {
  const void* data = nullptr;
  bool transposed = false;
  int64_t row_stride = 0;
  int64_t inner_rows = INT64_MAX, outer_stride = 0;
  int64_t segment = INT64_MAX, segment_stride = 0;
};

// B: element (k, j) is at data + k * row_stride + j, or with `transposed` at data + j * row_stride
// + k.
struct GemmB {
  const void* data = nullptr;
  bool transposed = false;
  int64_t row_stride = 0;
};

// A finished tile: rows [row, row + rows) × columns [column, column + columns) of C as float,
// `stride` floats from row to row; the epilogue may overwrite it.
struct GemmTile {
  float* data;
  int64_t stride, row, rows, column, columns;
};
using GemmEpilogue = void (*)(const GemmTile&, const void* context);

struct Gemm {
  DType dtype = DType::f32;  // of A and B
  bool wide_a = false;       // A is float whatever B is; only where A is transposed or B is not
  int64_t rows = 0, columns = 0, depth = 0;
  GemmA a;
  GemmB b;
  bool whole_rows = false;   // the epilogue wants tiles that span all columns
  bool fixed_tiles = false;  // tiles of kBlockRows rows, whatever the number of threads
  bool one_thread = false;   // all on the calling thread, tiles of a row from left to right
  GemmEpilogue epilogue = nullptr;
  const void* context = nullptr;
};

// Whether `whole_rows` may be set: the rows are not too wide for a tile, and not so few that the
// product is better computed with the roles of A and B exchanged.
bool can_own_whole_rows(const Gemm&);

// Whether bf16 is multiplied in pairs along the summed dimension here, and not widened to float.
bool multiplies_pairs(DType);

void gemm(const Gemm&);

}  // namespace ft::FT_ISA
