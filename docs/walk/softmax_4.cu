// Step 4: the row stays in registers between its passes, so that memory is read once and written
// once: less is impossible. The loop over the row is unrolled (registers have no index), hence the
// limit of 32 · 32 columns; all of its loads are under way before the first is used.
#include "cuda/device/launch.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "cuda/device/warp.h"
#include "walk/softmax.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kHeld = 32;  // floats of a row in a lane

FT_GLOBAL void row_in_registers(const WalkArgs a) {
  const int64_t step = int64_t{gridDim.x} * (kBlock / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kBlock / kWarp) + warp_index(); row < a.rows;
       row += step) {
    const float* in = a.in + row * a.columns;
    float* out = a.out + row * a.columns;
    float x[kHeld], top = -infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = i * kWarp + lane_index();
      x[i] = c < a.columns ? load_scalar(in + c) : -infinity();
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) top = maximum(top, x[i]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      top = maximum(top, shuffle_xor(top, offset));
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      x[i] = exponential<float>(x[i] - top);
      sum += x[i];
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
    const float scale = 1.f / sum;  // one division for the row
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = i * kWarp + lane_index();
      if (c < a.columns) store_scalar(out + c, x[i] * scale);
    }
  }
}

}  // namespace

void softmax_4(const WalkArgs& a, void* stream) {
  launch("softmax_4", row_in_registers, grid_for(a.rows, kBlock / kWarp), kBlock, 0, stream, a);
}

}  // namespace ft::cuda
