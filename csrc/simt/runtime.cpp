#include "simt/runtime.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "simt/block.h"
#include "simt/card.h"

namespace ft::simt {

thread_local Place place;

namespace {

// The elements of a tensor, nested dimensions only, the innermost last.
struct Range {
  uintptr_t begin, end;
  int64_t element;
  int dims;
  int64_t sizes[kTensorDims], strides[kTensorDims];
  bool writable;

  bool holds(uintptr_t at, int64_t bytes) const {
    if (at < begin || at + static_cast<uintptr_t>(bytes) > end) return false;
    int64_t rest = static_cast<int64_t>(at - begin);
    for (int d = 0; d < dims; ++d) {
      if (d == dims - 1 && strides[d] == element) return rest + bytes <= sizes[d] * element;
      rest -= std::min(rest / strides[d], sizes[d] - 1) * strides[d];
    }
    return rest + bytes <= element;
  }
};
// What a host thread's call may touch, and what the launch may that this thread carries out. A
// pointer each, as such storage is dear in a library.
thread_local std::unique_ptr<std::vector<Range>> allowed;
thread_local const std::vector<Range>* watched = nullptr;
int worker_limit = 0;  // 0: as many as there are cores
bool counting = false;
Traffic traffic;

const char* name_of(Meeting what) {
  switch (what) {
    case Meeting::none: break;
    case Meeting::shuffle: return "a shuffle";
    case Meeting::vote: return "a vote";
    case Meeting::matrix_load: return "an ldmatrix";
    case Meeting::mma: return "an mma";
    case Meeting::warp_barrier: return "a warp barrier";
    case Meeting::block_barrier: return "barrier";
  }
  return "nothing";
}

std::string describe(Meeting what, int detail) {
  std::string out = name_of(what);
  if (what == Meeting::block_barrier) out += " " + std::to_string(detail);
  return out;
}

}  // namespace

namespace {
thread_local std::unique_ptr<Block> current;  // a pointer, as such storage is dear in a library
}

Block& block() {
  if (!current) current = std::make_unique<Block>();
  return *current;
}

void report(const std::string& what) {
  throw std::runtime_error("simt: kernel " + block().kernel() + ", block " +
                           std::to_string(place.block.x) + ", thread " +
                           std::to_string(place.thread.x) + ": " + what);
}

// ---- fibers of a block --------------------------------------------------------------------------

Block::Block() : threads_(kMaxThreads), warps_(kMaxWarps), stacks_(kMaxThreads) {}

void fiber_main() {
  Block& b = block();
  try {
    (*b.body_)();
  } catch (...) { b.error_ = std::current_exception(); }
  b.threads_[static_cast<size_t>(b.now_)].state = State::done;
  --b.left_;
  b.leave_running();
}

void Block::start(const std::string& kernel, const std::function<void()>& body, int size,
                  int64_t dynamic_bytes, int64_t static_bytes, const Place& where) {
  kernel_ = kernel;
  body_ = &body;
  size_ = left_ = size;
  place = where;
  reverse_ = where.block.x % 2 != 0;
  error_ = nullptr;
  shared.start(size, dynamic_bytes, static_bytes);
  for (Barrier& b : barriers_) b = Barrier{};
  for (int w = 0; w < size / kLanes; ++w) warps_[static_cast<size_t>(w)] = Warp{};
  for (int i = 0; i < size; ++i) {
    Thread& t = threads_[static_cast<size_t>(i)];
    t.state = State::running;
    t.what = Meeting::none;
    prepare(t.fiber.context, stacks_.of(i), fiber_main);
  }
}

bool Block::can_run(int i) const {
  const Thread& t = threads_[static_cast<size_t>(i)];
  if (t.state == State::running) return true;
  if (t.state == State::done) return false;
  const Warp& w = warps_[static_cast<size_t>(i / kLanes)];
  if (w.meetings < t.meeting) return false;
  return w.barrier < 0 || barriers_[w.barrier].rounds >= w.barrier_round;
}

void Block::enter(int i, Context& from) {
  Thread& t = threads_[static_cast<size_t>(i)];
  t.state = State::running;
  now_ = i;
  place.thread = {static_cast<unsigned>(i), 0, 0};
  switch_to(from, t.fiber.context);
}

// Gives the CPU to another lane of the warp, or to the scheduler; comes back when this thread may
// go on.
void Block::leave_running() {
  const int me = now_, first = me / kLanes * kLanes;
  Context& from = threads_[static_cast<size_t>(me)].fiber.context;
  if (error_ == nullptr) {
    for (int k = 1; k < kLanes; ++k) {
      const int next = first + (reverse_ ? me - first + kLanes - k : me - first + k) % kLanes;
      if (next < size_ && can_run(next)) return enter(next, from);
    }
  }
  switch_to(from, scheduler_);
}

void Block::run() {
  const int warps = size_ / kLanes;
  while (left_ > 0) {
    bool moved = false;
    for (int k = 0; k < warps; ++k) {
      const int w = reverse_ ? warps - 1 - k : k;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = w * kLanes + (reverse_ ? kLanes - 1 - lane : lane);
        if (!can_run(i)) continue;
        moved = true;
        enter(i, scheduler_);
        if (error_ != nullptr) std::rethrow_exception(error_);
        lane = -1;  // whoever ran may have let lanes go on that were passed
      }
    }
    if (!moved) report_deadlock();
  }
}

