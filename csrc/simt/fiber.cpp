#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace ft::simt {

namespace { constexpr size_t kStack = 128 * 1024; }

#if defined(__x86_64__)
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
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

void prepare(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = kStack;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
#endif

Stacks::Stacks(int count) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  bytes_ = static_cast<size_t>(count) * (kStack + page);
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(of(i) - page, page, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, bytes_); }

char* Stacks::of(int thread) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return memory_ + static_cast<size_t>(thread) * (kStack + page) + page;
}

}  // namespace ft::simt
