// Token embedding with positions, and the gradient of an embedding table.
//   out[n] = scale · weight[input[n]] + position_weight[position[n]] + sinusoid(position[n])
//   d_table[r] = scale · Σ grad[n] over the tokens n that looked row r up, in the order of n
// Forward: a thread owns a run of tokens. With a sinusoid it takes kPositions neighbouring
// positions and goes through all the sequences with them, so that a row of sines is made once per
// position. Backward: the ids come sorted, with the tokens they are from. A thread owns a run of
// the table's rows, chosen so that rows to write and tokens to read are shared out evenly; it
// writes zeros or the sum of the row's tokens, which registers hold for kSumVectors vectors of
// columns. Only a row of very many tokens is shared by columns instead. Each column's
// sum has one order, that of the tokens in tiles of kEmbeddingTile, whoever makes it: the same bits
// on any number of threads. Bound by memory: forward reads a table row and writes a row per token,
// backward reads a row per token and writes the table. Source: Vaswani et al., 2017
// (arXiv:1706.03762), 3.4 and 3.5.
#include "params/embedding.h"

#include "cpu/columns.h"
#include "cpu/ids.h"
#include "cpu/parallel.h"
#include "cpu/sinusoid.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it gives
constexpr int64_t kPositions = 8;  // whose sines are kept at a time
constexpr int64_t kAhead = 2;      // tokens ahead whose row is asked for
constexpr int kSumVectors = 8;     // vectors of columns that are summed in registers
constexpr int64_t kShared = 4096;  // tokens of a row that is shared by columns
constexpr int64_t kInMemory = int64_t{32} << 20;  // bytes of a table that no cache holds
constexpr int64_t kLine = 64;                     // bytes of a cache line
constexpr int64_t kAskedLines = 4;  // of a row: the processor itself asks for what follows

template <class T>
FT_INLINE void ask(const T* row, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const int64_t end = bytes < kAskedLines * kLine ? bytes : kAskedLines * kLine;
  for (int64_t at = 0; at < end; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at);
  }
}

// ---- forward ------------------------------------------------------------------------------------

template <class T>
const T* table_row(const void* table, int64_t stride, int64_t row) {
  return static_cast<const T*>(table) + row * stride;
}

// One token's row; `learned` and `sines` may be null.
template <class T>
void token_row(const T* x, float scale, const T* learned, const float* sines, int64_t n, T* out) {
  if (scale == 1.f && learned == nullptr && sines == nullptr) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  const vf by = splat(scale);
  const auto walk = [&](auto add) __attribute__((always_inline)) {
    over_columns<4>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
      store(out + j, add(load(x + j, part) * by, j, part), part);
    });
  };
  const auto learned_at = [&](int64_t j, auto part)
                              __attribute__((always_inline)) { return load(learned + j, part); };
  const auto sines_at = [&](int64_t j, auto part)
                            __attribute__((always_inline)) { return load(sines + j, part); };
  if (learned == nullptr && sines == nullptr) {
    walk([&](vf x, int64_t, auto) __attribute__((always_inline)) { return x; });
  } else if (sines == nullptr) {
    walk([&](vf x, int64_t j, auto part)
             __attribute__((always_inline)) { return x + learned_at(j, part); });
  } else if (learned == nullptr) {
    walk([&](vf x, int64_t j, auto part)
             __attribute__((always_inline)) { return x + sines_at(j, part); });
  } else {
    walk([&](vf x, int64_t j, auto part) __attribute__((always_inline)) {
      return x + learned_at(j, part) + sines_at(j, part);
    });
  }
}

int64_t position_of(const EmbeddingParams& p, int64_t at) {
  return p.positions.data == nullptr ? at : id_at(p.positions, at);
}

template <class T>
void one_token(const EmbeddingParams& p, int64_t n, int64_t at, const float* sines) {
  const T* learned = nullptr;
  if (p.position_weight != nullptr) {
    learned = table_row<T>(p.position_weight, p.position_stride, position_of(p, at));
  }
  token_row(table_row<T>(p.weight, p.row_stride, id_at(p.input, n)), p.scale, learned, sines,
            p.features, static_cast<T*>(p.output) + n * p.features);
}

