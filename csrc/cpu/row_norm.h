// Layer norm and RMS norm of rows, with or without a residual added first, forward and backward:
// what layer_norm.cpp, rms_norm.cpp, add_layer_norm.cpp and add_rms_norm.cpp have in common.
//
// Forward: a thread owns a run of rows and takes kRows of them at a time, so that weight and bias
// are loaded once for all and one row's reductions hide behind another's. A row is read from memory
// once and then twice from cache: sum; squares of the centred values; write. The variance is that
// of centred values, and the sum of what centring left corrects the mean, so a mean far from 0
// costs no digits (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983,
// eq. 1.7).
//
// Backward: rows are cut into chunks by shape alone. A chunk sums its weight gradients over its
// rows in order, and the chunks' sums are added in order: the same bits on any number of threads.
// Bound by memory bandwidth; in cache by loads.
#pragma once
#include "cpu/columns.h"
#include "cpu/dropout.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "params/row_norm.h"

namespace ft::FT_ISA {

// Chosen by timing 384, 768 and 4096 features on one core of a Zen 4, with AVX2 and AVX-512.
constexpr int kRows = 2;                          // rows in flight …
constexpr int kShortRows = 4;                     // … when they are short
constexpr int64_t kShort = 1024;                  // forward: features of a short row at most
constexpr int64_t kGradShort = W < 16 ? 0 : 512;  // backward: where registers hold four such rows
constexpr int kSums = 2;                          // forward: partial sums of a row
constexpr int64_t kSumColumns = 512 * W;          // forward: columns that go into one such sum
constexpr int64_t kHead = 64;              // forward: columns whose mean the row is summed about
constexpr float kFar = 4.f;                // … unless that lies further off than √kFar deviations
constexpr int64_t kLongRowBytes = 8192;    // backward: of a row that is too long to go alone
constexpr int64_t kStreamBytes = 512;      // a row that is worth a stream of its own
constexpr int64_t kNormGrain = 32768;      // elements below which a second thread costs more
constexpr int64_t kChunkElements = 32768;  // backward: elements that a chunk has at least …
constexpr int64_t kChunkRows = 8;          // … unless that is fewer rows than these
constexpr int64_t kChunks = 64;            // … and at most as many chunks
constexpr int64_t kPlainSumRows = 32;      // rows added one by one before a sum goes up a level

// A variance + eps outside these numbers comes of squares that overflow, or lose their digits; and
// a rstd outside of the others has no square that a gradient could be multiplied by.
constexpr float kLeastVariance = 1e-30f, kMostVariance = 3.4e38f;
constexpr float kLeastRstd = 1e-12f, kMostRstd = 1e12f;

enum class Add { none, residual, dropped };  // what is added to what before the norm

// ---- forward ------------------------------------------------------------------------------------

// The variance of a row whose mean is known, in a pass of its own.
template <class T>
float variance_about(const T* x, int64_t n, float mean) {
  vf squares = zero();
  over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const vf d = keep(load(x + j, part) - splat(mean), part);
    squares = fma(d, d, squares);
  });
  return reduce_add(squares) / static_cast<float>(n);
}

inline bool is_ordinary(float variance) {  // NaN is not
  return variance >= kLeastVariance && variance <= kMostVariance;
}

struct NormStatistics {
  float mean, rstd;
};

// The statistics in double, for a row whose variance is not ordinary.
template <class T, bool Center>
__attribute__((noinline, cold)) NormStatistics wide_statistics(const T* x, int64_t n, float eps) {
  double sum = 0, squares = 0;
  for (int64_t j = 0; Center && j < n; ++j) sum += double{to_float(x[j])};
  const double mean = sum / static_cast<double>(n);
  for (int64_t j = 0; j < n; ++j) {
    const double d = double{to_float(x[j])} - mean;
    squares += d * d;
  }
  const double variance = squares / static_cast<double>(n) + double{eps};
  return {static_cast<float>(mean), static_cast<float>(1 / __builtin_sqrt(variance))};
}

// A stretch's sums go up a level: in a long row a single sum would lose digits to its own size.
FT_INLINE void move_up(vf (&sum)[kSums], vf& all) {
  all = all + (sum[0] + sum[1]);
  sum[0] = sum[1] = zero();
}

