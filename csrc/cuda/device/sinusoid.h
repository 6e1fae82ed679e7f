// The Transformer's fixed position table, by exact angles.
//   position[p, 2i] = sin(p · f), position[p, 2i+1] = cos(p · f), f = 10000^(−2i/C)
// An angle is an integer: 2^64 is one turn, so that p · f is one multiplication that drops whole
// turns, with an error of 2^−55 turns per position. In float32, p · f would be off by 0.06 at a
// position of a million.
#pragma once
#include "cuda/device/platform.h"
#include "params/embedding.h"

namespace ft::cuda {

struct SineCosine {
  float sine, cosine;
};

#if defined(FT_SIMT)
FT_DEVICE double power_of_two(double x) { return std::exp2(x); }
FT_DEVICE SineCosine sine_cosine_of_half_turns(float x) {
  const double angle = 3.141592653589793 * static_cast<double>(x);
  return {static_cast<float>(std::sin(angle)), static_cast<float>(std::cos(angle))};
}
#else
FT_DEVICE double power_of_two(double x) { return exp2(x); }
FT_DEVICE SineCosine sine_cosine_of_half_turns(float x) {
  SineCosine out;
  sincospif(x, &out.sine, &out.cosine);
  return out;
}
#endif

// f for the pair of columns that begins at `column`, an even number.
FT_DEVICE uint64_t turns_per_position(int64_t column, int64_t features) {
  const double exponent = static_cast<double>(column) / static_cast<double>(features);
  return static_cast<uint64_t>(power_of_two(-kLog2SinusoidBase * exponent) * kTurnsPerRadian);
}

// The quadrant is split off as an integer, so that what becomes a float is at most an eighth turn.
FT_DEVICE SineCosine sine_cosine(uint64_t turns) {
  constexpr uint64_t kQuarter = uint64_t{1} << 62;
  const uint64_t shifted = turns + kQuarter / 2;
  const int64_t rest =
      static_cast<int64_t>(shifted & (kQuarter - 1)) - static_cast<int64_t>(kQuarter / 2);
  const SineCosine x = sine_cosine_of_half_turns(static_cast<float>(rest) * 0x1p-63f);
  const int quadrant = static_cast<int>(shifted >> 62);
  const SineCosine turned = (quadrant & 1) != 0 ? SineCosine{x.cosine, -x.sine} : x;
  return (quadrant & 2) != 0 ? SineCosine{-turned.sine, -turned.cosine} : turned;
}

}  // namespace ft::cuda
