// How rows are spread over threads: what the host sides of the kernels that work on rows share.
#pragma once
#include "cuda/device/launch.h"
#include "cuda/device/vector.h"

namespace ft::cuda {

// Rows of up to `chunks` chunks of 16 bytes go to `group` threads, each with `held` of them.
struct Plan {
  int64_t chunks;
  int held, group;
};

// The table's first plan that is wide enough; held 0 where there is none.
template <size_t kPlans>
Plan choose(const Plan (&table)[kPlans], int64_t chunks) {
  for (const Plan& plan : table) {
    if (chunks <= plan.chunks) return plan;
  }
  return {chunks, 0, 0};
}

// Chunks of the longest row of a contiguous array: one more where rows do not begin on a chunk's
// boundary.
inline int64_t row_chunks(int64_t features, int lanes) {
  return (features + lanes - 1) / lanes + (features % lanes != 0 ? 1 : 0);
}

// Chunks of each of `arrays` that a block's dynamic shared memory holds, `chunks` at most.
template <class Args>
int64_t cached_chunks(const char* name, void (*kernel)(Args), int64_t chunks, int arrays) {
  const int64_t fits =
      dynamic_shared_room(name, kernel) / (arrays * static_cast<int64_t>(sizeof(Chunk)));
  return chunks < fits ? chunks : fits;
}

// A group is a part of a warp, or the whole block (see group_reduce).
constexpr int kSmallBlock = 128;
inline int block_of(int group) { return group <= kWarp ? kSmallBlock : group; }

}  // namespace ft::cuda
