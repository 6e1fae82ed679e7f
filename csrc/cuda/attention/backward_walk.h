// The walks of attention's backward pass (see backward.h). A block owns a tile of rows, either
// queries (with Q and dO) or keys (with K and V), each warp 16 or 32 of them, and walks over tiles
// of the others, which cp.async brings in while the tile before is worked on. In each step a warp
// has, of its rows × kStep columns,
//   s = own1 · walked1ᵀ   dp = own2 · walked2ᵀ      (q·kᵀ and dO·vᵀ, or their transposes)
// turns s into the weights p and dp into the score gradients ds, and adds
//   first += ds · walked1  (dQ or dK)       second += p · walked2  (dV)
// with p and ds as A operands straight from registers: rows of a warp are its own from the first
// product to the last sum, so a step has one barrier, which is the tiles' alone.
// Bound: tensor cores, and beside them shared memory: an operand of 8 columns serves 16 or 32 rows,
// so 16 rows cost as many cycles of shared memory as of tensor cores.
#pragma once
#include "cuda/attention/backward.h"
#include "cuda/device/async.h"
#include "cuda/device/dropout.h"
#include "cuda/device/fragment.h"
#include "cuda/device/shared.h"

namespace ft::cuda {

// What a block owns, and what it sums: dQ; dK and dV; or, where registers can't hold both (head
// sizes over 128), dV in one pass and dK in another, each by a block of its own.
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
//   head size ≤ 32           32, 64,  32                     32, 64,  64
//            ≤  64           32, 32,  64                     32, 32, 128
//            ≤ 128           32, 32, 128                     16, 64, 128
//            ≤ 256           16, 32, 128                     16, 32, 128 (in passes)
// With options, 16 rows, as softcap's derivative needs room too, and steps of 32 (to head size 64)
// or 16; float 16 and 16.
template <class T, int kHead, Walk kWalk, bool kPlain>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 2 && kPlain;  // room for 32 rows
  static constexpr bool kOwnsQueries = kWalk == Walk::queries;
  static constexpr int kTiles = kWide && kHead <= (kOwnsQueries ? 128 : 64) ? 2 : 1;
  static constexpr int kStep = sizeof(T) == 4 || (!kPlain && kHead > 64)                   ? 16
                               : kWide && (kHead == 32 || (!kOwnsQueries && kHead == 128)) ? 64
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
#pragma unroll(sizeof(T) == 2 ? 16 : 2)
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
#pragma unroll
  for (int k = 0; k < 8 * kN; k += kDepth<T>) {
    FragmentA<T> left[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) products_as_a(left[m], scores[m] + k / 8);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      FragmentB<T> right[2];
      load_b_transposed<true>(right, walked, k, 8 * n, for_float<T>(lane));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        add_product<T>(sum[m][n], left[m], right[0]);
        add_product<T>(sum[m][n + 1], left[m], right[1]);
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

// A row's weights from its threads' sums, whose columns are those of a quad of lanes; also left in
// memory for the kernels that follow. NaN stays: only a row without keys has no top and no sum.
template <class T>
FT_DEVICE RowWeight whole_row(const BackwardArgs& a, RowSums sums, int64_t b, int64_t h, int i,
                              RowWeight w, bool writes) {
  const AttentionBackwardParams& p = a.p;
#pragma unroll
  for (int offset = 1; offset <= 2; offset *= 2) {
    const RowSums other = {shuffle_xor(sums.top, offset), shuffle_xor(sums.sum, offset),
                           shuffle_xor(sums.product, offset)};
    sums = merge(sums, other, a.units);
  }
  w.top = infinity();
  w.shift = w.delta = 0.f;
  if (sums.top != -infinity() || sums.sum != 0.f) {
    w.top = sums.top * a.units.lse_scale;
    w.delta = sums.product;
    if (p.sinks != nullptr) {
      const float sink = load_scalar(p.sinks + h), most = maximum(sink, w.top);
      const float factor = power_of_2<float>((w.top - most) * kLog2E);
      sums.sum = sums.sum * factor + power_of_2<float>((sink - most) * kLog2E);
      w.delta *= factor;
      w.top = most;
    }
    w.delta /= sums.sum;
    w.shift = -natural_log(sums.sum) * kLog2E;
  }
  if (writes) {
    const int64_t at = (b * p.heads + h) * p.q_len + i;
    store_scalar(p.top + at, w.top);
    store_scalar(p.shift + at, w.shift);
    store_scalar(p.delta + at, w.delta);
  }
  return w;
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

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, int kHead, Walk kWalk, bool kPlain>
FT_GLOBAL void __launch_bounds__(kMostWarps* kWarp, 1)
    attention_backward_walk(const BackwardArgs a) {
  using S = Shape<T, kHead, kWalk, kPlain>;
  using OwnTile = Tile<T, kMostWarps * S::kRows, kHead>;
  using WalkedTile = Tile<T, S::kStep, kHead>;
  constexpr bool kOwnsQueries = S::kOwnsQueries;
  constexpr int kTiles = S::kTiles, kStep = S::kStep, kN = kStep / 8, kColumns = kHead / 8;
  FT_SHARED_ARRAY(uint32_t, votes, kMostWarps);
  const AttentionBackwardParams& p = a.p;
  const int thread = thread_index(), threads = a.warps * kWarp, lane = lane_index();
  const int g = lane / 4;
  const int rows = a.warps * S::kRows;          // of the block
  const int own_row = warp_index() * S::kRows;  // of the warp's first, in the block
  T* const own_memory = dynamic_shared<T>();
  const OwnTile own1{own_memory}, own2{own_memory + rows * kHead};
  T* const walked_memory = own_memory + 2 * rows * kHead;
  const auto walked1 = [&](int stage) {
    return WalkedTile{walked_memory + stage * 2 * kStep * kHead};
  };
  const auto walked2 = [&](int stage) {
    return WalkedTile{walked_memory + (stage * 2 + 1) * kStep * kHead};
  };
  // Of what is walked over, if queries: top, delta, shift and d_lse.
  float* const numbers = reinterpret_cast<float*>(walked_memory + a.stages * 2 * kStep * kHead);

  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const uint64_t seed = p.dropout.threshold != 0 ? dropout_seed(p) : 0;
  const bool own1_aligned = kOwnsQueries ? view_aligned<T>(p.query) : view_aligned<T>(p.key);
  const bool own2_aligned = kOwnsQueries ? view_aligned<T>(p.grad_out) : view_aligned<T>(p.value);
  const bool walked1_aligned = kOwnsQueries ? view_aligned<T>(p.key) : view_aligned<T>(p.query);
  const bool walked2_aligned =
      kOwnsQueries ? view_aligned<T>(p.value) : view_aligned<T>(p.grad_out);

  for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
    // Tiles of queries are taken from the end, where causal rows are longest.
    const int64_t index = item % a.tiles;
    const int first = static_cast<int>(kOwnsQueries ? a.tiles - 1 - index : index) * rows;
    int64_t rest = item / a.tiles;
    bool values_pass = false;
    if constexpr (kWalk == Walk::keys_in_passes) {
      values_pass = rest % 2 != 0;
      rest /= 2;
    }
    const int64_t own_heads = kOwnsQueries ? p.heads : p.kv_heads;
    const int64_t own_head = rest % own_heads, b = rest / own_heads;
    const int64_t kv_head = kOwnsQueries ? own_head / group : own_head;
    const int64_t first_head = kOwnsQueries ? own_head : own_head * group;
    const Sequence sequence = sequence_of(p, b);
    const int own_length = kOwnsQueries ? sequence.queries : sequence.keys;
    const int walked_length = kOwnsQueries ? sequence.keys : sequence.queries;
    const int last = at_most(first + rows, own_length) - 1;
    Runs runs = {0, 0, 0, 0};
    if (first < own_length) {
      runs = kOwnsQueries ? key_runs(sequence, first, last, kStep)
                          : query_runs(sequence, first, last, kStep);
    }
    const int per_head = (runs.end - runs.begin + kStep - 1) / kStep;
    const int steps = per_head * (kOwnsQueries ? 1 : group);

    const auto load_walked = [&](int step) {
      const int stage = step % a.stages, in_head = step % per_head, thread = hidden(thread_index());
      const int start = runs.begin + in_head * kStep, exist = walked_length - start;
      const int64_t h = kOwnsQueries ? kv_head : first_head + step / per_head;
      const HeadsView& view1 = kOwnsQueries ? p.key : p.query;
      const HeadsView& view2 = kOwnsQueries ? p.value : p.grad_out;
      load_rows(walked1(stage), kStep, exist, head_dim, walked1_aligned,
                head_of<T>(view1, b, h) + start * view1.row, view1.row, thread, threads);
      load_rows(walked2(stage), kStep, exist, value_dim, walked2_aligned,
                head_of<T>(view2, b, h) + start * view2.row, view2.row, thread, threads);
      if constexpr (!kOwnsQueries) {
        const int64_t at = (b * p.heads + h) * p.q_len + start;
        for (int i = thread; i < kStep; i += threads) {
          float* const to = numbers + stage * 4 * kStep + i;
          const bool there = i < exist;  // the others' weights meet zeros only
          copy_async<4>(to, p.top + (there ? at + i : 0), there);
          copy_async<4>(to + kStep, p.delta + (there ? at + i : 0), there);
          if constexpr (!kPlain) {
            copy_async<4>(to + 2 * kStep, p.shift + (there ? at + i : 0), there);
            if (p.grad_lse != nullptr) {
              copy_async<4>(to + 3 * kStep, p.grad_lse + (there ? at + i : 0), there);
            }
          }
        }
      }
    };

    float first_sum[kTiles][kColumns][4] = {};
    float second_sum[kWalk == Walk::keys ? kTiles : 1][kWalk == Walk::keys ? kColumns : 1][4] = {};
    RowWeight row_weights[kTiles][2] = {};
    bool again = false;  // the rows' maximum, sum and delta are found first
    if constexpr (kOwnsQueries) {
      bool coarse = false;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first + own_row + 16 * m + g + 8 * half;
          if (i >= own_length) continue;
          const int64_t at = (b * p.heads + own_head) * p.q_len + i;
          if constexpr (kPlain) {
            row_weights[m][half] = {load_scalar(p.top + at), 0.f, load_scalar(p.delta + at), 0.f};
          } else {
            row_weights[m][half] = row_weight(p, at);
            const float lse = row_weights[m][half].top;
            coarse = coarse || ((lse > kCoarseLse || lse < -kCoarseLse) && lse - lse == 0.f);
          }
        }
      }
      if constexpr (!kPlain) {
        const bool of_warp = any_lane(coarse);
        block_barrier();  // the item before may still read
        if (lane == 0) shared_store(votes + warp_index(), of_warp ? 1u : 0u);
        block_barrier();
        again = runs.end - runs.begin <= kShortRow;
        for (int w = 0; w < a.warps; ++w) again = again || shared_load(votes + w) != 0;
      }
    }
    const int total = again ? 2 * steps : steps;
    if (steps > 0) {
      block_barrier();  // the item before may still read
      const HeadsView& view1 = kOwnsQueries ? p.query : p.key;
      const HeadsView& view2 = kOwnsQueries ? p.grad_out : p.value;
      load_rows(own1, rows, own_length - first, head_dim, own1_aligned,
                head_of<T>(view1, b, own_head) + first * view1.row, view1.row, thread, threads);
      load_rows(own2, rows, own_length - first, value_dim, own2_aligned,
                head_of<T>(view2, b, own_head) + first * view2.row, view2.row, thread, threads);
      load_walked(0);
      copy_async_commit();
    }
    RowSums row_sums[kTiles][2];
    if constexpr (kOwnsQueries && !kPlain) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        row_sums[m][0] = row_sums[m][1] = {-infinity(), 0.f, 0.f};
      }
    }
    ScoreRow own_rows[kOwnsQueries ? kTiles : 1][2];
    if constexpr (kOwnsQueries && !kPlain) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first + own_row + 16 * m + g + 8 * half;
          own_rows[m][half] = score_row(p, sequence, b, own_head, i, i < own_length);
        }
      }
    }

