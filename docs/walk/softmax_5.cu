// Step 5: the same in chunks of 16 bytes: a quarter of the load and store instructions, and of the
// addresses and comparisons around them. csrc/cuda/softmax.cu starts from here: it adds any
// alignment and length, masks, 16-bit types, several rows in a warp and several warps on a row.
#include "cuda/device/launch.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "cuda/device/warp.h"
#include "walk/softmax.h"

namespace ft::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kHeld = 8;               // chunks of a row in a lane
constexpr int kCount = kLanes<float>;  // floats in a chunk

FT_GLOBAL void chunks_in_registers(const WalkArgs a) {
  const int64_t step = int64_t{gridDim.x} * (kBlock / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kBlock / kWarp) + warp_index(); row < a.rows;
       row += step) {
    const float* in = a.in + row * a.columns;
    float* out = a.out + row * a.columns;
    const bool aligned = a.columns % kCount == 0;  // then each row begins on 16 bytes
    float x[kHeld][kCount], top = -infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = (i * kWarp + lane_index()) * kCount;
      unpack<float>(load_chunk(in, c, a.columns, aligned), x[i]);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (c + j >= a.columns) x[i][j] = -infinity();
        top = maximum(top, x[i][j]);
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      top = maximum(top, shuffle_xor(top, offset));
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[i][j] = exponential<float>(x[i][j] - top);
        sum += x[i][j];
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
    const float scale = 1.f / sum;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = (i * kWarp + lane_index()) * kCount;
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[i][j] *= scale;
      if (c < a.columns) store_chunk(out, c, a.columns, aligned, pack<float>(x[i]));
    }
  }
}

}  // namespace

void softmax_5(const WalkArgs& a, void* stream) {
  launch("softmax_5", chunks_in_registers, grid_for(a.rows, kBlock / kWarp), kBlock, 0, stream, a);
}

}  // namespace ft::cuda
