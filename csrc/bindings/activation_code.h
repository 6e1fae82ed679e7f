// Activations by their codes in operators (fasttransformer/ops/_activation.py, CODES): those of the
// enumeration, then the gates. A string would be no argument: torch's stable ABI never frees it.
#pragma once
#include <stdexcept>
#include <string>

#include "params/linear_add.h"

namespace ft::bindings {

constexpr int64_t kSwiglu = 5, kGeglu = 6;

inline Activation activation_of(int64_t code) {
  if (code < 0 || code > static_cast<int64_t>(Activation::silu)) {
    throw std::invalid_argument("fasttransformer: no activation has the code " +
                                std::to_string(code));
  }
  return static_cast<Activation>(code);
}

}  // namespace ft::bindings
