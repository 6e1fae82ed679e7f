// linear_add_rms_norm: summed = input · weightᵀ + bias + residual, and the norm of its rows.
// Rows that fit one block's tile are normed there, where that is faster; else the product leaves
// each row's moments by strips and linear_norm_rows follows (linear_add/linear_add_plan.cu).
#include "cuda/linear_add/matmul.h"
#include "params/linear_add_rms_norm.h"

namespace ft::cuda {

void linear_add_rms_norm(const LinearAddNormParams& p, void* stream) {
  linear_add_norm("linear_add_rms_norm", p, stream);
}

}  // namespace ft::cuda
