// Which kernels a host asked to launch, by name, while a test counts: a test must prove that it ran
// what it names. A launch that nobody counts costs one load.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>

namespace ft::cuda {

struct LaunchCounts {
  std::atomic<bool> counting{false};
  std::mutex mutex;
  std::map<std::string, int64_t> by_name;
};
inline LaunchCounts& launch_counts() {
  static LaunchCounts counts;
  return counts;
}

inline void count_launch(const char* name) {
  LaunchCounts& counts = launch_counts();
  if (!counts.counting.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(counts.mutex);
  ++counts.by_name[name];
}

// Writes what was counted, "name<tab>count<newline>" each, and begins anew or stops. The number of
// bytes that all of it takes; no more than `size` are written.
inline int64_t exchange_launch_counts(bool begin, char* text, int64_t size) {
  LaunchCounts& counts = launch_counts();
  const std::lock_guard<std::mutex> lock(counts.mutex);
  std::string all;
  for (const auto& [name, count] : counts.by_name) {
    all += name + "\t" + std::to_string(count) + "\n";
  }
  if (size > 0) std::snprintf(text, static_cast<size_t>(size), "%s", all.c_str());
  counts.by_name.clear();
  counts.counting = begin;
  return static_cast<int64_t>(all.size()) + 1;
}

}  // namespace ft::cuda

// FT_EXPORT_LAUNCH_COUNTS stands in one file of a library, for Python to call.
#define FT_EXPORT_LAUNCH_COUNTS                                               \
  extern "C" __attribute__((visibility("default"))) int64_t ft_launch_counts( \
      int begin, char* text, int64_t size) {                                  \
    return ft::cuda::exchange_launch_counts(begin != 0, text, size);          \
  }
