// Ids of either width, which the front has checked.
#pragma once
#include <cstdint>

#include "params/common.h"

namespace ft::FT_ISA {

inline int64_t id_at(const IdsArg& ids, int64_t i) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[i]
                  : int64_t{static_cast<const int32_t*>(ids.data)[i]};
}

}  // namespace ft::FT_ISA
