// Attention forward: which kernel of attention/forward.h a call takes, into how many blocks it is
// cut, and the merge of keys that were shared out. attention/shapes.h has the tiles.
#include <stdexcept>

#include "cuda/attention/shapes.h"
#include "cuda/device/assert.h"
#include "cuda/device/launch.h"
#include "cuda/device/warp.h"

namespace ft::cuda {

void attention_forward_f32(const ForwardArgs&, Variant, int head, void* stream);
void attention_forward_f16(const ForwardArgs&, Variant, int head, void* stream);
void attention_forward_bf16(const ForwardArgs&, Variant, int head, void* stream);

namespace {

constexpr int64_t kLongest = int64_t{1} << 30;  // of queries and of keys: positions are ints
constexpr int64_t kSectionBytes =
    12 * 1024 * 1024;                 // of K and V, a part of sm_80's L2 of 2 × 20 MB
constexpr int64_t kMostSplits = 128;  // partial sums then stay small beside the keys
constexpr int kMergeWarps = 4;        // rows of a block of attention_merge
constexpr int kCheckBlock = 128;

bool aligned16(const void* data, int64_t a, int64_t b, int64_t c, int64_t size) {
  return ((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>((a | b | c) * size)) & 15) ==
         0;
}

// A dimension of one element has no stride to speak of.
bool aligned(const HeadsView& v, int64_t batch, int64_t heads, int64_t rows, int64_t size) {
  return aligned16(v.data, batch > 1 ? v.batch : 0, heads > 1 ? v.head : 0, rows > 1 ? v.row : 0,
                   size);
}

struct Plan {
  Variant variant;
  int head;
  TileShape shape;
  int pack;
  int64_t tiles, units;  // units: heads, or groups of packed heads, of the whole batch
  bool query_aligned, key_aligned, value_aligned;

