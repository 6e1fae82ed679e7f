// The block that a CPU thread runs: its fibers, where they wait, and its shared memory.
#pragma once
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/runtime.h"
#include "simt/shared.h"
#include "simt/traffic.h"

namespace ft::simt {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kBarriers = 16;

enum class State : uint8_t { running, meeting, done };

struct Thread {
  Fiber fiber;
  State state = State::done;
  int64_t meeting = 0;  // the number of the meeting that it waits for
  Meeting what = Meeting::none;
  int detail = 0;
};

struct Warp {
  void* brought[kLanes];
  int arrived = 0, first = 0;  // lanes at the meeting under way; the lane that came first
  int64_t meetings = 0;        // completed so far
  int barrier = -1;            // the hardware barrier that the warp waits at
  int64_t barrier_round = 0;   // completions of it that the warp has seen coming
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads
  int64_t rounds = 0;             // completed
  uint32_t waiting = 0;           // warps
  Clock clock;                    // of all that arrived
};

class Block {
 public:
  Block();
  void start(const std::string& kernel, const std::function<void()>& body, int size,
             int64_t dynamic_bytes, int64_t static_bytes, const Place& where);
  void run();  // to the end of all threads

  int size() const { return size_; }
  int now() const { return now_; }
  const std::string& kernel() const { return kernel_; }

  void meet(Meeting what, int detail, void* brought, void (*act)(void* const*));
  void barrier(int id, int threads, bool wait);

  Shared shared;
  TrafficCounter traffic;  // used while somebody counts

 private:
  friend void fiber_main();
  bool can_run(int thread) const;
  void enter(int thread, Context& from);
  void leave_running();
  void arrive(int warp, int id, int threads, bool wait);
  [[noreturn]] void report_deadlock();

  std::string kernel_;
  const std::function<void()>* body_ = nullptr;
  Context scheduler_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  Stacks stacks_;
  int size_ = 0, now_ = 0, left_ = 0;
  bool reverse_ = false;
  std::exception_ptr error_;
};

Block& block();  // of this CPU thread

}  // namespace ft::simt
