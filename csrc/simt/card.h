// The card that simt stands for: it refuses a launch that the CUDA runtime would refuse. A test
// sets a card's limits and what nvcc reported for each kernel (registers, static shared memory,
// threads of its launch bounds: tests/cuda_resources.json). For a kernel without an entry, static
// shared memory is the size of the arrays that a block has declared so far.
#pragma once
#include <cstdint>
#include <string>

namespace ft::simt {

constexpr int64_t kRegistersOfBlock = 65536;  // of every card from sm_80 to sm_100
constexpr int64_t kWithoutAsking = 48 * 1024;

struct KernelResources {
  int64_t static_shared = 0;
  int registers = 0, threads = 1024;  // of a thread; of a block at most
  bool known = false;
};
KernelResources resources_of(const void* kernel);

// Bytes of shared memory, static and dynamic, that a block of the kernel may have as things stand.
int64_t shared_limit_of(const void* kernel);

// Throws what cudaLaunchKernel would return.
void check_launch(const std::string& name, const void* kernel, int64_t grid, int block,
                  int64_t dynamic_bytes);

// Whether launches are checked and not carried out, for tests of many sizes.
bool launch_only();

}  // namespace ft::simt
