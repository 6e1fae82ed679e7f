// Attention backward's kernels of one element type; see backward.h.
#include "cuda/attention/backward_bias.h"

namespace ft::cuda {

template void backward_queries<f16>(const BackwardArgs&, bool, void*);
template void backward_keys<f16>(const BackwardArgs&, bool, void*);
template void backward_bias<f16>(const BackwardArgs&, void*);

}  // namespace ft::cuda
