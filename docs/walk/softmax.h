// The five softmax kernels of docs/kernel_walk.md: out[r] = softmax(in[r]) for contiguous float
// rows.
#pragma once
#include <cstdint>

namespace ft::cuda {

struct WalkArgs {
  const float* in;
  float* out;
  int64_t rows;
  int columns;  // of step 4 and 5: at most 1024
};

void softmax_1(const WalkArgs&, void* stream);
void softmax_2(const WalkArgs&, void* stream);
void softmax_3(const WalkArgs&, void* stream);
void softmax_4(const WalkArgs&, void* stream);
void softmax_5(const WalkArgs&, void* stream);

}  // namespace ft::cuda
