// Token embedding with positions, and the gradient of an embedding table.
//   out[n] = scale · weight[input[n]] + position_weight[position[n]] + sinusoid(position[n])
//   d_table[r] = scale · Σ grad[n] over the tokens n that looked row r up, in the order of n
// Forward: a thread owns one 16-byte chunk of columns for several tokens, so that what depends on
// the column alone (the sinusoid's frequency) is made once for them. Backward: the ids come sorted,
// with the tokens they are from; a block sums the gradients of a tile of kEmbeddingTile sorted ids
// column by column and writes the rows of ids that lie inside it. Sums of an id that reaches over
// the tile's ends are kept apart and joined by a second kernel, tile by tile: an order that the ids
// alone give, so results repeat bit by bit without atomic additions, and an id that fills half of
// the batch is still spread over many blocks. Rows without an id are cleared first.
// All are limited by memory: forward reads a table row and writes a row per token; backward reads a
// row per token and writes the table. Sources: Vaswani et al., 2017 (arXiv:1706.03762), 3.4 and
// 3.5; segments cut into pieces of a fixed size: PyTorch's EmbeddingBackwardKernel.
#include "cuda/device/assert.h"
#include "cuda/device/index.h"
#include "cuda/device/launch.h"
#include "cuda/device/sinusoid.h"
#include "params/embedding.h"

