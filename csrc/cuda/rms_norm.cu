// rms norm and its gradient: see row_norm.h and row_norm_backward.h.
#include "cuda/row_norm.h"
#include "cuda/row_norm_backward.h"
#include "params/rms_norm.h"

namespace ft::cuda {

void rms_norm(const RowNormParams& params, void* stream) {
  row_norm::forward<true, false>("rms_norm", params, stream);
}

void rms_norm_backward(const RowNormBackwardParams& params, void* stream) {
  row_norm::backward<true>("rms_norm_backward", params, stream);
}

}  // namespace ft::cuda
