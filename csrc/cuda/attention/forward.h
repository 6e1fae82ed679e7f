// Attention forward on tensor cores (mma.sync), FlashAttention-2's scheme:
//   s = scale · q·kᵀ …  out = softmax(s) · v   by tiles of keys, with a running maximum and sum
// A block owns a tile of query rows of one key head (with `pack` query heads, whose rows then take
// turns: row r is query r / pack of head r % pack), a warp 16 or 32 of its rows, and walks over the
// keys. Q stays in shared memory; K and V have a buffer each, and one is filled by cp.async while
// the other is in use: V comes during q·kᵀ, the next K during the softmax and p·v. Scores and
// weights never leave registers: the products of q·kᵀ are the A operand of p·v as they lie. Blocks
// that are few share their keys out (splits) and leave unfinished sums to attention_merge.
// Bound by the tensor cores; by memory for few queries. Source: Dao, FlashAttention-2, 2023
// (arXiv:2307.08691), section 3; splits: Dao, Haziza, Massa, Sizov, Flash-Decoding, 2023.
#pragma once
#include "cuda/attention/shapes.h"
#include "cuda/attention_scores.h"
#include "cuda/device/fragment.h"
#include "cuda/device/index.h"
#include "cuda/device/launch.h"

namespace ft::cuda {

// ---- loading ------------------------------------------------------------------------------------

// A thread's share of loading a tile of rows whose rows begin on 16 bytes: one column of chunks, so
// that all but the rows' number is settled once.
template <int kThreads, class T, int kRows, int kColumns>
struct AlignedLoader {
  using Shape = Tile<T, kRows, kColumns>;
  static constexpr int kStep = kThreads / Shape::kChunks;
  static_assert(kThreads % Shape::kChunks == 0 && kRows % kStep == 0);
  // Rows first … first + kRows − 1 of the matrix, of which `rows` exist; the others are zeros.
  FT_DEVICE static void load(const Shape& tile, const T* base, int64_t stride, int columns,
                             int first, int rows) {
    const int thread = hidden(thread_index());
    const int row0 = thread / Shape::kChunks, chunk = thread % Shape::kChunks;
    const int column = chunk * kLanes<T>;
    const int left = at_most(at_least(columns - column, 0), kLanes<T>) * int{sizeof(T)};
    const T* from = base + (first + row0) * stride + static_cast<uint32_t>(column);
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const int row = row0 + i * kStep;
      copy_async_part(tile.chunk(row, chunk), from, row < rows ? left : 0);
      from += kStep * stride;
    }
  }
};

// The same for any rows, a chunk after the other: what is loaded once, or not aligned.
template <int kThreads, class T, int kRows, int kColumns, class RowOf>
FT_DEVICE void load_any(const Tile<T, kRows, kColumns>& tile, int rows, int columns, bool aligned,
                        const RowOf& row_of) {
  constexpr int kChunks = Tile<T, kRows, kColumns>::kChunks;
#pragma unroll 1
  for (int i = hidden(thread_index()); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, column = chunk * kLanes<T>;
    const int left = row < rows ? at_least(columns - column, 0) : 0;
    const T* from = row_of(left > 0 ? row : 0) + (left > 0 ? column : 0);
    if (aligned) {
      copy_async_part(tile.chunk(row, chunk), from, at_most(left, kLanes<T>) * int{sizeof(T)});
    } else {
      shared_store(reinterpret_cast<Chunk*>(tile.chunk(row, chunk)),
                   load_chunk<T>(from, 0, left, false));
    }
  }
}

template <int kThreads, bool kAligned, class T, int kRows, int kColumns>
FT_DEVICE void load_rows(const Tile<T, kRows, kColumns>& tile, const HeadsView& view, const T* base,
                         int columns, bool aligned, int first, int rows) {
  if (kAligned || aligned) {
    using Loader = AlignedLoader<kThreads, T, kRows, kColumns>;
    return Loader::load(tile, base, view.row, columns, first, rows);
  }
  if constexpr (!kAligned) {
    load_any<kThreads>(tile, rows, columns, false,
                       [&](int r) { return base + (first + r) * view.row; });
  }
}

