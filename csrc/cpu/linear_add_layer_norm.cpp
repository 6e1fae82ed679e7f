// linear_add_layer_norm: output projection, residual and layer norm in one call. See linear_norm.h.
#include "params/linear_add_layer_norm.h"

#include "cpu/linear_norm.h"

namespace ft::FT_ISA {

void linear_add_layer_norm(const LinearAddNormParams& p) { linear_norm<true>(p); }

}  // namespace ft::FT_ISA
