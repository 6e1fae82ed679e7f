// What the bindings share: torch tensors in, params structs out, for the device that this library
// is built for. Compiled into the CPU library, again (with FT_CUDA) into the CUDA library, and
// (with FT_SIMT) into the library with which tests run the CUDA kernels on the CPU.
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
#elif defined(FT_SIMT)
#  include "simt/runtime.h"
#endif

namespace ft {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // does not own: for arguments

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      throw std::invalid_argument("fasttransformer: dtype must be float32, float16 or bfloat16");
  }
}

// Tells simt which elements a kernel may touch: a launch then reports any access outside them.
inline void allow_access([[maybe_unused]] const Tensor& t, [[maybe_unused]] bool writable) {
#if defined(FT_SIMT)
  if (t.numel() == 0) return;
  simt::Elements e{t.const_data_ptr(), 8, 0, {}, {}};
  switch (t.scalar_type()) {
    case ScalarType::Bool: e.element = 1; break;
    case ScalarType::Half:
    case ScalarType::BFloat16: e.element = 2; break;
    case ScalarType::Float:
    case ScalarType::Int: e.element = 4; break;
    default: break;
  }
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 1 || t.stride(i) == 0) continue;
    if (e.dims == simt::kTensorDims) throw std::invalid_argument("simt: too many dimensions");
    e.sizes[e.dims] = t.size(i);
    e.strides[e.dims++] = t.stride(i) * e.element;
  }
  simt::allow(e, writable);
#endif
}

inline const void* data(const Tensor& t) {
  allow_access(t, false);
  return t.const_data_ptr();
}
inline const void* data(const OptionalTensor& t) { return t ? data(*t) : nullptr; }

// Rows are a tensor's last dimension: of (rows, features) with any row stride, or of a contiguous
// tensor of any other rank.
inline int64_t features_of(const Tensor& t) { return t.size(t.dim() - 1); }

inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

inline int64_t row_stride(const Tensor& t) { return t.dim() == 2 ? t.stride(0) : features_of(t); }

inline VectorArg vector_arg(const OptionalTensor& t) {
  VectorArg out;
  if (t) out = {data(*t), dtype_of(*t)};
  return out;
}

inline IdsArg ids_arg(const OptionalTensor& t) {
  IdsArg out;
  if (!t) return out;
  out.wide = t->scalar_type() == ScalarType::Long;
  if (!out.wide && t->scalar_type() != ScalarType::Int) {
    throw std::invalid_argument("fasttransformer: ids must be int64 or int32");
  }
  out.data = data(*t);
  return out;
}

// A contiguous tensor. Straight to the allocator: new_empty would go through the dispatcher, which
// takes longer than a small kernel does.
inline Tensor make(const Tensor& like, Sizes sizes,
                   std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMostDims = 64;
  if (sizes.size() > kMostDims) throw std::invalid_argument("fasttransformer: over 64 dimensions");
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t type = 0, device = 0, index = 0;
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides, type, device, index, &handle));
  Tensor out(handle);
  allow_access(out, true);
  return out;
}

// Outputs that the caller did not ask for are tensors of shape (0,).
inline Tensor make_if(bool wanted, const Tensor& like, Sizes sizes,
                      std::optional<ScalarType> dtype = std::nullopt) {
  return make(like, wanted ? sizes : Sizes{0}, dtype);
}

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  Dropout out;
  if (!seed || p <= 0) return out;
  out.threshold = static_cast<uint32_t>(p * 4294967296.0);
  out.scale = static_cast<float>(1.0 / (1.0 - p));
#if defined(FT_CUDA) || defined(FT_SIMT)
  out.seed_ptr = static_cast<const int64_t*>(data(*seed));
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
#elif defined(FT_SIMT)
#  define FT_DISPATCH_KEY CPU
#  define FT_LAUNCH(name, params, on)               \
    do {                                            \
      const ::ft::simt::AllowedUntilHere ends_here; \
      ::ft::cuda::name(params, nullptr);            \
    } while (false)
#else
#  define FT_DISPATCH_KEY CPU
#  define FT_LAUNCH(name, params, on) ::ft::name(params)
#endif

}  // namespace ft

// FT_REGISTER(softmax, ft::softmax): implements fasttransformer::softmax on this library's device.
#if defined(FT_SIMT)
#  define FT_NAMESPACE fasttransformer_simt
#else
#  define FT_NAMESPACE fasttransformer
#endif
#define FT_REGISTER_EXPANDED(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define FT_REGISTER_NAMED(space, key, m) FT_REGISTER_EXPANDED(space, key, m)
#define FT_REGISTER_IMPL(m) FT_REGISTER_NAMED(FT_NAMESPACE, FT_DISPATCH_KEY, m)
