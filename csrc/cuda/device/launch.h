// Launching: grid limits, shared memory, and errors as exceptions that name the kernel.
#pragma once
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/device/launch_counts.h"
#include "cuda/device/platform.h"

namespace ft::cuda {

// ---- what CUDA, or simt in its place, answers and does ------------------------------------------

#if defined(FT_SIMT)
inline int64_t max_grid() { return simt::max_grid(); }
inline int current_device(const char*) { return simt::device(); }
inline int64_t max_shared_memory(const char*) { return simt::max_shared_memory(); }
inline int multiprocessors(const char*) { return simt::multiprocessors(); }
inline int64_t static_shared_memory(const char*, const void* kernel) {
  return simt::static_shared_memory(kernel);
}
inline void set_dynamic_limit(const char* name, const void* kernel, int64_t bytes) {
  simt::set_dynamic_limit(name, kernel, bytes);
}
template <class Args>
void start(const char* name, void (*kernel)(Args), int64_t grid, int block, int64_t shared, void*,
           const Args& args) {
  simt::launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared,
               [&] { kernel(args); });
}
#else
inline void check(const char* kernel, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here, it must not come out of somebody's next call again
  throw std::runtime_error(std::string("fasttransformer: CUDA kernel ") + kernel + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

inline int64_t max_grid() { return 2147483647; }

inline int current_device(const char* kernel) {
  int device = 0;
  check(kernel, cudaGetDevice(&device));
  return device;
}

inline int attribute(const char* kernel, cudaDeviceAttr which) {
  int value = 0;
  check(kernel, cudaDeviceGetAttribute(&value, which, current_device(kernel)));
  return value;
}

// Bytes of shared memory that a block can have on the current device, static and dynamic together.
inline int64_t max_shared_memory(const char* kernel) {
  return attribute(kernel, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Multiprocessors (SMs) of the current device.
inline int multiprocessors(const char* kernel) {
  return attribute(kernel, cudaDevAttrMultiProcessorCount);
}

inline int64_t static_shared_memory(const char* name, const void* kernel) {
  cudaFuncAttributes found;
  check(name, cudaFuncGetAttributes(&found, kernel));
  return static_cast<int64_t>(found.sharedSizeBytes);
}

inline void set_dynamic_limit(const char* name, const void* kernel, int64_t bytes) {
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
}

template <class Args>
void start(const char* name, void (*kernel)(Args), int64_t grid, int block, int64_t shared,
           void* stream, const Args& args) {
  void* pointers[] = {const_cast<Args*>(&args)};
  check(name,
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid)),
                         dim3(static_cast<unsigned>(block)), pointers, static_cast<size_t>(shared),
                         static_cast<cudaStream_t>(stream)));
}
#endif

// ---- shared memory ------------------------------------------------------------------------------

// What the system keeps of an SM's shared memory for each block. From sm_90 on the compiler counts
// it among a kernel's static bytes (cuobjdump --dump-resource-usage shows it).
constexpr int64_t kSystemShared = 1024;

// What each kernel may have of the current device's shared memory. A kernel gets 48 KB, static and
// dynamic together, until its limit is raised. That is done once for a kernel and device, to all
// that there is: a limit that each launch set to its own size would be a race between threads.
class SharedMemoryLimits {
 public:
  // Bytes of dynamic shared memory that a launch of the kernel can have.
  int64_t room(const char* name, const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entry(name, kernel).room;
  }

  // Sees to it that a launch with `bytes` of dynamic shared memory is within the kernel's limit.
  void allow(const char* name, const void* kernel, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry& e = entry(name, kernel);
    if (bytes > e.room) {
      throw std::runtime_error(std::string("fasttransformer: CUDA kernel ") + name + ": needs " +
                               std::to_string(bytes) + " bytes of dynamic shared memory, of " +
                               std::to_string(e.room) + " on this device");
    }
    if (e.raised || bytes + e.fixed + kSystemShared <= kWithoutAsking) return;
    set_dynamic_limit(name, kernel, e.room);
    e.raised = true;
  }

 private:
  static constexpr int64_t kWithoutAsking = 48 * 1024;

  struct Entry {
    int64_t fixed, room;  // static bytes, and what they leave
    bool raised;
  };

  Entry& entry(const char* name, const void* kernel) {
    const std::pair<int, const void*> key{current_device(name), kernel};
    const auto found = entries_.find(key);
    if (found != entries_.end()) return found->second;
    const int64_t fixed = static_shared_memory(name, kernel);
    return entries_[key] = {fixed, max_shared_memory(name) - fixed, false};
  }

  std::mutex mutex_;
  std::map<std::pair<int, const void*>, Entry> entries_;
};
inline SharedMemoryLimits& shared_memory_limits() {
  static SharedMemoryLimits limits;
  return limits;
}

// Bytes of dynamic shared memory that a launch of `kernel` can have on the current device.
template <class Args>
int64_t dynamic_shared_room(const char* name, void (*kernel)(Args)) {
  const int64_t room = shared_memory_limits().room(name, reinterpret_cast<const void*>(kernel));
  return room > 0 ? room : 0;
}

// ---- launching ----------------------------------------------------------------------------------

// kernel<<<grid, block, shared, stream>>>(args). Does not wait for the kernel; an error that an
// earlier kernel left behind comes out here too, as CUDA reports it.
template <class Args>
void launch(const char* name, void (*kernel)(Args), int64_t grid, int block, int64_t shared,
            void* stream, const std::type_identity_t<Args>& args) {
  if (shared > 0) {
    shared_memory_limits().allow(name, reinterpret_cast<const void*>(kernel), shared);
  }
  count_launch(name);
  start(name, kernel, grid, block, shared, stream, args);
}

// Blocks for `items` of work, `per_block` at a time; kernels loop, so a grid may be cut short.
inline int64_t grid_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return blocks < max_grid() ? blocks : max_grid();
}

}  // namespace ft::cuda
