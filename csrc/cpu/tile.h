// Register tiles for matrix products: packing into panels, and the micro-kernel that multiplies a
// block of A rows by one panel. After Goto and van de Geijn, Anatomy of high-performance matrix
// multiplication (2008); sizes here: MR × NR accumulators fill the vector registers, so that each
// loaded B vector feeds MR fused multiply-adds and each broadcast A element feeds NR / W.
//
// Everything is counted in 32-bit units. A unit is one float (`Float`), or a pair of bf16 along the
// summed dimension (`BfPair`, where the CPU has vdpbf16ps); packing and loops are the same for
// both. cpu/amx.h has a third, of whose pairs a product takes whole tiles.
#pragma once
#include "cpu/vec.h"

namespace ft::FT_ISA {

constexpr int NV = 2;       // vectors in a panel's row
constexpr int NR = NV * W;  // columns of a panel
#if defined(__AVX512F__)
constexpr int MR = 14;  // 28 accumulators + 2 of B + 1 broadcast of 32 registers
#else
constexpr int MR = 6;  // 12 + 2 + 1 of 16
#endif

// Units of the summed dimension in one A block: also the longest chain of float additions. Longer
// ones are a percent or two faster and break the number contract (256: at 200 elements).
constexpr int kDepth = 128;
constexpr int kBlockRows = MR * (84 / MR);  // rows of an A block, some 48 KB: it stays in L2

struct Float {
  static constexpr int elements = 1;  // of the summed dimension per unit
  static constexpr int step = 1;      // units that a product takes at once: depths are whole steps
  static constexpr int rows = MR;     // of a register tile
  static constexpr int depth = kDepth;
  using Vectors = Float;  // the unit where vectors are multiplied
  struct Registers {};    // what a thread holds while it multiplies
  static FT_INLINE vf fma(vf a, vf b, vf c) { return FT_ISA::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct BfPair {
  static constexpr int elements = 2, step = 1, rows = MR, depth = kDepth;
  using Vectors = BfPair;
  using Registers = Float::Registers;
  static FT_INLINE vf fma(vf a, vf b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// ---- transposition of W × W units -------------------------------------------------------------

#if defined(__AVX512F__)
FT_INLINE void transpose(vi (&r)[W]) {
  __m512i t[16], u[16];
#  pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
  }
#  pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#  pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // u[4i+j] holds column 4L+j of rows 4i…4i+3 in its 128-bit lane L
    const __m512i even0 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i even1 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i odd1 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = (vi)_mm512_shuffle_i32x4(even0, even1, 0x88);
    r[8 + j] = (vi)_mm512_shuffle_i32x4(even0, even1, 0xdd);
    r[4 + j] = (vi)_mm512_shuffle_i32x4(odd0, odd1, 0x88);
    r[12 + j] = (vi)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#elif defined(__AVX2__)
FT_INLINE void transpose(vi (&r)[W]) {
  __m256i t[8], u[8];
#  pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
  }
#  pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#  pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = (vi)_mm256_permute2x128_si256(u[j], u[4 + j], 0x20);
    r[4 + j] = (vi)_mm256_permute2x128_si256(u[j], u[4 + j], 0x31);
  }
}
#else
FT_INLINE void transpose(vi (&r)[W]) {
  vi out[W];
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) out[i][j] = r[j][i];
  }
  for (int i = 0; i < W; ++i) r[i] = out[i];
}
#endif

// ---- units ------------------------------------------------------------------------------------

// W units from `n` consecutive elements of the summed dimension (zeros after them).
template <class Unit, class T>
FT_INLINE vi load_units(const T* p, int64_t n) {
  if constexpr (Unit::elements == 1) {
    return n >= W ? (vi)load(p) : (vi)load(p, static_cast<int>(n));
  } else {
#if defined(__AVX512BF16__)
    if (n >= 2 * W) return (vi)_mm512_loadu_si512(p);
    return (vi)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
#endif
  }
}

// W units side by side: column j of the rows k (and k + 1, for pairs) of a row-major matrix, where
// row k + 1 exists if `both`, and n columns do.
template <class Unit, class T>
FT_INLINE vi load_unit_columns(const T* row, [[maybe_unused]] const T* next,
                               [[maybe_unused]] bool both, int64_t n) {
  if constexpr (Unit::elements == 1) {
    return n >= W ? (vi)load(row) : (vi)load(row, static_cast<int>(n));
  } else {
#if defined(__AVX512BF16__)
    const __mmask16 mask = n >= W ? 0xffff : first(static_cast<int>(n));
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (!both) return (vi)low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next));
    return (vi)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#endif
  }
}

FT_INLINE void store_units(float* p, vi x) { store(p, (vf)x); }

// In whole steps. Behind the last element are zeros.
template <class Unit>
FT_INLINE int64_t units_of(int64_t elements) {
  constexpr int64_t step = int64_t{Unit::elements} * Unit::step;
  return (elements + step - 1) / step * Unit::step;
}

// ---- packing ----------------------------------------------------------------------------------