template <class T, bool Center, Add A, int R, bool Past = false>
void norm_rows(const RowNormParams& p, int64_t row, const float* w, const float* b,
               uint32_t* random) {
  const int64_t n = p.features;
  const float count = static_cast<float>(n);
  const T *x[R], *in[R], *residual[R];  // x: what is normed
  T *out[R], *summed[R];
  const uint32_t* words[R];
  FT_UNROLL for (int r = 0; r < R; ++r) {
    in[r] = static_cast<const T*>(p.input) + (row + r) * p.input_stride;
    out[r] = static_cast<T*>(p.normed) + (row + r) * n;
    x[r] = in[r];
    if constexpr (A != Add::none) {
      residual[r] = static_cast<const T*>(p.residual) + (row + r) * p.residual_stride;
      x[r] = summed[r] = static_cast<T*>(p.summed) + (row + r) * n;
    }
    if constexpr (A == Add::dropped) {
      words[r] = random_words(p.dropout.seed, static_cast<uint64_t>((row + r) * n), n,
                              random + r * random_words_room(n));
    }
  }
  // The values to norm, seen for the first time: with add_*, they are made here.
  const auto take = [&](int r, int64_t j, auto part) __attribute__((always_inline)) {
    auto v = load(in[r] + j, part);
    if constexpr (A != Add::none) {
      if constexpr (A == Add::dropped) { v = dropped(v, words[r] + j, part, p.dropout); }
      store(summed[r] + j, load(residual[r] + j, part) + v, part);
      v = load(summed[r] + j, part);  // rounded to T
    }
    return v;
  };
  float mean[R] = {}, rstd[R];
  vf squares[R][kSums] = {}, all_squares[R] = {};
  if constexpr (Center) {
    const int64_t head = n < kHead ? n : kHead;
    vf sum[R][kSums] = {}, all[R] = {};
    over_columns<kSums, T>(head, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
      FT_UNROLL for (int r = 0; r < R; ++r) accumulate(sum[r], u, take(r, j, part));
    });
    float about[R];
    FT_UNROLL for (int r = 0; r < R; ++r) {
      about[r] = reduce_add(sum[r][0] + sum[r][1]) / static_cast<float>(head);
      sum[r][0] = sum[r][1] = zero();
    }
    const auto add = [&](int r, int u, auto v, auto part) __attribute__((always_inline)) {
      const auto d = keep(v - splat(about[r]), part);
      accumulate(sum[r], u, d);
      accumulate(squares[r], u, d, d);
    };
    over_columns<kSums, T>(head, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
      FT_UNROLL for (int r = 0; r < R; ++r) add(r, u, load(x[r] + j, part), part);
    });
    for (int64_t from = head; from < n; from += kSumColumns) {
      const int64_t columns = n - from < kSumColumns ? n - from : kSumColumns;
      over_columns<kSums, T>(
          columns, [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
            FT_UNROLL for (int r = 0; r < R; ++r) add(r, u, take(r, from + j, part), part);
          });
      FT_UNROLL for (int r = 0; r < R; ++r) {
        move_up(sum[r], all[r]);
        move_up(squares[r], all_squares[r]);
      }
    }
    FT_UNROLL for (int r = 0; r < R; ++r) {
      const float shift = reduce_add(all[r] + sum[r][0] + sum[r][1]) / count;
      float variance = reduce_add(all_squares[r] + squares[r][0] + squares[r][1]) / count;
      variance -= shift * shift;
      mean[r] = about[r] + shift;
      if (shift * shift > kFar * variance) variance = variance_about(x[r], n, mean[r]);
      rstd[r] = 1.f / __builtin_sqrtf(variance + p.eps);
      if (!is_ordinary(variance + p.eps)) [[unlikely]] {
        const NormStatistics wide = wide_statistics<T, Center>(x[r], n, p.eps);
        mean[r] = wide.mean;
        rstd[r] = wide.rstd;
      }
      p.mean[row + r] = mean[r];
    }
  } else {
    for (int64_t from = 0; from < n; from += kSumColumns) {
      const int64_t columns = n - from < kSumColumns ? n - from : kSumColumns;
      over_columns<kSums, T>(columns,
                             [&](int64_t j, int u, auto part) __attribute__((always_inline)) {
                               FT_UNROLL for (int r = 0; r < R; ++r) {
                                 const auto v = take(r, from + j, part);
                                 accumulate(squares[r], u, v, v);
                               }
                             });
      FT_UNROLL for (int r = 0; r < R; ++r) move_up(squares[r], all_squares[r]);
    }
    FT_UNROLL for (int r = 0; r < R; ++r) {
      const float variance = reduce_add(all_squares[r]) / count + p.eps;
      rstd[r] = 1.f / __builtin_sqrtf(variance);
      if (!is_ordinary(variance)) [[unlikely]] {
        rstd[r] = wide_statistics<T, Center>(x[r], n, p.eps).rstd;
      }
    }
  }
  FT_UNROLL for (int r = 0; r < R; ++r) p.rstd[row + r] = rstd[r];
  const auto write = [&](int64_t j, auto part) __attribute__((always_inline)) {
    const auto scale = load(w + j, part);
    const auto shift = load((Center ? b : w) + j, part);
    FT_UNROLL for (int r = 0; r < R; ++r) {
      const auto v = load(x[r] + j, part);
      const auto y = (Center ? v - splat(mean[r]) : v) * splat(rstd[r]);
      put<Past>(out[r] + j, Center ? fma(y, scale, shift) : y * scale, part);
    }
  };
  if constexpr (R == 1) {
    over_columns<kSums, T>(
        n, [&](int64_t j, int, auto part) __attribute__((always_inline)) { write(j, part); });
  } else {
    back_over_columns<T>(n, write);
  }
}