// ---- where a block stands -----------------------------------------------------------------------

struct Place {
  int64_t batch, head;  // head: the first query head of the tile
  int tile, split;
};

// Items lie by sections of heads whose keys and values fit in L2 together; within a section by
// tiles, the last, which under a causal mask is the longest, first. What is divided by is hidden,
// as the compiler would keep the reciprocals in registers through everything.
FT_DEVICE Place place_of(const ForwardArgs& a, int64_t item) {
  Place at;
  at.split = static_cast<int>(divide(item, hidden(a.splits)));
  const int tiles = hidden(a.tiles), heads = hidden(a.heads), section_heads = hidden(a.section);
  int64_t section = item;
  int64_t tile = divide(section, int64_t{section_heads} * tiles);
  const int64_t left = a.p.batch * heads - section * section_heads;
  const int64_t within = divide(tile, left < section_heads ? left : section_heads);
  at.tile = tiles - 1 - static_cast<int>(tile);
  at.batch = section * section_heads + within;
  at.head = divide(at.batch, heads) * a.pack;
  return at;
}

// Query and head (from the tile's first) of a row.
struct RowPlace {
  int query, head;
};
FT_DEVICE RowPlace row_place(int pack, int row) {
  if (pack == 1) return {row, 0};
  return {row / pack, row % pack};
}

FT_DEVICE float quad_max(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}
FT_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, int kHead, Variant kVariant>
struct Forward {
  static constexpr TileShape kShape = tile_shape(sizeof(T), kVariant, kHead);
  static constexpr bool kPlain = kVariant == Variant::plain;
  static constexpr int kThreads = kShape.warps * kWarp;
  static constexpr int kWarpRows = 16 * kShape.row_tiles, kRows = kShape.rows();
  static constexpr int kRowWarps = kShape.warps / kShape.column_warps;
  static constexpr int kKeys = kShape.keys, kRowTiles = kShape.row_tiles;
  static constexpr int kScoreTiles = kKeys / 8, kOutTiles = kHead / 8 / kShape.column_warps;
  using QueryTile = Tile<T, kRows, kHead>;
  using KeyTile = Tile<T, kKeys, kHead>;
  using Scores = float[kRowTiles][kScoreTiles][4];
  using Sums = float[kRowTiles][kOutTiles][4];

  // Of the output, where the warps of a tile's rows share its columns.
  FT_DEVICE static int first_column() {
    return kShape.column_warps == 1 ? 0 : warp_index() / kRowWarps * kOutTiles * 8;
  }

  // Two neighbouring tiles; float's products are summed in turns.
  FT_DEVICE static void mma_pair(float (&first)[4], float (&second)[4], const FragmentA<T>& left,
                                 const FragmentB<T> (&right)[2]) {
    if constexpr (sizeof(T) == 2) {
      mma(first, left, right[0]);
      mma(second, left, right[1]);
    } else {
      mma(reinterpret_cast<float (&)[2][4]>(first), left, right);
    }
  }

  // s = q · kᵀ
  FT_DEVICE static void score_products(const QueryTile& query, const KeyTile& key, int row,
                                       int lane, Scores& s) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s[m][n][c] = 0.f;
      }
    }
    constexpr int kTurns = 4;  // all would take more registers than there are
