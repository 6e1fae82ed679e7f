// Residual addition and rms norm: see row_norm.h. The gradient is rms_norm's, with grad_summed.
#include "cuda/row_norm.h"
#include "params/add_rms_norm.h"
#include "params/rms_norm.h"

namespace ft::cuda {

void add_rms_norm(const RowNormParams& params, void* stream) {
  row_norm::forward<true, true>("add_rms_norm", params, stream);
}

void add_rms_norm_backward(const RowNormBackwardParams& params, void* stream) {
  rms_norm_backward(params, stream);
}

}  // namespace ft::cuda
