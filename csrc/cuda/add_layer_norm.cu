// Residual addition and layer norm: see row_norm.h. The gradient is layer_norm's, with grad_summed.
#include "cuda/row_norm.h"
#include "params/add_layer_norm.h"
#include "params/layer_norm.h"

namespace ft::cuda {

void add_layer_norm(const RowNormParams& params, void* stream) {
  row_norm::forward<false, true>("add_layer_norm", params, stream);
}

void add_layer_norm_backward(const RowNormBackwardParams& params, void* stream) {
  layer_norm_backward(params, stream);
}

}  // namespace ft::cuda
