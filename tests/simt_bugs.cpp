// Kernels with one planted bug each, and one without: what simt must report. See test_simt.py.
#include <cstdio>
#include <exception>

#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/vector.h"

namespace ft::cuda {
namespace {

struct Args {
  const float* in;
  float* out;
};

// out[i] = Σ in over the block, through shared memory.
FT_GLOBAL void sound(const Args a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const float sum = group_sum(load_scalar(a.in + threadIdx.x), 64, scratch);
  store_scalar(a.out + threadIdx.x, sum);
}

FT_GLOBAL void missing_barrier(const Args a) {
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x, load_scalar(a.in + threadIdx.x));
  store_scalar(a.out + threadIdx.x,
               shared_load(row + threadIdx.x / 2));  // a neighbour may not have written
  block_barrier();
  shared_store(row + threadIdx.x, -1.f);
}

FT_GLOBAL void load_outside(const Args a) {
  store_scalar(a.out + threadIdx.x, load_scalar(a.in + threadIdx.x + 1));
}

FT_GLOBAL void store_outside(const Args a) { store_scalar(a.out + threadIdx.x - 1, 0.f); }

FT_GLOBAL void store_to_input(const Args a) {
  store_scalar(const_cast<float*>(a.in) + threadIdx.x, 0.f);
}

FT_GLOBAL void misaligned(const Args a) { store16(a.out + 1, load16(a.in)); }

FT_GLOBAL void barrier_left(const Args) {
  if (threadIdx.x == 5) return;
  block_barrier();
}

FT_GLOBAL void shuffle_left(const Args a) {
  if (threadIdx.x % kWarp == 31) return;
  store_scalar(a.out + threadIdx.x, shuffle_xor(1.f, 1));
}

FT_GLOBAL void barrier_against_shuffle(const Args) {
  if (threadIdx.x < 16) {
    block_barrier();
  } else {
    shuffle_xor(1.f, 1);
  }
}

FT_GLOBAL void never_written(const Args a) {
  store_scalar(a.out + threadIdx.x, shared_load(dynamic_shared<float>() + threadIdx.x));
}

struct Case {
  const char* name;
  void (*kernel)(Args);
};
constexpr Case kCases[] = {{"sound", sound},
                           {"missing_barrier", missing_barrier},
                           {"load_outside", load_outside},
                           {"store_outside", store_outside},
                           {"store_to_input", store_to_input},
                           {"misaligned", misaligned},
                           {"barrier_left", barrier_left},
                           {"shuffle_left", shuffle_left},
                           {"barrier_against_shuffle", barrier_against_shuffle},
                           {"never_written", never_written}};

}  // namespace
}  // namespace ft::cuda

// Runs a case on two blocks of 64 threads; what was reported goes to `message`.
extern "C" __attribute__((visibility("default"))) int ft_simt_bug(const char* name, const float* in,
                                                                  float* out, char* message) {
  using namespace ft;
  message[0] = 0;
  simt::allow(in, 64 * 4, false);
  simt::allow(out, 64 * 4, true);
  const simt::AllowedUntilHere ends_here;
  for (const auto& c : cuda::kCases) {
    if (std::string(c.name) != name) continue;
    try {
      cuda::launch(c.name, c.kernel, 2, 64, 256, nullptr, {in, out});
    } catch (const std::exception& error) { std::snprintf(message, 512, "%s", error.what()); }
    return 0;
  }
  return 1;
}
