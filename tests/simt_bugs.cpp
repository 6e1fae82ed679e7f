// Kernels with one planted bug each, and one without: what simt must report. See test_simt.py.
#include <dlfcn.h>

#include <cstdio>
#include <exception>

#include "cuda/device/async.h"
#include "cuda/device/atomic.h"
#include "cuda/device/launch.h"
#include "cuda/device/mma.h"
#include "cuda/device/reduce.h"
#include "cuda/device/vector.h"

extern "C" void ft_simt_set_resources(int64_t, int64_t, int, int);

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

// ---- shared memory ------------------------------------------------------------------------------

FT_GLOBAL void shared_outside(const Args) {
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x + 1, 1.f);
}

FT_GLOBAL void shared_misaligned(const Args) {
  FT_SHARED_ARRAY(float, row, 512);
  shared_store(reinterpret_cast<Chunk*>(row + 4 * threadIdx.x + 1), Chunk{});
}

FT_GLOBAL void two_stores(const Args) {
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x / 2, 1.f);
}

FT_GLOBAL void store_after_load(const Args a) {  // the next round overwrites what others still read
  FT_SHARED_ARRAY(float, row, 64);
  for (int round = 0; round < 2; ++round) {
    shared_store(row + threadIdx.x, load_scalar(a.in + threadIdx.x));
    block_barrier();
    store_scalar(a.out + threadIdx.x, shared_load(row + (threadIdx.x + 32) % 64));
  }
}

FT_GLOBAL void warp_barrier_missing(const Args a) {  // a shuffle orders no memory
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x, load_scalar(a.in + threadIdx.x));
  shuffle_xor(1.f, 1);
  store_scalar(a.out + threadIdx.x, shared_load(row + (threadIdx.x ^ 1)));
}

FT_GLOBAL void warp_barrier_there(const Args a) {
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x, load_scalar(a.in + threadIdx.x));
  warp_barrier();
  store_scalar(a.out + threadIdx.x, shared_load(row + (threadIdx.x ^ 1)));
}

FT_GLOBAL void atomic_sum(const Args a) {
  FT_SHARED_ARRAY(uint32_t, sum, 1);
  if (threadIdx.x == 0) shared_store(sum, 0u);
  block_barrier();
  shared_atomic_add(sum, threadIdx.x);
  block_barrier();
  store_scalar(a.out + threadIdx.x, static_cast<float>(shared_load(sum)));
}

FT_GLOBAL void atomic_against_load(const Args a) {
  FT_SHARED_ARRAY(uint32_t, sum, 1);
  if (threadIdx.x == 0) shared_store(sum, 0u);
  block_barrier();
  shared_atomic_add(sum, threadIdx.x);
  store_scalar(a.out + threadIdx.x, static_cast<float>(shared_load(sum)));
}

// ---- cp.async -----------------------------------------------------------------------------------

FT_GLOBAL void copy_not_waited(const Args a) {
  FT_SHARED_ARRAY(float, row, 64);
  copy_async<4>(row + threadIdx.x, a.in + threadIdx.x);
  copy_async_commit();
  store_scalar(a.out + threadIdx.x, shared_load(row + threadIdx.x));
}

FT_GLOBAL void copy_group_not_waited(const Args a) {  // the second of two groups is under way
  FT_SHARED_ARRAY(float, row, 128);
  for (int i = 0; i < 2; ++i) {
    copy_async<4>(row + 64 * i + threadIdx.x, a.in + threadIdx.x);
    copy_async_commit();
  }
  copy_async_wait<1>();
  shared_load(row + threadIdx.x);
  shared_load(row + 64 + threadIdx.x);
}

FT_GLOBAL void copy_without_barrier(const Args a) {  // own copies have come, others' maybe not
  FT_SHARED_ARRAY(float, row, 64);
  copy_async<4>(row + threadIdx.x, a.in + threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
  store_scalar(a.out + threadIdx.x, shared_load(row + threadIdx.x / 2));
}

FT_GLOBAL void copy_over_what_is_read(const Args a) {
  FT_SHARED_ARRAY(float, row, 64);
  for (int i = 0; i < 2; ++i) {
    copy_async<4>(row + threadIdx.x, a.in + threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    store_scalar(a.out + threadIdx.x, shared_load(row + (threadIdx.x + 1) % 64));
  }
}

FT_GLOBAL void copy_outside(const Args a) {
  FT_SHARED_ARRAY(float, row, 256);
  copy_async<16>(row + 4 * threadIdx.x, a.in + 4 * threadIdx.x);
}

FT_GLOBAL void copy_misaligned(const Args a) {
  FT_SHARED_ARRAY(float, row, 256);
  copy_async<16>(row + 4 * threadIdx.x, a.in + 1);
}

// ---- where threads meet -------------------------------------------------------------------------

FT_GLOBAL void named_barriers(const Args a) {  // warp 0 produces, warp 1 consumes; arrive frees
  FT_SHARED_ARRAY(float, slot, 32);
  const int lane = lane_index();
  for (int i = 0; i < 3; ++i) {
    if (warp_index() == 0) {
      if (i > 0) barrier_sync(2, 64);
      shared_store(slot + lane, static_cast<float>(i));
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      store_scalar(a.out + lane, shared_load(slot + 31 - lane));
      if (i < 2) barrier_arrive(2, 64);
    }
  }
}

FT_GLOBAL void named_barrier_forgotten(const Args a) {  // the slot is written before it is free
  FT_SHARED_ARRAY(float, slot, 32);
  for (int i = 0; i < 3; ++i) {
    if (warp_index() == 0) {
      shared_store(slot + lane_index(), static_cast<float>(i));
      barrier_arrive(1 + i, 64);
    } else {
      barrier_sync(1 + i, 64);
      store_scalar(a.out + lane_index(), shared_load(slot + 31 - lane_index()));
    }
  }
}

FT_GLOBAL void two_barriers(const Args) {
  if (warp_index() == 0) {
    barrier_sync(1, 64);
  } else {
    barrier_sync(2, 64);
  }
}

FT_GLOBAL void barrier_counts(const Args) { barrier_sync(1, warp_index() == 0 ? 64 : 32); }

FT_GLOBAL void vote_left(const Args) {
  if (threadIdx.x == 40) return;
  any_lane(true);
}

FT_GLOBAL void mma_left(const Args) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane_index() < 31) mma(d, a, b, bf16{});
}

