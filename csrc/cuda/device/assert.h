// What a kernel finds wrong with its input, without the host having to wait for a look at it.
#pragma once
#include <cassert>

#include "cuda/device/platform.h"

namespace ft::cuda {

// Unless `holds`, the thread ends here: on a GPU the launch fails with cudaErrorAssert and prints
// `what`, so a later call of CUDA raises; simt reports it, which raises at once.
#if defined(FT_SIMT)
FT_DEVICE void device_assert(bool holds, const char* what) {
  if (!holds) simt::report(what);
}
#else
FT_DEVICE void device_assert(bool holds, const char* what) {
  if (!holds) __assert_fail(what, "fasttransformer", 0, "");
}
#endif

}  // namespace ft::cuda
