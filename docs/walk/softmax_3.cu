// Step 3: maximum and sum in one pass (Milakov and Gimelshein, 2018): a sum relative to the maximum
// so far is rescaled when the maximum grows. The row is read twice, not three times. A warp owns a
// row, and lanes meet by shuffles: no barrier and no shared memory.
#include "cuda/device/launch.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "cuda/device/warp.h"
#include "walk/softmax.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 128;  // four rows

FT_DEVICE float rescaled(float sum, float from, float to) {
  return from == to ? sum : sum * exponential<float>(from - to);  // −inf − (−inf) is no number
}

FT_GLOBAL void warp_per_row(const WalkArgs a) {
  const int64_t step = int64_t{gridDim.x} * (kBlock / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kBlock / kWarp) + warp_index(); row < a.rows;
       row += step) {
    const float* in = a.in + row * a.columns;
    float* out = a.out + row * a.columns;
    float top = -infinity(), sum = 0.f;
    for (int c = lane_index(); c < a.columns; c += kWarp) {
      const float x = load_scalar(in + c);
      const float higher = maximum(top, x);
      sum = rescaled(sum, top, higher) + exponential<float>(x - higher);
      top = higher;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float other_top = shuffle_xor(top, offset), other_sum = shuffle_xor(sum, offset);
      const float higher = maximum(top, other_top);
      sum = rescaled(sum, top, higher) + rescaled(other_sum, other_top, higher);
      top = higher;
    }
    for (int c = lane_index(); c < a.columns; c += kWarp) {
      store_scalar(out + c, exponential<float>(load_scalar(in + c) - top) / sum);
    }
  }
}

}  // namespace

void softmax_3(const WalkArgs& a, void* stream) {
  launch("softmax_3", warp_per_row, grid_for(a.rows, kBlock / kWarp), kBlock, 0, stream, a);
}

}  // namespace ft::cuda
