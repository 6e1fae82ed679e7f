// The k most probable classes of an output layer, and their probabilities.
//   x = (X · Wᵀ + b) / τ,   values = exp(x − max x) / Σ exp(x − max x) at the k largest x
// For a small k the classes are cut into a fixed number of shares; a thread that takes one
// multiplies it tile by tile, and of a tile in cache keeps the running maximum and sum of each row
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 4) and its k
// largest: one comparison with the k-th so far for a vector of logits, an insertion where a lane
// beats it. Shares are joined in their order, so threads change nothing. For a large k the logits
// of a few rows are stored and selected from. Bound by reading W for few rows, by arithmetic for
// many.
#include "params/linear_topk.h"

#include <algorithm>
#include <cmath>

#include "cpu/columns.h"
#include "cpu/output_layer.h"

namespace ft::FT_ISA {
namespace {

// std::greater would make std::sort a weak symbol that all instruction sets share.
struct Descending {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

constexpr int64_t kListed = 128;  // the largest k that is kept in lists
constexpr int64_t kShares = 16;
constexpr int64_t kShareClasses = 256;  // at least
constexpr int64_t kRows = 192;          // at a time: the product then reads W in place

// Logits in order as integers: −0 is 0, NaN above all.
FT_INLINE vi keys_of(vf x) {
  const vi bits = (vi)(x + zero());
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : splat_int(INT32_MAX);
}
FT_INLINE int32_t key_of(float x) {
  const int32_t bits = bit_copy<int32_t>(x + 0.f);
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : INT32_MAX;
}
FT_INLINE float logit_of(int32_t key) {
  return key == INT32_MAX ? NAN : bit_copy<float>(key ^ ((key >> 31) & 0x7fffffff));
}

struct Entry {
  int32_t key, index;
};

// What a share, or a whole row, has seen: Σ exp(x − top).
struct Sum {
  float top = -INFINITY, total = 0.f;

  // Takes in a part's maximum and its sum about that maximum (about 0 where it is −inf). A NaN is
  // no maximum; it stays in the total.
  void add(float part_top, float part_total) {
    if (part_top > top) {
      total = total * __builtin_expf(top - part_top) + part_total;
      top = part_top;
    } else if (part_top != -INFINITY) {
      total += part_total * __builtin_expf(part_top - top);
    } else {
      total += part_total;
    }
  }
  float probability(float x) const {
    return top == -INFINITY ? NAN : __builtin_expf(x - top) / total;
  }
};

// A row's maximum and sum, and its logits, made from the product in place.
FT_INLINE Sum sum_of(float* x, const float* bias, float factor, int64_t n) {
  vf high = splat(-INFINITY), total = zero();
  over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    vf y = load(x + j, part);
    if (bias) y += load(bias + j, part);
    y = y * splat(factor);
    store(x + j, y, part);
    high = max(keep(y, part, -INFINITY), high);
  });
  const float top = reduce_max(high), about = top == -INFINITY ? 0.f : top;
  over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    total += keep(exp_below(load(x + j, part) - splat(about)), part);
  });
  Sum sum;
  sum.add(top, reduce_add(total));
  return sum;
}

// ---- lists ------------------------------------------------------------------------------------

struct Share {
  const LinearTopkParams& p;
  const float* bias;
  int64_t first;    // class
  Sum* sums;        // (rows)
  int32_t* sizes;   // (rows)
  Entry* lists;     // (rows, k), falling
  int32_t* bounds;  // (rows), of all shares: the k-th key is no less than that
};

// Puts an entry behind those that are not smaller: of equal keys the first that came stays first.
FT_INLINE void insert(Entry* list, int32_t& size, int64_t k, Entry e) {
  int64_t at = size < k ? size++ : k - 1;
  for (; at > 0 && list[at - 1].key < e.key; --at) list[at] = list[at - 1];
  list[at] = e;
}

// Classes come in rising order within a share.
void keep_largest(const GemmTile& tile, const void* context) {
  const Share& s = *static_cast<const Share*>(context);
  const int64_t k = s.p.k, first = s.first + tile.column;
  const float* bias = s.bias ? s.bias + first : nullptr;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t row = tile.row + i;
    float* x = tile.data + i * tile.stride;
    const Sum tile_sum = sum_of(x, bias, 1.f / s.p.linear.temperature, tile.columns);
    s.sums[row].add(tile_sum.top, tile_sum.total);
    Entry* list = s.lists + row * k;
    int32_t& size = s.sizes[row];
    // Another share's k-th key spares this one most insertions. Which it has seen changes no
    // result: what equals the bound is kept.
    const auto least_of = [&] {
      const int32_t bound = __atomic_load_n(&s.bounds[row], __ATOMIC_RELAXED) - 1;
      return size < k ? bound : std::max(bound, list[k - 1].key);
    };
    over_columns<1>(tile.columns, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      const vi keys = keys_of(keep(load(x + j, part), part, -INFINITY));
      int32_t least = least_of();
      const int64_t count = std::min<int64_t>(tile.columns - j, W);
      uint32_t above = bits_of(keys > splat_int(least)) & ((uint64_t{1} << count) - 1);
      for (; above != 0; above &= above - 1) {
        const int lane = __builtin_ctz(above);
        if (keys[lane] <= least) continue;
        insert(list, size, k, {keys[lane], static_cast<int32_t>(first + j + lane)});
        if (size < k) continue;
        if (list[k - 1].key > s.bounds[row]) {
          __atomic_store_n(&s.bounds[row], list[k - 1].key, __ATOMIC_RELAXED);
        }
        least = least_of();
      }
    });
  }
}