// Whether a call takes its rows of n elements of T one by one.
template <class T>
bool one_by_one(int64_t rows, int64_t n, int64_t tensors) {
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(T));
  return row_bytes >= kStreamBytes && rows * row_bytes * tensors > kFewStreamsBytes;
}

template <bool Center, Add A>
void norm_forward(const RowNormParams& p) {
  with_type(p.dtype, [&]<class T>() {
    const int64_t n = p.features;
    constexpr int64_t tensors = A == Add::none ? 2 : 4;
    const bool alone = one_by_one<T>(p.rows, n, tensors);
    const bool past = alone && goes_past(static_cast<const T*>(p.normed), p.rows, n, tensors);
    parallel_for(p.rows, kNormGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
      const int64_t room = (n + W - 1) / W * W;
      float* vectors = static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * 2 * room));
      uint32_t* random = nullptr;
      if constexpr (A == Add::dropped) {
        random = static_cast<uint32_t*>(
            thread_scratch(Scratch::pack, sizeof(uint32_t) * kShortRows * random_words_room(n)));
      }
      const float* w = float_vector<T>(p.weight, n, 1.f, vectors);
      const float* b = Center ? float_vector<T>(p.bias, n, 0.f, vectors + room) : nullptr;
      int64_t r = begin;
      if (past) {
        for (; r < end; ++r) norm_rows<T, Center, A, 1, true>(p, r, w, b, random);
        end_past();
      }
      const int64_t grouped = alone ? begin : end;  // the rows before it go several at a time
      if (n <= kShort) {
        for (; r + kShortRows <= grouped; r += kShortRows) {
          norm_rows<T, Center, A, kShortRows>(p, r, w, b, random);
        }
      }
      for (; r + kRows <= grouped; r += kRows) norm_rows<T, Center, A, kRows>(p, r, w, b, random);
      for (; r < end; ++r) norm_rows<T, Center, A, 1>(p, r, w, b, random);
    });
  });
}

template <bool Center>
void add_norm_forward(const RowNormParams& p) {
  if (p.dropout.on()) return norm_forward<Center, Add::dropped>(p);
  norm_forward<Center, Add::residual>(p);
}

// ---- backward -----------------------------------------------------------------------------------

