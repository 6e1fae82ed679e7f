#include "simt/runtime.h"

namespace ft::simt {

uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 6.103515625e-05f) {  // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.f)));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) / 16777216.f;
    return sign ? -size : size;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace ft::simt
