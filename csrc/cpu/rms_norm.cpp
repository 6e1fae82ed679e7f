// rms_norm over the last dimension: normed = x · rstd · weight, rstd = 1 / √(mean(x²) + eps). See
// row_norm.h.
#include "params/rms_norm.h"

#include "cpu/row_norm.h"

namespace ft::FT_ISA {

void rms_norm(const RowNormParams& p) { norm_forward<false, Add::none>(p); }

void rms_norm_backward(const RowNormBackwardParams& p) { norm_backward<false>(p); }

}  // namespace ft::FT_ISA