void Block::report_deadlock() {
  std::vector<std::pair<std::string, int>> who;
  int done = 0, first = -1;
  for (int i = 0; i < size_; ++i) {
    const Thread& t = threads_[static_cast<size_t>(i)];
    if (t.state == State::done) {
      ++done;
      continue;
    }
    if (first < 0) first = i;
    const std::string what = describe(t.what, t.detail);
    bool known = false;
    for (auto& [name, count] : who) {
      if (name == what) {
        ++count;
        known = true;
      }
    }
    if (!known) who.emplace_back(what, 1);
  }
  place.thread.x = static_cast<unsigned>(first);
  std::string text = "deadlock: ";
  for (const auto& [name, count] : who) {
    text += std::to_string(count) + " threads wait at " + name + ", ";
  }
  report(text + std::to_string(done) + " have ended");
}

void Block::meet(Meeting what, int detail, void* brought, void (*act)(void* const*)) {
  const int me = now_;
  Thread& t = threads_[static_cast<size_t>(me)];
  Warp& w = warps_[static_cast<size_t>(me / kLanes)];
  t.what = what;
  t.detail = detail;
  if (w.arrived == 0) {
    w.first = me;
  } else {
    const Thread& other = threads_[static_cast<size_t>(w.first)];
    if (other.what != what || other.detail != detail) {
      report("comes to " + describe(what, detail) + " while thread " + std::to_string(w.first) +
             " of its warp waits at " + describe(other.what, other.detail));
    }
  }
  w.brought[me % kLanes] = brought;
  if (++w.arrived == kLanes) {
    w.arrived = 0;
    ++w.meetings;
    if (act != nullptr) act(w.brought);
    return;
  }
  t.meeting = w.meetings + 1;
  t.state = State::meeting;
  leave_running();
}

void Block::barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= kBarriers) report("there is no barrier " + std::to_string(id));
  if (threads % kLanes != 0 || threads < kLanes || threads > size_) {
    report("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  struct Arrival {
    int id, threads;
    bool wait;
  } arrival{id, threads, wait};
  // The last lane arrives for the whole warp, since barriers count warps.
  meet(Meeting::block_barrier, id, &arrival, [](void* const* all) {
    const Arrival& a = *static_cast<Arrival*>(all[0]);
    for (int lane = 1; lane < kLanes; ++lane) {
      const Arrival& b = *static_cast<Arrival*>(all[lane]);
      if (b.threads != a.threads || b.wait != a.wait) {
        report("lanes of a warp use barrier " + std::to_string(a.id) + " differently");
      }
    }
    block().arrive(block().now() / kLanes, a.id, a.threads, a.wait);
  });
  // The lane that arrived for all was not stopped by the meeting; it waits here like the others.
  const Warp& w = warps_[static_cast<size_t>(now_ / kLanes)];
  if (w.barrier >= 0 && barriers_[w.barrier].rounds < w.barrier_round) {
    Thread& t = threads_[static_cast<size_t>(now_)];
    t.meeting = w.meetings;
    t.state = State::meeting;
    leave_running();
  }
}

void Block::arrive(int warp, int id, int threads, bool wait) {
  Barrier& b = barriers_[id];
  Warp& w = warps_[static_cast<size_t>(warp)];
  if (b.arrived == 0) {
    b.expected = threads;
    b.clock = Clock{};
  } else if (b.expected != threads) {
    report("barrier " + std::to_string(id) + " of " + std::to_string(threads) +
           " threads, which others use with " + std::to_string(b.expected));
  }
  if (counting) traffic.barrier();
  b.clock.join(shared.clock(warp));
  b.arrived += kLanes;
  if (wait) {
    b.waiting |= 1u << warp;
    w.barrier = id;
    w.barrier_round = b.rounds + 1;
  } else {
    shared.tick(warp);
  }
  if (b.arrived < b.expected) return;
  for (int i = 0; i < kMaxWarps; ++i) {
    if (!(b.waiting >> i & 1)) continue;
    shared.clock(i).join(b.clock);
    shared.tick(i);
  }
  b.arrived = 0;
  b.waiting = 0;
  ++b.rounds;
}

