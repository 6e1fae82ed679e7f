#pragma once
#include "params/linear_softmax.h"

namespace ft {

// The k largest of linear_softmax's output in each row, falling, and their classes; of equal logits
// the lower class first. A NaN is larger than any number.
struct LinearTopkParams {
  LinearSoftmaxParams linear;  // without output
  void* values = nullptr;      // (rows, k)
  int64_t* indices = nullptr;  // (rows, k)
  int64_t k = 0;
};

}  // namespace ft

FT_DECLARE_KERNEL(linear_topk, LinearTopkParams)
