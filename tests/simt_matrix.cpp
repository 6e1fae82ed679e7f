// Products of tiles for test_simt.py: every way in which csrc/cuda/device/fragment.h reads a tile,
// and one mma.sync of each type.
#include <cstdio>
#include <exception>
#include <string>

#include "cuda/device/fragment.h"
#include "cuda/device/launch.h"

namespace ft::cuda {
namespace {

struct Args {
  const void *a, *b;
  float* d;
  int m, n, k;  // 16, 16, kDepth · steps at most
  bool a_transposed, b_transposed, squared;
};

// d (16 × 16) = a (16 × k) · b (k × 16), both contiguous, or as their transposes. `squared`: d =
// (a · b) · b with the first product taken from registers (k = 16).
template <class T>
FT_GLOBAL void product(const Args a) {
  constexpr int kSize = 64;
  FT_SHARED_ARRAY(T, memory_a, kSize * kSize);
  FT_SHARED_ARRAY(T, memory_b, kSize * kSize);
  const Tile<T, kSize, kSize> tile_a{memory_a}, tile_b{memory_b};
  const auto load = [&](const Tile<T, kSize, kSize>& tile, const void* data, int rows,
                        int columns) {
    const T* base = static_cast<const T*>(data);
    load_tile<kWarp>(tile, rows, columns, rows_aligned(base, columns), thread_index(),
                     [&](int r) { return base + int64_t{r} * columns; });
  };
  load(tile_a, a.a, a.a_transposed ? a.k : a.m, a.a_transposed ? a.m : a.k);
  load(tile_b, a.b, a.b_transposed ? a.n : a.k, a.b_transposed ? a.k : a.n);
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  float d[2][4] = {};
  for (int k = 0; k < a.k; k += kDepth<T>) {
    FragmentA<T> left;
    FragmentB<T> right[2];
    if (a.a_transposed) {
      load_a_transposed(left, tile_a, 0, k);
    } else {
      load_a(left, tile_a, 0, k);
    }
    if (a.b_transposed) {
      load_b(right, tile_b, k, 0);
    } else {
      load_b_transposed(right, tile_b, k, 0);
    }
    for (int j = 0; j < 2; ++j) mma(d[j], left, right[j]);
  }
  if (a.squared) {
    float e[2][4] = {};
    for (int k = 0; k < 16; k += kDepth<T>) {
      FragmentA<T> left;
      FragmentB<T> right[2];
      products_as_a(left, d + k / 8);
      load_b_transposed<true>(right, tile_b, k, 0);
      for (int j = 0; j < 2; ++j) mma(e[j], left, right[j]);
    }
    for (int j = 0; j < 8; ++j) d[j / 4][j % 4] = e[j / 4][j % 4];
  }
  const int g = lane_index() / 4, t = lane_index() % 4 * 2;
  for (int j = 0; j < 8; ++j) {
    const int row = g + j % 4 / 2 * 8, column = j / 4 * 8 + t + j % 2;
    if (row < a.m && column < a.n) store_scalar(a.d + row * a.n + column, d[j / 4][j % 4]);
  }
}

}  // namespace
}  // namespace ft::cuda

extern "C" __attribute__((visibility("default"))) int ft_simt_product(
    int dtype, const void* a, const void* b, float* d, int m, int n, int k, bool a_transposed,
    bool b_transposed, bool squared, char* message) {
  using namespace ft;
  message[0] = 0;
  const int bytes = dtype == 0 ? 4 : 2;
  simt::allow(a, m * k * bytes, false);
  simt::allow(b, k * n * bytes, false);
  simt::allow(d, m * n * 4, true);
  const simt::AllowedUntilHere ends_here;
  try {
    cuda::with_type(static_cast<DType>(dtype), [&]<class T>() {
      cuda::launch("product", cuda::product<T>, 1, cuda::kWarp, 0, nullptr,
                   {a, b, d, m, n, k, a_transposed, b_transposed, squared});
    });
  } catch (const std::exception& error) { std::snprintf(message, 512, "%s", error.what()); }
  return 0;
}
