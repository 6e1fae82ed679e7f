// Attention of few query rows per key head, as a step of text generation has: every key and value
// is used by a handful of rows only, so they are read where they lie, in order, once. A work item
// is a part of the keys of one (batch, key head) with all rows that read it: per tile of 128 keys
// the scores, their exponentials relative to a running maximum, and the weighted sum of the values.
// Where items are few, keys are cut into parts, whose sums are added up in order. Bound by memory.
// Source: Dao, Haziza, Massa, Sizov, Flash-Decoding, 2023; online softmax: Milakov and Gimelshein,
// 2018 (arXiv:1805.02867).
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

// A part has this many keys at least, or the merge would be felt.
constexpr int64_t kPartKeys = 2 * kKeys;
// Multiply-adds below which a second thread costs more than it gives (about 10 µs of work).
constexpr int64_t kWorkPerThread = 100'000;

// ---- products -----------------------------------------------------------------------------------

template <bool whole, class T>
FT_INLINE vf load_part(const T* p, int have) {
  return whole ? load(p) : load(p, have);
}

// Lane i of the result: the sum of x[i]'s lanes. Neighbours are added pairwise, level by level, so
// that W sums cost 3·(W − 1) instructions.
template <int width>
FT_INLINE vf pair_sum(vf a, vf b) {
  vi low, high;  // constants once the loop is unrolled
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const int from = i / (2 * width) * (2 * width) + i % width;
    low[i] = from + (i & width ? W : 0);
    high[i] = low[i] + width;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}
template <int width = 1>
FT_INLINE vf sums_of(const vf* x) {
  if constexpr (width == W) {
    return x[0];
  } else {
    vf y[W / 2 / width];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2 / width; ++i) y[i] = pair_sum<width>(x[2 * i], x[2 * i + 1]);
    return sums_of<2 * width>(y);
  }
}

FT_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
  }
}

// Unit times unit, of a query row in units, zero behind dim, and of a key where it lies.
template <class Unit, class T, class F>
FT_INLINE void over_units(const T* key, int64_t dim, const F& f) {
  constexpr int64_t step = W * Unit::elements;
  int64_t d = 0;
  for (; d + step <= dim; d += step) f(d / Unit::elements, (vf)load_units<Unit>(key + d, step));
  if (d < dim) f(d / Unit::elements, (vf)load_units<Unit>(key + d, dim - d));
}

// s[r · kKeys + k] = query r · key k for R rows and W / R keys; queries are rows of units,
// `columns` apart. One key after another: keys in memory are read as one stream, which the
// hardware's prefetcher follows (four side by side take half as long again), and the queries are in
// L1.
template <class Unit, int R, class T>
FT_INLINE void scores_block(const float* query, int64_t columns, const T* key, int64_t stride,
                            int64_t dim, float* s) {
  constexpr int N = W / R;
  vf sum[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sum[i] = zero();
#pragma GCC unroll 16
  for (int k = 0; k < N; ++k) {
    over_units<Unit>(key + k * stride, dim, [&](int64_t d, vf x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r * N + k] = Unit::fma(load(query + r * columns + d), x, sum[r * N + k]);
      }
    });
  }
  const vf all = sums_of(sum);
  for (int r = 0; r < R; ++r) {
    __builtin_memcpy(s + r * kKeys, reinterpret_cast<const float*>(&all) + r * N, 4 * N);
  }
}

template <class Unit, int R, class T>
FT_INLINE void scores_of_one(const float* query, int64_t columns, const T* key, int64_t dim,
                             float* s) {
  for (int r = 0; r < R; ++r) {
    vf sum = zero();
    over_units<Unit>(key, dim, [&](int64_t d, vf x) __attribute__((always_inline)) {
      sum = Unit::fma(load(query + r * columns + d), x, sum);
    });
    s[r * kKeys] = reduce_add(sum);
  }
}

// `ahead`: rows like the keys', of `ahead_bytes` each, that will be wanted next.
template <class Unit, int R, class T>
void score_rows(const float* query, int64_t columns, const T* key, int64_t stride, int64_t n,
                int64_t dim, const T* ahead, int64_t ahead_stride, int64_t ahead_bytes, float* s) {
  constexpr int kAtOnce = W / R;
  int64_t k = 0;
  for (; k + kAtOnce <= n; k += kAtOnce) {
    for (int64_t i = k; i < k + kAtOnce; ++i) prefetch(ahead + i * ahead_stride, ahead_bytes);
    scores_block<Unit, R>(query, columns, key + k * stride, stride, dim, s + k);
  }
  for (; k < n; ++k) scores_of_one<Unit, R>(query, columns, key + k * stride, dim, s + k);
}

