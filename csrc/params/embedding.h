#pragma once
#include "params/common.h"

namespace ft {

// out[n] = scale · weight[input[n]] + position_weight[position] + sinusoid(position) for token n,
// each term where asked for; position is positions[n mod period], or n mod period. Rows of the
// tables and of the output have `features` elements; the tables' last stride is 1. An id or
// position outside its table is an error, and nothing is read with it.
struct EmbeddingParams {
  IdsArg input, positions;
  const void* weight = nullptr;
  const void* position_weight = nullptr;  // null: none
  void* output = nullptr;                 // contiguous
  DType dtype = DType::f32;
  bool sinusoidal = false;
  float scale = 1.f;
  int64_t tokens = 0, features = 0, period = 1;
  int64_t rows = 0, row_stride = 0;                 // of weight
  int64_t positions_rows = 0, position_stride = 0;  // of position_weight
};

// d_table[r] = scale · Σ grad[order[i]] over the i with ids[i] == r, in the order of i; 0 for row
// `padding_idx` (−1: none). `ids` are sorted, in range, and order[i] is the token of ids[i].
struct EmbeddingBackwardParams {
  const void* grad = nullptr;  // (tokens, features), last stride 1
  IdsArg ids, order;
  void* d_table = nullptr;   // (rows, features), contiguous
  float* partial = nullptr;  // (tiles, 2, features), on a GPU: see kEmbeddingTile
  DType dtype = DType::f32;
  float scale = 1.f;
  int64_t tokens = 0, features = 0, rows = 0, grad_stride = 0, padding_idx = -1;
};

// The sinusoid's angles are integers of which 2^64 make a turn: p · f, f = base^(−2i/features).
constexpr double kLog2SinusoidBase = 13.287712379549449;   // of 10000
constexpr double kTurnsPerRadian = 2935890503282001226.0;  // 2^64 / 2π

// Sorted tokens that are summed up on their own; on a GPU, where a block does so, the sums of ids
// that reach over its ends are kept apart.
constexpr int64_t kEmbeddingTile = 32;

}  // namespace ft

FT_DECLARE_KERNEL(embedding, EmbeddingParams)
FT_DECLARE_KERNEL(embedding_backward, EmbeddingBackwardParams)
