// What the library can say of itself: which GPUs it holds code for, and whether a device and its
// driver can run that. Python asks once, before the first call on a GPU
// (fasttransformer/backends.py); `fasttransformer info` finds the marker in the file, without
// loading it.
#include <cuda_runtime.h>

#include <cstdlib>
#include <sstream>
#include <string>

#include "cuda/device/launch_counts.h"
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

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Whether code for the architectures, written like "80 90a", runs on a GPU: code for one without a
// letter on its major version from its minor on, with `f` likewise, with `a` there only; and the
// newest without a letter is there as PTX too (setup.py), for all that come later.
bool runs_on(const std::string& archs, int capability) {
  std::istringstream words(archs);
  int newest = 1000;
  bool plain = false;
  for (std::string word; words >> word;) {
    const int arch = std::atoi(word.c_str());
    if (arch == 0) return true;  // built by hand: not known
    if (word.back() == 'a' ? capability == arch
                           : capability / 10 == arch / 10 && capability >= arch) {
      return true;
    }
    if (word.back() >= '0' && word.back() <= '9') {
      newest = plain && newest > arch ? newest : arch;
      plain = true;
    }
  }
  return plain && capability >= newest;
}

std::string problem(int capability) {
  if (!runs_on(FT_CUDA_ARCHS, capability)) {
    return "the CUDA library holds code for " FT_CUDA_ARCHS ", not for its compute capability";
  }
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed";
  if (driver / 1000 < runtime / 1000) {  // within a major version any driver will do
    return "the NVIDIA driver is of CUDA " + version(driver) +
           ", the CUDA library of the newer CUDA " + version(runtime);
  }
  return "";
}

}  // namespace
}  // namespace ft::cuda

// Why this library's kernels can't run on a GPU of compute capability major.minor: empty if they
// can. Makes no context on any device.
FT_EXPORT const char* ft_cuda_problem(int major, int minor) {
  static thread_local std::string text;
  text = ft::cuda::problem(10 * major + minor);
  return text.c_str();
}

FT_EXPORT const char* ft_cuda_marker() { return ft::cuda::kMarker; }

FT_EXPORT_LAUNCH_COUNTS
