// Attention backward's kernels of one element type; see backward.h.
#include "cuda/attention/backward_bias.h"

namespace ft::cuda {

template void backward_queries<bf16>(const BackwardArgs&, bool, void*);
template void backward_keys<bf16>(const BackwardArgs&, bool, void*);
template void backward_bias<bf16>(const BackwardArgs&, void*);

}  // namespace ft::cuda
