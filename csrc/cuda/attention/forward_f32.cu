#include "cuda/attention/forward.h"

namespace ft::cuda {

void attention_forward_f32(const ForwardArgs& a, Variant variant, int head, void* stream) {
  launch_head<float>(a, variant, head, stream);
}

}  // namespace ft::cuda
