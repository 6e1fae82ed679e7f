// softmax((X · Wᵀ + b) / τ), a piece of rows at a time: the product's tiles go to the output
// (float) or to scratch memory (16 bit), and threads take whole rows of them, still in cache,
// through the softmax. Bound by arithmetic for many rows, by reading W for few.
#include "params/linear_softmax.h"

#include "cpu/output_layer.h"
#include "cpu/softmax_row.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // logits below which a second thread costs more than it gives

template <class T>
void run(const LinearSoftmaxParams& p) {
  const float* bias = wide_bias(p);
  const int64_t n = p.classes, most = rows_at_once(p);
  const int64_t blocks = (n + kSoftmaxBlock - 1) / kSoftmaxBlock;
  float* scratch = nullptr;
  if (sizeof(T) != sizeof(float)) {
    scratch = static_cast<float*>(
        thread_scratch(Scratch::logits, sizeof(float) * static_cast<size_t>(most * n)));
  }
  for (int64_t row = 0; row < p.rows; row += most) {
    const int64_t rows = row + most < p.rows ? most : p.rows - row;
    T* out = static_cast<T*>(p.output) + row * n;
    float* x = scratch ? scratch : reinterpret_cast<float*>(out);
    const Logits logits = {x, n, bias};
    Gemm g = output_product(p, row, rows, 0, n);
    g.epilogue = store_logits;
    g.context = &logits;
    gemm(g);
    parallel_for(rows, kGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
      float* tops = static_cast<float*>(
          thread_scratch(Scratch::tile, sizeof(float) * static_cast<size_t>(blocks + W)));
      for (int64_t r = begin; r < end; ++r) {
        float* from = x + r * n;
        softmax_row<false>(from, AllAllowed{}, n, 1.f / p.temperature, from, tops, out + r * n);
      }
    });
  }
}

}  // namespace

void linear_softmax(const LinearSoftmaxParams& p) {
  if (p.classes == 0 || p.rows == 0) return;
  with_type(p.dtype, [&]<class T>() { run<T>(p); });
}

}  // namespace ft::FT_ISA
