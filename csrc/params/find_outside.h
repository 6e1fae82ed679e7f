#pragma once
#include "params/common.h"

namespace ft {

// *found = the place of the first id that is neither in [0, size) nor `ignore`, or −1.
struct FindOutsideParams {
  IdsArg ids;
  int64_t count = 0, size = 0, ignore = 0;  // an `ignore` inside is none
  int64_t* found = nullptr;
};

}  // namespace ft

FT_DECLARE_KERNEL(find_outside, FindOutsideParams)
