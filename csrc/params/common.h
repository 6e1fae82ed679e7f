// What every params struct shares: element types, and how a kernel is declared for the device that
// this translation unit is compiled for. No torch header may be included from here.
#pragma once
#include <cstdint>

namespace ft {

enum class DType : int32_t { f32, f16, bf16 };

// A vector of length `features` of any float type (norm weights may differ from the input's type).
struct VectorArg {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
};

// A contiguous array of ids, int64 or int32.
struct IdsArg {
  const void* data = nullptr;  // null: absent
  bool wide = true;
};

// Dropout is a pure function of (seed, position): see fasttransformer/reference/dropout.py.
struct Dropout {
  uint64_t seed = 0;
  const int64_t* seed_ptr = nullptr;  // on CUDA the seed is read by the kernel, without a sync
  uint32_t threshold = 0;             // keep where philox(seed, position) >= threshold
  float scale = 1.f;                  // 1 / (1 - p)
  bool on() const { return threshold != 0; }
};

}  // namespace ft

// FT_DECLARE_KERNEL(name, Params) stands in params/<op>.h and declares ft::name for this device.
#if defined(FT_CUDA) || defined(FT_SIMT)
#  define FT_DECLARE_KERNEL(name, Params) \
    namespace ft::cuda { void name(const Params&, void* stream); }
#else
#  include "cpu/isa.h"
#  define FT_DECLARE_KERNEL(name, Params) FT_DECLARE_CPU_KERNEL(name, Params)
#endif