#pragma unroll 1
    for (int step = 0; step < total; ++step) {
      const int at = step < steps ? step : step - steps;
      const int start = runs.begin + at % per_head * kStep;
      const int64_t h = kOwnsQueries ? own_head : first_head + at / per_head;
      const int stage = step % a.stages;
      if constexpr (kOwnsQueries && !kPlain) {
        if (again && step == steps) {  // every key was seen once: the rows are known now
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int i = first + own_row + 16 * m + g + 8 * half;
              row_weights[m][half] =
                  whole_row<T>(a, row_sums[m][half], b, own_head, i, row_weights[m][half],
                               i < own_length && lane % 4 == 0);
            }
          }
        }
      }
      copy_async_wait<0>();
      block_barrier();
      if (a.stages > 1 && step + 1 < total) {
        load_walked(step + 1);
        copy_async_commit();
      }
      const WalkedTile tile1 = walked1(stage), tile2 = walked2(stage);
      const float* const walked_numbers = numbers + stage * 4 * kStep;

      const int here = hidden(lane), g = here / 4, t = here % 4 * 2;
      float s[kTiles][kN][4] = {}, dp[kTiles][kN][4] = {};
      add_score_products<T>(s, own1, tile1, own_row, here);
      if (!values_pass) add_score_products<T>(dp, own2, tile2, own_row, here);

      const bool edges = start < runs.whole_begin || start >= runs.whole_end;
      const ScoreRow head_row =
          kOwnsQueries || kPlain ? ScoreRow{} : score_row(p, sequence, b, h, 0, true);
      const auto query_of = [&](int m, int n, int c) {
        return kOwnsQueries ? first + own_row + 16 * m + g + c / 2 * 8 : start + 8 * n + t + c % 2;
      };
      const auto key_of = [&](int m, int n, int c) {
        return kOwnsQueries ? start + 8 * n + t + c % 2 : first + own_row + 16 * m + g + c / 2 * 8;
      };
      const auto row_of = [&](int m, int n, int c) {
        if constexpr (kOwnsQueries && !kPlain) {
          return own_rows[m][c / 2];
        } else {
          const int i = query_of(m, n, c);
          ScoreRow r = head_row;
          r.position = i + sequence.shift;
          r.low = at_least(r.position - sequence.left, 0);
          r.high =
              i < sequence.queries ? at_most(r.position + sequence.right + 1, sequence.keys) : 0;
          if (!kPlain) {
            if (r.mask != nullptr) r.mask += i * p.mask.row;
            if (r.bias != nullptr) r.bias += i * p.bias.row * (p.bias_dtype == DType::f32 ? 4 : 2);
          }
          return r;
        }
      };
      const auto weights_of = [&](int m, int n, int c) {
        if constexpr (kOwnsQueries) {
          return row_weights[m][c / 2];
        } else {
          const float* const from = walked_numbers + 8 * n + t + c % 2;
          RowWeight w = {shared_load(from), 0.f, shared_load(from + kStep), 0.f};
          if constexpr (!kPlain) {
            w.shift = shared_load(from + 2 * kStep);
            if (p.grad_lse != nullptr) w.d_lse = shared_load(from + 3 * kStep);
          }
          return w;
        }
      };
      const int64_t head_position = (b * p.heads + h) * p.q_len * p.kv_len;
      bool summing = false;
      if constexpr (kOwnsQueries && !kPlain) {
        summing = again && step < steps;
        if (summing) {
          scores_for_sums<T>(a, edges, head_position, seed, row_of, query_of, key_of, s, dp);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                add_score(row_sums[m][c / 2], a.units, s[m][n][c], dp[m][n][c]);
              }
            }
          }
        }
      }
      if (!summing) {
        gradients_of_scores<T, kPlain>(a, edges, head_position, seed, row_of, query_of, key_of,
                                       weights_of, s, dp);
        if constexpr (kWalk == Walk::keys) add_products<T>(second_sum, s, tile2, here);
        if constexpr (kWalk == Walk::keys_in_passes) {
          if (values_pass) {
            add_products<T>(first_sum, s, tile2, here);
          } else {
            add_products<T>(first_sum, dp, tile1, here);
          }
        } else {
          add_products<T>(first_sum, dp, tile1, here);
        }
      }
      if (a.stages == 1 && step + 1 < total) {
        block_barrier();
        load_walked(step + 1 < steps ? step + 1 : step + 1 - steps);
        copy_async_commit();
      }
    }

    // All rows of the output are written, those behind key_lengths too.
    const int64_t length = kOwnsQueries ? p.q_len : p.kv_len;
    const int exist = static_cast<int>(length) - first;
    const auto write = [&](const auto& sum, void* out, int columns, float factor) {
      T* const to =
          static_cast<T*>(out) + ((b * length + first) * own_heads + own_head) * int64_t{columns};
      write_sums(sum, to, own_heads * columns, own_row, exist, own_length - first, columns, factor);
    };
    if constexpr (kOwnsQueries) {
      write(first_sum, p.d_query, head_dim, p.scale);
    } else if constexpr (kWalk == Walk::keys) {
      write(first_sum, p.d_key, head_dim, p.scale);
      write(second_sum, p.d_value, value_dim, 1.f);
    } else if (values_pass) {
      write(first_sum, p.d_value, value_dim, 1.f);
    } else {
      write(first_sum, p.d_key, head_dim, p.scale);
    }
  }
}

