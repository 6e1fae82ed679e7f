// Launching: grid limits, shared memory, and errors as exceptions that name the kernel.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device/platform.h"

namespace ft::cuda {

#if defined(FT_SIMT)
inline int64_t max_grid() { return simt::max_grid(); }
inline int64_t max_shared_memory(const char*) { return simt::max_shared_memory(); }
inline int multiprocessors(const char*) { return simt::multiprocessors(); }
template <class Args>
void launch(const char* name, void (*kernel)(Args), int64_t grid, int block, int64_t shared, void*,
            const std::type_identity_t<Args>& args) {
  simt::launch(name, grid, block, shared, [&] { kernel(args); });
}
#else
inline void check(const char* kernel, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("fasttransformer: CUDA kernel ") + kernel + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

inline int64_t max_grid() { return 2147483647; }

// Bytes of shared memory that a block can have on the current device.
inline int64_t max_shared_memory(const char* kernel) {
  int device = 0, bytes = 0;
  check(kernel, cudaGetDevice(&device));
  check(kernel, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Multiprocessors (SMs) of the current device.
inline int multiprocessors(const char* kernel) {
  int device = 0, count = 0;
  check(kernel, cudaGetDevice(&device));
  check(kernel, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// kernel<<<grid, block, shared, stream>>>(args). Does not wait for the kernel; an error that an
// earlier kernel left behind comes out here too, as CUDA reports it.
template <class Args>
void launch(const char* name, void (*kernel)(Args), int64_t grid, int block, int64_t shared,
            void* stream, const std::type_identity_t<Args>& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {  // more than any kernel may have without asking
    check(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared)));
  }
  void* pointers[] = {const_cast<Args*>(&args)};
  check(name, cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)),
                               dim3(static_cast<unsigned>(block)), pointers,
                               static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)));
}
#endif

// Blocks for `items` of work, `per_block` at a time; kernels loop, so a grid may be cut short.
inline int64_t grid_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return blocks < max_grid() ? blocks : max_grid();
}

}  // namespace ft::cuda
