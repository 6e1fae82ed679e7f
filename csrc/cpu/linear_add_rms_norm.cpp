// linear_add_rms_norm: output projection, residual and RMS norm in one call. See linear_norm.h.
#include "params/linear_add_rms_norm.h"

#include "cpu/linear_norm.h"

namespace ft::FT_ISA {

void linear_add_rms_norm(const LinearAddNormParams& p) { linear_norm<false>(p); }

}  // namespace ft::FT_ISA