// sums[r] = alpha[r] · sums[r] + s[r] · values for V vectors of columns, of which the last may be
// cut to `have`.
template <int R, int V, bool whole, class T, class Ahead>
FT_INLINE void values_block(const float* s, const T* value, int64_t stride, int64_t n, int have,
                            const float* alpha, float* sums, int64_t columns, const Ahead& ahead) {
  for (int64_t k = 0; k < n; k += kChain) {
    const int64_t end = min64(k + kChain, n);
    vf sum[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = zero();
    }
    for (int64_t i = k; i < end; ++i) {
      ahead(i);
      vf x[V];
      for (int v = 0; v + 1 < V; ++v) x[v] = load(value + i * stride + v * W);
      x[V - 1] = load_part<whole>(value + i * stride + (V - 1) * W, have);
      for (int r = 0; r < R; ++r) {
        const vf weight = splat(s[r * kKeys + i]);
        for (int v = 0; v < V; ++v) sum[r][v] = fma(weight, x[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const vf factor = splat(k == 0 ? alpha[r] : 1.f);
      for (int v = 0; v < V; ++v) {
        float* to = sums + r * columns + v * W;
        store(to, fma(load(to), factor, sum[r][v]));
      }
    }
  }
}

// As many vectors of a row as registers hold the sums of; with two rows of AVX-512 eight, so that
// rows of 128 floats are read whole, in one stream.
template <int R, int Most, class T>
void value_rows(const float* s, const T* value, int64_t stride, int64_t n, int64_t dim,
                const float* alpha, float* sums, int64_t columns, const T* ahead,
                int64_t ahead_stride, int64_t ahead_bytes) {
  constexpr int kVectors = W < 16 ? (R > 2 ? 2 : 4) : Most > 2 ? 4 : 8;
  const auto next = [&](int64_t i) { prefetch(ahead + i * ahead_stride, ahead_bytes); };
  const auto none = [](int64_t) {};
  int64_t e = 0;
  if (dim >= kVectors * W) {
    values_block<R, kVectors, true>(s, value, stride, n, W, alpha, sums, columns, next);
    e = kVectors * W;
  }
  for (; e + kVectors * W <= dim; e += kVectors * W) {
    values_block<R, kVectors, true>(s, value + e, stride, n, W, alpha, sums + e, columns, none);
  }
  for (; e < dim; e += W) {
    const int have = static_cast<int>(min64(W, dim - e));
    if (have == W) {
      values_block<R, 1, true>(s, value + e, stride, n, W, alpha, sums + e, columns, none);
    } else {
      values_block<R, 1, false>(s, value + e, stride, n, have, alpha, sums + e, columns, none);
    }
  }
}

// Rows four at a time, if `Most` is that, then two, then one.
template <int Most = 4, class F>
FT_INLINE void by_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  if constexpr (Most == 4) {
    for (; r + 4 <= rows; r += 4) f.template operator()<4>(r);
  }
  for (; r + 2 <= rows; r += 2) f.template operator()<2>(r);
  if (r < rows) f.template operator()<1>(r);
}

// ---- a part of the keys -------------------------------------------------------------------------

// What a part leaves: per row the maximum, the sum per lane, the weighted sums; and whether some
// key takes part, which masks decide.
struct Sums {
  float *top, *total, *sums;
  float* any;
  static int64_t floats(int64_t columns) { return kFewRows * (2 + W + columns); }
  Sums(float* at, int64_t columns) {
    sums = at;
    total = sums + kFewRows * columns;
    top = total + kFewRows * W;
    any = top + kFewRows;
  }
};

struct Plan {
  int64_t columns, query_columns, parts, items, part_floats;
  bool in_memory;  // keys and values, rather than in a cache
};

Plan make_plan(const AttentionParams& p, int64_t threads) {
  Plan plan;
  const int64_t bytes = p.dtype == DType::f32 ? 4 : 2;
  plan.in_memory =
      p.batch * p.kv_heads * p.kv_len * (p.head_dim + p.value_dim) * bytes > kFewStreamsBytes;
  plan.columns = round_up(p.value_dim, W);
  plan.query_columns = round_up(p.head_dim, W);
  plan.part_floats = round_up(Sums::floats(plan.columns), 16);
  const int64_t heads = p.batch * p.kv_heads;
  plan.parts = 1;
  if (threads > 1 && heads < 4 * threads && heads % threads != 0) {
    plan.parts = max64(1, min64(p.kv_len / kPartKeys, (4 * threads + heads - 1) / heads));
  }
  plan.items = heads * plan.parts;
  return plan;
}

int64_t make_rows(const AttentionParams& p, const Sequence& seq, int64_t b, int64_t g, Row* rows) {
  const int64_t group = p.group();
  int64_t count = 0;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    for (int64_t i = 0; i < seq.queries; ++i) rows[count++] = make_row(p, seq, b, h, i);
  }
  return count;
}

template <class Unit, class T>
void part_of(const AttentionParams& p, const Units& u, const Plan& plan, const Sequence& seq,
             int64_t b, int64_t g, int64_t part, Row* rows, int64_t count, const Sums& to) {
  alignas(64) float s[kFewRows * kKeys], alpha[kFewRows < W ? W : kFewRows];
  float* queries = static_cast<float*>(
      thread_scratch(Scratch::tile, sizeof(float) * kFewRows * plan.query_columns));
  int64_t first = p.kv_len, last = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].first < rows[r].last) {
      first = min64(first, rows[r].first);
      last = max64(last, rows[r].last);
    }
    const T* query = at<T>(p.query, b, rows[r].head, rows[r].token);
    over_units<Unit>(query, p.head_dim,
                     [&](int64_t d, vf x) { store(queries + r * plan.query_columns + d, x); });
    to.top[r] = -__builtin_inff();
    store(to.total + r * W, zero());
    for (int64_t e = 0; e < plan.columns; e += W) store(to.sums + r * plan.columns + e, zero());
  }
  const int64_t tiles = first < last ? (last - first / kKeys * kKeys + kKeys - 1) / kKeys : 0;
  const int64_t begin = first / kKeys * kKeys + tiles * part / plan.parts * kKeys;
  const int64_t end = min64(last, first / kKeys * kKeys + tiles * (part + 1) / plan.parts * kKeys);
  for (int64_t j = begin; j < end; j += kKeys) {
    const int64_t n = min64(kKeys, last - j);
    const T* key = at<T>(p.key, b, g, seq.key_start + j);
    const T* value = at<T>(p.value, b, g, seq.key_start + j);
    const Seen see = seen_by(p, u, rows, static_cast<int>(count), j, n);
    if (see.end == 0) continue;
    // Keys of whole vectors; those that no row sees are not read.
    const int64_t from = see.begin, to_key = see.end, whole = round_up(to_key, W);
    // One row alone is bound by its reads, and the hardware does best without being told.
    const bool asks = count > 1;
    by_rows(count, [&]<int R>(int64_t r) {
      score_rows<Unit, R>(
          queries + r * plan.query_columns, plan.query_columns, key + from * p.key.row, p.key.row,
          to_key - from, p.head_dim, value + from * p.value.row, p.value.row,
          asks && r == 0 ? p.value_dim * int64_t{sizeof(T)} : 0, s + r * kKeys + from);
    });
    for (int64_t r = 0; r < count; ++r) {
      float* row = s + r * kKeys;
      for (int64_t k = to_key; k < whole; ++k) row[k] = -__builtin_inff();
      if (!see.plain) finish_scores<T>(p, u, rows[r], j, from, whole, n, row);
      alpha[r] = raise_top(row, from, whole, to.top + r);
    }
    for (int64_t r = 0; r < count; r += W)
      store(alpha + r, exp2(load(alpha + r) * splat(u.exponent)));
    for (int64_t r = 0; r < count; ++r) {
      weights_row<float>(s + r * kKeys, from, whole, u.exponent, to.top[r], alpha[r],
                         to.total + r * W);
      if (p.dropout.on()) {
        const int64_t row = (b * p.heads + rows[r].head) * p.q_len + rows[r].index;
        drop_row(p, row * p.kv_len + j + from, from, whole, s + r * kKeys);
      }
    }
    const auto sum_values = [&]<int Most>() {
      by_rows<Most>(count, [&]<int R>(int64_t r) {
        value_rows<R, Most>(
            s + r * kKeys + from, value + from * p.value.row, p.value.row, to_key - from,
            p.value_dim, alpha + r, to.sums + r * plan.columns, plan.columns,
            key + (from + kKeys) * p.key.row, p.key.row,
            asks && r == 0 && j + kKeys < end ? p.head_dim * int64_t{sizeof(T)} : 0);
      });
    };
    plan.in_memory ? sum_values.template operator()<2>() : sum_values.template operator()<4>();
  }
  for (int64_t r = 0; r < count; ++r) to.any[r] = rows[r].any ? 1.f : 0.f;
}

