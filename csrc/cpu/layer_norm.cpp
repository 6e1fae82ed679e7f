// layer_norm over the last dimension: normed = (x − mean) · rstd · weight + bias. See row_norm.h.
#include "params/layer_norm.h"

#include "cpu/row_norm.h"

namespace ft::FT_ISA {

void layer_norm(const RowNormParams& p) { norm_forward<true, Add::none>(p); }

void layer_norm_backward(const RowNormBackwardParams& p) { norm_backward<true>(p); }

}  // namespace ft::FT_ISA
