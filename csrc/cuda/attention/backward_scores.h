// What the kernels of attention's backward pass that make scores share: tiles and their loads,
// products of tiles, and the passes that turn s and dp into weights and score gradients.
#pragma once
#include "cuda/attention/backward.h"
#include "cuda/device/async.h"
#include "cuda/device/dropout.h"
#include "cuda/device/fragment.h"
#include "cuda/device/shared.h"

namespace ft::cuda {

// What a block owns, and what it sums: dQ; dK and dV; or, where registers can't hold both (head
// sizes over 128, float's over 32), dV in one pass and dK in another, each by a block of its own.
enum class Walk { queries, keys, keys_in_passes };

constexpr int kMostWarps = 8;

// Rows that see few keys have gradients that are small differences of weights of order 1: their
// maximum, sum and delta are always found again, which frees them of the rounding of lse and out.
constexpr int kShortRow = 256;

// Tiles by head size. A thread has 255 registers: the sums take 4 · kTiles · kHead / 8 of them,
// twice for dK and dV, s and dp 8 · kTiles · kStep / 8, fragments and addresses some 50. 32 rows a
// warp (kTiles 2) halve the traffic to shared memory where the sums leave room. Not measured: no
// GPU was at hand.
//   16-bit, plain            dQ: rows a warp, kStep, sums    dK, dV
//   head size ≤ 32           32, 64,  32                     32, 32,  64
//            ≤  64           32, 32,  64                     32, 32, 128
//            ≤ 128           32, 16, 128                     16, 32, 128
//            ≤ 256           16, 32, 128                     16, 32, 128 (in passes)
// With options, 16 rows, as softcap's derivative needs room too, and steps of 32 (to head size 64)
// or 16; float 16 and 16.
template <class T, int kHead, Walk kWalk, bool kPlain>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 2 && kPlain;  // room for 32 rows
  static constexpr bool kOwnsQueries = kWalk == Walk::queries;
  static constexpr int kTiles = kWide && kHead <= (kOwnsQueries ? 128 : 64) ? 2 : 1;
  static constexpr int kStep = sizeof(T) == 4 || (!kPlain && kHead > 64) ? 16
                               : kWide && kOwnsQueries && kHead == 128   ? 16
                               : kWide && kOwnsQueries && kHead == 32    ? 64
                                                                         : 32;
  static constexpr int kRows = 16 * kTiles;  // of a warp
  // Bytes of shared memory for each warp's rows, and for each stage of what is walked over.
  static constexpr int64_t kWarpBytes = int64_t{2} * kRows * kHead * sizeof(T);
  static constexpr int64_t kStageBytes = int64_t{2} * kStep * kHead * sizeof(T) + 16 * kStep;
};

// Rows [0, rows) of a tile from a matrix in memory: zeros in rows from `exist` on and columns from
// `columns` on, which are not read. A thread keeps its column of chunks.
template <class Shape, class T>
FT_DEVICE void load_rows(const Shape& tile, int rows, int exist, int columns, bool aligned,
                         const T* base, int64_t stride, int thread, int threads) {
  const int chunk = thread % Shape::kChunks, column = chunk * kLanes<T>;
  const int left = columns - column;
  const int bytes = left <= 0 ? 0 : left < kLanes<T> ? left * static_cast<int>(sizeof(T)) : 16;
  const int step = threads / Shape::kChunks, begin = thread / Shape::kChunks;
  const T* from = base + begin * stride + column;
  if (aligned) {
    for (int row = begin; row < rows; row += step, from += step * stride) {
      const bool there = row < exist && bytes > 0;
      copy_async_part(tile.chunk(row, chunk), there ? from : base, there ? bytes : 0);
    }
    return;
  }
#pragma unroll 1
  for (int row = begin; row < rows; row += step, from += step * stride) {
    const bool there = row < exist && bytes > 0;
    const Chunk c = load_chunk<T>(there ? from : base, 0, there ? left : 0, false);
    shared_store(reinterpret_cast<Chunk*>(tile.chunk(row, chunk)), c);
  }
}

// d += a · b. Tensor cores round towards zero with every product that they add: float's products of
// 8 terms are therefore summed by float's own additions, which round to nearest.
template <class T>
FT_DEVICE void add_product(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 2) {
    mma(d, a, b);
  } else {
    float part[4] = {};
    mma(part, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
  }
}

