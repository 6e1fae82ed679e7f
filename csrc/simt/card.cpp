#include "simt/card.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda/device/launch_counts.h"
#include "simt/runtime.h"

namespace ft::simt {
namespace {

// Of sm_86, the least of sm_80 and later, but an A100's multiprocessors.
int64_t grid_limit = 2147483647, shared_limit = 99 * 1024;
int multiprocessor_count = 108;
int device_number = 0;
bool only_launch = false;

std::mutex mutex;
std::unordered_map<const void*, KernelResources> resources;
std::map<std::pair<const void*, int>, int64_t> dynamic_limits;  // raised ones, by kernel and device

[[noreturn]] void refuse(const std::string& name, const std::string& error,
                         const std::string& why) {
  throw std::runtime_error("simt: kernel " + name + ": " + error + ": " + why);
}

// Of the launch's threads, whole warps of which get registers by the 256.
int64_t registers_of(const KernelResources& use, int block) {
  const int64_t of_warp = (int64_t{use.registers} * kLanes + 255) / 256 * 256;
  return (block + kLanes - 1) / kLanes * of_warp;
}

const void* library() {
  Dl_info found{};
  dladdr(reinterpret_cast<const void*>(&max_grid), &found);
  return found.dli_fbase;
}

}  // namespace

int64_t max_grid() { return grid_limit; }
int64_t max_shared_memory() { return shared_limit; }
int multiprocessors() { return multiprocessor_count; }
int device() { return device_number; }
bool launch_only() { return only_launch; }

KernelResources resources_of(const void* kernel) {
  const auto found = resources.find(kernel);
  return found == resources.end() ? KernelResources{} : found->second;
}

int64_t static_shared_memory(const void* kernel) { return resources_of(kernel).static_shared; }

void set_dynamic_limit(const char* name, const void* kernel, int64_t bytes) {
  const int64_t most = shared_limit - static_shared_memory(kernel);
  if (bytes < 0 || bytes > most) {
    refuse(name, "cudaErrorInvalidValue",
           "a limit of " + std::to_string(bytes) + " bytes of dynamic shared memory, of " +
               std::to_string(most));
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, first] = dynamic_limits.insert({{kernel, device_number}, bytes});
  if (!first && at->second != bytes) {
    refuse(name, "race",
           "the kernel's limit of dynamic shared memory goes from " + std::to_string(at->second) +
               " bytes to " + std::to_string(bytes) + " while other threads may launch it");
  }
}

int64_t shared_limit_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto raised = dynamic_limits.find({kernel, device_number});
  if (raised == dynamic_limits.end()) return std::min(kWithoutAsking, shared_limit);
  return raised->second + static_shared_memory(kernel);
}

void check_launch(const std::string& name, const void* kernel, int64_t grid, int block,
                  int64_t dynamic_bytes) {
  const KernelResources use = resources_of(kernel);
  if (grid < 1 || grid > grid_limit) {
    refuse(name, "cudaErrorInvalidConfiguration", "grid of " + std::to_string(grid) + " blocks");
  }
  if (block < 1 || block > use.threads || block % kLanes != 0) {
    refuse(name, "cudaErrorInvalidConfiguration",
           "block of " + std::to_string(block) + " threads (whole warps, at most " +
               std::to_string(use.threads) + ")");
  }
  if (registers_of(use, block) > kRegistersOfBlock) {
    refuse(name, "cudaErrorLaunchOutOfResources",
           "block of " + std::to_string(block) + " threads of " + std::to_string(use.registers) +
               " registers");
  }
  const int64_t limit = shared_limit_of(kernel);
  if (dynamic_bytes + use.static_shared > limit) {
    refuse(name, "cudaErrorInvalidValue",
           std::to_string(dynamic_bytes) + " bytes of dynamic shared memory and " +
               std::to_string(use.static_shared) + " static ones, of " + std::to_string(limit));
  }
}

}  // namespace ft::simt

#define FT_SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// Another card, whose kernels have the limits that every kernel begins with.
FT_SIMT_EXPORT void ft_simt_set_limits(int64_t grid, int64_t shared_memory, int multiprocessors) {
  using namespace ft::simt;
  grid_limit = grid;
  shared_limit = shared_memory;
  multiprocessor_count = multiprocessors;
  ++device_number;
}
// What nvcc made of the kernel that lies `offset` bytes into this library.
FT_SIMT_EXPORT void ft_simt_set_resources(int64_t offset, int64_t static_shared, int registers,
                                          int threads) {
  using namespace ft::simt;
  const char* const kernel = static_cast<const char*>(library()) + offset;
  resources[kernel] = {static_shared, registers, threads, true};
  ++device_number;  // forgets what the launch code has looked up for it
}
FT_SIMT_EXPORT void ft_simt_set_launch_only(int only) { ft::simt::only_launch = only != 0; }

FT_EXPORT_LAUNCH_COUNTS
