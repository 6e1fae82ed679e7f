// A block's shared memory, and what is known of each two bytes of it: who wrote and who read them
// last, and whether a cp.async is on its way to them. Two accesses of which one writes are a race
// unless a barrier lies between them. Order is kept by vector clocks, one entry for each warp
// (barriers are met by whole warps, hence one entry serves its 32 lanes), after Flanagan and
// Freund, FastTrack, PLDI 2009. Shuffles, votes and mma order no memory, as in CUDA.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ft::simt {

struct Clock {
  std::array<uint32_t, 32> of_warp{};
  void join(const Clock& other) {
    for (size_t i = 0; i < of_warp.size(); ++i) {
      if (other.of_warp[i] > of_warp[i]) of_warp[i] = other.of_warp[i];
    }
  }
};

struct Access {
  int32_t thread = -1;  // −1: none
  uint32_t clock = 0;   // of the thread's warp
};

struct Cell {  // two bytes
  uint32_t block = 0;
  int32_t copier = -1;  // the thread whose cp.async is on its way here
  Access write;
  Access read[2];       // the last readers, of two warps
  bool atomic = false;  // the last write was an atomic addition
  bool many = false;    // read[0] stands for more than one lane of its warp
};

struct Copy {
  char* shared;
  const char* global;
  int bytes, valid;
  int64_t group;
};

class Shared {
 public:
  Shared();
  // A new block begins, whose arrays may take `static_bytes`.
  void start(int threads, int64_t dynamic_bytes, int64_t static_bytes);
  void* named(const void* key, const char* name, int64_t bytes);
  void* dynamic() { return base_; }
  void read(int thread, const void* at, int64_t bytes);
  void write(int thread, const void* at, int64_t bytes);
  void atomic(int thread, const void* at, int64_t bytes);
  void copy(int thread, void* shared, const void* global, int bytes, int valid);
  void commit(int thread);
  void wait(int thread, int groups_left);

  // Warps that synchronize: their clocks are joined by whoever runs the barrier.
  Clock& clock(int warp) { return clocks_[static_cast<size_t>(warp)]; }
  void tick(int warp) { ++clock(warp).of_warp[static_cast<size_t>(warp)]; }

 private:
  struct Array {
    const void* key;
    const char* name;
    int64_t begin, end;
  };
  int64_t offset_of(const void* at, int64_t bytes, const char* what) const;
  std::string name_of(int64_t offset) const;
  bool ordered(const Access& before, int thread) const;
  Cell& cell(int64_t offset);
  void check_write(int thread, int64_t offset, bool atomic);

  std::vector<char> memory_;
  char* base_;  // aligned as the hardware's shared memory is
  std::vector<Cell> cells_;
  std::vector<Array> arrays_;
  std::vector<Clock> clocks_;
  std::vector<std::vector<Copy>> copies_;  // by thread, in order of issue
  std::vector<int64_t> groups_;            // by thread: commits so far
  int64_t end_ = 0;                        // of what has been given out
  int64_t static_left_ = 0;                // bytes that arrays may yet take
  uint32_t block_ = 0;
};

}  // namespace ft::simt