template <class T>
void tokens(const EmbeddingParams& p, int64_t begin, int64_t end) {
  int64_t at = begin % p.period;
  for (int64_t n = begin; n < end; ++n) {
    if (n + kAhead < end) {
      ask(table_row<T>(p.weight, p.row_stride, id_at(p.input, n + kAhead)), p.features);
    }
    one_token<T>(p, n, at, nullptr);
    at = at + 1 == p.period ? 0 : at + 1;
  }
}

// Item i is the tokens of sequence i mod sequences at positions kPositions · ⌊i / sequences⌋ on.
template <class T>
void sinusoidal_tokens(const EmbeddingParams& p, int64_t sequences, int64_t begin, int64_t end) {
  const int64_t room = p.features + 2 * W, pairs = (p.features + 1) / 2;
  char* scratch = static_cast<char*>(thread_scratch(
      Scratch::tile, static_cast<size_t>(kPositions * room * 4 + room * 4 + pairs * 8)));
  uint64_t* turns = reinterpret_cast<uint64_t*>(scratch);
  float* sines = reinterpret_cast<float*>(turns + pairs);
  int32_t* angles = reinterpret_cast<int32_t*>(sines + kPositions * room);
  turns_per_position(p.features, turns);
  int64_t made = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / sequences * kPositions, sequence = item % sequences;
    const int64_t left = p.period - first, count = left < kPositions ? left : kPositions;
    if (first != made) {
      for (int64_t i = 0; i < count; ++i) {
        sinusoid_row(position_of(p, first + i), turns, p.features, angles, sines + i * room);
      }
      made = first;
    }
    for (int64_t i = 0; i < count; ++i) {
      one_token<T>(p, sequence * p.period + first + i, first + i, sines + i * room);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

// The first of the sorted ids from `from` on that is not below `id`.
int64_t first_of(const EmbeddingBackwardParams& p, int64_t id, int64_t from = 0) {
  int64_t low = from, high = p.tokens;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (id_at(p.ids, middle) < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first row whose share of the work, a unit for each row and each token before it, is behind
// `unit`.
int64_t row_at(const EmbeddingBackwardParams& p, int64_t unit) {
  int64_t low = 0, high = p.rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (middle + first_of(p, middle) < unit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
FT_INLINE const T* grad_row(const EmbeddingBackwardParams& p, int64_t i) {
  return static_cast<const T*>(p.grad) + id_at(p.order, i) * p.grad_stride;
}

// Columns from `column` on, V vectors of which the last is a `part`, of the sum over the sorted
// tokens [begin, end).
template <int V, class T, class P>
FT_INLINE void sum_columns(const EmbeddingBackwardParams& p, int64_t begin, int64_t end,
                           int64_t column, P part, T* out) {
  vf sum[V] = {};
  for (int64_t from = begin; from < end; from += kEmbeddingTile) {
    const int64_t to = end - from < kEmbeddingTile ? end : from + kEmbeddingTile;
    vf tile[V] = {};
    for (int64_t i = from; i < to; ++i) {
      if (i + kAhead < end) ask(grad_row<T>(p, i + kAhead) + column, V * W);
      const T* g = grad_row<T>(p, i) + column;
      FT_UNROLL for (int v = 0; v < V; ++v) tile[v] += load(g + v * W, part);
    }
    FT_UNROLL for (int v = 0; v < V; ++v) sum[v] += tile[v];
  }
  const vf by = splat(p.scale);
  FT_UNROLL for (int v = 0; v < V; ++v) store(out + column + v * W, sum[v] * by, part);
}

// Columns [first, last) of the row of the sorted tokens [begin, end).
template <class T>
void sum_row(const EmbeddingBackwardParams& p, int64_t begin, int64_t end, int64_t first,
             int64_t last, T* out) {
  int64_t j = first;
  for (; j + kSumVectors * W <= last; j += kSumVectors * W) {
    sum_columns<kSumVectors>(p, begin, end, j, Whole{}, out);
  }
  for (; j + W <= last; j += W) sum_columns<1>(p, begin, end, j, Whole{}, out);
  if (j < last) sum_columns<1>(p, begin, end, j, Part{static_cast<int>(last - j)}, out);
}

template <class T>
void table_rows(const EmbeddingBackwardParams& p, int64_t from, int64_t to, int64_t longest) {
  T* table = static_cast<T*>(p.d_table);
  const auto clear = [&](int64_t first, int64_t last) {
    std::memset(static_cast<void*>(table + first * p.features), 0,
                static_cast<size_t>((last - first) * p.features) * sizeof(T));
  };
  // Where most rows get zeros and lie in memory, all do, in one stretch: that is written without
  // being read first.
  const bool cleared =
      2 * p.tokens < p.rows && p.rows * p.features * static_cast<int64_t>(sizeof(T)) > kInMemory;
  if (cleared) clear(from, to);
  int64_t row = from, i = first_of(p, from);
  while (row < to) {
    const int64_t id = i < p.tokens ? id_at(p.ids, i) : p.rows;
    if (id > row) {  // no token looked up the rows before it
      const int64_t end = id < to ? id : to;
      if (!cleared) clear(row, end);
      row = end;
      continue;
    }
    int64_t end = i + 1;
    while (end < p.tokens && end <= i + longest && id_at(p.ids, end) == id) ++end;
    if (end > i + longest) end = first_of(p, id + 1, end);
    if (id == p.padding_idx) {
      clear(id, id + 1);
    } else if (end - i <= longest) {
      sum_row(p, i, end, 0, p.features, table + id * p.features);
    }
    i = end;
    ++row;
  }
}

// The rows of more than kShared tokens, one after the other, each by all threads.
template <class T>
void shared_rows(const EmbeddingBackwardParams& p) {
  int64_t done = -1;
  for (int64_t i = kShared; i < p.tokens; i += kShared) {  // such a row has one of these tokens
    const int64_t id = id_at(p.ids, i);
    if (id == done || id == p.padding_idx) continue;
    done = id;
    const int64_t begin = first_of(p, id), end = first_of(p, id + 1, i);
    if (end - begin <= kShared) continue;
    constexpr int64_t kColumns = kSumVectors * W;
    const int64_t shares = (p.features + kColumns - 1) / kColumns;
    parallel_for(shares, 1, [&](int64_t first, int64_t last) {
      sum_row(p, begin, end, first * kColumns,
              last * kColumns < p.features ? last * kColumns : p.features,
              static_cast<T*>(p.d_table) + id * p.features);
    });
  }
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  if (p.tokens == 0 || p.features == 0) return;
  with_type(p.dtype, [&]<class T>() {
    if (!p.sinusoidal) {
      parallel_for(p.tokens, kGrain / p.features + 1,
                   [&](int64_t begin, int64_t end) { tokens<T>(p, begin, end); });
      return;
    }
    const int64_t sequences = p.tokens / p.period;
    const int64_t items = (p.period + kPositions - 1) / kPositions * sequences;
    const int64_t elements = p.tokens * p.features / items;
    parallel_for(items, kGrain / (elements + 1) + 1, [&](int64_t begin, int64_t end) {
      sinusoidal_tokens<T>(p, sequences, begin, end);
    });
  });
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  if (p.rows == 0 || p.features == 0) return;
  const bool shared = p.tokens > kShared && num_threads() > 1;
  with_type(p.dtype, [&]<class T>() {
    parallel_for(p.rows + p.tokens, kGrain / p.features + 1, [&](int64_t begin, int64_t end) {
      table_rows<T>(p, row_at(p, begin), end == p.rows + p.tokens ? p.rows : row_at(p, end),
                    shared ? kShared : p.tokens);
    });
    if (shared) shared_rows<T>(p);
  });
}

}  // namespace ft::FT_ISA