namespace {
void add(Traffic& sum, const Traffic& more) {
  sum.load_requests += more.load_requests;
  sum.load_sectors += more.load_sectors;
  sum.store_requests += more.store_requests;
  sum.store_sectors += more.store_sectors;
  sum.barriers += more.barriers;
  sum.shuffles += more.shuffles;
}
}  // namespace

// ---- launching ----------------------------------------------------------------------------------

void launch(const std::string& name, const void* function, int64_t grid, int size, int64_t shared,
            const std::function<void()>& kernel) {
  check_launch(name, function, grid, size, shared);
  if (launch_only()) return;
  // What a kernel declares is no less than what the compiler keeps of it, if that is known.
  const int64_t room =
      resources_of(function).known ? INT64_MAX : shared_limit_of(function) - shared;
  Place where{{0, 0, 0},
              {0, 0, 0},
              {static_cast<unsigned>(size), 1, 1},
              {static_cast<unsigned>(grid), 1, 1}};
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;  // of the first block that has one, whichever thread ran it
  int64_t where_error = grid;
  const std::vector<Range>* const these = allowed.get();
  const auto work = [&] {
    watched = these;
    Block& b = block();
    for (int64_t i = next++; i < grid; i = next++) {
      where.block.x = 0;
      Place here = where;
      here.block.x = static_cast<unsigned>(i);
      try {
        b.start(name, kernel, size, shared, room, here);
        if (counting) b.traffic.start(size);
        b.run();
        if (counting) {
          const std::lock_guard<std::mutex> lock(mutex);
          add(traffic, b.traffic.finish());
        }
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (i < where_error) {
          error = std::current_exception();
          where_error = i;
        }
        next = grid;
      }
    }
  };
  int workers =
      worker_limit > 0 ? worker_limit : static_cast<int>(std::thread::hardware_concurrency());
  if (workers > grid) workers = static_cast<int>(grid);
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (error) std::rethrow_exception(error);
}

// ---- what kernels call --------------------------------------------------------------------------

void allow(const Elements& e, bool writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(e.begin);
  Range r{at, at, e.element, 0, {}, {}, writable};
  int64_t last = 0;
  int order[kTensorDims], kept = 0;
  for (int d = 0; d < e.dims; ++d) {
    if (e.sizes[d] == 0) return;
    if (e.sizes[d] == 1 || e.strides[d] == 0) continue;
    last += (e.sizes[d] - 1) * e.strides[d];
    order[kept++] = d;
  }
  std::sort(order, order + kept, [&](int a, int b) { return e.strides[a] > e.strides[b]; });
  for (int i = 0; i < kept; ++i) {
    const int64_t size = e.sizes[order[i]], stride = e.strides[order[i]];
    if (r.dims > 0 && r.strides[r.dims - 1] == size * stride) {  // one run with the one before
      r.sizes[r.dims - 1] *= size;
      r.strides[r.dims - 1] = stride;
    } else {
      r.sizes[r.dims] = size;
      r.strides[r.dims++] = stride;
    }
  }
  r.end = at + static_cast<uintptr_t>(last + e.element);
  int64_t within = e.element;  // what the inner dimensions span
  for (int d = r.dims - 1; d >= 0; --d) {
    if (r.strides[d] < within) {  // windows that overlap: only their outermost ends are known
      r.dims = 1;
      r.sizes[0] = (last + e.element) / e.element;
      r.strides[0] = e.element;
      break;
    }
    within += (r.sizes[d] - 1) * r.strides[d];
  }
  if (!allowed) allowed = std::make_unique<std::vector<Range>>();
  allowed->push_back(r);
}

void allow(const void* begin, int64_t bytes, bool writable) {
  allow(Elements{begin, 1, 1, {bytes}, {1}}, writable);
}

AllowedUntilHere::~AllowedUntilHere() {
  if (allowed) allowed->clear();
}

