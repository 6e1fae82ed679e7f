// softmax and log_softmax over the last dimension, forward and backward.
//   out = exp(s − max s) / Σ exp(s − max s),  s = scale · x over the allowed entries
// One thread owns a run of whole rows. A row is taken in blocks that stay in the nearest cache:
// a block's maximum, then its exponentials about that maximum and their sum; a last pass brings the
// blocks to the row's maximum and divides. So a row is read from memory once, whatever its length
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, block by block).
// Exponentials of a 16-bit row wait as floats in thread scratch, those of a float row in the
// output, or in scratch, too, if the output goes around the caches. Bound by memory; by exp() when
// the row is in cache.
#include "params/softmax.h"

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/softmax_row.h"

namespace ft::FT_ISA {
namespace {

// Chosen by timing rows of 8 … 65536 columns on a Zen 4 (2 cores, AVX-512).
constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it gives

template <class T>
void fill(T* out, int64_t n, float value) {
  over_columns<1>(n, [&](int64_t j, int, auto part)
                         __attribute__((always_inline)) { store(out + j, splat(value), part); });
}

bool any(const bool* mask, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (mask[j]) return true;
  }
  return false;
}

// Leading dimensions joined where a stride allows it, so that most inputs have one.
struct Leading {
  int dims = 0;
  int64_t sizes[kSoftmaxDims], input[kSoftmaxDims], mask[kSoftmaxDims];

  explicit Leading(const SoftmaxParams& p) {
    for (int d = 0; d < p.dims; ++d) {
      if (p.sizes[d] == 1) continue;
      const bool joins = dims > 0 && input[dims - 1] == p.input_strides[d] * p.sizes[d] &&
                         mask[dims - 1] == p.mask_strides[d] * p.sizes[d];
      if (!joins) ++dims;
      sizes[dims - 1] = joins ? sizes[dims - 1] * p.sizes[d] : p.sizes[d];
      input[dims - 1] = p.input_strides[d];
      mask[dims - 1] = p.mask_strides[d];
    }
  }
  void offsets(int64_t r, int64_t* at, int64_t* mask_at) const {
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t i = d == 0 ? r : r % sizes[d];
      if (d != 0) r /= sizes[d];
      *at += i * input[d];
      *mask_at += i * mask[d];
    }
  }
};

template <bool Log, bool Past, class T>
void rows(const SoftmaxParams& p, const Leading& leading, int64_t begin, int64_t end) {
  const int64_t n = p.columns, blocks = (n + kSoftmaxBlock - 1) / kSoftmaxBlock;
  const int64_t room = (n + W - 1) / W * W;
  float* scratch = static_cast<float*>(thread_scratch(
      Scratch::tile, sizeof(float) * (room + blocks + W) + static_cast<size_t>(room)));
  float* tops = scratch + room;
  bool* gathered = reinterpret_cast<bool*>(tops + blocks + W);
  const int64_t queries = p.dims > 0 ? p.sizes[p.dims - 1] : 1;
  const float nothing = Log ? -INFINITY : 0.f;
  for (int64_t r = begin; r < end; ++r) {
    int64_t at = 0, mask_at = 0;
    leading.offsets(r, &at, &mask_at);
    const T* x = static_cast<const T*>(p.input) + at;
    T* out = static_cast<T*>(p.output) + r * n;
    float* e = scratch;
    if constexpr (sizeof(T) == sizeof(float) && !Past) e = reinterpret_cast<float*>(out);
    int64_t allowed = n;
    if (p.is_causal && r % queries + 1 < n) allowed = r % queries + 1;
    const bool* mask = p.mask == nullptr ? nullptr : p.mask + mask_at;
    if (mask != nullptr && p.mask_column_stride == 0) {  // the whole row or nothing
      if (!mask[0]) allowed = 0;
      mask = nullptr;
    } else if (mask != nullptr) {
      if (p.mask_column_stride != 1) {
        for (int64_t j = 0; j < allowed; ++j) gathered[j] = mask[j * p.mask_column_stride];
        mask = gathered;
      }
      if (!any(mask, allowed)) allowed = 0;
    }
    if (allowed < n) fill(out + allowed, n - allowed, nothing);
    if (allowed == 0) continue;
    if (mask != nullptr) {
      softmax_row<Log, Past>(x, mask, allowed, p.scale, e, tops, out);
    } else {
      softmax_row<Log, Past>(x, AllAllowed{}, allowed, p.scale, e, tops, out);
    }
  }
}

template <bool Log, bool Past, class T>
void grad_row(const T* g, const T* y, int64_t n, float factor, T* dx) {
  vf total[4] = {};
  over_columns<4, T>(n, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
    const auto gj = load(g + j, part);
    Log ? accumulate(total, u, gj) : accumulate(total, u, gj, load(y + j, part));
  });
  const vf sum = splat(reduce_add((total[0] + total[1]) + (total[2] + total[3])));
  const vf scale = splat(factor);
  over_columns<2, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto gj = load(g + j, part), yj = load(y + j, part);
    const auto d = Log ? scale * (gj - exp_for<T>(yj) * sum) : scale * yj * (gj - sum);
    put<Past>(dx + j, d, part);
  });
}

}  // namespace

void softmax(const SoftmaxParams& p) {
  const Leading leading(p);
  with_type(p.dtype, [&]<class T>() {
    const bool past = !p.is_causal && goes_past(static_cast<T*>(p.output), p.rows, p.columns, 2);
    parallel_for(p.rows, kGrain / (p.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      with_flags(p.log, past, [&]<bool Log, bool Past>() {
        rows<Log, Past, T>(p, leading, begin, end);
        if (Past) end_past();
      });
    });
  });
}

void softmax_backward(const SoftmaxBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    T* d_input = static_cast<T*>(p.d_input);
    const bool past = goes_past(d_input, p.rows, p.columns, 3);
    parallel_for(p.rows, kGrain / (p.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      with_flags(p.log, past, [&]<bool Log, bool Past>() {
        for (int64_t r = begin; r < end; ++r) {
          const T* g = static_cast<const T*>(p.grad) + r * p.columns;
          const T* y = static_cast<const T*>(p.output) + r * p.columns;
          grad_row<Log, Past>(g, y, p.columns, p.scale, d_input + r * p.columns);
        }
        if (Past) end_past();
      });
    });
  });
}

}  // namespace ft::FT_ISA
