// Step 1: a thread owns a row and walks over it three times. Right, and slow: the lanes of a warp
// read 32 different rows at once, so that each load touches 32 sectors to use 4 bytes of each.
#include "cuda/device/launch.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "walk/softmax.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 64;

FT_GLOBAL void thread_per_row(const WalkArgs a) {
  const int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (row >= a.rows) return;
  const float* in = a.in + row * a.columns;
  float* out = a.out + row * a.columns;
  float top = -infinity();
  for (int c = 0; c < a.columns; ++c) top = maximum(top, load_scalar(in + c));
  float sum = 0.f;
  for (int c = 0; c < a.columns; ++c) sum += exponential<float>(load_scalar(in + c) - top);
  for (int c = 0; c < a.columns; ++c) {
    store_scalar(out + c, exponential<float>(load_scalar(in + c) - top) / sum);
  }
}

}  // namespace

void softmax_1(const WalkArgs& a, void* stream) {
  launch("softmax_1", thread_per_row, grid_for(a.rows, kBlock), kBlock, 0, stream, a);
}

}  // namespace ft::cuda