FT_GLOBAL void load_between(const Args a) {  // the input's rows have 6 elements, 8 apart
  store_scalar(a.out + threadIdx.x, load_scalar(a.in + 2 * threadIdx.x));
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
                           {"never_written", never_written},
                           {"shared_outside", shared_outside},
                           {"shared_misaligned", shared_misaligned},
                           {"two_stores", two_stores},
                           {"store_after_load", store_after_load},
                           {"warp_barrier_missing", warp_barrier_missing},
                           {"warp_barrier_there", warp_barrier_there},
                           {"atomic_sum", atomic_sum},
                           {"atomic_against_load", atomic_against_load},
                           {"copy_not_waited", copy_not_waited},
                           {"copy_group_not_waited", copy_group_not_waited},
                           {"copy_without_barrier", copy_without_barrier},
                           {"copy_over_what_is_read", copy_over_what_is_read},
                           {"copy_outside", copy_outside},
                           {"copy_misaligned", copy_misaligned},
                           {"named_barriers", named_barriers},
                           {"named_barrier_forgotten", named_barrier_forgotten},
                           {"two_barriers", two_barriers},
                           {"barrier_counts", barrier_counts},
                           {"vote_left", vote_left},
                           {"mma_left", mma_left},
                           {"load_between", load_between}};

// ---- launches that a card refuses ---------------------------------------------------------------

FT_GLOBAL void with_static_array(const Args a) {
  FT_SHARED_ARRAY(float, row, 64);
  shared_store(row + threadIdx.x, load_scalar(a.in + threadIdx.x));
  store_scalar(a.out + threadIdx.x, shared_load(row + threadIdx.x));
}

constexpr int64_t kWithoutAsking = 48 * 1024;
const void* const kStatic = reinterpret_cast<const void*>(with_static_array);

void start_with(int block, int64_t shared, const Args& args) {
  start("with_static_array", with_static_array, 1, block, shared, nullptr, args);
}

// Each leaves `launch` out, which would see to it.
void refused(const std::string& name, const Args& args) {
  const char* const kernel = "with_static_array";
  if (name == "limit_not_raised") start_with(64, kWithoutAsking, args);
  if (name == "limit_raised") {
    set_dynamic_limit(kernel, kStatic, kWithoutAsking + 1024);
    start_with(64, kWithoutAsking, args);
  }
  if (name == "limit_raised_in_launch") {
    launch(kernel, with_static_array, 1, 64, kWithoutAsking, nullptr, args);
  }
  if (name == "limit_changed") {
    set_dynamic_limit(kernel, kStatic, kWithoutAsking + 1024);
    set_dynamic_limit(kernel, kStatic, kWithoutAsking + 2048);
  }
  if (name == "limit_too_high") {
    set_dynamic_limit(kernel, kStatic, max_shared_memory(kernel) - 255);
  }
  if (name == "too_much_in_launch") {
    launch(kernel, with_static_array, 1, 64, max_shared_memory(kernel), nullptr, args);
  }
  if (name == "block_too_large") start_with(128, 0, args);
  if (name == "grid_too_large") {
    start(kernel, with_static_array, max_grid() + 1, 64, 0, nullptr, args);
  }
}

}  // namespace
}  // namespace ft::cuda

// A launch by `name`, of a kernel that the compiler gave so many static bytes (−1: nobody knows),
// registers and threads of a block; what was reported goes to `message`.
extern "C" __attribute__((visibility("default"))) void ft_simt_refused(const char* name,
                                                                       int64_t static_shared,
                                                                       int registers, int threads,
                                                                       const float* in, float* out,
                                                                       char* message) {
  using namespace ft;
  message[0] = 0;
  Dl_info found{};
  dladdr(cuda::kStatic, &found);
  const int64_t offset =
      static_cast<const char*>(cuda::kStatic) - static_cast<const char*>(found.dli_fbase);
  if (static_shared >= 0) ft_simt_set_resources(offset, static_shared, registers, threads);
  simt::allow(in, 64 * 4, false);
  simt::allow(out, 64 * 4, true);
  const simt::AllowedUntilHere ends_here;
  try {
    cuda::refused(name, {in, out});
  } catch (const std::exception& error) { std::snprintf(message, 512, "%s", error.what()); }
}

// Runs a case on two blocks of 64 threads; what was reported goes to `message`.
extern "C" __attribute__((visibility("default"))) int ft_simt_bug(const char* name, const float* in,
                                                                  float* out, char* message) {
  using namespace ft;
  message[0] = 0;
  if (std::string(name) == "load_between") {
    simt::allow({in, 4, 2, {8, 6}, {32, 4}}, false);
  } else {
    simt::allow(in, 64 * 4, false);
  }
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