// float's fragments take twice the registers, and four addresses each where they are read element
// by element: none is made before the product ahead of it is under way.
template <class T>
FT_DEVICE int for_float(int lane) {
  return sizeof(T) == 4 ? hidden(lane) : lane;
}

// d[m][n] += own · walkedᵀ over the tiles' columns.
template <class T, int kTiles, int kN, class Own, class Walked>
FT_DEVICE void add_score_products(float (&d)[kTiles][kN][4], const Own& own, const Walked& walked,
                                  int row, int lane) {
#pragma unroll(sizeof(T) == 4 ? 1 : Own::kColumns > 128 ? 4 : 16)
  for (int k = 0; k < Own::kColumns; k += kDepth<T>) {
    FragmentA<T> left[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_a(left[m], own, row + 16 * m, k, lane);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      FragmentB<T> right[2];
      load_b(right, walked, k, 8 * n, for_float<T>(lane));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        add_product<T>(d[m][n], left[m], right[0]);
        add_product<T>(d[m][n + 1], left[m], right[1]);
      }
    }
  }
}

// sum[m] += scores · walked.
template <class T, int kTiles, int kN, int kColumns, class Walked>
FT_DEVICE void add_products(float (&sum)[kTiles][kColumns][4], const float (&scores)[kTiles][kN][4],
                            const Walked& walked, int lane) {
  if constexpr (sizeof(T) == 4) {
    constexpr int kSteps = 8 * kN / kDepth<T>;
    FragmentA<T> left[kTiles][kSteps];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) products_as_a(left[m][k], scores[m] + k);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      if (n % 4 == 0) warp_barrier();  // keeps ptxas from loading far ahead
      float part[kTiles][2][4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        FragmentB<T> right[2];
        load_b_transposed<true>(right, walked, k * kDepth<T>, 8 * n, hidden(lane));
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma(part[m][0], left[m][k], right[0]);
          mma(part[m][1], left[m][k], right[1]);
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[m][n + c / 4][c % 4] += part[m][c / 4][c % 4];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8 * kN; k += kDepth<T>) {
      FragmentA<T> left[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) products_as_a(left[m], scores[m] + k / 8);
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        FragmentB<T> right[2];
        load_b_transposed<true>(right, walked, k, 8 * n, lane);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          add_product<T>(sum[m][n], left[m], right[0]);
          add_product<T>(sum[m][n + 1], left[m], right[1]);
        }
      }
    }
  }
}

// What a query's weights and their gradients are made with: dS = weight · ((dp − delta) + d_lse),
// in this order, as dp − delta is exact where a query sees one key. Plain kernels have d_lse in
// delta.
struct RowWeight {
  float top, shift, delta, d_lse;
};
FT_DEVICE RowWeight row_weight(const AttentionBackwardParams& p, int64_t at) {
  return {load_scalar(p.top + at), load_scalar(p.shift + at), load_scalar(p.delta + at),
          p.grad_lse == nullptr ? 0.f : load_scalar(p.grad_lse + at)};
}

// Online maximum, sum and Σ p·dp of a row, over a thread's columns first.
struct RowSums {
  float top, sum, product;
};
FT_DEVICE void add_score(RowSums& r, const Units& u, float s, float dp) {
  if (s == -infinity()) return;
  if (s > r.top) {
    const float factor = r.top == -infinity() ? 0.f : power_of_2<float>((r.top - s) * u.exponent);
    r.sum *= factor;
    r.product *= factor;
    r.top = s;
  }
  const float e = power_of_2<float>((s - r.top) * u.exponent);  // NaN of a NaN score
  r.sum += e;
  r.product += e * dp;
}
FT_DEVICE RowSums merge(const RowSums& x, const RowSums& y, const Units& u) {
  const float top = maximum(x.top, y.top);
  const float a =
      x.top == -infinity() && x.sum == 0.f ? 0.f : power_of_2<float>((x.top - top) * u.exponent);
  const float b =
      y.top == -infinity() && y.sum == 0.f ? 0.f : power_of_2<float>((y.top - top) * u.exponent);
  return {top, x.sum * a + y.sum * b, x.product * a + y.product * b};
}