  int64_t rows() const { return shape.rows(); }
};

// Part of a tile's rows that exist, on average.
double filled(int64_t rows, int64_t tile) {
  return static_cast<double>(rows) / static_cast<double>((rows + tile - 1) / tile * tile);
}

Plan plan_of(const AttentionParams& p) {
  Plan plan;
  const int64_t size = p.dtype == DType::f32 ? 4 : 2, group = p.group();
  const bool packed = p.cu_seqlens_q != nullptr;
  plan.head = head_bucket(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
  plan.query_aligned = aligned(p.query, p.batch, p.heads, packed ? 2 : p.q_len, size);
  plan.key_aligned = aligned(p.key, p.batch, p.kv_heads, packed ? 2 : p.kv_len, size);
  plan.value_aligned = aligned(p.value, p.batch, p.kv_heads, packed ? 2 : p.kv_len, size);
  const bool options = p.mask.data != nullptr || p.dropout.on() || !units_of(p).raw;
  plan.variant =
      size == 2 && !options && plan.query_aligned && plan.key_aligned && plan.value_aligned
          ? Variant::plain
          : Variant::general;
  if (size == 2 && p.q_len * group <= 16) plan.variant = Variant::few;
  plan.shape = tile_shape(static_cast<int>(size), plan.variant, plan.head);
  const int64_t rows = plan.rows();
  plan.pack = 1;
  if (group > 1 && filled(p.q_len, rows) < 0.9 * filled(p.q_len * group, rows)) {
    plan.pack = static_cast<int>(group);
  }
  plan.tiles = (p.q_len * plan.pack + rows - 1) / rows;
  plan.units = p.batch * (p.heads / plan.pack);
  return plan;
}

// The smallest number of splits whose waves of blocks are 85 % as full as the best, and one where
// the blocks are there anyway. Source: flash-attention, num_splits_heuristic.
int64_t splits_of(const AttentionParams& p, const Plan& plan) {
  const int64_t blocks = plan.tiles * plan.units;
  const int64_t slots = multiprocessors("attention") * plan.shape.blocks;
  const int64_t key_tiles = (p.kv_len + plan.shape.keys - 1) / plan.shape.keys;
  if (blocks * 5 >= slots * 4 || key_tiles < 2) return 1;
  const int64_t most = key_tiles < kMostSplits ? key_tiles : kMostSplits;
  const auto useful = [&](int64_t n) {  // n splits have fewer tiles each than n − 1
    return n == 1 || (key_tiles + n - 1) / n != (key_tiles + n - 2) / (n - 1);
  };
  const auto fullness = [&](int64_t n) {
    const int64_t waves = (blocks * n + slots - 1) / slots;
    return static_cast<double>(blocks * n) / static_cast<double>(waves * slots);
  };
  double best = 0;
  for (int64_t n = 1; n <= most; ++n) {
    if (useful(n) && fullness(n) > best) best = fullness(n);
  }
  for (int64_t n = 1; n <= most; ++n) {
    if (useful(n) && fullness(n) >= 0.85 * best) return n;
  }
  return 1;
}

// ---- merge --------------------------------------------------------------------------------------

// A warp adds a row's splits up: sums relative to the splits' own maxima to one.
FT_GLOBAL void __launch_bounds__(kMergeWarps* kWarp) attention_merge(const ForwardArgs a) {
  const AttentionParams& p = a.p;
  const int64_t rows = p.rows();
  for (int64_t first = blockIdx.x * int64_t{kMergeWarps}; first < rows;
       first += gridDim.x * int64_t{kMergeWarps}) {
    const int64_t row = first + warp_index();
    if (row >= rows) continue;
    const int64_t query = row % p.head_rows, head = row / p.head_rows % p.heads;
    const int64_t token = row / p.head_rows / p.heads * p.head_rows + query;
    const float* stats = a.partial + a.splits * rows * p.value_dim;
    float top = -infinity(), total = 0.f;
    bool some = false;
    for (int s = 0; s < a.splits; ++s) {
      top = maximum(top, load_scalar(stats + (s * rows + row) * 2));
    }
    const float base = top == -infinity() ? 0.f : top;
    const auto weight = [&](int s) {
      return power_of_2<float>((load_scalar(stats + (s * rows + row) * 2) - base) *
                               a.units.exponent);
    };
    for (int s = 0; s < a.splits; ++s) {
      const float part = load_scalar(stats + (s * rows + row) * 2 + 1);
      if (part == -1.f) continue;  // it saw no key
      some = true;
      total += part * weight(s);
    }
    const Finish f = finish_row(p, a.units.lse_scale, some, top, total, head);
    if (lane_index() == 0) store_scalar(p.lse + row, f.lse);
    for (int64_t e = lane_index(); e < p.value_dim; e += kWarp) {
      float sum = 0.f;
      for (int s = 0; s < a.splits; ++s) {
        if (load_scalar(stats + (s * rows + row) * 2 + 1) == -1.f) continue;
        sum += load_scalar(a.partial + (s * rows + row) * p.value_dim + e) * weight(s);
      }
      store_as(p.out, p.dtype, (token * p.heads + head) * p.value_dim + e,
               some ? sum * f.factor : 0.f);
    }
  }
}

// ---- packed sequences ---------------------------------------------------------------------------

struct Boundaries {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t sequences, most_queries, most_keys, queries, keys;
};

FT_DEVICE void check_boundary(const int32_t* starts, int64_t b, int64_t sequences, int64_t most,
                              int64_t tokens, const char* what) {
  const int64_t start = load_scalar(starts + b), length = load_scalar(starts + b + 1) - start;
  device_assert((b > 0 || start == 0) && length >= 0 && length <= most, what);
  device_assert(b + 1 < sequences || start + length == tokens, what);
}

// The boundaries are on the GPU: to look at them from the host would be to wait for it.
FT_GLOBAL void __launch_bounds__(kCheckBlock) attention_check_boundaries(const Boundaries a) {
  const int64_t b = blockIdx.x * int64_t{kCheckBlock} + thread_index();
  if (b >= a.sequences) return;
  check_boundary(a.cu_seqlens_q, b, a.sequences, a.most_queries, a.queries,
                 "attention_varlen: cu_seqlens_q does not rise from 0 to the number of query's "
                 "tokens, or a sequence is longer than max_seqlen_q");
  check_boundary(a.cu_seqlens_k, b, a.sequences, a.most_keys, a.keys,
                 "attention_varlen: cu_seqlens_k does not rise from 0 to the number of key's "
                 "tokens, or a sequence is longer than max_seqlen_k");
}

}  // namespace

int64_t attention_splits(const AttentionParams& p) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return 1;
  return splits_of(p, plan_of(p));
}

int64_t attention_workspace(const AttentionParams& p) {
  return p.splits < 2 ? 0 : p.splits * p.rows() * (p.value_dim + 2);
}

void attention(const AttentionParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return;
  if (p.q_len > kLongest || p.kv_len > kLongest || p.q_len * p.group() > kLongest) {
    throw std::invalid_argument("fasttransformer: attention takes up to 2^30 queries and keys");
  }
  if (p.cu_seqlens_q != nullptr) {
    launch("attention_check_boundaries", attention_check_boundaries,
           static_cast<int>((p.batch + kCheckBlock - 1) / kCheckBlock), kCheckBlock, 0, stream,
           {p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.q_len, p.kv_len, p.head_rows, p.key_rows});
  }
  const Plan plan = plan_of(p);
  ForwardArgs a;
  a.p = p;
  a.units = units_of(p);
  a.pack = plan.pack;
  a.heads = static_cast<int>(p.heads / plan.pack);
  a.tiles = static_cast<int>(plan.tiles);
  a.splits = static_cast<int>(p.splits);
  a.items = plan.tiles * plan.units * p.splits;
  const int64_t size = p.dtype == DType::f32 ? 4 : 2;
  const int64_t bytes = (p.kv_len + 1) * (p.head_dim + p.value_dim + 1) * size;
  const int64_t key_heads = kSectionBytes / bytes + 1;
  a.section = static_cast<int>(key_heads * p.group() / plan.pack);
  a.partial = p.workspace;
  a.query_aligned = plan.query_aligned;
  a.key_aligned = plan.key_aligned;
  a.value_aligned = plan.value_aligned;
  a.out_aligned = p.value_dim * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  switch (p.dtype) {
    case DType::f32: attention_forward_f32(a, plan.variant, plan.head, stream); break;
    case DType::f16: attention_forward_f16(a, plan.variant, plan.head, stream); break;
    case DType::bf16: attention_forward_bf16(a, plan.variant, plan.head, stream); break;
  }
  if (p.splits < 2) return;
  launch("attention_merge", attention_merge, grid_for(p.rows(), kMergeWarps), kMergeWarps * kWarp,
         0, stream, a);
}

}  // namespace ft::cuda