namespace ft::cuda {
namespace {

// Not measured: no GPU was at hand.
constexpr int kBlock = 256;  // the largest block
constexpr int kTokens =
    8;  // forward, per thread with a sinusoid: its frequency costs some 30 instructions
constexpr int kBatch = 4;        // forward, of them at a time: 64 bytes of loads in flight
constexpr int kGradients = 4;    // backward, rows in flight per thread
constexpr int kClearChunks = 4;  // stores per thread that clear the table

constexpr const char* kBadId = "embedding: an id is out of range of weight's rows";
constexpr const char* kBadPosition =
    "embedding: a position is out of range of position_weight's rows";

// `width` threads have the chunks of a row, or of one of `column_blocks` parts of it; `per_block`
// such groups make a block.
struct Layout {
  int width, per_block, column_blocks;
  int block() const { return (width * per_block + kWarp - 1) / kWarp * kWarp; }
};
Layout layout(int64_t features, int lanes) {
  const int64_t chunks = features > 0 ? (features + lanes - 1) / lanes : 1;
  const int64_t column_blocks = (chunks + kBlock - 1) / kBlock;
  const int width = static_cast<int>((chunks + column_blocks - 1) / column_blocks);
  return {width, kBlock / width, static_cast<int>(column_blocks)};
}

// Where a thread works: which of the items that its block shares out (-1: none), and which column.
struct Where {
  int64_t item;
  int column;
};
template <class T>
FT_DEVICE Where locate(const Layout& l, int64_t block_item) {
  const int slot = static_cast<int>(threadIdx.x) / l.width;
  const int lane = static_cast<int>(threadIdx.x) - slot * l.width;
  int64_t group = block_item;
  const int part = static_cast<int>(divide(group, l.column_blocks));
  return {slot < l.per_block ? group * l.per_block + slot : -1,
          (part * l.width + lane) * kLanes<T>};
}

// ---- forward ------------------------------------------------------------------------------------

struct ForwardArgs {
  EmbeddingParams p;
  Layout layout;
  int tokens;      // of a thread: a multiple of kBatch
  int64_t groups;  // of tokens · per_block tokens
};

template <class T>
FT_DEVICE Chunk load_row(const void* table, int64_t row, int64_t stride, int column, int features) {
  const T* at = static_cast<const T*>(table) + row * stride;
  return load_chunk(at, column, features, is_aligned(at));
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock, 2) embedding_rows(const ForwardArgs a) {
  const EmbeddingParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int features = static_cast<int>(p.features);
  const bool learned = p.position_weight != nullptr;
  for (int64_t item = blockIdx.x; item < a.groups * a.layout.column_blocks; item += gridDim.x) {
    const Where where = locate<T>(a.layout, item);
    const int column = where.column;
    if (where.item < 0 || column >= features) continue;
    const int64_t group = where.item / a.layout.per_block;
    const int64_t first =
        group * a.tokens * a.layout.per_block + (where.item - group * a.layout.per_block);
    uint64_t frequency[kCount / 2] = {};
    if (p.sinusoidal) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        frequency[i] = turns_per_position(column + 2 * i, p.features);
      }
    }
#pragma unroll 1
    for (int from = 0; from < a.tokens; from += kBatch) {
      Chunk raw[kBatch] = {}, learned_raw[kBatch] = {};
      int64_t position[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t token = first + static_cast<int64_t>(from + k) * a.layout.per_block;
        if (token >= p.tokens) continue;
        const int64_t id = load_id(p.input, token);
        device_assert(id >= 0 && id < p.rows, kBadId);
        raw[k] = load_row<T>(p.weight, id, p.row_stride, column, features);
        if (!learned && !p.sinusoidal) continue;
        int64_t quotient = token;
        position[k] = divide(quotient, p.period);
        if (p.positions.data != nullptr) position[k] = load_id(p.positions, position[k]);
        if (!learned) continue;
        device_assert(position[k] >= 0 && position[k] < p.positions_rows, kBadPosition);
        learned_raw[k] =
            load_row<T>(p.position_weight, position[k], p.position_stride, column, features);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t token = first + static_cast<int64_t>(from + k) * a.layout.per_block;
        if (token >= p.tokens) continue;
        float x[kCount];
        unpack<T>(raw[k], x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= p.scale;
        if (learned) {
          float y[kCount];
          unpack<T>(learned_raw[k], y);
#pragma unroll
          for (int i = 0; i < kCount; ++i) x[i] += y[i];
        }
        if (p.sinusoidal) {
#pragma unroll
          for (int i = 0; i < kCount / 2; ++i) {
            const SineCosine s = sine_cosine(static_cast<uint64_t>(position[k]) * frequency[i]);
            x[2 * i] += s.sine;
            x[2 * i + 1] += s.cosine;
          }
        }
        T* out = static_cast<T*>(p.output) + token * p.features;
        store_chunk(out, column, features, is_aligned(out), pack<T>(x));
      }
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

struct BackwardArgs {
  EmbeddingBackwardParams p;
  Layout layout;
  int64_t tiles;
};

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock) embedding_clear(const BackwardArgs a) {
  T* table = static_cast<T*>(a.p.d_table);
  const int64_t count = a.p.rows * a.p.features;
  const bool aligned = is_aligned(table);
  const int64_t step = static_cast<int64_t>(kBlock) * kLanes<T>;
  for (int64_t at = (blockIdx.x * int64_t{kBlock} + threadIdx.x) * kLanes<T>; at < count;
       at += gridDim.x * step) {
    store_chunk(table, at, count, aligned, Chunk{});
  }
}

// Of a tile's ids, the one that began in an earlier tile has its sum in row 0 of the tile's two
// rows of `partial`, one that begins here and goes on behind the tile in row 1.
template <class T>
FT_DEVICE float* partial_row(const BackwardArgs& a, int64_t tile, int which) {
  return a.p.partial + (tile * 2 + which) * a.p.features;
}

template <class T>
FT_DEVICE void store_sums(const BackwardArgs& a, int64_t id, int column,
                          const float (&sums)[kLanes<T>]) {
  device_assert(id >= 0 && id < a.p.rows, kBadId);
  float out[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) out[i] = sums[i] * a.p.scale;
  T* row = static_cast<T*>(a.p.d_table) + id * a.p.features;
  store_chunk(row, column, static_cast<int>(a.p.features), is_aligned(row), pack<T>(out));
}

template <class T>
FT_DEVICE void store_partial(float* row, int column, int features, const float (&sums)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i += 4) {
    const float four[4] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    store_chunk(row, column + i, features, is_aligned(row), pack<float>(four));
  }
}

template <class T>
FT_DEVICE void add_partial(const float* row, int column, int features, float (&sums)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i += 4) {
    float four[4];
    unpack<float>(load_chunk(row, column + i, features, is_aligned(row)), four);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i + j] += four[j];
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock, 2) embedding_tiles(const BackwardArgs a) {
  const EmbeddingBackwardParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int features = static_cast<int>(p.features);
  const int64_t groups = (a.tiles + a.layout.per_block - 1) / a.layout.per_block;
  for (int64_t item = blockIdx.x; item < groups * a.layout.column_blocks; item += gridDim.x) {
    const Where where = locate<T>(a.layout, item);
    const int64_t tile = where.item;
    if (tile < 0 || tile >= a.tiles || where.column >= features) continue;
    const int64_t begin = tile * kEmbeddingTile;
    const int64_t end = begin + kEmbeddingTile < p.tokens ? begin + kEmbeddingTile : p.tokens;
    int64_t current = load_id(p.ids, begin);
    bool earlier = begin > 0 && load_id(p.ids, begin - 1) == current;  // began in a tile before
    float sums[kCount] = {};
    const auto finish = [&](bool goes_on) {
      if (current == p.padding_idx) return;
      if (!earlier && !goes_on) return store_sums<T>(a, current, where.column, sums);
      store_partial<T>(partial_row<T>(a, tile, earlier ? 0 : 1), where.column, features, sums);
    };
#pragma unroll 1
    for (int64_t from = begin; from < end; from += kGradients) {
      int64_t id[kGradients];
      Chunk raw[kGradients] = {};
#pragma unroll
      for (int k = 0; k < kGradients; ++k) {
        if (from + k >= end) continue;
        id[k] = load_id(p.ids, from + k);
        if (id[k] == p.padding_idx) continue;
        const int64_t token = load_id(p.order, from + k);
        raw[k] = load_row<T>(p.grad, token, p.grad_stride, where.column, features);
      }
#pragma unroll
      for (int k = 0; k < kGradients; ++k) {
        if (from + k >= end) continue;
        float x[kCount];
        unpack<T>(raw[k], x);
        const bool next = id[k] != current;
        if (next) {
          finish(false);
          current = id[k];
          earlier = false;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] = (next ? 0.f : sums[i]) + x[i];
      }
    }
    finish(end < p.tokens && load_id(p.ids, end) == current);
  }
}

// The first position behind `from` whose id is larger than that of `from`.
FT_DEVICE int64_t end_of(const EmbeddingBackwardParams& p, int64_t from, int64_t id) {
  int64_t low = from + 1, high = p.tokens;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load_id(p.ids, middle) > id) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBlock, 2) embedding_joins(const BackwardArgs a) {
  const EmbeddingBackwardParams& p = a.p;
  const int features = static_cast<int>(p.features);
  const int64_t groups = (a.tiles + a.layout.per_block - 1) / a.layout.per_block;
  for (int64_t item = blockIdx.x; item < groups * a.layout.column_blocks; item += gridDim.x) {
    const Where where = locate<T>(a.layout, item);
    const int64_t tile = where.item;
    if (tile < 0 || tile >= a.tiles || where.column >= features) continue;
    const int64_t begin = tile * kEmbeddingTile, end = begin + kEmbeddingTile;
    if (end >= p.tokens) continue;
    const int64_t id = load_id(p.ids, end);
    if (id == p.padding_idx || load_id(p.ids, end - 1) != id) continue;
    if (begin > 0 && load_id(p.ids, begin - 1) == id) continue;  // a tile before joins it
    const int64_t last = (end_of(p, end, id) - 1) / kEmbeddingTile;
    float sums[kLanes<T>] = {};
    add_partial<T>(partial_row<T>(a, tile, 1), where.column, features, sums);
#pragma unroll 4
    for (int64_t t = tile + 1; t <= last; ++t) {
      add_partial<T>(partial_row<T>(a, t, 0), where.column, features, sums);
    }
    store_sums<T>(a, id, where.column, sums);
  }
}

}  // namespace

