// What the norms' bindings share: the parts of the params structs that all of them fill alike.
#pragma once
#include "bindings/device.h"
#include "params/row_norm.h"

namespace ft {

inline RowNormParams row_norm_params(const Tensor& input, const OptionalTensor& weight,
                                     double eps) {
  RowNormParams p;
  p.input = data(input);
  p.weight = vector_arg(weight);
  p.dtype = dtype_of(input);
  p.eps = static_cast<float>(eps);
  p.rows = rows_of(input);
  p.features = features_of(input);
  p.input_stride = row_stride(input);
  return p;
}

inline RowNormBackwardParams row_norm_backward_params(const Tensor& grad_normed,
                                                      const Tensor& summed,
                                                      const OptionalTensor& weight) {
  RowNormBackwardParams p;
  p.grad_normed = data(grad_normed);
  p.summed = data(summed);
  p.weight = vector_arg(weight);
  p.dtype = dtype_of(summed);
  p.rows = rows_of(summed);
  p.features = features_of(summed);
  p.grad_normed_stride = row_stride(grad_normed);
  p.summed_stride = row_stride(summed);
  if (weight) p.weight_dtype = dtype_of(*weight);
  p.bias_dtype = p.weight_dtype;
  return p;
}

// A d_weight or d_bias: weight's dtype, or float32 if `wide` or without a weight; shape (0,) and a
// null pointer in the params where it is not wanted.
inline Tensor vector_grad(const Tensor& like, const OptionalTensor& weight, bool wanted,
                          void** pointer, bool wide = false) {
  const ScalarType dtype = weight && !wide ? weight->scalar_type() : ScalarType::Float;
  Tensor out = make_if(wanted, like, {features_of(like)}, dtype);
  *pointer = wanted ? out.mutable_data_ptr() : nullptr;
  return out;
}

// The bias's; `wide` where its dtype is another than the weight's, so that it is not rounded twice.
inline Tensor bias_grad_of(RowNormBackwardParams& p, const Tensor& like,
                           const OptionalTensor& weight, bool wanted, bool wide) {
  if (wide) p.bias_dtype = DType::f32;
  return vector_grad(like, weight, wanted, &p.d_bias, wide);
}

// The weight gradients' scratch memory on CUDA, for as long as the tensor lives.
inline OptionalTensor workspace_for([[maybe_unused]] RowNormBackwardParams& p,
                                    [[maybe_unused]] const Tensor& like) {
#if defined(FT_CUDA) || defined(FT_SIMT)
  const int64_t floats = cuda::row_norm_workspace(p);
  if (floats == 0) return std::nullopt;
  Tensor workspace = make(like, {floats}, ScalarType::Float);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  return workspace;
#else
  return std::nullopt;
#endif
}

}  // namespace ft