namespace {
void check_range(const void* p, int64_t bytes, bool write, const char* kind) {
  if (watched == nullptr || watched->empty()) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  bool readable = false;
  for (const Range& r : *watched) {
    if (!r.holds(at, bytes)) continue;
    if (!write || r.writable) return;
    readable = true;
  }
  report(readable ? "store to an input" : std::string(kind) + " outside the call's tensors");
}

void check_alignment(const void* p, int64_t bytes, const char* kind) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0) return;
  report(std::string("misaligned ") + kind + " of " + std::to_string(bytes) + " bytes");
}
}  // namespace

namespace {
void count(const void* p, int64_t bytes, bool write) {
  if (!counting) return;
  block().traffic.access(block().now(), reinterpret_cast<uintptr_t>(p), bytes, write);
}
}  // namespace

void check_access(const void* p, int64_t bytes, bool write) {
  const char* kind = write ? "store" : "load";
  check_alignment(p, bytes, kind);
  check_range(p, bytes, write, kind);
  count(p, bytes, write);
}

void meet(Meeting what, int detail, void* brought, void (*act)(void* const*)) {
  block().meet(what, detail, brought, act);
}

void warp_barrier() {
  meet(Meeting::warp_barrier, 0, nullptr,
       [](void* const*) { block().shared.tick(block().now() / kLanes); });
}
void barrier_sync(int id, int threads) { block().barrier(id, threads, true); }
void barrier_arrive(int id, int threads) { block().barrier(id, threads, false); }
void block_barrier() { block().barrier(0, block().size(), true); }

uint32_t shuffle_bits(uint32_t value, int from_lane) {
  struct Lane {
    uint32_t value, result;
    int from;
  } mine{value, 0, from_lane};
  meet(Meeting::shuffle, 0, &mine, [](void* const* all) {
    if (counting) block().traffic.shuffle();
    for (int lane = 0; lane < kLanes; ++lane) {
      Lane& l = *static_cast<Lane*>(all[lane]);
      if (l.from < 0 || l.from >= kLanes) report("shuffle from lane " + std::to_string(l.from));
      l.result = static_cast<Lane*>(all[l.from])->value;
    }
  });
  return mine.result;
}

uint32_t ballot(bool vote) {
  struct Lane {
    bool vote;
    uint32_t result;
  } mine{vote, 0};
  meet(Meeting::vote, 0, &mine, [](void* const* all) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      bits |= static_cast<uint32_t>(static_cast<Lane*>(all[lane])->vote) << lane;
    }
    for (int lane = 0; lane < kLanes; ++lane) static_cast<Lane*>(all[lane])->result = bits;
  });
  return mine.result;
}

void* static_shared(const void* key, const char* name, int64_t bytes) {
  return block().shared.named(key, name, bytes);
}
void* dynamic_shared_memory() { return block().shared.dynamic(); }
void shared_read(const void* at, int64_t bytes) { block().shared.read(block().now(), at, bytes); }
void shared_write(const void* at, int64_t bytes) { block().shared.write(block().now(), at, bytes); }

uint32_t atomic_add(uint32_t* global, uint32_t value) {
  check_access(global, 4, true);
  return std::atomic_ref<uint32_t>(*global).fetch_add(value);
}
uint32_t shared_atomic_add(uint32_t* shared, uint32_t value) {
  block().shared.atomic(block().now(), shared, 4);
  const uint32_t before = *shared;  // the block's fibers take turns
  *shared = before + value;
  return before;
}
void memory_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

void copy_async(void* shared, const void* global, int bytes, int valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    report("cp.async of " + std::to_string(bytes) + " bytes");
  }
  if (valid > 0) {
    check_alignment(global, bytes, "cp.async");
    check_range(global, valid, false, "cp.async");
    count(global, valid, false);
  }
  block().shared.copy(block().now(), shared, global, bytes, valid);
}
void copy_async_commit() { block().shared.commit(block().now()); }
void copy_async_wait(int groups_left) { block().shared.wait(block().now(), groups_left); }

}  // namespace ft::simt

extern "C" __attribute__((visibility("default"))) void ft_simt_set_workers(int workers) {
  ft::simt::worker_limit = workers;
}
// Begins to count (1), or stops and gives the counts (0).
extern "C" __attribute__((visibility("default"))) void ft_simt_count(int begin, int64_t* counts) {
  using namespace ft::simt;
  if (begin) {
    traffic = Traffic{};
  } else {
    const int64_t now[] = {traffic.load_requests, traffic.load_sectors, traffic.store_requests,
                           traffic.store_sectors, traffic.barriers,     traffic.shuffles};
    std::copy(now, now + 6, counts);
  }
  counting = begin != 0;
}