// ---- launching ----------------------------------------------------------------------------------

// As many warps as the table's registers and shared memory allow, fewer where rows are few.
template <class T, int kHead, Walk kWalk, bool kPlain>
void launch_walk(BackwardArgs args, void* stream) {
  using S = Shape<T, kHead, kWalk, kPlain>;
  const AttentionBackwardParams& p = args.p;
  const char* const name = S::kOwnsQueries ? "attention_backward_dq" : "attention_backward_dkdv";
  const int64_t length = S::kOwnsQueries ? p.q_len : p.kv_len;
  const int64_t most = max_shared_memory(name) - 64;  // of the votes
  const auto bytes = [](int warps, int stages) {
    return warps * S::kWarpBytes + stages * S::kStageBytes;
  };
  // Up to head size 64 two blocks of 4 warps share a multiprocessor.
  int warps = kHead <= 64 ? 4 : kMostWarps, stages = 2;
  while (warps > 4 && bytes(warps, stages) > most) warps /= 2;
  if (bytes(warps, stages) > most) stages = 1;
  while (warps > 2 && bytes(warps, stages) > most) warps /= 2;
  while (warps > 2 && warps / 2 * S::kRows >= length) warps /= 2;
  const int64_t rows = warps * S::kRows;
  args.warps = warps;
  args.stages = stages;
  args.tiles = (length + rows - 1) / rows;
  const int64_t heads = S::kOwnsQueries ? p.heads : p.kv_heads;
  args.items = args.tiles * heads * p.batch * (kWalk == Walk::keys_in_passes ? 2 : 1);
  if (args.items == 0) return;
  launch(name, attention_backward_walk<T, kHead, kWalk, kPlain>, grid_for(args.items, 1),
         warps * kWarp, bytes(warps, stages), stream, args);
}

template <class T, Walk kWalk>
void launch_walk(const BackwardArgs& args, bool plain, void* stream) {
  const int64_t dim = args.p.head_dim > args.p.value_dim ? args.p.head_dim : args.p.value_dim;
  constexpr Walk kLargest = kWalk == Walk::queries ? Walk::queries : Walk::keys_in_passes;
  const auto run = [&]<bool kPlain>() {
    if (dim <= 32) return launch_walk<T, 32, kWalk, kPlain>(args, stream);
    if (dim <= 64) return launch_walk<T, 64, kWalk, kPlain>(args, stream);
    if (dim <= 128) return launch_walk<T, 128, kWalk, kPlain>(args, stream);
    launch_walk<T, 256, kLargest, kPlain>(args, stream);
  };
  if constexpr (sizeof(T) == 2) {
    if (plain) return run.template operator()<true>();
  }
  run.template operator()<false>();
}

template <class T>
void backward_queries(const BackwardArgs& args, bool plain, void* stream) {
  launch_walk<T, Walk::queries>(args, plain, stream);
}
template <class T>
void backward_keys(const BackwardArgs& args, bool plain, void* stream) {
  launch_walk<T, Walk::keys>(args, plain, stream);
}

}  // namespace ft::cuda
