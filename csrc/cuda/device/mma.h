// Tensor cores: ldmatrix and mma.sync, for sm_80 and later. Fragments of a warp, lane = 4·g + t:
//   A (16 × 16, 16-bit)  a[0] row g, a[1] row g + 8, columns 2t and 2t + 1; a[2], a[3]: 8 columns
//   on B (16 × 8)           b[0] rows 2t and 2t + 1, b[1] 8 rows on; column g C, D (16 × 8) d[0],
//   d[1] row g, columns 2t and 2t + 1; d[2], d[3] row g + 8 tf32 (16 × 8 by 8 × 8): a[0] row g,
//   a[1] row g + 8, column t; a[2], a[3] column t + 4;
//                        b[0] row t, b[1] row t + 4; column g
// D's layout is A's of two neighbouring 8-column tiles: P = softmax(S) never leaves registers.
#pragma once
#include "cuda/device/platform.h"
#include "cuda/device/vector.h"

namespace ft::cuda {

#if defined(FT_SIMT)
template <int kCount>
FT_DEVICE void load_matrices(uint32_t (&r)[kCount], const void* row) {
  simt::load_matrices(r, kCount, false, row);
}
template <int kCount>
FT_DEVICE void load_matrices_transposed(uint32_t (&r)[kCount], const void* row) {
  simt::load_matrices(r, kCount, true, row);
}
FT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  simt::mma(simt::Element::f16, d, a, b);
}
FT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  simt::mma(simt::Element::bf16, d, a, b);
}
FT_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::Element::tf32, d, a, b);
}
// To the nearest of tf32's 10 stored bits, ties away from zero.
FT_DEVICE uint32_t to_tf32(float x) { return (simt::float_to_bits(x) + 0x1000u) & 0xffffe000u; }
#else
// One, two or four 8 × 8 matrices of 16-bit elements: lane 8·m + r gives the address of row r of
// matrix m (16 bytes, aligned). r[m] holds columns 2t and 2t + 1 of row g of matrix m, or with
// `transposed` rows 2t and 2t + 1 of column g.
template <int kCount>
FT_DEVICE void load_matrices(uint32_t (&r)[kCount], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else {
    static_assert(kCount == 1);
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(at)
                 : "memory");
  }
}
template <int kCount>
FT_DEVICE void load_matrices_transposed(uint32_t (&r)[kCount], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else {
    static_assert(kCount == 1);
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(at)
                 : "memory");
  }
}
// d += a · b
FT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FT_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FT_DEVICE uint32_t to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}
#endif

// float = big + small to 2^-24. Three tf32 products (big·big, big·small, small·big) lose up to
// 2^-22 of a product, which shows in short sums; with small·small they lose no more than float's
// own. Source: CUTLASS, example 27 (3xTF32).
struct Split {
  uint32_t big, small;
};
FT_DEVICE Split split_tf32(float x) {
  const uint32_t big = to_tf32(x);
  return {big, to_tf32(x - bits_to_float(big))};
}

}  // namespace ft::cuda
