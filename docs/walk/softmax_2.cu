// Step 2: a block owns a row, so that neighbours read neighbours: a load of a warp touches 4
// sectors and uses them whole. The threads' maxima and sums meet in shared memory, in a tree with a
// barrier at each level.
#include "cuda/device/launch.h"
#include "cuda/device/scalar.h"
#include "cuda/device/shared.h"
#include "cuda/device/vector.h"
#include "cuda/device/warp.h"
#include "walk/softmax.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 128;

template <class Op>
FT_DEVICE float tree(float value, float* scratch, const Op& op) {
  const int thread = thread_index();
  block_barrier();  // the tree before may still be read
  shared_store(scratch + thread, value);
  for (int half = kBlock / 2; half > 0; half /= 2) {
    block_barrier();
    if (thread < half) {
      const float other = shared_load(scratch + thread + half);
      shared_store(scratch + thread, op(shared_load(scratch + thread), other));
    }
  }
  block_barrier();
  return shared_load(scratch);
}

FT_GLOBAL void block_per_row(const WalkArgs a) {
  FT_SHARED_ARRAY(float, scratch, kBlock);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const float* in = a.in + row * a.columns;
    float* out = a.out + row * a.columns;
    float top = -infinity();
    for (int c = thread_index(); c < a.columns; c += kBlock) {
      top = maximum(top, load_scalar(in + c));
    }
    top = tree(top, scratch, [](float x, float y) { return maximum(x, y); });
    float sum = 0.f;
    for (int c = thread_index(); c < a.columns; c += kBlock) {
      sum += exponential<float>(load_scalar(in + c) - top);
    }
    sum = tree(sum, scratch, [](float x, float y) { return x + y; });
    for (int c = thread_index(); c < a.columns; c += kBlock) {
      store_scalar(out + c, exponential<float>(load_scalar(in + c) - top) / sum);
    }
  }
}

}  // namespace

void softmax_2(const WalkArgs& a, void* stream) {
  launch("softmax_2", block_per_row, grid_for(a.rows, 1), kBlock, 0, stream, a);
}

}  // namespace ft::cuda
