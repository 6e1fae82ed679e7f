// Residual addition and layer norm in one pass over memory, forward and backward.
//   summed = residual + dropout(input);  normed = (summed − mean) · rstd · weight + bias
// A group of threads (4 lanes of a warp … a block) owns a row and keeps `summed` in registers as
// raw 16-byte chunks while it takes the mean and then the variance of the centred values: two
// reads, two writes, bound by memory. Backward, the same groups walk over rows and carry the weight
// gradients of their columns in registers; a second kernel adds up the groups' partial sums in a
// fixed order. Rows too wide for registers go to `wide` kernels, which leave what they read in
// shared memory. Sources: Ba, Kiros, Hinton, 2016 (arXiv:1607.06450); Chan, Golub, LeVeque, 1979
// (merging moments); two-stage weight gradients as in NVIDIA apex's layer norm; QuACK's table of
// threads per row.
#include "cuda/device/dropout.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "params/add_layer_norm.h"

namespace ft::cuda {
namespace {

// Threads per row and chunks per thread by the row's 16-byte chunks (8 elements of 16 bits, 4 of
// 32). After QuACK's published table, cut at what registers hold; not measured here: no GPU was at
// hand.
struct Plan {
  int64_t chunks;
  int held, group;
};
constexpr Plan kForward[] = {{8, 2, 4},    {16, 2, 8},   {32, 2, 16},   {64, 2, 32},
                             {128, 4, 32}, {256, 4, 64}, {512, 4, 128}, {1024, 4, 256}};
// Backward, a thread also carries the sums of its columns: 2 chunks at most.
constexpr Plan kBackward[] = {{8, 2, 4},    {16, 2, 8},    {32, 2, 16},   {64, 2, 32},
                              {128, 2, 64}, {256, 2, 128}, {512, 2, 256}, {1024, 2, 512}};
constexpr int kSmallBlock = 128;  // block size of groups within a warp
constexpr int kForwardBlock = 256,
              kForwardBlocks = 3;  // largest block, and how many an SM has room for
constexpr int kBackwardBlock = 512;
constexpr int kWideBlock = 512;  // block size of the wide kernels, two on an SM where rows fit
// Backward: threads in all, 512 for each of an H100's 132 SMs. It fixes the size of the partial
// sums (17 MB for 16-bit types at most, which stay in L2) and makes the result the same on every
// GPU.
constexpr int64_t kBackwardThreads = 132 * 512;
constexpr int kColumnBlock = 128;      // wide backward: columns' kernel, one chunk a thread
constexpr int64_t kColumnSplits = 64;  // and the partial sums per column that it leaves
constexpr int kReduceColumns = 32, kReduceRows = 32;  // block of the second stage

template <size_t kRows>
Plan choose(const Plan (&table)[kRows], int64_t chunks) {
  for (const Plan& plan : table) {
    if (chunks <= plan.chunks) return plan;
  }
  return {chunks, 0, kWideBlock};  // held 0: wide
}

struct ForwardArgs {
  RowNormParams p;
  int group = 0;
  int64_t cached = 0;  // wide: chunks that shared memory holds
};

struct BackwardArgs {
  RowNormBackwardParams p;
  int group = 0;
  int64_t cached = 0;
  int64_t partials = 0;  // rows of the workspace, each with d_weight's and d_bias's sums
};

// ---- forward ------------------------------------------------------------------------------------

FT_DEVICE uint64_t seed_of(const Dropout& dropout) {
  return dropout.threshold == 0 ? 0 : static_cast<uint64_t>(load_scalar(dropout.seed_ptr));
}

// residual + dropout(input), rounded to T.
template <class T>
FT_DEVICE Chunk add_chunk(const Chunk& input, const Chunk& residual, const Dropout& dropout,
                          uint64_t seed, int64_t position) {
  float x[kLanes<T>], r[kLanes<T>];
  unpack<T>(input, x);
  unpack<T>(residual, r);
  if (dropout.threshold != 0) {
    const uint32_t keep = keep_bits<kLanes<T>>(seed, position, dropout.threshold);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = (keep >> i & 1) ? x[i] * dropout.scale : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) r[i] += x[i];
  return pack<T>(r);
}

template <class T, class Index>
FT_DEVICE Chunk norm_chunk(const Chunk& summed, float mean, float rstd, const RowNormParams& p,
                           Index column, Index end) {
  float x[kLanes<T>], weight[kLanes<T>], bias[kLanes<T>];
  unpack<T>(summed, x);
  load_vector(p.weight, column, end, 1.f, weight);
  load_vector(p.bias, column, end, 0.f, bias);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  return pack<T>(x);
}

template <class T, int kHeld>
FT_GLOBAL void __launch_bounds__(kForwardBlock, kForwardBlocks)
    add_layer_norm_held(const ForwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const RowNormParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  const int features = static_cast<int>(p.features);
  const uint64_t seed = seed_of(p.dropout);
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const int width = row < p.rows ? features : 0;
    const int64_t begin = row * p.features;
    const T* input = static_cast<const T*>(p.input) + row * p.input_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* summed = static_cast<T*>(p.summed) + begin;
    T* normed = static_cast<T*>(p.normed) + begin;
    const int shift = chunk_shift<T>(row, p.features);
    const bool input_aligned = chunks_aligned(input, shift);
    const bool residual_aligned = chunks_aligned(residual, shift);
    const int start = lane * kLanes<T> - shift;
    const int step = a.group * kLanes<T>;

    Chunk x[kHeld], r[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      x[k] = load_chunk(input, start + k * step, width, input_aligned);
      r[k] = load_chunk(residual, start + k * step, width, residual_aligned);
    }
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = start + k * step;
      if (column >= width) continue;
      x[k] = add_chunk<T>(x[k], r[k], p.dropout, seed, begin + column);
      store_chunk(summed, column, width, chunks_aligned(summed, shift), x[k]);
      float value[kLanes<T>];
      unpack<T>(x[k], value);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) sum += value[i];  // 0 outside the row
      keep_packed(x[k]);
    }
    const float mean = group_sum(sum, a.group, scratch) / static_cast<float>(features);
    float m2 = 0.f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = start + k * step;
      if (column >= width) continue;
      const uint32_t bits = inside<T>(column, width);
      float value[kLanes<T>];
      unpack<T>(x[k], value);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        const float apart = (bits >> i & 1) ? value[i] - mean : 0.f;
        m2 += apart * apart;
      }
      keep_packed(x[k]);
    }
    const float variance = group_sum(m2, a.group, scratch) / static_cast<float>(features);
    const float rstd = reciprocal_sqrt(variance + p.eps);
    if (lane == 0 && width > 0) {
      store_scalar(p.mean + row, mean);
      store_scalar(p.rstd + row, rstd);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = start + k * step;
      if (column >= width) continue;
      store_chunk(normed, column, width, chunks_aligned(normed, shift),
                  norm_chunk<T>(x[k], mean, rstd, p, column, width));
    }
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kWideBlock, 2) add_layer_norm_wide(const ForwardArgs a) {
  FT_SHARED_ARRAY(Moments, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();
  const RowNormParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  const uint64_t seed = seed_of(p.dropout);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t begin = row * p.features;
    const T* input = static_cast<const T*>(p.input) + row * p.input_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* summed = static_cast<T*>(p.summed) + begin;
    T* normed = static_cast<T*>(p.normed) + begin;
    const int shift = chunk_shift<T>(row, p.features);
    const bool input_aligned = chunks_aligned(input, shift);
    const bool residual_aligned = chunks_aligned(residual, shift);
    const bool summed_aligned = chunks_aligned(summed, shift);
    const bool normed_aligned = chunks_aligned(normed, shift);
    const int64_t chunks = (p.features + shift + kCount - 1) / kCount;

    Moments moments = {0.f, 0.f, 0.f};
#pragma unroll 2
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      const Chunk x = add_chunk<T>(load_chunk(input, column, p.features, input_aligned),
                                   load_chunk(residual, column, p.features, residual_aligned),
                                   p.dropout, seed, begin + column);
      store_chunk(summed, column, p.features, summed_aligned, x);
      if (c < a.cached) shared_store(cache + c, x);  // read back by this thread only
      const uint32_t bits = inside<T>(column, p.features);
      float value[kLanes<T>];
      unpack<T>(x, value);
      Moments own = {0.f, 0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        own.count += static_cast<float>(bits >> i & 1);
        own.mean += value[i];  // 0 outside the row
      }
      own.mean /= own.count;
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        const float apart = (bits >> i & 1) ? value[i] - own.mean : 0.f;
        own.m2 += apart * apart;
      }
      moments = merge(moments, own);
    }
    moments = group_reduce(moments, kWideBlock, Moments{0.f, 0.f, 0.f}, scratch,
                           [](const Moments& x, const Moments& y) { return merge(x, y); });
    const float mean = moments.mean;
    const float rstd = reciprocal_sqrt(moments.m2 / moments.count + p.eps);
    if (threadIdx.x == 0) {
      store_scalar(p.mean + row, mean);
      store_scalar(p.rstd + row, rstd);
    }
