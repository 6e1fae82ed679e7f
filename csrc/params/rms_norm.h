#pragma once
#include "params/row_norm.h"

FT_DECLARE_KERNEL(rms_norm, RowNormParams)
FT_DECLARE_KERNEL(rms_norm_backward, RowNormBackwardParams)
