// What a launch asked of global memory, counted as the hardware does: a request is one load or
// store instruction of a warp, and moves as many 32-byte sectors as its lanes touch. The n-th
// access of each lane is taken for the same instruction, which it is unless lanes branch apart.
#pragma once
#include <cstddef>
#include <cstdint>
#include <set>
#include <vector>

namespace ft::simt {

struct Traffic {
  int64_t load_requests = 0, load_sectors = 0;
  int64_t store_requests = 0, store_sectors = 0;
  int64_t barriers = 0;  // of the block, counted once for each warp
  int64_t shuffles = 0;  // of a warp
};

// Of one block; added to the launch's when the block ends.
class TrafficCounter {
 public:
  void start(int threads);
  void access(int thread, uintptr_t at, int64_t bytes, bool store);
  void barrier() { ++own_.barriers; }
  void shuffle() { ++own_.shuffles; }
  Traffic finish() const;

 private:
  struct Warp {
    std::vector<std::set<uintptr_t>> sectors[2];  // by request; loads and stores
  };
  Traffic own_;
  std::vector<Warp> warps_;
  std::vector<std::size_t> made_[2];  // by thread: accesses so far
};

}  // namespace ft::simt
