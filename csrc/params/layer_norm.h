#pragma once
#include "params/row_norm.h"

FT_DECLARE_KERNEL(layer_norm, RowNormParams)
FT_DECLARE_KERNEL(layer_norm_backward, RowNormBackwardParams)
