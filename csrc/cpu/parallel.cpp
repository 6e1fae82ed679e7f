#include "cpu/parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>

// Where a sanitizer looks on (tests/sanitize.py), torch's pool of threads, which was not compiled
// for one, is left for plain threads, and a block of scratch memory is as large as was asked for.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define FT_SANITIZED 1
#  include <algorithm>
#  include <thread>
#  include <vector>
#endif

namespace ft {

namespace {

// A child of fork() has one thread, the one that forked, and its runtime of threads still waits for
// the parent's. Threads that the child starts have a runtime of their own.
thread_local bool lost_threads = false;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { lost_threads = true; });

}  // namespace

void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= grain || num_threads() == 1) {
    fn(0, n, context);
    return;
  }
#if defined(FT_SANITIZED)
  const int64_t count = std::min<int64_t>(num_threads(), (n + grain - 1) / grain);
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; ++i) {
    threads.emplace_back(fn, n * i / count, n * (i + 1) / count, context);
  }
  fn(0, n / count, context);
  for (std::thread& thread : threads) thread.join();
#else
  if (torch_parallel_for(0, n, grain, fn, context) != 0) {
    throw std::runtime_error("fasttransformer: a parallel CPU kernel failed (out of memory?)");
  }
#endif
}

int num_threads() {
  if (lost_threads) return 1;
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return static_cast<int>(count);
}

namespace {

// A cache's size and how many of the system's processors share it.
struct Cache {
  int64_t bytes = int64_t{32} << 20;
  int64_t processors = 1 << 30;
};

// Linux tells; elsewhere the guess above stays.
Cache read_last_level_cache() {
  Cache found;
  for (int index = 3; index >= 2; --index) {
    char path[96], text[4096] = "";
    const auto read = [&](const char* name) {
      std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index,
                    name);
      std::FILE* file = std::fopen(path, "r");
      if (file == nullptr) return false;
      const size_t count = std::fread(text, 1, sizeof(text) - 1, file);
      std::fclose(file);
      text[count] = '\0';
      return count > 0;
    };
    if (!read("size")) continue;
    const int64_t kilobytes = std::atoll(text);
    if (kilobytes <= 0 || !read("shared_cpu_map")) continue;
    found.bytes = kilobytes << 10;
    found.processors = 0;
    for (const char* digit = text; *digit != '\0'; ++digit) {
      const char hex[] = {*digit, '\0'};
      found.processors += __builtin_popcountl(std::strtoul(hex, nullptr, 16));
    }
    if (found.processors < 1) found.processors = 1;
    break;
  }
  return found;
}

}  // namespace

int64_t last_level_cache() {
  static const Cache cache = read_last_level_cache();
  const int64_t threads = num_threads();
  return cache.bytes * ((threads + cache.processors - 1) / cache.processors);
}

namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

// A block above this size is not kept: one huge call must not pin memory for the thread's life.
constexpr size_t kKeep = size_t{64} << 20;

}  // namespace

void* thread_scratch(Scratch slot, size_t bytes) {
  static thread_local Block blocks[static_cast<int>(Scratch::count)];
  Block& block = blocks[static_cast<int>(slot)];
#if defined(FT_SANITIZED)
  const bool other = block.bytes != bytes;
  const size_t whole = bytes;
#else
  const bool other = block.bytes < bytes || (block.bytes > kKeep && bytes <= kKeep);
  const size_t whole = (bytes + 4095) / 4096 * 4096;
#endif
  if (other) {
    std::free(block.data);
    block.bytes = whole;
    if (posix_memalign(&block.data, 4096, whole) != 0) {
      block.data = nullptr;
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace ft