#pragma unroll kTurns
    for (int k = 0; k < kHead; k += kDepth<T>) {
      FragmentA<T> left[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_a(left[m], query, row + 16 * m, k, lane);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        FragmentB<T> right[2];
        load_b(right, key, k, n * 8, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) { mma_pair(s[m][n], s[m][n + 1], left[m], right); }
      }
    }
  }

  // o += p · v
  FT_DEVICE static void value_products(const Scores& s, const KeyTile& value, int column, int lane,
                                       Sums& o) {
#pragma unroll
    for (int k = 0; k < kKeys; k += kDepth<T>) {
      FragmentA<T> left[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) products_as_a(left[m], s[m] + k / 8);
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        if (sizeof(T) == 4 && n % 4 == 0) warp_barrier();  // keeps ptxas from loading far ahead
        FragmentB<T> right[2];
        load_b_transposed<true>(right, value, k, column + n * 8, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) { mma_pair(o[m][n], o[m][n + 1], left[m], right); }
      }
    }
  }

  // Scores of 16 rows become weights relative to the new maximum; sums so far shrink to it.
  FT_DEVICE static void softmax(float exponent, float (&s)[kScoreTiles][4], float (&top)[2],
                                float (&total)[2], float (&o)[kOutTiles][4]) {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[half];
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        most = maximum(most, maximum(s[n][2 * half], s[n][2 * half + 1]));
      }
      most = quad_max(most);
      // Of a row that has seen −inf only, every exponential must come out 0.
      const float base = most == -infinity() ? 0.f : most;
      alpha[half] = power_of_2<T>((top[half] - base) * exponent);
      top[half] = most;
      float sum = 0.f;
      const float shift = base * exponent;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          // The product may leave float's range where a bias does nearly; the difference doesn't.
          s[n][c] = kPlain ? power_of_2<T>(s[n][c] * exponent - shift)
                           : power_of_2<T>((s[n][c] - base) * exponent);
          sum += s[n][c];
        }
      }
      total[half] = total[half] * alpha[half] + sum;
    }
    if (any_lane(alpha[0] != 1.f || alpha[1] != 1.f)) {  // seldom, after the first tiles
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[n][c] *= alpha[c / 2];
      }
    }
  }

  // What of the weights of a row and two neighbouring keys dropout keeps. keep_bits<2> by hand: its
  // loop takes registers that float at 128 does not have.
  FT_DEVICE static void drop(const ForwardArgs& a, uint64_t seed, int64_t position, float& first,
                             float& second) {
    const uint32_t threshold = a.p.dropout.threshold;
    const int at = static_cast<int>(position & 3);
    uint32_t bits = dropout_keep4(seed, static_cast<uint64_t>(position) >> 2, threshold) >> at;
    if (at == 3) {
      bits |= dropout_keep4(seed, static_cast<uint64_t>(position + 1) >> 2, threshold) << 1;
    }
    if ((bits & 1) == 0) first = 0.f;
    if ((bits & 2) == 0) second = 0.f;
  }

  struct Item {
    Place at;
    Sequence seq;
    int pack;
    int first_row, rows;  // of the tile; none: nothing to do
    Runs runs;
    int begin, end;  // of the keys of this split
  };

  // What the loop asks for once a tile: it waits in shared memory, as registers are scarcer.
  struct Kept {
    Item item;
    const T *key, *value;
  };

  FT_DEVICE static Item locate(const ForwardArgs& a, int round) {
    const int64_t item = blockIdx.x + int64_t{round} * gridDim.x;
    Item i = {};
    if (item >= a.items) return i;
    i.at = place_of(a, item);
    i.seq = sequence_of(a.p, i.at.batch);
    i.pack = hidden(a.pack);
    const int all_rows = i.seq.queries * i.pack;
    i.first_row = i.at.tile * kRows;
    i.rows = at_most(all_rows - i.first_row, kRows);
    i.runs = key_runs(i.seq, row_place(i.pack, i.first_row).query,
                      row_place(i.pack, at_most(i.first_row + kRows, all_rows) - 1).query, kKeys);
    i.begin = i.runs.begin;
    i.end = i.runs.end;
    if (a.splits > 1) {
      const int tiles = (i.end - i.begin + kKeys - 1) / kKeys;
      const int each = (tiles + a.splits - 1) / a.splits * kKeys;
      i.begin = at_most(i.begin + i.at.split * each, i.end);
      i.end = at_most(i.begin + each, i.end);
    }
    return i;
  }

  FT_DEVICE static void finish(const ForwardArgs& a, const Item& item,
                               const float (&top)[kRowTiles][2], const float (&total)[kRowTiles][2],
                               const bool (&seen)[kRowTiles][2], const Sums& o);
  FT_DEVICE static void run(const ForwardArgs& a, int round);
};

