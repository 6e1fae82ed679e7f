// Rows far from 1: the squares of a row of 1e20 are no floats. The norms then take its statistics
// again of the row times a power of 2.
#pragma once
#include "cuda/device/scalar.h"

namespace ft::cuda {

// A variance + eps outside these numbers comes of squares that overflow, or lose their digits.
constexpr float kLeastVariance = 1e-30f, kMostVariance = 3.4e38f;
constexpr float kUpscale = 3.7778931862957162e22f, kDownscale = 2.6469779601696886e-23f;

FT_DEVICE bool is_ordinary(float variance) {  // NaN is not
  return variance >= kLeastVariance && variance <= kMostVariance;
}
FT_DEVICE float scale_for(float variance) {
  if (is_ordinary(variance)) return 1.f;
  return variance < kLeastVariance ? kUpscale : kDownscale;
}
// From the variance of a row times `scale`, next to which eps may have vanished.
FT_DEVICE float scaled_rstd(float variance, float eps, float scale) {
  if (variance == 0.f) return reciprocal_sqrt(eps);
  return reciprocal_sqrt(variance + eps * scale * scale) * scale;
}

}  // namespace ft::cuda
