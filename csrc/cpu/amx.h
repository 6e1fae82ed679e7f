// Products of bf16 by AMX, the matrix unit of Intel's server CPUs from Sapphire Rapids on: eight
// registers of 16 rows × 64 bytes, and an instruction that adds the product of two of them to a
// third, 16 × 16 floats, in 16 cycles: sixteen times the float multiply-adds of the same cycles.
// Its right operand is a panel as tile.h packs it for pairs; its left one is rows of pairs, such as
// a row-major matrix of bf16 itself. So a product by tiles differs from one by vectors in its
// register tile alone. Compiled with the kernels for avx512_bf16, used where isa() is amx.
#pragma once
#include "cpu/isa.h"
#include "cpu/tile.h"

#if defined(__AMX_BF16__)
namespace ft::FT_ISA {

constexpr int kTileRows = 16, kTileUnits = 16;
static_assert(W == kTileUnits && NV == 2);

inline bool has_amx() { return isa() == Isa::amx; }

// While it lives, this thread's tile registers are all 16 × 64 bytes. Afterwards they are as a new
// thread's, which others may count on, and cost nothing when threads are switched.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// As BfPair, of which a product takes whole tiles. Sums of bf16 products stay in registers for
// longer: what C's way to L2 and back costs counts more here, and rounding to bf16 hides theirs.
struct BfTile : BfPair {
  static constexpr int step = kTileUnits, rows = 2 * kTileRows, depth = 256;
  using Registers = TileRegisters;
};

// C[rows·16 × nv·16] = A · panel, or added to what is there. `a_stride` is in bytes, `units` a
// multiple of 16. Registers: 0 to 3 are C, 4 and 5 A's rows, 6 and 7 the panel's columns.
template <int rows, int nv>
FT_INLINE void tile_product(int64_t units, const char* a, int64_t a_stride, const float* panel,
                            float* c, int64_t c_stride, bool accumulate) {
  constexpr bool both = rows == 2, wide = nv == 2;
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  constexpr int64_t panel_bytes = NR * sizeof(float);
  float* below = c + kTileRows * c_stride;
  const char* a_below = a + kTileRows * a_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (wide) _tile_loadd(1, c + W, c_bytes);
    if constexpr (both) _tile_loadd(2, below, c_bytes);
    if constexpr (both && wide) _tile_loadd(3, below + W, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (wide) _tile_zero(1);
    if constexpr (both) _tile_zero(2);
    if constexpr (both && wide) _tile_zero(3);
  }
  for (int64_t k = 0; k < units; k += kTileUnits, panel += kTileUnits * NR) {
    _tile_loadd(6, panel, panel_bytes);
    _tile_loadd(4, a + k * 4, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (both) {
      _tile_loadd(5, a_below + k * 4, a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (wide) {
      _tile_loadd(7, panel + W, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (both && wide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (wide) _tile_stored(1, c + W, c_bytes);
  if constexpr (both) _tile_stored(2, below, c_bytes);
  if constexpr (both && wide) _tile_stored(3, below + W, c_bytes);
}

#else
namespace ft::FT_ISA {
constexpr int kTileRows = 16, kTileUnits = 16;
#endif

// `rows` rows of n columns of floats, turned, as bf16: out[column][unit], a unit being a pair of
// rows, zeros behind the last, in whole tiles; n is a multiple of 16, `stride` and `out_stride` in
// floats.
inline void turn_to_pairs([[maybe_unused]] const float* x, [[maybe_unused]] int64_t stride,
                          [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t n,
                          [[maybe_unused]] float* out, [[maybe_unused]] int64_t out_stride) {
#if defined(__AMX_BF16__)
  const __m512i alternately = _mm512_set_epi16(  // of two vectors' 32 numbers
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  for (int64_t i = 0; i < rows; i += 2 * kTileUnits) {
    for (int64_t j = 0; j < n; j += W) {
      vi r[W];
      for (int u = 0; u < W; ++u) {
        const int64_t row = i + 2 * u;
        const float* at = x + row * stride + j;
        const vf even = row < rows ? load(at) : zero(),
                 odd = row + 1 < rows ? load(at + stride) : zero();
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        r[u] = (vi)_mm512_permutexvar_epi16(alternately, (__m512i)both);
      }
      transpose(r);
      for (int u = 0; u < W; ++u) store_units(out + (j + u) * out_stride + i / 2, r[u]);
    }
  }
#endif
}

// C[n × nv·16] = A · panel, or added to what is there, for n ≤ 32. Whole tiles of 16 rows are read
// of A and written of C.
template <int nv, class A>
FT_INLINE void multiply_tiles([[maybe_unused]] int64_t n, [[maybe_unused]] int64_t units,
                              [[maybe_unused]] const A& a, [[maybe_unused]] const float* panel,
                              [[maybe_unused]] float* c, [[maybe_unused]] int64_t c_stride,
                              [[maybe_unused]] bool accumulate) {
#if defined(__AMX_BF16__)
  const char* data = a.data();
  if (n > kTileRows) {
    tile_product<2, nv>(units, data, a.bytes_between(), panel, c, c_stride, accumulate);
  } else {
    tile_product<1, nv>(units, data, a.bytes_between(), panel, c, c_stride, accumulate);
  }
#endif
}

// The same for some of a panel's columns.
template <bool accumulate, class A>
FT_INLINE void multiply_some(int64_t n, int64_t columns, int64_t units, const A& a,
                             const float* panel, float* c, int64_t c_stride) {
  if (columns > W) return multiply_tiles<NV>(n, units, a, panel, c, c_stride, accumulate);
  multiply_tiles<1>(n, units, a, panel, c, c_stride, accumulate);
}

}  // namespace ft::FT_ISA