#pragma unroll 2
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      const Chunk x = c < a.cached ? shared_load(cache + c)
                                   : load_chunk<T>(summed, column, p.features, summed_aligned);
      store_chunk(normed, column, p.features, normed_aligned,
                  norm_chunk<T>(x, mean, rstd, p, column, p.features));
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------
// Chunks begin at column 0 of each row (shift 0), so that a thread meets the same columns in every
// row; rows whose length is no multiple of a chunk then go element by element where misaligned.

template <class T>
struct BackwardRow {
  const T *grad, *summed, *grad_summed;
  T *d_residual, *d_input;
  float mean, rstd;
  int64_t begin;  // position of the row's first element
};

template <class T>
FT_DEVICE BackwardRow<T> backward_row(const RowNormBackwardParams& p, int64_t row) {
  BackwardRow<T> r;
  r.begin = row * p.features;
  r.grad = static_cast<const T*>(p.grad_normed) + row * p.grad_normed_stride;
  r.summed = static_cast<const T*>(p.summed) + row * p.summed_stride;
  r.grad_summed = p.grad_summed == nullptr
                      ? nullptr
                      : static_cast<const T*>(p.grad_summed) + row * p.grad_summed_stride;
  r.d_residual = static_cast<T*>(p.d_residual) + r.begin;
  r.d_input = p.d_input == nullptr ? nullptr : static_cast<T*>(p.d_input) + r.begin;
  r.mean = load_scalar(p.mean + row);
  r.rstd = load_scalar(p.rstd + row);
  return r;
}

