#pragma once
#include "params/row_norm.h"

namespace ft {

using AddLayerNormParams = RowNormParams;
using AddLayerNormBackwardParams = RowNormBackwardParams;

#if defined(FT_CUDA) || defined(FT_SIMT)
namespace cuda {
// Floats that add_layer_norm_backward needs in `workspace` for the weight gradients' first stage.
int64_t add_layer_norm_workspace(const AddLayerNormBackwardParams&);
}  // namespace cuda
#endif

}  // namespace ft

FT_DECLARE_KERNEL(add_layer_norm, AddLayerNormParams)
FT_DECLARE_KERNEL(add_layer_norm_backward, AddLayerNormBackwardParams)
