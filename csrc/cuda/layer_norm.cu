// layer norm and its gradient: see row_norm.h and row_norm_backward.h.
#include "cuda/row_norm.h"
#include "cuda/row_norm_backward.h"
#include "params/layer_norm.h"

namespace ft::cuda {

void layer_norm(const RowNormParams& params, void* stream) {
  row_norm::forward<false, false>("layer_norm", params, stream);
}

void layer_norm_backward(const RowNormBackwardParams& params, void* stream) {
  row_norm::backward<false>("layer_norm_backward", params, stream);
}

int64_t row_norm_workspace(const RowNormBackwardParams& params) {
  return row_norm::backward_workspace(params);
}

}  // namespace ft::cuda
