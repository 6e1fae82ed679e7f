// linear_add: out = act(input · weightᵀ + bias) + residual, and the gradients of its linear part:
//   d_input = grad · weight,   d_weight = gradᵀ · input,   d_bias = Σ rows of grad.
// Three forms of one product (linear_add/product.h), which differ in which operand's tile is read
// transposed; linear_add/linear_add_plan.cu chooses tiles and splits of K. d_bias sums rows in
// parts, and the parts in order (linear_add/rows.h).
#include "cuda/linear_add/matmul.h"
#include "params/linear_add.h"

namespace ft::cuda {
namespace {

constexpr const char* kForward = "linear_add";
constexpr const char* kBackward = "linear_add_backward";

ProductPlan forward_plan(const LinearAddParams& p) {
  return plan_product(kForward, p.dtype, Form::forward, p.rows, p.out_features, p.in_features,
                      false);
}
ProductPlan d_input_plan(const LinearAddParams& p) {
  return plan_product(kBackward, p.dtype, Form::d_input, p.rows, p.in_features, p.out_features,
                      false);
}
ProductPlan d_weight_plan(const LinearAddParams& p) {
  return plan_product(kBackward, p.dtype, Form::d_weight, p.out_features, p.in_features, p.rows,
                      false);
}

}  // namespace

int64_t linear_add_workspace(const LinearAddParams& p) {
  return product_workspace(forward_plan(p), p.rows, p.out_features, false);
}

void linear_add(const LinearAddParams& p, void* stream) {
  run_product(kForward, p.dtype, Form::forward, forward_plan(p), forward_args(p), p.workspace,
              stream);
}

int64_t linear_add_backward_workspace(const LinearAddBackwardParams& p) {
  const LinearAddParams& l = p.linear;
  int64_t most = 0;  // one after the other in the same memory
  const auto need = [&](int64_t floats) { most = floats > most ? floats : most; };
  if (p.d_input) need(product_workspace(d_input_plan(l), l.rows, l.in_features, false));
  if (p.d_weight) need(product_workspace(d_weight_plan(l), l.out_features, l.in_features, false));
  if (p.d_bias) need(column_sums_workspace(l.dtype, l.rows, l.out_features));
  return most;
}

void linear_add_backward(const LinearAddBackwardParams& p, void* stream) {
  const LinearAddParams& l = p.linear;
  const Matrix grad = row_matrix(p.grad, l.rows, l.out_features, p.grad_stride, l.dtype);
  if (p.d_input) {
    MatmulArgs a;
    a.m = l.rows;
    a.n = l.in_features;
    a.k = l.out_features;
    a.a = grad;
    a.b = row_matrix(l.weight, l.out_features, l.in_features, l.in_features, l.dtype);
    a.epilogue.out = input_matrix(l, p.d_input, true);
    run_product(kBackward, l.dtype, Form::d_input, d_input_plan(l), a, l.workspace, stream);
  }
  if (p.d_weight) {
    MatmulArgs a;
    a.m = l.out_features;
    a.n = l.in_features;
    a.k = l.rows;
    a.a = grad;
    a.b = input_matrix(l, l.input, false);
    a.epilogue.out = row_matrix(p.d_weight, l.out_features, l.in_features, l.in_features, l.dtype);
    run_product(kBackward, l.dtype, Form::d_weight, d_weight_plan(l), a, l.workspace, stream);
  }
  if (p.d_bias) run_column_sums(kBackward, l.dtype, grad, p.d_bias, l.workspace, stream);
}

}  // namespace ft::cuda
