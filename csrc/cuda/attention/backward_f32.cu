// Attention backward's kernels of one element type; see backward.h.
#include "cuda/attention/backward_bias.h"

namespace ft::cuda {

template void backward_queries<float>(const BackwardArgs&, bool, void*);
template void backward_keys<float>(const BackwardArgs&, bool, void*);
template void backward_bias<float>(const BackwardArgs&, void*);

}  // namespace ft::cuda
