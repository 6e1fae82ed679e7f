// Arithmetic of indices, and ids of either integer width.
#pragma once
#include "cuda/device/vector.h"

namespace ft::cuda {

// Leaves the quotient in `value`, returns the remainder. 64-bit division costs some 70 instructions
// more than 32-bit.
FT_DEVICE int64_t divide(int64_t& value, int64_t by) {
  int64_t rest;
  if (((value | by) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(value) / static_cast<uint32_t>(by);
    rest = value - static_cast<int64_t>(quotient) * by;
    value = quotient;
  } else {
    rest = value % by;
    value /= by;
  }
  return rest;
}

FT_DEVICE int64_t load_id(const IdsArg& ids, int64_t at) {
  return ids.wide ? load_scalar(static_cast<const int64_t*>(ids.data) + at)
                  : load_scalar(static_cast<const int32_t*>(ids.data) + at);
}

}  // namespace ft::cuda
