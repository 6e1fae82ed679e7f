// The activations of linear layers, and their derivatives. In float32; which one is a run-time
// value, as next to a row of memory or a product they cost little.
#pragma once
#include "cuda/device/scalar.h"
#include "params/linear_add.h"

namespace ft::cuda {

constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kSqrtTwoOverPi = 0.7978845608028654f;
constexpr float kInverseSqrtTwoPi = 0.3989422804014327f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kFlatSquare = 400.f;  // of x, where gelu_tanh is 0 or x long since

template <Activation kValue>
struct ActivationIs {
  static constexpr Activation value = kValue;
};

FT_DEVICE float sigmoid(float x) { return 1.f / (1.f + exponential<float>(-x)); }

FT_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x < 0.f ? 0.f : x;  // NaN stays
    case Activation::gelu: return 0.5f * x * (1.f + error_function(x * kSqrtHalf));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.f + hyperbolic_tangent(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x)));
    case Activation::silu: return x / (1.f + exponential<float>(-x));
    default: return x;
  }
}

// Of several numbers: one branch for all of them.
template <int kCount>
FT_DEVICE void activate(Activation activation, float (&x)[kCount]) {
  const auto each = [&](auto which) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = activate(decltype(which)::value, x[i]);
  };
  switch (activation) {
    case Activation::relu: return each(ActivationIs<Activation::relu>{});
    case Activation::gelu: return each(ActivationIs<Activation::gelu>{});
    case Activation::gelu_tanh: return each(ActivationIs<Activation::gelu_tanh>{});
    case Activation::silu: return each(ActivationIs<Activation::silu>{});
    default: return;
  }
}

FT_DEVICE float activation_derivative(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x <= 0.f ? 0.f : x == x ? 1.f : x;
    case Activation::gelu:
      return 0.5f * (1.f + error_function(x * kSqrtHalf)) +
             x * kInverseSqrtTwoPi * exponential<float>(-0.5f * x * x);
    case Activation::gelu_tanh: {  // of x · sigmoid(z), z = 2√(2/π)(x + 0.044715x³)
      // Of sigmoid(z) and 1 − sigmoid(z) the smaller one comes from the exponential: a difference
      // from 1 would lose it, and the slope multiplies it by up to x³.
      const float z = 2.f * kSqrtTwoOverPi * (x + kGeluCubic * x * x * x);
      const float e = exponential<float>(z < 0.f ? z : -z);
      const float larger = 1.f / (1.f + e), smaller = e * larger;
      const float bounded = kFlatSquare < x * x ? kFlatSquare : x * x;
      const float inner = 2.f * kSqrtTwoOverPi * (1.f + 3.f * kGeluCubic * bounded);
      return (z < 0.f ? smaller : larger) + x * (larger * smaller) * inner;
    }
    case Activation::silu: {
      const float s = sigmoid(x);
      return s * (1.f + x * (1.f - s));
    }
    default: return 1.f;
  }
}

}  // namespace ft::cuda
