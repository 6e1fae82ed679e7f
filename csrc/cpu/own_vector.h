// std::vector with an allocator of this instruction set's namespace: the functions of a plain
// std::vector are weak symbols, of which the linker keeps one copy for all sets, and an older CPU
// would run into AVX-512 code.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace ft::FT_ISA {

template <class T>
struct OwnAllocator {
  using value_type = T;
  OwnAllocator() = default;
  template <class U>
  OwnAllocator(const OwnAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T))); }
  void deallocate(T* p, size_t) { ::operator delete(p); }
  bool operator==(const OwnAllocator&) const { return true; }
};

template <class T>
using OwnVector = std::vector<T, OwnAllocator<T>>;

}  // namespace ft::FT_ISA
