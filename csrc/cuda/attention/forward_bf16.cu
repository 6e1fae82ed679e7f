#include "cuda/attention/forward.h"

namespace ft::cuda {

void attention_forward_bf16(const ForwardArgs& a, Variant variant, int head, void* stream) {
  launch_head<bf16>(a, variant, head, stream);
}

}  // namespace ft::cuda
