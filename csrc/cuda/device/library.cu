// What the library can say of itself: which GPUs it holds code for, and whether a device and its
// driver can run that. Python asks once, when it loads the library (fasttransformer/backends.py);
// `fasttransformer info` finds the marker in the file, without loading it.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "cuda/device/platform.h"

#if !defined(FT_CUDA_ARCHS)
#  define FT_CUDA_ARCHS "unknown"
#endif
#define FT_TEXT(x) #x
#define FT_AS_TEXT(x) FT_TEXT(x)
#define FT_EXPORT extern "C" __attribute__((visibility("default")))

namespace ft::cuda {
namespace {

const char kMarker[] =
    "fasttransformer CUDA library: archs " FT_CUDA_ARCHS
    "; nvcc " FT_AS_TEXT(__CUDACC_VER_MAJOR__) "." FT_AS_TEXT(__CUDACC_VER_MINOR__) ";";

FT_GLOBAL void probe() {}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string problem(int device) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed";
  if (driver / 1000 < runtime / 1000) {  // within a major version any driver will do
    return "the NVIDIA driver is of CUDA " + version(driver) +
           ", the CUDA library of the newer CUDA " + version(runtime);
  }
  int before = 0;
  cudaGetDevice(&before);
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
  }
  cudaGetLastError();  // a failed probe must not be the error of the next launch
  cudaSetDevice(before);
  if (status == cudaSuccess) return "";
  return std::string("the CUDA library holds code for " FT_CUDA_ARCHS ": ") +
         cudaGetErrorString(status);
}

}  // namespace
}  // namespace ft::cuda

// Why this library's kernels can't run on a device: empty if they can.
FT_EXPORT const char* ft_cuda_problem(int device) {
  static thread_local std::string text;
  text = ft::cuda::problem(device);
  return text.c_str();
}

FT_EXPORT const char* ft_cuda_marker() { return ft::cuda::kMarker; }
