// Fragments of tiles for tensor cores, of 16-bit types (mma.m16n8k16) and of float: there each
// number is split into two tf32 and four m16n8k8 products are taken, which is as exact as float's
// own sums are. A warp multiplies A (16 × kDepth) by B (kDepth × 8) into 16 × 8 floats; mma.h has
// the layouts. A loop that is short of registers gives the loads hidden(lane_index()) as their
// lane: the addresses of a tile's fragments, a register each, are then made when they are needed.
#pragma once
#include "cuda/device/mma.h"
#include "cuda/device/tile.h"
#include "cuda/device/warp.h"

namespace ft::cuda {

template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;

template <class T>
struct FragmentA {
  uint32_t r[4];
};
template <>
struct FragmentA<float> {
  uint32_t big[4], small[4];
};
template <class T>
struct FragmentB {
  uint32_t r[2];
};
template <>
struct FragmentB<float> {
  uint32_t big[2], small[2];
};

// d[n] += a · b[n] for kCount neighbouring tiles. Tensor cores cut sums off instead of rounding
// them, which shows in float: its products are summed from 0, the small terms first, and added to
// d by rounding additions (Ootomo and Yokota 2022, arXiv:2203.03341).
template <class T, int kCount>
FT_DEVICE void mma(float (&d)[kCount][4], const FragmentA<T>& a, const FragmentB<T> (&b)[kCount]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma(d[n], a.r, b[n].r, T{});
  } else {
    float sum[kCount][4] = {};  // in turns, since each product waits for the one before
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(sum[n], a.small, b[n].small);
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(sum[n], a.small, b[n].big);
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(sum[n], a.big, b[n].small);
#pragma unroll
    for (int n = 0; n < kCount; ++n) { mma_tf32(sum[n], a.big, b[n].big); }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] += sum[n][i];
    }
  }
}
template <class T>
FT_DEVICE void mma(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  using One = float (&)[1][4];
  using OneB = const FragmentB<T>(&)[1];
  mma<T, 1>(reinterpret_cast<One>(d), a, reinterpret_cast<OneB>(b));
}

FT_DEVICE void set(FragmentA<float>& f, int i, float x) {
  const Split s = split_tf32(x);
  f.big[i] = s.big;
  f.small[i] = s.small;
}
FT_DEVICE void set(FragmentB<float>& f, int i, float x) {
  const Split s = split_tf32(x);
  f.big[i] = s.big;
  f.small[i] = s.small;
}

// A[m][k] from a tile that holds it as [m][k]; (m, k) is its corner.
template <class T, int kRows, int kColumns>
FT_DEVICE void load_a(FragmentA<T>& f, const Tile<T, kRows, kColumns>& tile, int m, int k,
                      int lane = lane_index()) {
  uint32_t r[4];
  load_matrices(r, tile.chunk(m + lane % 16, k / kLanes<T> + lane / 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      f.r[i] = r[i];
    } else {
      set(f, i, bits_to_float(r[i]));
    }
  }
}

// A[m][k] from a tile that holds its transpose, [k][m].
template <class T, int kRows, int kColumns>
FT_DEVICE void load_a_transposed(FragmentA<T>& f, const Tile<T, kRows, kColumns>& tile, int m,
                                 int k, int lane = lane_index()) {
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(
        f.r, tile.chunk(k + lane % 8 + lane / 16 * 8, (m + lane / 8 % 2 * 8) / kLanes<T>));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      set(f, i, shared_load(tile.at(k + lane % 4 + i / 2 * 4, m + lane / 4 + i % 2 * 8)));
    }
  }
}

// Two neighbours B[k][n], columns n … n + 7 and n + 8 … n + 15, from a tile that holds [n][k].
template <class T, int kRows, int kColumns>
FT_DEVICE void load_b(FragmentB<T> (&f)[2], const Tile<T, kRows, kColumns>& tile, int k, int n,
                      int lane = lane_index()) {
  uint32_t r[4];
  load_matrices(r, tile.chunk(n + lane % 8 + lane / 16 * 8, k / kLanes<T> + lane / 8 % 2));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      f[i / 2].r[i % 2] = r[i];
    } else {
      set(f[i / 2], i % 2, bits_to_float(r[i]));
    }
  }
}

// Two neighbours B[k][n] from a tile that holds [k][n]. With kPaired, float's k are in the order in
// which products_as_a has its columns (16-bit types have one order).
template <bool kPaired = false, class T, int kRows, int kColumns>
FT_DEVICE void load_b_transposed(FragmentB<T> (&f)[2], const Tile<T, kRows, kColumns>& tile, int k,
                                 int n, int lane = lane_index()) {
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    load_matrices_transposed(r, tile.chunk(k + lane % 16, n / kLanes<T> + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i / 2].r[i % 2] = r[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = kPaired ? lane % 4 * 2 + i % 2 : lane % 4 + i % 2 * 4;
      set(f[i / 2], i % 2, shared_load(tile.at(k + row, n + lane / 4 + i / 2 * 8)));
    }
  }
}

// The products d of kDepth / 8 neighbouring 16 × 8 tiles as an A: what lies in registers stays
// there. For float its k are paired: multiply by load_b_transposed<true>.
template <class T>
FT_DEVICE void products_as_a(FragmentA<T>& f, const float (*d)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f.r[i] = narrow2(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1], T{});
  } else {
    set(f, 0, d[0][0]);
    set(f, 1, d[0][2]);
    set(f, 2, d[0][1]);
    set(f, 3, d[0][3]);
  }
}

}  // namespace ft::cuda
