// Runs a CUDA kernel's own source on the CPU, for tests on machines without a GPU. The threads of a
// block are fibers; the blocks of a grid are shared out over the machine's cores. csrc/cuda/device/
// takes its host twins from here. Reported, with kernel, block and thread:
//   global memory   an access outside the call's tensors, a store to an input, a misaligned access
//   shared memory   an access outside the block's arrays, a read of what nobody wrote, a read of a
//                   cp.async destination before its wait, a race between two barriers (shared.cpp)
//   the card        a launch that a card of the limits set would refuse (card.h)
//   synchronization a barrier, shuffle or mma that a thread has left for good or meets elsewhere, a
//                   deadlock, with who waits for what
// Odd blocks run their warps and lanes in reverse order, so that what depends on the order shows.
// A Hopper kernel's clusters, mbarriers, TMA and wgmma come with those kernels: an mbarrier is one
// more Meeting whose clock (shared.h) is taken at arrival, TMA a copy that completes at its wait.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define FT_GLOBAL
#define FT_DEVICE inline
#define __launch_bounds__(...)

namespace ft::simt {

struct Index {
  unsigned x, y, z;
};
struct Place {
  Index thread, block, block_size, grid_size;
};
extern thread_local Place place;  // of the CUDA thread that this CPU thread runs now

[[noreturn]] void report(const std::string& what);

// Runs `kernel`, which stands for the device function at `function`, for every block of the grid.
void launch(const std::string& name, const void* function, int64_t grid, int block, int64_t shared,
            const std::function<void()>& kernel);

// ---- the card (card.h) --------------------------------------------------------------------------

int64_t max_grid();           // small when a test says so, that kernels' loops over rows run
int64_t max_shared_memory();  // of a block; likewise, that rows don't fit
int multiprocessors();        // likewise, that a rule takes either side
int device();                 // another number for each card that a test sets

int64_t static_shared_memory(const void* function);
void set_dynamic_limit(const char* name, const void* function, int64_t bytes);

// ---- global memory ------------------------------------------------------------------------------

// A tensor that kernels may read, or write: its elements and nothing between or behind them. With
// none allowed, accesses are not checked.
constexpr int kTensorDims = 8;
struct Elements {
  const void* begin;
  int64_t element;                                   // its bytes
  int dims;                                          // outermost first
  int64_t sizes[kTensorDims], strides[kTensorDims];  // strides in bytes
};
void allow(const Elements& elements, bool writable);
void allow(const void* begin, int64_t bytes, bool writable);
struct AllowedUntilHere {
  ~AllowedUntilHere();
};
void check_access(const void* at, int64_t bytes, bool write);

template <class U>
U load(const void* p) {
  check_access(p, sizeof(U), false);
  U value;
  std::memcpy(&value, p, sizeof(U));
  return value;
}
template <class U>
void store(void* p, const U& value) {
  check_access(p, sizeof(U), true);
  std::memcpy(p, &value, sizeof(U));
}

// ---- where threads meet -------------------------------------------------------------------------

enum class Meeting : uint8_t { none, shuffle, vote, matrix_load, mma, warp_barrier, block_barrier };

constexpr int kLanes = 32;

// Waits until all lanes of the warp are at the same meeting; the last to come runs `act` on what
// they brought, by lane. `detail` must be the same for all, too.
void meet(Meeting what, int detail, void* brought, void (*act)(void* const*));

void warp_barrier();
// The hardware's barriers 0 … 15, among `threads` threads (whole warps). arrive does not wait.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void block_barrier();

uint32_t shuffle_bits(uint32_t value, int from_lane);
uint32_t ballot(bool vote);

// ---- shared memory ------------------------------------------------------------------------------

// The array that `key` stands for, one for each block; all threads that ask get the same.
void* static_shared(const void* key, const char* name, int64_t bytes);
void* dynamic_shared_memory();
void shared_read(const void* at, int64_t bytes);
void shared_write(const void* at, int64_t bytes);

uint32_t atomic_add(uint32_t* global, uint32_t value);
uint32_t shared_atomic_add(uint32_t* shared, uint32_t value);
void memory_fence();

// cp.async of `bytes`, of which the first `valid` come from `global` and the others are 0. The
// bytes arrive when the thread waits, and not before.
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int groups_left);

// ---- tensor cores (matrix.cpp) ------------------------------------------------------------------

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row);

enum class Element : uint8_t { f16, bf16, tf32 };
void mma(Element type, float* d, const uint32_t* a, const uint32_t* b);

// ---- numbers ------------------------------------------------------------------------------------

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Round to nearest even, NaN stays NaN (as the device's conversions do).
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t float_to_half(float);
float half_to_float(uint16_t);

}  // namespace ft::simt

#define threadIdx (::ft::simt::place.thread)
#define blockIdx (::ft::simt::place.block)
#define blockDim (::ft::simt::place.block_size)
#define gridDim (::ft::simt::place.grid_size)
