// The Transformer's fixed position table, by exact angles.
//   position[p, 2i] = sin(p · f), position[p, 2i+1] = cos(p · f), f = 10000^(−2i/C)
// An angle is an integer: 2^64 is one turn, so that p · f is one multiplication that drops whole
// turns, with an error of 2^−55 turns per position. In float32, p · f would be off by 0.06 at a
// position of a million. The upper 32 bits are enough to take the sine of.
#pragma once
#include <cmath>

#include "cpu/columns.h"
#include "params/embedding.h"

namespace ft::FT_ISA {

constexpr int64_t kAnchors = 16;  // pairs of columns per power that is taken of 10000

// f of each pair of columns, in turns of 2^64 per position; `out` has room for ⌈features / 2⌉.
// Every kAnchors-th is exact, those between are products, which are off by 2^−52 of themselves.
inline void turns_per_position(int64_t features, uint64_t* out) {
  const auto power = [&](int64_t pair) {
    return __builtin_exp2(-kLog2SinusoidBase * static_cast<double>(2 * pair) /
                          static_cast<double>(features));
  };
  const int64_t pairs = (features + 1) / 2;
  double step[kAnchors];
  for (int64_t i = 0; i < kAnchors; ++i) step[i] = power(i);
  for (int64_t first = 0; first < pairs; first += kAnchors) {
    const double anchor = power(first) * kTurnsPerRadian;
    const int64_t count = pairs - first < kAnchors ? pairs - first : kAnchors;
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<uint64_t>(anchor * step[i]);
  }
}

// Sines and cosines of angles of which 2^32 are a turn. The quadrant is split off as an integer;
// of the eighth turn that is left our own fits are off by 3e-9 and 5e-11.
FT_INLINE vf2 sine_cosine(vi turns) {
  const vu shifted = (vu)turns + 0x20000000u;
  const vi rest = (vi)(shifted & 0x3fffffffu) - 0x20000000;
  const vf x = __builtin_convertvector(rest, vf) * splat(0x1p-30f);  // in quarter turns
  const vf square = x * x;
  vf s = splat(-0.00460165786f);
  s = fma(s, square, splat(0.079680033f));
  s = fma(s, square, splat(-0.64596349f));
  s = fma(s, square, splat(1.57079637f)) * x;
  vf c = splat(0.000904021668f);
  c = fma(c, square, splat(-0.0208602883f));
  c = fma(c, square, splat(0.253669232f));
  c = fma(c, square, splat(-1.23370051f));
  c = fma(c, square, splat(1.f));
  const vi swapped = (vi)(shifted << 1) >> 31;
  const vu sine = (vu)select(swapped, c, s) ^ (shifted & 0x80000000u);
  const vu cosine = (vu)select(swapped, s, c) ^ ((shifted ^ (shifted << 1)) & 0x80000000u);
  return {(vf)sine, (vf)cosine};
}

// Row `position` of the table. `out` and `angles` have room for `features` and, beyond, 2W numbers.
inline void sinusoid_row(int64_t position, const uint64_t* turns, int64_t features, int32_t* angles,
                         float* out) {
  const int64_t pairs = (features + 1) / 2;
  const uint64_t p = static_cast<uint64_t>(position);
  for (int64_t i = 0; i < pairs; ++i) angles[i] = static_cast<int32_t>((p * turns[i]) >> 32);
  for (int64_t i = 0; i < pairs; i += W) {
    vi angle;
    std::memcpy(&angle, angles + i, sizeof(angle));
    store_in_order(out + 2 * i, sine_cosine(angle), Pair{});
  }
}

}  // namespace ft::FT_ISA
