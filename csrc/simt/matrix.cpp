// ldmatrix and mma.sync in the fragment layouts of the PTX manual ("Warp-level Matrix Load",
// "Matrix Fragments for mma.m16n8k16", "… m16n8k8"). A product's terms are summed exactly (in
// double) and rounded towards zero once, which is what tensor cores come closest to; tf32 inputs
// lose the 13 bits that the hardware does not read. Source of the rounding: Fasi, Higham,
// Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS, 2021.
#include <cmath>
#include <cstring>

#include "simt/runtime.h"

namespace ft::simt {

namespace {

struct MatrixLoad {
  uint32_t* registers;
  const void* row;
  int count;
  bool transposed;
};

void load_all(void* const* all) {
  const MatrixLoad& first = *static_cast<MatrixLoad*>(all[0]);
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      std::memcpy(matrix[r], static_cast<MatrixLoad*>(all[m * 8 + r])->row, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int a = lane / 4, b = lane % 4 * 2;
      const uint16_t low = first.transposed ? matrix[b][a] : matrix[a][b];
      const uint16_t high = first.transposed ? matrix[b + 1][a] : matrix[a][b + 1];
      static_cast<MatrixLoad*>(all[lane])->registers[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

float towards_zero(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.f)
                                                                    : nearest;
}

template <int kDepth>
void multiply(void* const* all, const double (&a)[16][kDepth], const double (&b)[kDepth][8]) {
  double sum[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* d = static_cast<Product*>(all[lane])->d;
    for (int i = 0; i < 4; ++i)
      sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = static_cast<double>(d[i]);
  }
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      for (int c = 0; c < 8; ++c) sum[r][c] += a[r][k] * b[k][c];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<Product*>(all[lane])->d;
    for (int i = 0; i < 4; ++i)
      d[i] = towards_zero(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

template <class Widen>
void mma_16_bit(void* const* all, const Widen& widen) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& p = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = static_cast<uint16_t>(p.a[i] >> (half * 16));
        a[g + i % 2 * 8][t + i / 2 * 8 + half] = static_cast<double>(widen(bits));
      }
      for (int i = 0; i < 2; ++i) {
        const uint16_t bits = static_cast<uint16_t>(p.b[i] >> (half * 16));
        b[t + i * 8 + half][g] = static_cast<double>(widen(bits));
      }
    }
  }
  multiply<16>(all, a, b);
}

void mma_f16(void* const* all) { mma_16_bit(all, half_to_float); }
void mma_bf16(void* const* all) {
  mma_16_bit(all, [](uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); });
}

void mma_tf32(void* const* all) {
  double a[16][8], b[8][8];
  const auto read = [](uint32_t bits) {
    return static_cast<double>(bits_to_float(bits & 0xffffe000u));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& p = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = read(p.a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = read(p.b[i]);
  }
  multiply<8>(all, a, b);
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row) {
  // Lanes beyond the matrices' rows bring an address that nobody reads.
  if (static_cast<int>(place.thread.x) % kLanes < count * 8) shared_read(row, 16);
  MatrixLoad mine{registers, row, count, transposed};
  meet(Meeting::matrix_load, count * 2 + transposed, &mine, load_all);
}

void mma(Element type, float* d, const uint32_t* a, const uint32_t* b) {
  Product mine{d, a, b};
  meet(Meeting::mma, static_cast<int>(type), &mine,
       type == Element::f16    ? mma_f16
       : type == Element::bf16 ? mma_bf16
                               : mma_tf32);
}

}  // namespace ft::simt