// The parts' sums into those of the first, in order.
void merge_parts(const Units& u, const Plan& plan, float* parts, Row* rows, int64_t count) {
  const Sums whole(parts, plan.columns);
  for (int64_t r = 0; r < count; ++r) {
    float top = whole.top[r];
    rows[r].any |= whole.any[r] != 0.f;
    for (int64_t i = 1; i < plan.parts; ++i) {
      const Sums part(parts + i * plan.part_floats, plan.columns);
      top = part.top[r] > top ? part.top[r] : top;
      rows[r].any |= part.any[r] != 0.f;
    }
    const float base = top == -__builtin_inff() ? 0.f : top;
    for (int64_t i = 0; i < plan.parts; ++i) {
      const Sums part(parts + i * plan.part_floats, plan.columns);
      const vf factor = splat(__builtin_exp2f((part.top[r] - base) * u.exponent));
      const auto take = [&](float* to, const float* from) {
        store(to, i == 0 ? load(from) * factor : fma(load(from), factor, load(to)));
      };
      take(whole.total + r * W, part.total + r * W);
      for (int64_t e = 0; e < plan.columns; e += W) {
        take(whole.sums + r * plan.columns + e, part.sums + r * plan.columns + e);
      }
    }
    whole.top[r] = top;
  }
}

