#pragma once
#include "params/common.h"

namespace ft {

// What the forward pass keeps of a row: log p[c] = (x[c] − top) − log_sum, and the weights that its
// loss was made with. target_weight is 0 in a row that is left out.
struct RowStatistics {
  float top, log_sum;
  float target_weight, weight_sum;  // the target's class weight, the sum of all classes'
};

// loss[r] = −(1 − s) · w[y] · log p[y] − s/C · Σ_c w[c] · log p[c], y the target of row r.
// A row whose target is `ignore_index` has loss 0; any other target outside [0, columns) is an
// error, and nothing is read with it.
struct CrossEntropyParams {
  const void* input = nullptr;  // last stride 1
  IdsArg target;
  VectorArg weight;  // absent: ones
  float* losses = nullptr;
  RowStatistics* statistics = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, columns = 0, row_stride = 0, ignore_index = -100;
  float label_smoothing = 0.f;
};

// d_input = grad[r] · ((1 − s) · w[y] · (p − onehot(y)) + s/C · (p · Σ w − w)), contiguous.
struct CrossEntropyBackwardParams {
  CrossEntropyParams forward;   // without losses; statistics are read
  const float* grad = nullptr;  // one per row
  int64_t grad_stride = 0;
  void* d_input = nullptr;
};

}  // namespace ft

FT_DECLARE_KERNEL(cross_entropy, CrossEntropyParams)
FT_DECLARE_KERNEL(cross_entropy_backward, CrossEntropyBackwardParams)
