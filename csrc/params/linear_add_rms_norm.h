#pragma once
#include "params/linear_add_layer_norm.h"

FT_DECLARE_KERNEL(linear_add_rms_norm, LinearAddNormParams)
