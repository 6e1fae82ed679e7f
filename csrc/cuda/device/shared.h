// Shared memory. It is read and written through these functions only, so that simt sees each
// access: whether it lies inside an array, whether somebody wrote what is read, and whether a
// barrier lies between two threads' accesses.
#pragma once
#include "cuda/device/platform.h"

namespace ft::cuda {

#if defined(FT_SIMT)
// An array of a block: `T name[count]` as a pointer, aligned to 16 bytes.
#  define FT_SHARED_ARRAY(T, name, count)   \
    static const char ft_key_of_##name = 0; \
    T* const name =                         \
        static_cast<T*>(::ft::simt::static_shared(&ft_key_of_##name, #name, sizeof(T) * (count)))

// The launch's dynamic shared memory, aligned to 16 bytes.
template <class U>
U* dynamic_shared() {
  return static_cast<U*>(simt::dynamic_shared_memory());
}
template <class U>
FT_DEVICE U shared_load(const U* p) {
  simt::shared_read(p, sizeof(U));
  return *p;
}
template <class U>
FT_DEVICE void shared_store(U* p, const U& value) {
  simt::shared_write(p, sizeof(U));
  *p = value;
}
#else
#  define FT_SHARED_ARRAY(T, name, count)              \
    __shared__ __align__(16) T ft_array_##name[count]; \
    T* const name = ft_array_##name

template <class U>
FT_DEVICE U* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char ft_dynamic_shared[];
  return reinterpret_cast<U*>(ft_dynamic_shared);
}
template <class U>
FT_DEVICE U shared_load(const U* p) {
  return *p;
}
template <class U>
FT_DEVICE void shared_store(U* p, const U& value) {
  *p = value;
}
#endif

}  // namespace ft::cuda