void embedding(const EmbeddingParams& params, void* stream) {
  if (params.tokens == 0 || params.features == 0) return;
  with_type(params.dtype, [&]<class T>() {
    const Layout l = layout(params.features, kLanes<T>);
    const int tokens = params.sinusoidal ? kTokens : kBatch;
    const int64_t per_group = int64_t{tokens} * l.per_block;
    const int64_t groups = (params.tokens + per_group - 1) / per_group;
    launch("embedding", embedding_rows<T>, grid_for(groups * l.column_blocks, 1), l.block(), 0,
           stream, {params, l, tokens, groups});
  });
}

void embedding_backward(const EmbeddingBackwardParams& params, void* stream) {
  const int64_t count = params.rows * params.features;
  if (count == 0) return;
  with_type(params.dtype, [&]<class T>() {
    const Layout l = layout(params.features, kLanes<T>);
    const int64_t tiles = (params.tokens + kEmbeddingTile - 1) / kEmbeddingTile;
    const BackwardArgs a = {params, l, tiles};
    launch("embedding_backward (clear)", embedding_clear<T>,
           grid_for(count, int64_t{kBlock} * kLanes<T> * kClearChunks), kBlock, 0, stream, a);
    if (tiles == 0) return;
    const int64_t grid = grid_for((tiles + l.per_block - 1) / l.per_block * l.column_blocks, 1);
    launch("embedding_backward (tiles)", embedding_tiles<T>, grid, l.block(), 0, stream, a);
    launch("embedding_backward (joins)", embedding_joins<T>, grid, l.block(), 0, stream, a);
  });
}

}  // namespace ft::cuda
