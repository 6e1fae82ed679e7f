#include "cpu/parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace ft {

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
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return static_cast<int>(count);
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