template <class T, int kHead, Variant kVariant>
FT_DEVICE void Forward<T, kHead, kVariant>::run(const ForwardArgs& a, int round) {
  const AttentionParams& p = a.p;
  T* memory = dynamic_shared<T>();
  const QueryTile query_tile{memory};
  const KeyTile key_tile{memory + kRows * kHead}, value_tile{memory + (kRows + kKeys) * kHead};

  const Item here = locate(a, round);
  if (here.rows <= 0) return;
  const Place& at = here.at;
  const Sequence& seq = here.seq;
  const Runs& runs = here.runs;
  const int first_row = here.first_row, rows = here.rows, pack = here.pack;
  const int begin = here.begin, end = here.end;
  FT_SHARED_ARRAY(Kept, kept, 1);

  // Rows of a thread: row_tiles times row g and row g + 8 of the warp's 16. What is known of them
  // is made anew in each tile that asks: registers are scarcer.
  const int warp_row = warp_index() % kRowWarps * kWarpRows;
  const bool active = warp_row < rows;
  const auto row_of = [&](int m, int half, int lane) {
    return warp_row + 16 * m + 8 * half + lane / 4;
  };
  const auto place = [&](const Item& item, int m, int half, int lane) {
    const int row = at_most(row_of(m, half, lane), item.rows - 1);
    return row_place(item.pack, item.first_row + row);
  };
  const auto score_row_of = [&](const Item& item, int m, int half, int lane) {
    const RowPlace r = place(item, m, half, lane);
    return score_row(p, item.seq, item.at.batch, item.at.head + r.head, r.query,
                     row_of(m, half, lane) < item.rows);
  };

  float top[kRowTiles][2], total[kRowTiles][2];
  bool seen[kRowTiles][2];  // the row has a key, by masks and biases
  Sums o;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[m][half] = -infinity();
      total[m][half] = 0.f;
      seen[m][half] = false;
    }
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o[m][n][c] = 0.f;
    }
  }

  const bool masks = !kPlain && (p.mask.data != nullptr || p.bias.data != nullptr);
  if (begin < end) {
    const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
    const int64_t key_head = at.head / (p.heads / p.kv_heads);
    const T* query = static_cast<const T*>(p.query.data) + at.batch * p.query.batch +
                     at.head * p.query.head + seq.query_start * p.query.row;
    const T* key = static_cast<const T*>(p.key.data) + at.batch * p.key.batch +
                   key_head * p.key.head + seq.key_start * p.key.row;
    const T* value = static_cast<const T*>(p.value.data) + at.batch * p.value.batch +
                     key_head * p.value.head + seq.key_start * p.value.row;
    block_barrier();  // the item before has left the tiles
    if (thread_index() == 0) {
      shared_store(&kept->item, here);
      shared_store(&kept->key, key);
      shared_store(&kept->value, value);
    }
    load_any<kThreads>(query_tile, rows, dim, kPlain || a.query_aligned, [&](int r) {
      const RowPlace place = row_place(pack, first_row + r);
      return query + place.head * p.query.head + place.query * p.query.row;
    });
    load_rows<kThreads, kPlain>(key_tile, p.key, key, dim, a.key_aligned, begin, seq.keys - begin);
    copy_async_commit();
    block_barrier();  // `kept` is there
#pragma unroll 1
    for (int j = begin; j < shared_load(&kept->item.end); j += kKeys) {
      copy_async_wait<0>();
      block_barrier();  // K is here, and V is free
      load_rows<kThreads, kPlain>(value_tile, p.value, shared_load(&kept->value), value_dim,
                                  a.value_aligned, j, shared_load(&kept->item.seq.keys) - j);
      copy_async_commit();
      const int lane = hidden(lane_index());
      Scores s;
      if (active) score_products(query_tile, key_tile, hidden(warp_row), hidden(lane_index()), s);
      copy_async_wait<0>();
      block_barrier();  // V is here, and K is free
      if (j + kKeys < shared_load(&kept->item.end)) {
        load_rows<kThreads, kPlain>(key_tile, p.key, shared_load(&kept->key), dim, a.key_aligned,
                                    j + kKeys, shared_load(&kept->item.seq.keys) - j - kKeys);
      }
      copy_async_commit();
      if (!active) continue;
      const bool edges = j < shared_load(&kept->item.runs.whole_begin) ||
                         j >= shared_load(&kept->item.runs.whole_end);
      const auto key_of = [&](int n, int c) { return j + n * 8 + lane % 4 * 2 + c % 2; };
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if constexpr (kPlain) {
          if (edges) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Sequence seq = shared_load(&kept->item.seq);
              const int row = shared_load(&kept->item.first_row) + row_of(m, half, hidden(lane));
              const int position = row_place(hidden(a.pack), row).query + seq.shift;
              const int low = position - seq.left;
              const int high = at_most(position + seq.right + 1, seq.keys);
#pragma unroll
              for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
                for (int c = 2 * half; c < 2 * half + 2; ++c) {
                  if (key_of(n, c) < low || key_of(n, c) >= high) s[m][n][c] = -infinity();
                }
              }
            }
          }
        } else {
          if (!a.units.raw) scale_scores<T>(p, s[m]);
          if (edges || masks || p.alibi_slopes != nullptr) {
            const Item now = shared_load(&kept->item);
            const ScoreRow r[2] = {score_row_of(now, m, 0, lane), score_row_of(now, m, 1, lane)};
            mask_scores<T>(
                p, edges, [&](int, int c) -> const ScoreRow& { return r[c / 2]; }, key_of, s[m],
                [&](int, int c, bool allowed) { seen[m][c / 2] |= allowed; });
          }
        }
        softmax(a.units.exponent, s[m], top[m], total[m], o[m]);
        if constexpr (!kPlain) {
          if (p.dropout.threshold != 0) {
            const uint64_t seed = seed_of(p.dropout);
            const Item now = shared_load(&kept->item);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const RowPlace r = place(now, m, half, lane);
              const int64_t position =
                  dropout_position(p, now.at.batch, now.at.head + r.head, r.query);
#pragma unroll
              for (int n = 0; n < kScoreTiles; ++n) {
                drop(a, seed, position + key_of(n, 0), s[m][n][2 * half], s[m][n][2 * half + 1]);
              }
            }
          }
        }
      }
      value_products(s, value_tile, first_column(), hidden(lane_index()), o);
    }
    copy_async_wait<0>();
  }
  // What only the end needs is found again, rather than kept in registers through the loop.
  if constexpr (kShape.column_warps > 1) block_barrier();  // Q becomes the output's place
  if (active) finish(a, locate(a, hidden(round)), top, total, seen, o);
}

