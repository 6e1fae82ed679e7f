// add_rms_norm: summed = residual + dropout(input), normed = rms_norm(summed), in one pass over
// memory: two rows in, two rows out. See row_norm.h.
#include "params/add_rms_norm.h"

#include "cpu/row_norm.h"

namespace ft::FT_ISA {

void add_rms_norm(const RowNormParams& p) { add_norm_forward<false>(p); }

void add_rms_norm_backward(const RowNormBackwardParams& p) { norm_backward<false>(p); }

}  // namespace ft::FT_ISA
