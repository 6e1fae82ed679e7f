// Every operator's schema, in one place. Implementations register themselves in
// csrc/bindings/<op>.cpp; what each operator may rely on is written in csrc/README.md.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string cpu_isa() { return ft::isa_name(ft::isa()); }

// For tests and benchmarks: run the kernels of a lower instruction set. False if this CPU can't.
bool set_cpu_isa(std::string name) { return ft::set_isa(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(fasttransformer, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> bool");

  // The machine's ceilings, for benchmarks: GFLOP/s and GB/s, the best seen within `seconds`.
  m.def("measure_fma(float seconds) -> float");
  m.def("measure_dot(float seconds) -> float");
  m.def("measure_read(int bytes, float seconds) -> float");
  m.def("measure_copy(int bytes, float seconds) -> float");

  m.def("softmax(Tensor input, float scale, Tensor? mask, bool is_causal, bool log) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor output, float scale, bool log) -> Tensor");

  m.def(
      "layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor out, Tensor "
      "mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor rstd, "
      "bool weight_grad, bool bias_grad, bool wide_bias=False) -> (Tensor d_input, Tensor d_weight, "
      "Tensor d_bias)");
  m.def("rms_norm(Tensor input, Tensor? weight, float eps) -> (Tensor out, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor rstd, bool weight_grad) "
      "-> (Tensor d_input, Tensor d_weight)");

  m.def(
      "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
      "float "
      "dropout_p, Tensor? seed) -> (Tensor normed, Tensor summed, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor? "
      "weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, bool weight_grad, bool "
      "bias_grad, bool wide_bias=False) -> (Tensor d_residual, Tensor d_input, Tensor d_weight, "
      "Tensor d_bias)");
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, Tensor? weight, float eps, float dropout_p, "
      "Tensor? seed) -> (Tensor normed, Tensor summed, Tensor rstd)");
  m.def(
      "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor? "
      "weight, Tensor rstd, float dropout_p, Tensor? seed, bool weight_grad) -> (Tensor "
      "d_residual, "
      "Tensor d_input, Tensor d_weight)");

  m.def(
      "linear_add(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float dropout_p=0.0, Tensor? seed=None) -> Tensor");
  m.def(
      "linear_add_backward(Tensor grad, Tensor input, Tensor weight, bool input_grad, bool "
      "weight_grad, bool bias_grad) -> (Tensor d_input, Tensor d_weight, Tensor d_bias)");
  m.def(
      "linear_add_layer_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? "
      "norm_weight, Tensor? norm_bias, float eps, bool return_sum, float dropout_p=0.0, Tensor? "
      "seed=None) -> (Tensor normed, Tensor summed, Tensor mean, Tensor rstd)");
  m.def(
      "linear_add_rms_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? "
      "norm_weight, float eps, bool return_sum, float dropout_p=0.0, Tensor? seed=None) -> (Tensor "
      "normed, Tensor summed, Tensor rstd)");

  // The place of the first of contiguous ids that is outside of [0, size) and not `ignore`, or −1.
  m.def("find_outside(Tensor ids, int size, int? ignore) -> int");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, float "
      "label_smoothing) -> (Tensor losses, Tensor statistics)");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor "
      "statistics, int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? "
      "class_weight, int ignore_index, float label_smoothing, bool mean, bool input_grad, bool "
      "weight_grad, bool bias_grad) -> (Tensor losses, Tensor statistics, Tensor d_input, Tensor "
      "d_weight, Tensor d_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor? class_weight, Tensor statistics, int ignore_index, float "
      "label_smoothing, bool input_grad, bool weight_grad, bool bias_grad) -> (Tensor d_input, "
      "Tensor d_weight, Tensor d_bias)");
  m.def("linear_softmax(Tensor input, Tensor weight, Tensor? bias, float temperature) -> Tensor");
  m.def(
      "linear_topk(Tensor input, Tensor weight, Tensor? bias, int k, float temperature) -> (Tensor "
      "values, Tensor indices)");
  m.def(
      "embedding(Tensor input, Tensor weight, Tensor? positions, Tensor? position_weight, bool "
      "sinusoidal, float scale) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad, Tensor ids, Tensor order, int rows, float scale, int "
      "padding_idx) -> Tensor");
  m.def(
      "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved, "
      "Tensor? position_ids) -> (Tensor query, Tensor key)");
  m.def(
      "rotary_embedding_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool "
      "interleaved, Tensor? position_ids) -> (Tensor d_query, Tensor d_key)");
  m.def(
      "activation(Tensor input, int activation, float dropout_p=0.0, Tensor? seed=None) -> Tensor");
  m.def(
      "activation_backward(Tensor grad, Tensor input, int activation, float dropout_p=0.0, "
      "Tensor? seed=None) -> Tensor");

  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, bool "
      "is_causal, bool bottom_right, int window_left, int window_right, float softcap, Tensor? "
      "alibi_slopes, Tensor? sinks, Tensor? key_lengths, float scale, float dropout_p, Tensor? "
      "seed) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
      "value, Tensor out, Tensor lse, Tensor? mask, Tensor? bias, bool is_causal, bool "
      "bottom_right, int window_left, int window_right, float softcap, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? key_lengths, float scale, float dropout_p, Tensor? seed, bool "
      "bias_grad, bool sinks_grad) -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor "
      "d_bias, Tensor d_sinks)");
  m.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor "
      "cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? mask, Tensor? bias, bool "
      "is_causal, bool bottom_right, int window_left, int window_right, float softcap, Tensor? "
      "alibi_slopes, Tensor? sinks, float scale, float dropout_p, Tensor? seed) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int "
      "max_seqlen_q, int max_seqlen_k, Tensor? mask, Tensor? bias, bool is_causal, bool "
      "bottom_right, int window_left, int window_right, float softcap, Tensor? alibi_slopes, "
      "Tensor? sinks, float scale, float dropout_p, Tensor? seed, bool bias_grad, bool sinks_grad) "
      "-> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_bias, Tensor d_sinks)");
  m.def(
      "attention_decode(Tensor query, Tensor key, Tensor value, Tensor key_lengths, Tensor? mask, "
      "Tensor? bias, bool is_causal, int window_left, int window_right, float softcap, Tensor? "
      "alibi_slopes, Tensor? sinks, float scale) -> (Tensor out, Tensor lse)");
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses) "
      "-> "
      "(Tensor d_outs, Tensor d_lses)");
}

STABLE_TORCH_LIBRARY_IMPL(fasttransformer, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}
