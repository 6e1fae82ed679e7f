// Reductions over a group of threads: 2, 4, … 32 lanes of a warp, or the whole block.
#pragma once
#include "cuda/device/shared.h"
#include "cuda/device/warp.h"

namespace ft::cuda {

struct Pair {
  float a, b;
};
FT_DEVICE Pair shuffle_xor(const Pair& v, int offset) {
  return {shuffle_xor(v.a, offset), shuffle_xor(v.b, offset)};
}

// Count, mean and sum of squared distances from it; merged as Chan, Golub and LeVeque do (1979).
struct Moments {
  float count, mean, m2;
};
FT_DEVICE Moments shuffle_xor(const Moments& v, int offset) {
  return {shuffle_xor(v.count, offset), shuffle_xor(v.mean, offset), shuffle_xor(v.m2, offset)};
}
// Symmetric in x and y, so that all lanes of a butterfly end with the same bits.
FT_DEVICE Moments merge(const Moments& x, const Moments& y) {
  const float count = x.count + y.count;
  if (count == 0.f) return x;
  const float apart = y.mean - x.mean;
  return {count, apart == 0.f ? x.mean : (x.count * x.mean + y.count * y.mean) / count,
          x.m2 + y.m2 + apart * apart * (x.count * y.count / count)};
}

// op over the values of the thread's group, in every thread of it with the same bits (op commutes).
// Groups of up to 32 lie in a warp; a larger group is the whole block. All threads of the block
// take part. `scratch` has kWarp entries.
template <class V, class Op>
FT_DEVICE V group_reduce(V value, int group, V identity, V* scratch, const Op& op) {
  const int within = group < kWarp ? group : kWarp;
  for (int offset = within / 2; offset > 0; offset /= 2) {
    value = op(value, shuffle_xor(value, offset));
  }
  if (group <= kWarp) return value;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  block_barrier();  // the scratch of the reduction before may still be in use
  if (lane == 0) shared_store(scratch + warp, value);
  block_barrier();
  const int warps = group / kWarp;
  value = lane < warps ? shared_load(scratch + lane) : identity;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, shuffle_xor(value, offset));
  }
  return value;
}

FT_DEVICE float group_sum(float value, int group, float* scratch) {
  return group_reduce(value, group, 0.f, scratch, [](float x, float y) { return x + y; });
}
FT_DEVICE Pair group_sum(const Pair& value, int group, Pair* scratch) {
  return group_reduce(value, group, Pair{0.f, 0.f}, scratch,
                      [](const Pair& x, const Pair& y) { return Pair{x.a + y.a, x.b + y.b}; });
}

}  // namespace ft::cuda