// Adds the chunk's part of (Σ g, Σ g·x̂), g = grad · weight.
template <class T, class Index>
FT_DEVICE void backward_sums(const Chunk& grad, const Chunk& summed, const BackwardRow<T>& r,
                             const VectorArg& weights, Index column, Index end, Pair& sums) {
  float g[kLanes<T>], x[kLanes<T>], weight[kLanes<T>];
  unpack<T>(grad, g);
  unpack<T>(summed, x);
  load_vector(weights, column, end, 1.f, weight);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    const float gw = g[i] * weight[i];  // grad is 0 outside the row
    sums.a += gw;
    sums.b += gw * ((x[i] - r.mean) * r.rstd);
  }
}

// Writes d_residual and d_input of a chunk; `means` holds mean(g) and mean(g·x̂).
template <class T, class Index>
FT_DEVICE void backward_write(const Chunk& grad, const Chunk& summed, const Chunk& grad_summed,
                              const BackwardRow<T>& r, const RowNormBackwardParams& p,
                              uint64_t seed, Index column, Index end, const Pair& means) {
  float g[kLanes<T>], x[kLanes<T>], weight[kLanes<T>];
  unpack<T>(grad, g);
  unpack<T>(summed, x);
  load_vector(p.weight, column, end, 1.f, weight);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    g[i] = r.rstd * (g[i] * weight[i] - means.a - (x[i] - r.mean) * r.rstd * means.b);
  }
  unpack<T>(grad_summed, x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) g[i] += x[i];
  store_chunk(r.d_residual, column, end, chunks_aligned(r.d_residual, 0), pack<T>(g));
  if (r.d_input == nullptr) return;
  const uint32_t keep = keep_bits<kLanes<T>>(seed, r.begin + column, p.dropout.threshold);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) g[i] = (keep >> i & 1) ? g[i] * p.dropout.scale : 0.f;
  store_chunk(r.d_input, column, end, chunks_aligned(r.d_input, 0), pack<T>(g));
}

