#include "cpu/parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>

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
  if (torch_parallel_for(0, n, grain, fn, context) != 0) {
    throw std::runtime_error("fasttransformer: a parallel CPU kernel failed (out of memory?)");
  }
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
  if (block.bytes < bytes || (block.bytes > kKeep && bytes <= kKeep)) {
    std::free(block.data);
    block.bytes = (bytes + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(4096, block.bytes);
    if (block.data == nullptr) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace ft