// Panel [units][NR] of B = Wᵀ: columns are `columns` (≤ NR) rows of W, `depth` elements each.
template <class Unit, class T>
inline void pack_panel_transposed(const T* w, int64_t row_stride, int64_t columns, int64_t depth,
                                  float* panel) {
  constexpr int64_t step = W * Unit::elements;
  const int64_t units = units_of<Unit>(depth);
  for (int64_t k = 0; k < depth; k += step) {
    const int64_t unit = k / Unit::elements;
    const int64_t count = units - unit < W ? units - unit : W;
    for (int v = 0; v < NV; ++v) {
      vi r[W];
      const int64_t have = columns - v * W;
      for (int i = 0; i < W; ++i) {
        r[i] = i < have ? load_units<Unit>(w + (v * W + i) * row_stride + k, depth - k) : vi{};
      }
      transpose(r);
      float* out = panel + unit * NR + v * W;
      if (count == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store_units(out + i * NR, r[i]);
      } else {
        for (int i = 0; i < count; ++i) store_units(out + i * NR, r[i]);
      }
    }
  }
}

// Panel [units][NR] of a row-major B: `columns` (≤ NR) columns of `depth` rows.
template <class Unit, class T>
inline void pack_panel(const T* b, int64_t row_stride, int64_t columns, int64_t depth,
                       float* panel) {
  for (int64_t k = 0; k < depth; k += Unit::elements, panel += NR) {
    const T* row = b + k * row_stride;
    for (int v = 0; v < NV; ++v) {
      const int64_t have = columns - v * W;
      const vi x = have > 0 ? load_unit_columns<Unit>(row + v * W, row + row_stride + v * W,
                                                      k + 1 < depth, have)
                            : vi{};
      store_units(panel + v * W, x);
    }
  }
  if constexpr (Unit::step > 1) {
    const int64_t rest = units_of<Unit>(depth) - (depth + Unit::elements - 1) / Unit::elements;
    std::memset(panel, 0, sizeof(float) * NR * rest);
  }
}

// ---- micro-kernel -----------------------------------------------------------------------------

// Where the micro-kernel finds element (i, k) of A, in units. Addresses are spelled so that four
// rows share one pointer: fourteen pointers would not fit the general registers.
template <int stride>
struct Rows {  // a[i * stride + k]
  const float* a;
  FT_INLINE vf at(int i, int64_t k) const { return splat(a[i * stride + k]); }
  FT_INLINE Rows below(int64_t rows) const { return {a + rows * stride}; }
  FT_INLINE const char* data() const { return reinterpret_cast<const char*>(a); }
  FT_INLINE int64_t bytes_between() const { return int64_t{stride} * sizeof(float); }
};
template <int stride>
struct Columns {  // transposed: a[k * stride + i]
  const float* a;
  FT_INLINE vf at(int i, int64_t k) const { return splat(a[k * stride + i]); }
  FT_INLINE Columns below(int64_t rows) const { return {a + rows}; }
};
struct InPlace {  // the matrix itself, `stride` bytes from row to row
  const char* a;
  int64_t stride;
  FT_INLINE vf at(int i, int64_t k) const {
    float x;
    std::memcpy(&x, a + (i / 4 * 4) * stride + (i % 4) * stride + k * 4, sizeof(x));
    return splat(x);
  }
  FT_INLINE InPlace below(int64_t rows) const { return {a + rows * stride, stride}; }
  FT_INLINE const char* data() const { return a; }
  FT_INLINE int64_t bytes_between() const { return stride; }
};

// What a row i of C becomes, of which `c` is a vector and x the product's.
struct StoreTo {
  FT_INLINE vf operator()(int, const float*, vf x) const { return x; }
};
struct AddTo {
  FT_INLINE vf operator()(int, const float* c, vf x) const { return x + load(c); }
};
struct AddToIf {
  bool accumulate;
  FT_INLINE vf operator()(int, const float* c, vf x) const { return accumulate ? x + load(c) : x; }
};
struct AddToScaled {
  const float* factor;  // of each row
  FT_INLINE vf operator()(int i, const float* c, vf x) const {
    return FT_ISA::fma(load(c), splat(factor[i]), x);
  }
};

// C[rows × nv·W] = into(A[rows × units] · panel), of which nv vectors are used.
template <class Unit, int rows, int nv, class A, class Into>
FT_INLINE void micro(int64_t units, const A& a, const float* panel, float* c, int64_t c_stride,
                     const Into& into) {
  vf acc[rows][nv];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) acc[i][v] = zero();
  }
  for (int64_t k = 0; k < units; ++k) {
    vf b[nv];
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) b[v] = load(panel + k * NR + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const vf x = a.at(i, k);
#pragma GCC unroll 2
      for (int v = 0; v < nv; ++v) acc[i][v] = Unit::fma(x, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) {
      float* at = c + i * c_stride + v * W;
      store(at, into(i, at, acc[i][v]));
    }
  }
}

// The same for any number of rows up to MR.
template <class Unit, int nv, int rows = MR, class A, class Into>
FT_INLINE void micro_rows(int n, int64_t units, const A& a, const float* panel, float* c,
                          int64_t c_stride, const Into& into) {
  if constexpr (rows > 0) {
    if (n == rows) return micro<Unit, rows, nv>(units, a, panel, c, c_stride, into);
    micro_rows<Unit, nv, rows - 1>(n, units, a, panel, c, c_stride, into);
  }
}

}  // namespace ft::FT_ISA