template <class Unit, class T>
void run(const AttentionParams& p) {
  const Units u = units_of_case(p);
  const int64_t work = p.rows() * max64(p.kv_len, 1) * (p.head_dim + p.value_dim);
  const int64_t threads = max64(1, min64(num_threads(), work / kWorkPerThread));
  const Plan plan = make_plan(p, threads);
  const auto finish = [&](const Sequence& seq, int64_t b, const Row* rows, int64_t count,
                          const Sums& sums) {
    write_rows<T>(p, u, seq, b, rows, count, sums.top, sums.total, sums.sums, plan.columns);
  };
  float* parts = nullptr;
  if (plan.parts > 1) {
    parts = static_cast<float*>(
        thread_scratch(Scratch::shared, sizeof(float) * plan.part_floats * plan.items));
  }
  int64_t next = 0;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    Row rows[kFewRows];
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= plan.items) break;
      const int64_t part = item % plan.parts, head = item / plan.parts;
      const int64_t b = head / p.kv_heads, g = head % p.kv_heads;
      const Sequence seq = sequence_of(p, b);
      const int64_t count = make_rows(p, seq, b, g, rows);
      float* at = parts ? parts + item * plan.part_floats
                        : static_cast<float*>(thread_scratch(Scratch::accumulate,
                                                             sizeof(float) * plan.part_floats));
      const Sums sums(at, plan.columns);
      part_of<Unit, T>(p, u, plan, seq, b, g, part, rows, count, sums);
      if (plan.parts == 1) finish(seq, b, rows, count, sums);
    }
  });
  if (plan.parts == 1) return;
  for (int64_t head = 0; head < p.batch * p.kv_heads; ++head) {
    const int64_t b = head / p.kv_heads, g = head % p.kv_heads;
    const Sequence seq = sequence_of(p, b);
    Row rows[kFewRows];
    const int64_t count = make_rows(p, seq, b, g, rows);
    float* at = parts + head * plan.parts * plan.part_floats;
    merge_parts(u, plan, at, rows, count);
    finish(seq, b, rows, count, Sums(at, plan.columns));
  }
}

}  // namespace

void attention_few(const AttentionParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_unit<T>([&]<class Unit>() { run<typename Unit::Vectors, T>(p); });
  });
}

}  // namespace ft::FT_ISA
