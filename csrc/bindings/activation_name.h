// Activations by their names in operators.
#pragma once
#include <stdexcept>
#include <string>

#include "params/linear_add.h"

namespace ft::bindings {

inline Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  throw std::invalid_argument("fasttransformer: unknown activation " + name);
}

}  // namespace ft::bindings
