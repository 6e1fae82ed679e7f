// add_layer_norm: summed = residual + dropout(input), normed = layer_norm(summed), in one pass over
// memory: two rows in, two rows out. See row_norm.h.
#include "params/add_layer_norm.h"

#include "cpu/row_norm.h"

namespace ft::FT_ISA {

void add_layer_norm(const RowNormParams& p) { add_norm_forward<true>(p); }

void add_layer_norm_backward(const RowNormBackwardParams& p) { norm_backward<true>(p); }

}  // namespace ft::FT_ISA