// Adds the sums of a quad's lanes, which have a row's columns between them, to the row's.
FT_DEVICE void add_quad(RowSums* row, RowSums sums, const Units& u) {
#pragma unroll
  for (int offset = 1; offset <= 2; offset *= 2) {
    const RowSums other = {shuffle_xor(sums.top, offset), shuffle_xor(sums.sum, offset),
                           shuffle_xor(sums.product, offset)};
    sums = merge(sums, other, u);
  }
  if (lane_index() % 4 == 0) shared_store(row, merge(shared_load(row), sums, u));
}

// A row's weights from its sums, left in memory for this kernel and those that follow. NaN stays:
// only a row without keys has no top and no sum. Its sink, where it has one, has the weight 1.
template <class T>
FT_DEVICE void whole_row(const BackwardArgs& a, RowSums sums, int64_t h, int64_t at) {
  const AttentionBackwardParams& p = a.p;
  RowWeight w = {infinity(), 0.f, 0.f, 0.f};
  if (sums.top != -infinity() || sums.sum != 0.f) {
    w.top = sums.top * a.units.lse_scale;
    // What the multiply-add of weight_of leaves of the largest score.
    float left = multiply_add(sums.top, a.units.lse_scale, -w.top);
    w.delta = sums.product;
    if (p.sinks != nullptr) {
      const float sink = load_scalar(p.sinks + h), most = maximum(sink, w.top);
      const float factor = power_of_2<float>((w.top - most) * kLog2E);
      sums.sum = sums.sum * factor + power_of_2<float>((sink - most) * kLog2E);
      w.delta *= factor;
      if (most != w.top) left = 0.f;
      w.top = most;
    }
    w.delta /= sums.sum;
    w.shift = -(natural_log(sums.sum) + left) * kLog2E;
  } else if (p.sinks != nullptr && load_scalar(p.sinks + h) != -infinity()) {
    w.top = load_scalar(p.sinks + h);  // the sink alone
  }
  store_scalar(p.top + at, w.top);
  store_scalar(p.shift + at, w.shift);
  store_scalar(p.delta + at, w.delta);
}

// Writes the sums of a warp's rows: row r of the tile at out + r · stride, `rows` of them wanted;
// rows from `alive` on get 0.
template <class T, int kTiles, int kColumns>
FT_DEVICE void write_sums(const float (&sum)[kTiles][kColumns][4], T* out, int64_t stride, int row,
                          int rows, int alive, int columns, float factor) {
  const int lane = hidden(lane_index()), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + g + 8 * half;
      if (r >= rows) continue;
      T* to = out + r * stride;
      const bool zero = r >= alive;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = 8 * n + 2 * t;
        if (column >= columns) continue;
        const float x = zero ? 0.f : sum[m][n][2 * half] * factor;
        const float y = zero ? 0.f : sum[m][n][2 * half + 1] * factor;
        if constexpr (sizeof(T) == 4) {
          store_scalar(to + column, x);
          if (column + 1 < columns) store_scalar(to + column + 1, y);
        } else {
          const uint32_t both = narrow2(x, y, T{});
          if ((columns & 1) == 0) {
            store_scalar(reinterpret_cast<uint32_t*>(to + column), both);
          } else {
            store_scalar(to + column, T{static_cast<uint16_t>(both)});
            if (column + 1 < columns) {
              store_scalar(to + column + 1, T{static_cast<uint16_t>(both >> 16)});
            }
          }
        }
      }
    }
  }
}

template <class T>
FT_DEVICE const T* head_of(const HeadsView& v, int64_t b, int64_t h) {
  return static_cast<const T*>(v.data) + b * v.batch + h * v.head;
}

// Whether the rows of a tensor of heads all begin on 16 bytes.
template <class T>
FT_DEVICE bool view_aligned(const HeadsView& v) {
  return rows_aligned(static_cast<const T*>(v.data), v.row | v.head | v.batch);
}