// Writes the rows of a warp.
template <class T, int kHead, Variant kVariant>
FT_DEVICE void Forward<T, kHead, kVariant>::finish(const ForwardArgs& a, const Item& item,
                                                   const float (&top)[kRowTiles][2],
                                                   const float (&total)[kRowTiles][2],
                                                   const bool (&seen)[kRowTiles][2],
                                                   const Sums& o) {
  const AttentionParams& p = a.p;
  const Place& at = item.at;
  const Sequence& seq = item.seq;
  const int pack = item.pack, rows = item.rows, first_row = item.first_row;
  const int warp_row = warp_index() % kRowWarps * kWarpRows;
  const bool masks = !kPlain && (p.mask.data != nullptr || p.bias.data != nullptr);
  const auto row_of = [&](int m, int half, int lane) {
    return warp_row + 16 * m + 8 * half + lane / 4;
  };
  const auto place = [&](int m, int half, int lane) {
    return row_place(pack, first_row + at_most(row_of(m, half, lane), rows - 1));
  };
  const int lane = hidden(lane_index()), t = lane % 4;
  const float lse_scale = a.units.lse_scale;
  const QueryTile staged{dynamic_shared<T>()};  // Q's, of whose rows nothing is read any more
  warp_barrier();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Whether a query has a key at all is told by the rules, never by the sum.
      const RowPlace here = place(m, half, lane);
      const int position = here.query + seq.shift;
      bool some = at_least(position - seq.left, item.begin) <
                  at_most(at_most(position + seq.right + 1, seq.keys), item.end);
      if (masks) {
        int any = seen[m][half] ? 1 : 0;
        any |= shuffle_xor(any, 1);
        any |= shuffle_xor(any, 2);
        some = any != 0;
      }
      const float sum = quad_sum(total[m][half]);
      const bool exists = row_of(m, half, lane) < rows;
      const int64_t head = at.head + here.head;
      const int64_t row = first_row_of(p, seq, at.batch, head) + here.query;
      if (a.splits > 1) {
        const int64_t all = p.rows(), place_here = at.split * all + row;
        float* to = a.partial + place_here * p.value_dim;
        float* stats = a.partial + a.splits * all * p.value_dim + place_here * 2;
        if (exists && t == 0 && first_column() == 0) {
          store_scalar(stats, top[m][half]);
          store_scalar(stats + 1, some ? sum : -1.f);
        }
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = first_column() + n * 8 + t * 2 + c;
            if (exists && column < p.value_dim) store_scalar(to + column, o[m][n][2 * half + c]);
          }
        }
        continue;
      }
      const Finish f = finish_row(p, lse_scale, some, top[m][half], sum, head);
      if (exists && t == 0 && first_column() == 0) { store_scalar(p.lse + row, f.lse); }
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        T* to = staged.at(row_of(m, half, lane), first_column() + n * 8 + t * 2);
        const float low = some ? o[m][n][2 * half] * f.factor : 0.f;
        const float high = some ? o[m][n][2 * half + 1] * f.factor : 0.f;
        if constexpr (sizeof(T) == 2) {
          shared_store(reinterpret_cast<uint32_t*>(to), narrow2(low, high, T{}));
        } else {
          shared_store(to, low);
          shared_store(to + 1, high);
        }
      }
    }
  }
  if (a.splits > 1) return;
  warp_barrier();
  const int columns = static_cast<int>(p.value_dim);
  constexpr int kChunks = QueryTile::kChunks / kShape.column_warps;
