#pragma once
#include "params/linear_add.h"
#include "params/row_norm.h"

namespace ft {

// summed = dropout(input · weightᵀ + bias) + residual (linear.output), and the norm of its rows:
// norm.input is `summed` again. linear_add_rms_norm takes the same params.
struct LinearAddNormParams {
  LinearAddParams linear;
  RowNormParams norm;
};

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace cuda {
// Floats that linear_add_layer_norm and linear_add_rms_norm need in linear.workspace.
int64_t linear_add_norm_workspace(const LinearAddNormParams&);
}  // namespace cuda
#endif

}  // namespace ft

FT_DECLARE_KERNEL(linear_add_layer_norm, LinearAddNormParams)