// One row of the workspace: `kCount` sums from `column` on.
template <int kCount, class Index>
FT_DEVICE void store_partial(float* row, Index column, Index end, const float (&sums)[kCount]) {
  const bool aligned = chunks_aligned(row, 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kLanes<float>) {
    const float four[kLanes<float>] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    store_chunk(row, column + i, end, aligned, pack<float>(four));
  }
}

template <class T, int kHeld>
FT_GLOBAL void __launch_bounds__(kBackwardBlock, 1)
    add_layer_norm_backward_held(const BackwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kWarp);
  const RowNormBackwardParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  const int features = static_cast<int>(p.features);
  const int start = lane * kCount;
  const int step = a.group * kCount;
  const uint64_t seed = seed_of(p.dropout);
  float d_weight[kHeld][kCount] = {}, d_bias[kHeld][kCount] = {};

  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const bool active = row < p.rows;
    const int width = active ? features : 0;
    const BackwardRow<T> r = backward_row<T>(p, active ? row : first);
    const bool grad_aligned = chunks_aligned(r.grad, 0);
    const bool summed_aligned = chunks_aligned(r.summed, 0);

    Chunk g[kHeld], x[kHeld], gs[kHeld] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      g[k] = load_chunk(r.grad, start + k * step, width, grad_aligned);
      x[k] = load_chunk(r.summed, start + k * step, width, summed_aligned);
    }
    if (r.grad_summed != nullptr) {
      const bool gs_aligned = chunks_aligned(r.grad_summed, 0);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        gs[k] = load_chunk(r.grad_summed, start + k * step, width, gs_aligned);
      }
    }
    Pair sums = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * step >= width) continue;
      backward_sums<T>(g[k], x[k], r, p.weight, start + k * step, width, sums);
      float grad[kCount], value[kCount];
      unpack<T>(g[k], grad);
      unpack<T>(x[k], value);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        d_weight[k][i] += grad[i] * ((value[i] - r.mean) * r.rstd);
        d_bias[k][i] += grad[i];
      }
      keep_packed(g[k]);
      keep_packed(x[k]);
    }
    sums = group_sum(sums, a.group, scratch);
    const Pair means = {sums.a / static_cast<float>(features),
                        sums.b / static_cast<float>(features)};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * step >= width) continue;
      backward_write<T>(g[k], x[k], gs[k], r, p, seed, start + k * step, width, means);
    }
  }
  if (p.d_weight == nullptr && p.d_bias == nullptr) return;
  // Groups that share a warp add up first; a warp, or a group of several, leaves one partial sum.
  for (int offset = kWarp / 2; offset >= a.group; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        d_weight[k][i] += shuffle_xor(d_weight[k][i], offset);
        d_bias[k][i] += shuffle_xor(d_bias[k][i], offset);
      }
    }
  }
  const int owner = a.group < kWarp ? kWarp : a.group;
  if (static_cast<int>(threadIdx.x) % owner >= a.group) return;
  const int64_t partial = blockIdx.x * (blockDim.x / owner) + threadIdx.x / owner;
  float* sums = p.workspace + partial * 2 * p.features;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    store_partial(sums, start + k * step, features, d_weight[k]);
    store_partial(sums + p.features, start + k * step, features, d_bias[k]);
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kWideBlock, 2) add_layer_norm_backward_wide(const BackwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();  // grad and summed in turn
  const RowNormBackwardParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  const int64_t chunks = (p.features + kCount - 1) / kCount;
  const uint64_t seed = seed_of(p.dropout);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const BackwardRow<T> r = backward_row<T>(p, row);
    const bool grad_aligned = chunks_aligned(r.grad, 0);
    const bool summed_aligned = chunks_aligned(r.summed, 0);
    Pair sums = {0.f, 0.f};
#pragma unroll 2
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const Chunk g = load_chunk(r.grad, c * kCount, p.features, grad_aligned);
      const Chunk x = load_chunk(r.summed, c * kCount, p.features, summed_aligned);
      if (c < a.cached) {
        shared_store(cache + 2 * c, g);
        shared_store(cache + 2 * c + 1, x);
      }
      backward_sums<T>(g, x, r, p.weight, c * kCount, p.features, sums);
    }
    sums = group_sum(sums, kWideBlock, scratch);
    const Pair means = {sums.a / static_cast<float>(p.features),
                        sums.b / static_cast<float>(p.features)};
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      Chunk g, x, gs = {};
      if (c < a.cached) {
        g = shared_load(cache + 2 * c);
        x = shared_load(cache + 2 * c + 1);
      } else {
        g = load_chunk(r.grad, c * kCount, p.features, grad_aligned);
        x = load_chunk(r.summed, c * kCount, p.features, summed_aligned);
      }
      if (r.grad_summed != nullptr) {
        gs = load_chunk(r.grad_summed, c * kCount, p.features, chunks_aligned(r.grad_summed, 0));
      }
      backward_write<T>(g, x, gs, r, p, seed, c * kCount, p.features, means);
    }
  }
}

