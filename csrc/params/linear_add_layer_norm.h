#pragma once
#include "params/linear_add.h"
#include "params/row_norm.h"

namespace ft {

// summed = input · weightᵀ + bias + residual (linear.output), and the norm of its rows:
// norm.input is `summed` again. linear_add_rms_norm takes the same params.
struct LinearAddNormParams {
  LinearAddParams linear;
  RowNormParams norm;
};

}  // namespace ft

FT_DECLARE_KERNEL(linear_add_layer_norm, LinearAddNormParams)
