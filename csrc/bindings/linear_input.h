// The linear operators' common arguments as params: rows, or attention's (B, H, S, E) read in
// place.
#pragma once
#include "bindings/device.h"
#include "params/linear_add_layer_norm.h"

namespace ft::bindings {

inline LinearAddParams linear_input(const Tensor& input, const Tensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual) {
  LinearAddParams p;
  p.input = data(input);
  p.weight = data(weight);
  p.bias = vector_arg(bias);
  p.dtype = dtype_of(input);
  p.out_features = weight.size(0);
  p.in_features = weight.size(1);
  if (input.dim() != 4) {
    p.rows = rows_of(input);
    p.row_stride = row_stride(input);
  } else {
    p.rows = input.size(0) * input.size(2);
    p.inner_rows = input.size(2) > 0 ? input.size(2) : 1;
    p.outer_stride = input.stride(0);
    p.row_stride = input.stride(2);
    p.heads = input.size(1);
    p.head_dim = input.size(3);
    p.head_stride = input.stride(1);
  }
  if (residual) {
    p.residual = data(residual);
    p.residual_stride = row_stride(*residual);
  }
  return p;
}

// (rows, out_features), or (batch, sequence, out_features) of three dimensions and of heads.
inline Tensor make_output(const Tensor& input, int64_t out_features) {
  const int64_t outer = input.size(0), inner = input.size(input.dim() - 2);
  if (input.dim() == 2) return make(input, {outer, out_features});
  return make(input, {outer, inner, out_features});
}

// What linear_add_layer_norm and linear_add_rms_norm share: their outputs, and params that name
// them. A sum that is not wanted is an empty tensor: it is made where the normed rows will be.
struct LinearNormCall {
  LinearAddNormParams p;
  Tensor normed, summed, rstd;

  LinearNormCall(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& residual, const OptionalTensor& norm_weight,
                 const OptionalTensor& norm_bias, double eps, bool return_sum) {
    p.linear = linear_input(input, weight, bias, residual);
    const int64_t rows = p.linear.rows, features = p.linear.out_features;
    normed = make_output(input, features);
    summed = return_sum ? make_output(input, features) : make(input, {0});
    rstd = make(input, {rows}, ScalarType::Float);
    p.linear.output = (return_sum ? summed : normed).mutable_data_ptr();
    p.norm.input = p.linear.output;
    p.norm.normed = normed.mutable_data_ptr();
    p.norm.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    p.norm.weight = vector_arg(norm_weight);
    p.norm.bias = vector_arg(norm_bias);
    p.norm.dtype = p.linear.dtype;
    p.norm.eps = static_cast<float>(eps);
    p.norm.rows = rows;
    p.norm.features = features;
    p.norm.input_stride = features;
  }
};

}  // namespace ft::bindings
