#include "simt/runtime.h"

#include <sys/mman.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#  include <ucontext.h>
#endif

namespace ft::simt {

Place place;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

// ---- fibers -------------------------------------------------------------------------------------
// A switch saves the registers that a call preserves and exchanges stacks. ucontext would make a
// system call for the signal mask each time, some ten times slower; it serves other processors.

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void ft_simt_switch(void** save, void* load);
asm(R"(
.text
.type ft_simt_switch, @function
ft_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ft_simt_switch, .-ft_simt_switch
)");

void switch_to(Context& from, Context& to) {
  ft_simt_switch(&from.stack_pointer, to.stack_pointer);
}

void prepare(Context& c, char* stack, void (*entry)()) {
  // As if `entry` had been called from address 0: the stack pointer is ≡ 8 modulo 16 on entry.
  void** top = reinterpret_cast<void**>(stack + kStack - 8);
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = kStack;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
#endif

enum class State { running, at_barrier, at_shuffle, done };

struct Warp {
  uint32_t slot[2][kWarp];  // values of the shuffle under way and of the one before
  int arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  Context context;
  State state = State::done;
  int64_t waits_for = 0;  // generation of its barrier or shuffle
};

struct Block {
  std::string kernel;
  const std::function<void()>* body = nullptr;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int size = 0, arrived = 0, now = 0;
  int64_t generation = 0;  // of the block's barrier
  std::exception_ptr error;
  char* stacks = nullptr;
  std::vector<char> shared;

  Block() {
    void* memory = mmap(nullptr, kStack * 1024, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(memory);
  }
  ~Block() { munmap(stacks, kStack * 1024); }
};

Block& block() {
  static Block b;
  return b;
}

struct Range {
  uintptr_t begin, end;
  bool writable;
};
std::vector<Range> ranges;
int64_t grid_limit = 2147483647, shared_limit = 99 * 1024;

[[noreturn]] void report(const std::string& what) {
  throw std::runtime_error("simt: kernel " + block().kernel + ", block " +
                           std::to_string(place.block.x) + ", thread " +
                           std::to_string(place.thread.x) + ": " + what);
}

void yield() {
  Block& b = block();
  switch_to(b.fibers[static_cast<size_t>(b.now)].context, b.scheduler);
}

void fiber_main() {
  Block& b = block();
  try {
    (*b.body)();
  } catch (...) { b.error = std::current_exception(); }
  b.fibers[static_cast<size_t>(b.now)].state = State::done;
  yield();
}

bool can_run(const Block& b, int i) {
  const Fiber& f = b.fibers[static_cast<size_t>(i)];
  switch (f.state) {
    case State::running: return true;
    case State::at_barrier: return b.generation > f.waits_for;
    case State::at_shuffle: return b.warps[static_cast<size_t>(i / kWarp)].generation > f.waits_for;
    case State::done: return false;
  }
  return false;
}

std::string who_waits(const Block& b) {
  int barrier = 0, shuffle = 0, done = 0, first = -1;
  for (int i = 0; i < b.size; ++i) {
    const State s = b.fibers[static_cast<size_t>(i)].state;
    barrier += s == State::at_barrier;
    shuffle += s == State::at_shuffle;
    done += s == State::done;
    if (first < 0 && s != State::done) first = i;
  }
  place.thread.x = static_cast<unsigned>(first);
  return "deadlock: " + std::to_string(barrier) + " threads wait at a barrier, " +
         std::to_string(shuffle) + " at a shuffle, " + std::to_string(done) + " have ended";
}

void run_block(Block& b, int64_t index) {
  place.block = {static_cast<unsigned>(index), 0, 0};
  b.arrived = 0;
  b.generation = 0;
  for (Warp& w : b.warps) w = Warp{};
  std::memset(b.shared.data(), 0xff, b.shared.size());
  for (int i = 0; i < b.size; ++i) {
    Fiber& f = b.fibers[static_cast<size_t>(i)];
    f.state = State::running;
    prepare(f.context, b.stacks + static_cast<size_t>(i) * kStack, fiber_main);
  }
  int left = b.size;
  while (left > 0) {
    bool moved = false;
    for (int k = 0; k < b.size; ++k) {
      const int i = index % 2 == 0 ? k : b.size - 1 - k;
      if (!can_run(b, i)) continue;
      moved = true;
      b.now = i;
      place.thread = {static_cast<unsigned>(i), 0, 0};
      b.fibers[static_cast<size_t>(i)].state = State::running;
      switch_to(b.scheduler, b.fibers[static_cast<size_t>(i)].context);
      if (b.error) {
        std::exception_ptr error = b.error;
        b.error = nullptr;
        std::rethrow_exception(error);
      }
      left -= b.fibers[static_cast<size_t>(i)].state == State::done;
    }
    if (!moved) report(who_waits(b));
  }
}

}  // namespace

void launch(const std::string& name, int64_t grid, int size, int64_t shared,
            const std::function<void()>& kernel) {
  Block& b = block();
  b.kernel = name;
  if (grid < 1 || grid > grid_limit) report("grid of " + std::to_string(grid) + " blocks");
  if (size < 1 || size > 1024) report("block of " + std::to_string(size) + " threads");
  if (shared > shared_limit) report(std::to_string(shared) + " bytes of shared memory");
  b.body = &kernel;
  b.size = size;
  b.fibers.resize(1024);
  b.warps.resize(1024 / kWarp);
  b.shared.resize(static_cast<size_t>(shared) + 16);
  place.block_size = {static_cast<unsigned>(size), 1, 1};
  place.grid_size = {static_cast<unsigned>(grid), 1, 1};
  for (int64_t i = 0; i < grid; ++i) run_block(b, i);
}

int64_t max_grid() { return grid_limit; }
int64_t max_shared_memory() { return shared_limit; }
void set_limits(int64_t grid, int64_t shared_memory) {
  grid_limit = grid;
  shared_limit = shared_memory;
}

void allow(const void* begin, int64_t bytes, bool writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  ranges.push_back({at, at + static_cast<uintptr_t>(bytes), writable});
}
AllowedUntilHere::~AllowedUntilHere() { ranges.clear(); }

void check_access(const void* p, int64_t bytes, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const char* kind = write ? "store" : "load";
  if (at % static_cast<uintptr_t>(bytes) != 0) {
    report(std::string("misaligned ") + kind + " of " + std::to_string(bytes) + " bytes");
  }
  if (ranges.empty()) return;
  bool readable = false;
  for (const Range& r : ranges) {
    if (at < r.begin || at + static_cast<uintptr_t>(bytes) > r.end) continue;
    if (!write || r.writable) return;
    readable = true;
  }
  report(readable ? "store to an input" : std::string(kind) + " outside the call's tensors");
}

void* dynamic_shared_memory() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(block().shared.data());
  return reinterpret_cast<void*>((at + 15) / 16 * 16);
}

void block_barrier() {
  Block& b = block();
  Fiber& f = b.fibers[static_cast<size_t>(b.now)];
  if (++b.arrived == b.size) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  f.waits_for = b.generation;
  f.state = State::at_barrier;
  yield();
}

uint32_t shuffle_xor_bits(uint32_t value, int offset) {
  Block& b = block();
  const int me = b.now;
  Warp& w = b.warps[static_cast<size_t>(me / kWarp)];
  const int64_t generation = w.generation;
  w.slot[generation & 1][me % kWarp] = value;
  const int lanes = b.size - me / kWarp * kWarp < kWarp ? b.size % kWarp : kWarp;
  if (lanes != kWarp) report("shuffle in a warp with lanes that don't exist");
  if (++w.arrived == lanes) {
    w.arrived = 0;
    ++w.generation;
  } else {
    Fiber& f = b.fibers[static_cast<size_t>(me)];
    f.waits_for = generation;
    f.state = State::at_shuffle;
    yield();
  }
  return w.slot[generation & 1][(me % kWarp) ^ offset];
}

uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 6.103515625e-05f) {  // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.f)));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) / 16777216.f;
    return sign ? -size : size;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace ft::simt

extern "C" __attribute__((visibility("default"))) void ft_simt_set_limits(int64_t grid,
                                                                          int64_t shared_memory) {
  ft::simt::set_limits(grid, shared_memory);
}
