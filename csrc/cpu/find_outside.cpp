// The first id out of range, if any: a block of ids is looked at as a whole, and only one that
// holds a bad id is gone through. On one thread: 8,192 ids take 2 µs, less than waking another one.
#include "params/find_outside.h"

#include <cstdint>

namespace ft::FT_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // ids

template <class Id>
int64_t first_outside(const Id* ids, const FindOutsideParams& p) {
  const uint64_t size = static_cast<uint64_t>(p.size);
  const auto outside = [&](Id id) {
    const int64_t wide = id;
    return static_cast<uint64_t>(wide) >= size && wide != p.ignore;
  };
  for (int64_t first = 0; first < p.count; first += kBlock) {
    const int64_t end = p.count - first < kBlock ? p.count : first + kBlock;
    int64_t found = 0;
    for (int64_t i = first; i < end; ++i) found |= outside(ids[i]);
    if (found == 0) continue;
    for (int64_t i = first; i < end; ++i) {
      if (outside(ids[i])) return i;
    }
  }
  return -1;
}

}  // namespace

void find_outside(const FindOutsideParams& p) {
  *p.found = p.ids.wide ? first_outside(static_cast<const int64_t*>(p.ids.data), p)
                        : first_outside(static_cast<const int32_t*>(p.ids.data), p);
}

}  // namespace ft::FT_ISA
