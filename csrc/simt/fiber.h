// Fibers: a stack and the registers that a call preserves. ucontext would make a system call for
// the signal mask at each switch, some ten times slower; it serves processors other than x86-64.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#  include <ucontext.h>
#endif

namespace ft::simt {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t context;
};
#endif

struct Fiber {
  Context context;
};

void switch_to(Context& from, Context& to);
void prepare(Context& context, char* stack, void (*entry)());

// One stack for each thread of a block, with an unmapped page under each.
class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  char* of(int thread) const;

 private:
  char* memory_;
  size_t bytes_;
};

}  // namespace ft::simt
