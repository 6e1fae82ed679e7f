// Scalar functions whose device form is an intrinsic.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

constexpr float kLog2E = 1.4426950408889634f;

#if defined(FT_SIMT)
FT_DEVICE float infinity() { return INFINITY; }
FT_DEVICE float not_a_number() { return NAN; }
template <class T>
FT_DEVICE float exponential(float x) {
  return std::exp(x);
}
template <class T>
FT_DEVICE float power_of_2(float x) {
  return std::exp2(x);
}
template <class T>
FT_DEVICE float hyperbolic_tangent(float x) {
  return std::tanh(x);
}
FT_DEVICE float natural_log(float x) { return std::log(x); }
FT_DEVICE float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }
FT_DEVICE float error_function(float x) { return std::erf(x); }
FT_DEVICE float hyperbolic_tangent(float x) { return std::tanh(x); }
FT_DEVICE float maximum(float a, float b) { return std::fmax(a, b); }  // the number, if one is NaN
FT_DEVICE float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}  // rounds once
#else
FT_DEVICE float infinity() { return __int_as_float(0x7f800000); }
FT_DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }

// For a 16-bit result one ex2.approx (2 ulp of float, results under 2^-126 are 0); for float the
// library's 1-ulp expf, whose five extra instructions hide behind memory.
template <class T>
FT_DEVICE float exponential(float x) {
  if constexpr (sizeof(T) == 2) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * kLog2E));
    return out;
  } else {
    return expf(x);
  }
}
// 2^x: one ex2.approx for a 16-bit result.
template <class T>
FT_DEVICE float power_of_2(float x) {
  if constexpr (sizeof(T) == 2) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
  } else {
    return exp2f(x);
  }
}
// For a 16-bit result by one exponential, to 2e-7 (tanh.approx has 5e-4 only).
template <class T>
FT_DEVICE float hyperbolic_tangent(float x) {
  if constexpr (sizeof(T) == 2) {
    return 1.f - __fdividef(2.f, power_of_2<T>(x * (2.f * kLog2E)) + 1.f);
  } else {
    return tanhf(x);
  }
}
FT_DEVICE float natural_log(float x) { return logf(x); }
FT_DEVICE float reciprocal_sqrt(float x) { return 1.f / sqrtf(x); }
FT_DEVICE float error_function(float x) { return erff(x); }
FT_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FT_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FT_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
#endif

// exp((from − to) · size): what a sum relative to `from` is multiplied by to be relative to `to`.
// It is 0, or NaN, if `from` is −inf.
FT_DEVICE float rescale(float from, float to, float size) {
  return from == -infinity() ? 0.f : exponential<float>((from - to) * size);
}

}  // namespace ft::cuda
