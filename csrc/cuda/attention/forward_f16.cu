#include "cuda/attention/forward.h"

namespace ft::cuda {

void attention_forward_f16(const ForwardArgs& a, Variant variant, int head, void* stream) {
  launch_head<f16>(a, variant, head, stream);
}

}  // namespace ft::cuda