#pragma unroll 2
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int row = warp_row + i / kChunks;
    const int chunk = i % kChunks + first_column() / kLanes<T>;
    if (row >= rows || chunk * kLanes<T> >= columns) continue;
    const RowPlace here = row_place(pack, first_row + row);
    const int64_t token = first_query_of(p, seq, at.batch) + here.query;
    T* out = static_cast<T*>(p.out) + (token * p.heads + at.head + here.head) * p.value_dim;
    store_chunk(out, chunk * kLanes<T>, columns, a.out_aligned,
                shared_load(reinterpret_cast<const Chunk*>(staged.chunk(row, chunk))));
  }
}

template <class T, int kHead, Variant kVariant>
FT_GLOBAL void __launch_bounds__(Forward<T, kHead, kVariant>::kThreads,
                                 Forward<T, kHead, kVariant>::kShape.blocks)
    attention_forward(const ForwardArgs a) {
  const int rounds = static_cast<int>((a.items + gridDim.x - 1) / gridDim.x);
  for (int round = 0; round < rounds; ++round) { Forward<T, kHead, kVariant>::run(a, round); }
}

template <class T, int kHead, Variant kVariant>
void launch_forward(const ForwardArgs& a, void* stream) {
  using F = Forward<T, kHead, kVariant>;
  launch("attention", attention_forward<T, kHead, kVariant>, grid_for(a.items, 1), F::kThreads,
         int64_t{sizeof(T)} * (F::kRows + 2 * F::kKeys) * kHead, stream, a);
}

template <class T, int kHead>
void launch_variant(const ForwardArgs& a, Variant variant, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (variant == Variant::plain) return launch_forward<T, kHead, Variant::plain>(a, stream);
    if (variant == Variant::few) return launch_forward<T, kHead, Variant::few>(a, stream);
  }
  launch_forward<T, kHead, Variant::general>(a, stream);
}

template <class T>
void launch_head(const ForwardArgs& a, Variant variant, int head, void* stream) {
  if (head == 32) return launch_variant<T, 32>(a, variant, stream);
  if (head == 64) return launch_variant<T, 64>(a, variant, stream);
  if (head == 128) return launch_variant<T, 128>(a, variant, stream);
  launch_variant<T, 256>(a, variant, stream);
}

}  // namespace ft::cuda