// Wide rows' weight gradients: a thread owns a chunk of columns and walks down every splits-th row.
template <class T>
FT_GLOBAL void __launch_bounds__(kColumnBlock) add_layer_norm_columns(const BackwardArgs a) {
  const RowNormBackwardParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int64_t blocks = (p.features + kColumnBlock * kCount - 1) / (kColumnBlock * kCount);
  const int64_t split = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x % blocks * kColumnBlock + threadIdx.x) * kCount;
  float d_weight[kCount] = {}, d_bias[kCount] = {};
#pragma unroll 2
  for (int64_t row = split; row < p.rows; row += a.partials) {
    const BackwardRow<T> r = backward_row<T>(p, row);
    float g[kCount], x[kCount];
    unpack<T>(load_chunk(r.grad, column, p.features, chunks_aligned(r.grad, 0)), g);
    unpack<T>(load_chunk(r.summed, column, p.features, chunks_aligned(r.summed, 0)), x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      d_weight[i] += g[i] * ((x[i] - r.mean) * r.rstd);
      d_bias[i] += g[i];
    }
  }
  float* sums = p.workspace + split * 2 * p.features;
  store_partial(sums, column, p.features, d_weight);
  store_partial(sums + p.features, column, p.features, d_bias);
}

// Second stage: 32 columns a block, 32 threads a column, each over every 32nd partial sum.
FT_GLOBAL void __launch_bounds__(kReduceColumns* kReduceRows)
    add_layer_norm_weights(const BackwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kReduceRows * kReduceColumns);
  const RowNormBackwardParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % kReduceColumns;
  const int slice = static_cast<int>(threadIdx.x) / kReduceColumns;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kReduceColumns) + lane;
  Pair sum = {0.f, 0.f};
  if (column < p.features) {
    const float* at = p.workspace + column;
#pragma unroll 4
    for (int64_t i = slice; i < a.partials; i += kReduceRows) {
      sum.a += load_scalar(at + i * 2 * p.features);
      sum.b += load_scalar(at + i * 2 * p.features + p.features);
    }
  }
  shared_store(scratch + slice * kReduceColumns + lane, sum);
  block_barrier();
  if (slice != 0 || column >= p.features) return;
  for (int i = 1; i < kReduceRows; ++i) {
    const Pair other = shared_load(scratch + i * kReduceColumns + lane);
    sum.a += other.a;
    sum.b += other.b;
  }
  if (p.d_weight != nullptr) store_as(p.d_weight, p.weight_dtype, column, sum.a);
  if (p.d_bias != nullptr) store_as(p.d_bias, p.weight_dtype, column, sum.b);
}

// ---- host side ----------------------------------------------------------------------------------

int64_t row_chunks(int64_t features, int lanes, bool shifted) {
  return (features + lanes - 1) / lanes + (shifted && features % lanes != 0 ? 1 : 0);
}

