// What the bindings share: torch tensors in, params structs out, for the device that this library
// is built for. Compiled into the CPU library and again (with FT_CUDA) into the CUDA library.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "params/common.h"

#if defined(FT_CUDA)
#  include <torch/csrc/stable/accelerator.h>
#endif

namespace ft {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      throw std::invalid_argument("fasttransformer: dtype must be float32, float16 or bfloat16");
  }
}

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline VectorArg vector_arg(const OptionalTensor& t) {
  VectorArg out;
  if (t) out = {t->const_data_ptr(), dtype_of(*t)};
  return out;
}

inline Tensor make(const Tensor& like, std::vector<int64_t> sizes,
                   std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
      dtype ? dtype : std::optional<ScalarType>(like.scalar_type()));
}

// Outputs that the caller did not ask for are tensors of shape (0,).
inline Tensor make_if(bool wanted, const Tensor& like, std::vector<int64_t> sizes,
                      std::optional<ScalarType> dtype = std::nullopt) {
  return make(like, wanted ? std::move(sizes) : std::vector<int64_t>{0}, dtype);
}

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  Dropout out;
  if (!seed || p <= 0) return out;
  out.threshold = static_cast<uint32_t>(p * 4294967296.0);
  out.scale = static_cast<float>(1.0 / (1.0 - p));
#if defined(FT_CUDA)
  out.seed_ptr = static_cast<const int64_t*>(seed->const_data_ptr());
#else
  out.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
#endif
  return out;
}

#if defined(FT_CUDA)
#  define FT_DISPATCH_KEY CUDA
// Runs a kernel launcher on the current stream of the tensor's device.
template <class Params>
void launch(void (*kernel)(const Params&, void*), const Params& params, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel(params, stream);
}
#  define FT_LAUNCH(name, params, on) ::ft::launch(&::ft::cuda::name, params, on)
#else
#  define FT_DISPATCH_KEY CPU
#  define FT_LAUNCH(name, params, on) ::ft::name(params)
#endif

}  // namespace ft

// FT_REGISTER(softmax, ft::softmax): implements fasttransformer::softmax on this library's device.
#define FT_REGISTER_EXPANDED(key, m) STABLE_TORCH_LIBRARY_IMPL(fasttransformer, key, m)
#define FT_REGISTER_IMPL(m) FT_REGISTER_EXPANDED(FT_DISPATCH_KEY, m)
