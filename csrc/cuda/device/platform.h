// The only door to CUDA: kernels include csrc/cuda/device/*.h and use no intrinsic, inline PTX or
// runtime call by themselves. Compiled by nvcc, these headers wrap CUDA; compiled with FT_SIMT,
// they take the same names from csrc/simt, which runs a kernel's source on the CPU.
#pragma once
#include "params/common.h"
#include "params/philox.h"

#if defined(FT_SIMT)
#  include "simt/runtime.h"
#else
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_runtime.h>

#  include <cmath>

#  define FT_GLOBAL __global__
#  define FT_DEVICE __device__ __forceinline__
#endif

namespace ft::cuda {

// The 16-bit types as bits; arithmetic is float. vector.h converts.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr int kMaxBlock = 1024;

// Calls f.operator()<T>() with the element type of `dtype` (host side).
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::f16: return f.template operator()<f16>();
    case DType::bf16: return f.template operator()<bf16>();
  }
}

}  // namespace ft::cuda