int64_t cached_chunks(const char* name, int64_t chunks, int arrays) {
  const int64_t room = max_shared_memory(name) - 1024;  // the reductions' scratch
  const int64_t fits = room / (arrays * static_cast<int64_t>(sizeof(Chunk)));
  return chunks < fits ? chunks : fits;
}

// A group is a part of a warp, or the whole block (see group_reduce).
int block_of(int group) { return group <= kWarp ? kSmallBlock : group; }

int lanes_of(DType dtype) { return dtype == DType::f32 ? kLanes<float> : kLanes<bf16>; }

struct BackwardPlan {
  Plan plan;
  int block;
  int64_t grid, partials;
};

// Depends on shapes only, so that gradients have the same bits on every GPU and in every run.
BackwardPlan backward_plan(const RowNormBackwardParams& p) {
  const Plan plan = choose(kBackward, row_chunks(p.features, lanes_of(p.dtype), false));
  if (plan.held == 0) {
    return {plan, kWideBlock, grid_for(p.rows, 1), p.rows < kColumnSplits ? p.rows : kColumnSplits};
  }
  const int block = block_of(plan.group);
  int64_t grid = grid_for(p.rows, block / plan.group);
  if (grid > kBackwardThreads / block) grid = kBackwardThreads / block;
  return {plan, block, grid, grid * (block / (plan.group < kWarp ? kWarp : plan.group))};
}

}  // namespace

int64_t add_layer_norm_workspace(const AddLayerNormBackwardParams& p) {
  if (p.d_weight == nullptr && p.d_bias == nullptr) return 0;
  return backward_plan(p).partials * 2 * p.features;
}

void add_layer_norm(const AddLayerNormParams& params, void* stream) {
  if (params.rows == 0 || params.features == 0) return;
  with_type(params.dtype, [&]<class T>() {
    ForwardArgs a{params};
    const int64_t chunks = row_chunks(params.features, kLanes<T>, true);
    const Plan plan = choose(kForward, chunks);
    a.group = plan.group;
    if (plan.held == 0) {
      a.cached = cached_chunks("add_layer_norm", chunks, 1);
      return launch("add_layer_norm", add_layer_norm_wide<T>, grid_for(params.rows, 1), kWideBlock,
                    a.cached * static_cast<int64_t>(sizeof(Chunk)), stream, a);
    }
    const int block = block_of(plan.group);
    launch("add_layer_norm", plan.held == 2 ? add_layer_norm_held<T, 2> : add_layer_norm_held<T, 4>,
           grid_for(params.rows, block / plan.group), block, 0, stream, a);
  });
}

void add_layer_norm_backward(const AddLayerNormBackwardParams& params, void* stream) {
  const char* name = "add_layer_norm_backward";
  if (params.features == 0) return;
  BackwardArgs a{params};
  const BackwardPlan plan = backward_plan(params);
  a.group = plan.plan.group;
  a.partials = plan.partials;
  const bool weights = params.d_weight != nullptr || params.d_bias != nullptr;
  if (params.rows > 0) {
    with_type(params.dtype, [&]<class T>() {
      if (plan.plan.held != 0) {
        return launch(name, add_layer_norm_backward_held<T, 2>, plan.grid, plan.block, 0, stream,
                      a);
      }
      a.cached = cached_chunks(name, plan.plan.chunks, 2);
      launch(name, add_layer_norm_backward_wide<T>, plan.grid, kWideBlock,
             a.cached * 2 * static_cast<int64_t>(sizeof(Chunk)), stream, a);
      if (!weights) return;
      const int64_t per_block = static_cast<int64_t>(kColumnBlock) * kLanes<T>;
      const int64_t blocks = (params.features + per_block - 1) / per_block;
      launch(name, add_layer_norm_columns<T>, blocks * plan.partials, kColumnBlock, 0, stream, a);
    });
  }
  if (!weights) return;
  launch(name, add_layer_norm_weights, (params.features + kReduceColumns - 1) / kReduceColumns,
         kReduceColumns * kReduceRows, 0, stream, a);
}

}  // namespace ft::cuda