// The input gradients of R rows; adds their part of the weight gradients to dw and db unless null.
// `Wide` is for a row whose rstd has no square: its values are normalized before they are
// multiplied by anything.
template <class T, bool Center, int R, bool Past = false, bool Wide = false>
void norm_grad_rows(const RowNormBackwardParams& p, int64_t row, const float* w, float* dw,
                    float* db, uint32_t* random) {
  const int64_t n = p.features;
  const float count = static_cast<float>(n);
  const T* grad[R];
  const T* x[R];
  float mean[R], rstd[R];
  FT_UNROLL for (int r = 0; r < R; ++r) {
    grad[r] = static_cast<const T*>(p.grad_normed) + (row + r) * p.grad_normed_stride;
    x[r] = static_cast<const T*>(p.summed) + (row + r) * p.summed_stride;
    mean[r] = Center ? p.mean[row + r] : 0.f;
    rstd[r] = p.rstd[row + r];
  }
  if constexpr (!Wide) {
    const auto is_wide = [&](int r) {  // 0, inf and NaN give what they give
      return rstd[r] > 0.f && rstd[r] <= kMostVariance &&
             (rstd[r] < kLeastRstd || rstd[r] > kMostRstd);
    };
    bool any = false;
    FT_UNROLL for (int r = 0; r < R; ++r) any = any || is_wide(r);
    if (any) [[unlikely]] {
      for (int r = 0; r < R; ++r) {
        if (is_wide(r)) {
          norm_grad_rows<T, Center, 1, Past, true>(p, row + r, w, dw, db, random);
        } else {
          norm_grad_rows<T, Center, 1, Past, false>(p, row + r, w, dw, db, random);
        }
      }
      return;
    }
  }
  const auto centre = [&](int r, auto v) __attribute__((always_inline)) {
    const auto centred = Center ? v - splat(mean[r]) : v;
    return Wide ? centred * splat(rstd[r]) : centred;
  };
  vf sum_grad[R][1] = {}, sum_product[R][1] = {};
  over_columns<1, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto weight = load(w + j, part);
    FT_UNROLL for (int r = 0; r < R; ++r) {
      const auto g = load(grad[r] + j, part) * weight;
      const auto v = load(x[r] + j, part);
      if (Center) accumulate(sum_grad[r], 0, g);
      accumulate(sum_product[r], 0, g, centre(r, v));
    }
  });
  // d = rstd·(g·w) + v·across + level with v = x − mean, or where `Wide` with v = x̂ and rstd as a
  // factor of all three. With one feature v is 0 and g·w is its own mean; the difference must be 0
  // and no rounding of it.
  const bool constant = Center && n == 1;
  float scale[R], across[R], level[R];
  FT_UNROLL for (int r = 0; r < R; ++r) {
    scale[r] = constant ? 0.f : Wide ? 1.f : rstd[r];
    // In this order no factor overflows while g·x̂ and the result don't.
    across[r] = -(reduce_add(sum_product[r][0]) * scale[r] / count) * scale[r] * scale[r];
    level[r] = Center ? -scale[r] * (reduce_add(sum_grad[r][0]) / count) : 0.f;
  }
  const T* grad_summed = static_cast<const T*>(p.grad_summed);
  T* d_residual = static_cast<T*>(p.d_residual) + row * n;
  T* d_input = p.d_input == nullptr ? nullptr : static_cast<T*>(p.d_input) + row * n;
  const int64_t room = random_words_room(n);
  const uint32_t* words[R];
  if (d_input != nullptr) {
    for (int r = 0; r < R; ++r) {
      const uint64_t position = static_cast<uint64_t>((row + r) * n);
      words[r] = random_words(p.dropout.seed, position, n, random + r * room);
    }
  }
  over_columns<1, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto weight = load(w + j, part);
    decltype(load(w + j, part)) sum_w = zero(), sum_b = zero();
    FT_UNROLL for (int r = 0; r < R; ++r) {
      const auto g = load(grad[r] + j, part);
      const auto v = load(x[r] + j, part);
      const auto centred = centre(r, v);
      const auto scaled = g * splat(scale[r]);
      sum_w = fma(scaled, centred, sum_w);
      sum_b = sum_b + g;
      auto d = centred * splat(across[r]);
      if (Center) d = d + splat(level[r]);
      d = fma(scaled, weight, d);
      if (Wide) d = d * splat(rstd[r]);
      if (grad_summed != nullptr) {
        d = d + load(grad_summed + (row + r) * p.grad_summed_stride + j, part);
      }
      put<Past>(d_residual + r * n + j, d, part);
      if (d_input != nullptr) {
        d = dropped(d, words[r] + j, part, p.dropout);
        store(d_input + r * n + j, d, part);
      }
    }
    if (dw != nullptr) store(dw + j, load(dw + j, part) + sum_w, part);
    if (db != nullptr) store(db + j, load(db + j, part) + sum_b, part);
  });
}

// Adds `from` to `to` and clears it.
inline void move_sum(float* from, float* to, int64_t n) {
  over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    store(to + j, load(to + j, part) + load(from + j, part), part);
    store(from + j, zero(), part);
  });
}

