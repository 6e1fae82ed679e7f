#pragma once
#include "params/row_norm.h"

FT_DECLARE_KERNEL(add_layer_norm, RowNormParams)
FT_DECLARE_KERNEL(add_layer_norm_backward, RowNormBackwardParams)