// Bit 4n + c: whether dropout keeps the element. A loop, as philox is long.
template <int kN, class QueryOf, class KeyOf>
FT_DEVICE uint32_t kept_bits(const AttentionBackwardParams& p, int64_t head_position, uint64_t seed,
                             int m, const QueryOf& query_of, const KeyOf& key_of) {
  static_assert(4 * kN <= 32);
  if (p.dropout.threshold == 0) return ~0u;
  uint32_t keep = 0;
#pragma unroll 1
  for (int e = 0; e < 4 * kN; ++e) {
    const int64_t at =
        head_position + query_of(m, e / 4, e % 4) * p.kv_len + key_of(m, e / 4, e % 4);
    const bool kept = dropout_keep(seed, static_cast<uint64_t>(at), p.dropout.threshold);
    keep |= static_cast<uint32_t>(kept) << e;
  }
  return keep;
}

// s → scores, −inf where masked, and dp → its value behind dropout.
template <class T, int kTiles, int kN, class RowOf, class QueryOf, class KeyOf>
FT_DEVICE void scores_for_sums(const BackwardArgs& a, bool edges, int64_t head_position,
                               uint64_t seed, const RowOf& row_of, const QueryOf& query_of,
                               const KeyOf& key_of, float (&s)[kTiles][kN][4],
                               float (&dp)[kTiles][kN][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    if (!a.units.raw) scale_scores<T>(a.p, s[m]);
    mask_scores<T>(
        a.p, edges, [&](int n, int c) { return row_of(m, n, c); },
        [&](int n, int c) { return key_of(m, n, c); }, s[m], [](int, int, bool) {});
    if (a.p.dropout.threshold == 0) continue;
    const uint32_t keep = kept_bits<kN>(a.p, head_position, seed, m, query_of, key_of);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        dp[m][n][c] = keep >> (4 * n + c) & 1 ? dp[m][n][c] * a.p.dropout.scale : 0.f;
      }
    }
  }
}

// s → p as it meets the values, dp → ds, in place. i_of(m, n, c) and j_of give an element's query
// and key, weights(m, n, c) its row's (top, shift, delta). `edges`: some element may be masked by
// position.
template <class T, bool kPlain, int kTiles, int kN, class RowOf, class QueryOf, class KeyOf,
          class WeightsOf>
FT_DEVICE void gradients_of_scores(const BackwardArgs& a, bool edges, int64_t head_position,
                                   uint64_t seed, const RowOf& row_of, const QueryOf& query_of,
                                   const KeyOf& key_of, const WeightsOf& weights_of,
                                   float (&s)[kTiles][kN][4], float (&dp)[kTiles][kN][4]) {
  const AttentionBackwardParams& p = a.p;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    if constexpr (kPlain) {
      if (edges) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const ScoreRow& r = row_of(m, n, c);
            const int key = key_of(m, n, c);
            if (key < r.low || key >= r.high) s[m][n][c] = -infinity();
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const RowWeight w = weights_of(m, n, c);
          const float weight = power_of_2<T>(s[m][n][c] * a.units.exponent - w.top);
          dp[m][n][c] = weight * (dp[m][n][c] - w.delta);
          if (edges && s[m][n][c] == -infinity()) {  // what is left out may hold NaN
            dp[m][n][c] = 0.f;
            s[m][n][c] = 0.f;
          } else {
            s[m][n][c] = weight;
          }
        }
      }
    } else {
      float derivative[kN][4];
      if (!a.units.raw) scale_scores<T>(p, s[m]);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          derivative[n][c] = p.softcap != 0.f ? softcap_derivative(p, s[m][n][c]) : 1.f;
        }
      }
      mask_scores<T>(
          p, edges, [&](int n, int c) { return row_of(m, n, c); },
          [&](int n, int c) { return key_of(m, n, c); }, s[m], [](int, int, bool) {});
      const uint32_t keep = kept_bits<kN>(p, head_position, seed, m, query_of, key_of);
      const float kept_scale = p.dropout.threshold != 0 ? p.dropout.scale : 1.f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const RowWeight w = weights_of(m, n, c);
          const float weight = power_of_2<T>(weight_of(a.units, s[m][n][c], w.top, w.shift));
          const bool kept = keep >> (4 * n + c) & 1;
          const float grad = kept ? dp[m][n][c] * kept_scale : 0.f;
          const bool masked = s[m][n][c] == -infinity();
          const float ds = weight * ((grad - w.delta) + w.d_lse);
          dp[m][n][c] = masked ? 0.f : ds * derivative[n][c];
          s[m][n][c] = masked || !kept ? 0.f : weight * kept_scale;
        }
      }
    }
  }
}

}  // namespace ft::cuda