// out = sums[0] + sums[1] + … of `chunks` vectors that lie `stride` apart, in the order of a walk
// over a row of T.
template <class T>
void add_chunks(const float* sums, int64_t chunks, int64_t stride, int64_t n, DType dtype,
                void* out) {
  constexpr int64_t unit = 2 * W;
  with_type(dtype, [&]<class Out>() {
    parallel_for((n + unit - 1) / unit, kNormGrain / (unit * (chunks + 1)) + 1,
                 [&](int64_t begin, int64_t end) {
                   const int64_t from = begin * unit, to = end * unit < n ? end * unit : n;
                   over_columns<1, T>(
                       to - from, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
                         decltype(load(sums, part)) sum = zero();
                         for (int64_t c = 0; c < chunks; ++c) {
                           sum = sum + load(sums + c * stride + from + j, part);
                         }
                         store_in_order(static_cast<Out*>(out) + from + j, sum, part);
                       });
                 });
  });
}

template <bool Center>
void norm_backward(const RowNormBackwardParams& p) {
  const int64_t n = p.features, rows = p.rows;
  int64_t chunk = kChunkElements / (n + 1) + 1;
  if (chunk < kChunkRows) chunk = kChunkRows;
  if (chunk < (rows + kChunks - 1) / kChunks) chunk = (rows + kChunks - 1) / kChunks;
  chunk = (chunk + kShortRows - 1) / kShortRows * kShortRows;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const int64_t room = (n + W - 1) / W * W;
  const bool wants_weight = p.d_weight != nullptr, wants_bias = p.d_bias != nullptr;
  float* sums = nullptr;  // (chunks, {weight, bias}, room)
  if (wants_weight || wants_bias) {
    sums = static_cast<float*>(
        thread_scratch(Scratch::shared, sizeof(float) * 2 * room * (chunks + 1)));
  }
  with_type(p.dtype, [&]<class T>() {
    const int64_t tensors = p.grad_summed == nullptr ? 3 : 4;
    // A row alone adds to the vectors of weight gradients, which a long row's turn out of L1.
    const bool alone =
        n * static_cast<int64_t>(sizeof(T)) <= kLongRowBytes && one_by_one<T>(rows, n, tensors);
    const bool past = alone && goes_past(static_cast<const T*>(p.d_residual), rows, n, tensors);
    parallel_for(chunks, kNormGrain / (chunk * n + 1) + 1, [&](int64_t begin, int64_t end) {
      const float* w = float_vector<T>(
          p.weight, n, 1.f,
          static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * 2 * room)));
      float* level =
          static_cast<float*>(thread_scratch(Scratch::accumulate, sizeof(float) * 2 * room));
      uint32_t* random = nullptr;
      if (p.d_input != nullptr) {
        random = static_cast<uint32_t*>(
            thread_scratch(Scratch::pack, sizeof(uint32_t) * kShortRows * random_words_room(n)));
      }
      for (int64_t c = begin; c < end; ++c) {
        const int64_t last = c * chunk + chunk < rows ? c * chunk + chunk : rows;
        float* total = nullptr;
        if (sums != nullptr) {
          total = sums + 2 * room * c;
          std::memset(total, 0, sizeof(float) * 2 * room);
          std::memset(level, 0, sizeof(float) * 2 * room);
        }
        float* dw = wants_weight ? level : nullptr;
        float* db = wants_bias ? level + room : nullptr;
        for (int64_t first = c * chunk; first < last; first += kPlainSumRows) {
          const int64_t stop = first + kPlainSumRows < last ? first + kPlainSumRows : last;
          int64_t r = first;
          if (past) {
            for (; r < stop; ++r) norm_grad_rows<T, Center, 1, true>(p, r, w, dw, db, random);
          }
          const int64_t grouped = alone ? first : stop;
          if (n <= kGradShort) {
            for (; r + kShortRows <= grouped; r += kShortRows) {
              norm_grad_rows<T, Center, kShortRows>(p, r, w, dw, db, random);
            }
          }
          for (; r + kRows <= grouped; r += kRows) {
            norm_grad_rows<T, Center, kRows>(p, r, w, dw, db, random);
          }
          for (; r < stop; ++r) norm_grad_rows<T, Center, 1>(p, r, w, dw, db, random);
          if (sums != nullptr) move_sum(level, total, 2 * room);
        }
      }
      if (past) end_past();
    });
    if (wants_weight) add_chunks<T>(sums, chunks, 2 * room, n, p.weight_dtype, p.d_weight);
    if (wants_bias) add_chunks<T>(sums + room, chunks, 2 * room, n, p.bias_dtype, p.d_bias);
  });
}

}  // namespace ft::FT_ISA