// The shares' sums and lists as one row of the output. `sums`, `sizes` and `lists` are the first
// share's of that row; the next share's are `stride` rows further.
template <class T>
void join(int64_t k, int64_t shares, int64_t stride, const Sum* sums, const int32_t* sizes,
          const Entry* lists, T* values, int64_t* indices) {
  Sum sum;
  for (int64_t s = 0; s < shares; ++s) sum.add(sums[s * stride].top, sums[s * stride].total);
  int32_t taken[kShares] = {};
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    Entry e = {};
    for (int64_t s = 0; s < shares; ++s) {
      if (taken[s] == sizes[s * stride]) continue;
      const Entry other = lists[s * stride * k + taken[s]];
      if (best < 0 || other.key > e.key) {
        best = s;
        e = other;
      }
    }
    ++taken[best];
    values[i] = from_float<T>(sum.probability(logit_of(e.key)));
    indices[i] = e.index;
  }
}

template <class T>
void run_lists(const LinearTopkParams& p) {
  const LinearSoftmaxParams& l = p.linear;
  const float* bias = wide_bias(l);
  const int64_t count = std::clamp<int64_t>(l.classes / kShareClasses, 1, kShares),
                most = std::min(kRows, l.rows);
  const int64_t width = ((l.classes + count - 1) / count + 3) / 4 * 4;
  const size_t cells = static_cast<size_t>(count * most);
  char* memory = static_cast<char*>(thread_scratch(
      Scratch::logits,
      cells * (sizeof(Sum) + 2 * sizeof(int32_t) + static_cast<size_t>(p.k) * sizeof(Entry))));
  Entry* lists = reinterpret_cast<Entry*>(memory);
  Sum* sums = reinterpret_cast<Sum*>(lists + cells * static_cast<size_t>(p.k));
  int32_t* sizes = reinterpret_cast<int32_t*>(sums + cells);
  int32_t* bounds = sizes + cells;
  for (int64_t row = 0; row < l.rows; row += most) {
    const int64_t rows = std::min(most, l.rows - row);
    std::fill(sums, sums + cells, Sum{});
    std::fill(sizes, sizes + cells, 0);
    std::fill(bounds, bounds + most, INT32_MIN + 1);
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t at = s * most;
        const Share share = {p, bias, s * width, sums + at, sizes + at, lists + at * p.k, bounds};
        const int64_t classes = std::min(width, l.classes - share.first);
        if (classes <= 0) break;
        Gemm g = output_product(l, row, rows, share.first, classes);
        g.one_thread = true;
        g.epilogue = keep_largest;
        g.context = &share;
        gemm(g);
      }
    });
    parallel_for(rows, 4096 / (p.k * count) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = (row + r) * p.k;
        join(p.k, count, most, sums + r, sizes + r, lists + r * p.k, static_cast<T*>(p.values) + at,
             p.indices + at);
      }
    });
  }
}

// ---- selection --------------------------------------------------------------------------------

// A key and its index as one number, of which larger is earlier.
FT_INLINE uint64_t rank_of(float x, int64_t index) {
  const uint64_t key = static_cast<uint32_t>(key_of(x)) ^ 0x80000000u;
  return key << 32 | (0xffffffffu - static_cast<uint64_t>(index));
}

template <class T>
void run_selection(const LinearTopkParams& p) {
  const LinearSoftmaxParams& l = p.linear;
  const float* bias = wide_bias(l);
  const int64_t n = l.classes, most = rows_at_once(l);
  float* logits = static_cast<float*>(
      thread_scratch(Scratch::logits, sizeof(float) * static_cast<size_t>(most * n)));
  for (int64_t row = 0; row < l.rows; row += most) {
    const int64_t rows = std::min(most, l.rows - row);
    const Logits context = {logits, n, nullptr};
    Gemm g = output_product(l, row, rows, 0, n);
    g.epilogue = store_logits;
    g.context = &context;
    gemm(g);
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
      uint64_t* ranks = static_cast<uint64_t*>(
          thread_scratch(Scratch::accumulate, sizeof(uint64_t) * static_cast<size_t>(n)));
      for (int64_t r = begin; r < end; ++r) {
        float* x = logits + r * n;
        const Sum sum = sum_of(x, bias, 1.f / l.temperature, n);
        for (int64_t j = 0; j < n; ++j) ranks[j] = rank_of(x[j], j);
        if (p.k < n) std::nth_element(ranks, ranks + p.k, ranks + n, Descending{});
        std::sort(ranks, ranks + p.k, Descending{});
        const int64_t at = (row + r) * p.k;
        for (int64_t i = 0; i < p.k; ++i) {
          const int64_t index = 0xffffffffu - static_cast<int64_t>(ranks[i] & 0xffffffffu);
          static_cast<T*>(p.values)[at + i] = from_float<T>(sum.probability(x[index]));
          p.indices[at + i] = index;
        }
      }
    });
  }
}

}  // namespace

void linear_topk(const LinearTopkParams& p) {
  if (p.k == 0 || p.linear.rows == 0) return;
  with_type(p.linear.dtype,
            [&]<class T>() { p.k <= kListed ? run_lists<T>(p) : run_selection<T>(p); });
}

}  // namespace ft::FT_ISA
