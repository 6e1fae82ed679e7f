// The norms' gradients. With x̂ = (summed − mean) · rstd and g = grad · weight:
//   d_residual = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + grad_summed         (kRms: no mean(g))
//   d_input    = d_residual · dropout;  d_weight = Σ over rows of grad · x̂;  d_bias = Σ of grad
// Groups of threads walk over rows and carry the weight gradients of their columns in registers:
// of one row the sums and then the gradients, while the next row's chunks are on their way to
// shared memory (cp.async). Each chunk is copied, read and forgotten by one thread, so no barrier
// is needed. All rows of a group begin at the same place of a chunk, whatever their length: rows
// go round the groups, whose number is a multiple of a chunk's elements. A block leaves one sum per
// column, and a second kernel adds up the blocks' sums in a fixed order. Rows too wide for
// registers go to `wide`, which keeps grad and summed in shared memory, and their weight gradients
// to `columns`, which reads them again. Bound by memory. Source: two-stage weight gradients as in
// NVIDIA apex's layer norm.
#pragma once
#include "cuda/device/async.h"
#include "cuda/device/dropout.h"
#include "cuda/device/reduce.h"
#include "cuda/row_plan.h"
#include "params/row_norm.h"

namespace ft::cuda::row_norm {

// By the row's 16-byte chunks. A thread carries 2 or 4 chunks of float sums, of which 64 registers
// are the most that leaves 512 threads on an SM. Not measured: no GPU was at hand.
constexpr Plan kBackward[] = {{8, 2, 4},     {16, 2, 8},     {32, 2, 16},
                              {64, 2, 32},   {128, 2, 64},   {256, 2, 128},
                              {512, 2, 256}, {1024, 2, 512}, {2048, 4, 512}};
constexpr int kBackwardBlock = 512;  // the largest, and the wide kernel's
// Blocks make up this many threads, 512 for each of an H100's 132 SMs, and so do up to 4 rounds of
// blocks where each gets 64 rows: then the last round counts for little on GPUs with fewer SMs, and
// the blocks' sums for less than 5 % of the traffic. The numbers fix the order of sums, and make
// the result the same on every GPU.
constexpr int64_t kBackwardThreads = 132 * 512, kMostRounds = 4, kRowsOfBlock = 64;
constexpr int kAhead = 2;              // wide: chunks of each array that a thread asks for at once
constexpr int kColumnBlock = 128;      // wide rows' weight gradients: one chunk a thread …
constexpr int kColumnRows = 4;         // … of so many rows at once
constexpr int64_t kColumnSplits = 64;  // and the partial sums per column that it leaves
constexpr int kReduceColumns = 32, kReduceRows = 32;  // block of the second stage

struct BackwardArgs {
  RowNormBackwardParams p;
  float share = 0.f;  // 1 / features
  int group = 0;
  int stage_chunks = 0;  // that a row takes up in shared memory
  int64_t row_step = 0;  // from one row of a group to its next
  int64_t ahead = 0;     // how far copies run ahead of their use: row_step, or 0 for want of room
  int64_t cached = 0;    // wide: chunks that shared memory holds
  int64_t partials = 0;  // partial sums of a vector; the workspace is (vectors, partials, features)
  int vectors = 0;       // of d_weight and d_bias, those that are wanted
};

struct Statistics {
  float mean, rstd;
};

template <bool kRms>
FT_DEVICE Statistics load_statistics(const RowNormBackwardParams& p, int64_t row) {
  if constexpr (kRms) return {0.f, load_scalar(p.rstd + row)};
  // With one feature g is its own mean and x̂ is 0: the gradient is 0, not a rounding of it.
  return {load_scalar(p.mean + row), p.features == 1 ? 0.f : load_scalar(p.rstd + row)};
}

template <bool kRms>
FT_DEVICE float normalized(float x, const Statistics& s) {
  return (kRms ? x : x - s.mean) * s.rstd;
}

// Adds the chunk's part of (Σ g, Σ g · x̂).
template <class T, bool kRms>
FT_DEVICE void add_sums(const float (&grad)[kLanes<T>], const float (&normed)[kLanes<T>],
                        const float (&weight)[kLanes<T>], Pair& sums) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    const float g = grad[i] * weight[i];  // grad is 0 outside the row
    if constexpr (!kRms) sums.a += g;
    sums.b += g * normed[i];
  }
}

// The group's means of g and g · x̂ from its threads' sums.
template <bool kRms>
FT_DEVICE Pair group_means(const Pair& sums, int group, float share, Pair* scratch) {
  if constexpr (kRms) return {0.f, group_sum(sums.b, group, &scratch->a) * share};
  const Pair all = group_sum(sums, group, scratch);
  return {all.a * share, all.b * share};
}

// Writes d_residual and d_input of the chunk at `column`.
template <class T, bool kRms, class Index>
FT_DEVICE void write_gradients(const RowNormBackwardParams& p, int64_t row, Index column, Index end,
                               int shift, const Chunk& grad, const Chunk& summed,
                               const Chunk& grad_summed, const Statistics& s, const Pair& means) {
  float d[kLanes<T>], x[kLanes<T>], weight[kLanes<T>];
  unpack<T>(grad, d);
  unpack<T>(summed, x);
  load_vector(p.weight, column, end, 1.f, weight);
  // rstd · (g − mean(g) − x̂ · mean(g · x̂)): rstd alone may be so small that it has no square.
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    const float rest = normalized<kRms>(x[i], s) * means.b + (kRms ? 0.f : means.a);
    d[i] = (d[i] * weight[i] - rest) * s.rstd;
  }
  if (p.grad_summed != nullptr) {
    unpack<T>(grad_summed, x);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) d[i] += x[i];
  }
  T* d_residual = static_cast<T*>(p.d_residual) + row * p.features;
  store_chunk(d_residual, column, end, chunks_aligned(d_residual, shift), pack<T>(d));
  if (p.d_input == nullptr) return;
  const uint64_t seed = seed_of(p.dropout);
  const uint32_t keep = keep_bits<kLanes<T>>(seed, row * p.features + column, p.dropout.threshold);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) d[i] = (keep >> i & 1) ? d[i] * p.dropout.scale : 0.f;
  T* d_input = static_cast<T*>(p.d_input) + row * p.features;
  store_chunk(d_input, column, end, chunks_aligned(d_input, shift), pack<T>(d));
}

// Asks for the thread's chunks of a row; they lie in `to`, `apart` chunks from one another, when
// the thread has waited.
template <class T, int kHeld>
FT_DEVICE void copy_row(Chunk* to, int apart, const void* array, int64_t offset, int start,
                        int step, int end, int shift) {
  const T* row = static_cast<const T*>(array) + offset;
  const bool aligned = chunks_aligned(row, shift);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = start + k * step;
    if (column >= end) continue;
    if (aligned && column >= 0 && column + kLanes<T> <= end) {
      copy_async<16>(to + k * apart, row + column);
    } else {
      shared_store(to + k * apart, load_chunk(row, column, end, false));
    }
  }
}

// Adds up the groups' sums of the block, and leaves them in one row of the workspace. `shared` has
// room for a row of floats for each group.
template <class T, int kHeld>
FT_DEVICE void leave_partial(float* out, const float (&sums)[kHeld][kLanes<T>], int start, int step,
                             int features, int group, float* shared) {
  float* own = shared + static_cast<int>(threadIdx.x) / group * features;
  block_barrier();  // what lies there may still be in use
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const int column = start + k * step + i;
      if (column >= 0 && column < features) shared_store(own + column, sums[k][i]);
    }
  }
  block_barrier();
  const int groups = static_cast<int>(blockDim.x) / group;
  for (int column = threadIdx.x; column < features; column += blockDim.x) {
    float sum = 0.f;
    for (int g = 0; g < groups; ++g) sum += shared_load(shared + g * features + column);
    store_scalar(out + column, sum);
  }
}

template <class T, bool kRms, int kHeld>
FT_GLOBAL void __launch_bounds__(kBackwardBlock, 1) backward_held(const BackwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kWarp);
  // (stages, {grad, summed, grad_summed}, kHeld, threads)
  Chunk* staged = dynamic_shared<Chunk>();
  const RowNormBackwardParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int threads = static_cast<int>(blockDim.x), array = kHeld * threads;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = threads / a.group;
  const int features = static_cast<int>(p.features);
  const int step = a.group * kCount;

  for (int64_t block = blockIdx.x; block < a.partials; block += gridDim.x) {
    const int64_t place = threadIdx.x / a.group, own = block * per_block + place;  // the first row
    const int shift = chunk_shift<T>(own, p.features);  // and that of its others
    const int start = lane * kCount - shift;
    const auto ask = [&](int64_t row, int stage) {
      if (row < p.rows) {
        Chunk* to = staged + stage * a.stage_chunks + threadIdx.x;
        copy_row<T, kHeld>(to, threads, p.grad_normed, row * p.grad_normed_stride, start, step,
                           features, shift);
        copy_row<T, kHeld>(to + array, threads, p.summed, row * p.summed_stride, start, step,
                           features, shift);
        if (p.grad_summed != nullptr) {
          copy_row<T, kHeld>(to + 2 * array, threads, p.grad_summed, row * p.grad_summed_stride,
                             start, step, features, shift);
        }
      }
      copy_async_commit();
    };
    const auto statistics = [&](int64_t row) {
      return row < p.rows ? load_statistics<kRms>(p, row) : Statistics{0.f, 0.f};
    };

    float d_weight[kHeld][kCount] = {}, d_bias[kHeld][kCount] = {};
    Statistics next = statistics(own);
    int stage = 0;
    for (int64_t row = own - a.ahead; row - place < p.rows; row += a.row_step) {
      ask(row + a.ahead, stage);
      if (a.ahead == 0) {
        copy_async_wait<0>();
      } else {
        stage ^= 1;  // where the row before is
        if (row < 0) continue;
        copy_async_wait<1>();
      }
      const Statistics s = next;
      next = statistics(row + a.row_step);
      const int width = row < p.rows ? features : -kCount;  // no chunk begins below that
      const Chunk* held = staged + stage * a.stage_chunks + threadIdx.x;
      Pair sums = {0.f, 0.f};
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (start + k * step >= width) continue;
        float g[kCount], x[kCount], weight[kCount];
        unpack<T>(shared_load(held + k * threads), g);
        unpack<T>(shared_load(held + k * threads + array), x);
        load_vector(p.weight, start + k * step, width, 1.f, weight);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          x[i] = normalized<kRms>(x[i], s);
          d_weight[k][i] += g[i] * x[i];
          if constexpr (!kRms) d_bias[k][i] += g[i];
        }
        add_sums<T, kRms>(g, x, weight, sums);
      }
      const Pair means = group_means<kRms>(sums, a.group, a.share, scratch);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (start + k * step >= width) continue;
        const Chunk* own_chunk = held + k * threads;
        Chunk grad_summed = {};
        if (p.grad_summed != nullptr) grad_summed = shared_load(own_chunk + 2 * array);
        write_gradients<T, kRms>(p, row, start + k * step, width, shift, shared_load(own_chunk),
                                 shared_load(own_chunk + array), grad_summed, s, means);
      }
    }
    copy_async_wait<0>();
    float* sums = reinterpret_cast<float*>(staged);
    float* partial = p.workspace + block * p.features;
    if (p.d_weight != nullptr) {
      leave_partial<T>(partial, d_weight, start, step, features, a.group, sums);
      partial += a.partials * p.features;
    }
    if (!kRms && p.d_bias != nullptr) {
      leave_partial<T>(partial, d_bias, start, step, features, a.group, sums);
    }
    block_barrier();
  }
}

template <class T, bool kRms>
FT_GLOBAL void __launch_bounds__(kBackwardBlock, 2) backward_wide(const BackwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();  // grad and summed in turn
  const RowNormBackwardParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* grad = static_cast<const T*>(p.grad_normed) + row * p.grad_normed_stride;
    const T* summed = static_cast<const T*>(p.summed) + row * p.summed_stride;
    const int shift = chunk_shift<T>(row, p.features);
    const bool grad_aligned = chunks_aligned(grad, shift);
    const bool summed_aligned = chunks_aligned(summed, shift);
    const Statistics s = load_statistics<kRms>(p, row);
    const int64_t chunks = (p.features + shift + kCount - 1) / kCount;
    Pair sums = {0.f, 0.f};
    for (int64_t c = threadIdx.x; c < chunks; c += kAhead * kBackwardBlock) {
      Chunk grads[kAhead], values[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t column = (c + k * kBackwardBlock) * kCount - shift;
        grads[k] = load_chunk(grad, column, p.features, grad_aligned);
        values[k] = load_chunk(summed, column, p.features, summed_aligned);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t own = c + k * kBackwardBlock;
        if (own >= chunks) continue;
        if (own < a.cached) {  // read back by this thread only
          shared_store(cache + 2 * own, grads[k]);
          shared_store(cache + 2 * own + 1, values[k]);
        }
        float g[kCount], x[kCount], weight[kCount];
        unpack<T>(grads[k], g);
        unpack<T>(values[k], x);
        load_vector(p.weight, own * kCount - shift, p.features, 1.f, weight);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = normalized<kRms>(x[i], s);
        add_sums<T, kRms>(g, x, weight, sums);
      }
    }
    const Pair means = group_means<kRms>(sums, kBackwardBlock, a.share, scratch);
    for (int64_t c = threadIdx.x; c < chunks; c += kBackwardBlock) {
      const int64_t column = c * kCount - shift;
      Chunk g, x, gs = {};
      if (c < a.cached) {
        g = shared_load(cache + 2 * c);
        x = shared_load(cache + 2 * c + 1);
      } else {
        g = load_chunk(grad, column, p.features, grad_aligned);
        x = load_chunk(summed, column, p.features, summed_aligned);
      }
      if (p.grad_summed != nullptr) {
        const T* grad_summed = static_cast<const T*>(p.grad_summed) + row * p.grad_summed_stride;
        gs = load_chunk(grad_summed, column, p.features, chunks_aligned(grad_summed, shift));
      }
      write_gradients<T, kRms>(p, row, column, p.features, shift, g, x, gs, s, means);
    }
  }
}

// Wide rows' weight gradients: a thread owns a chunk of columns and walks down every splits-th row.
// All of them begin at the same place of a chunk: there are 64 splits, or as many as rows.
template <class T, bool kRms>
FT_GLOBAL void __launch_bounds__(kColumnBlock) backward_columns(const BackwardArgs a) {
  const RowNormBackwardParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int64_t blocks = (p.features + kCount + kColumnBlock * kCount - 1) /
                         (kColumnBlock * kCount);  // one chunk more: see row_chunks
  for (int64_t block = blockIdx.x; block < blocks * a.partials; block += gridDim.x) {
    const int64_t split = block / blocks;
    const int shift = chunk_shift<T>(split, p.features);
    const int64_t column = (block % blocks * kColumnBlock + threadIdx.x) * kCount - shift;
    float d_weight[kCount] = {}, d_bias[kCount] = {};
    for (int64_t first = split; first < p.rows; first += kColumnRows * a.partials) {
      Chunk grads[kColumnRows], values[kColumnRows];
      Statistics s[kColumnRows];
#pragma unroll
      for (int k = 0; k < kColumnRows; ++k) {
        const int64_t row = first + k * a.partials;
        const int64_t end = row < p.rows ? p.features : -kCount;  // no chunk begins below that
        const T* grad = static_cast<const T*>(p.grad_normed) + row * p.grad_normed_stride;
        const T* summed = static_cast<const T*>(p.summed) + row * p.summed_stride;
        grads[k] = load_chunk<T>(grad, column, end, chunks_aligned(grad, shift));
        values[k] = load_chunk<T>(summed, column, end, chunks_aligned(summed, shift));
        s[k] = load_statistics<kRms>(p, row < p.rows ? row : split);
      }
#pragma unroll
      for (int k = 0; k < kColumnRows; ++k) {
        if (first + k * a.partials >= p.rows) continue;
        float g[kCount], x[kCount];
        unpack<T>(grads[k], g);
        unpack<T>(values[k], x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          d_weight[i] += g[i] * normalized<kRms>(x[i], s[k]);
          if constexpr (!kRms) d_bias[i] += g[i];
        }
      }
    }
    float* partial = p.workspace + split * p.features;
    const auto leave = [&](const float (&sums)[kCount]) {
      const bool aligned = chunks_aligned(partial + column, 0);
#pragma unroll
      for (int i = 0; i < kCount; i += kLanes<float>) {
        const float four[kLanes<float>] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
        store_chunk(partial, column + i, p.features, aligned, pack<float>(four));
      }
      partial += a.partials * p.features;
    };
    if (p.d_weight != nullptr) leave(d_weight);
    if (!kRms && p.d_bias != nullptr) leave(d_bias);
  }
}

// Second stage: 32 columns of a vector a block, 32 threads a column, each over every 32nd partial
// sum; their sums are added in pairs.
static FT_GLOBAL void __launch_bounds__(kReduceColumns* kReduceRows)
    sum_partials(const BackwardArgs a) {
  FT_SHARED_ARRAY(float, sums, kReduceRows* kReduceColumns);
  const RowNormBackwardParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % kReduceColumns;
  const int slice = static_cast<int>(threadIdx.x) / kReduceColumns;
  const int64_t blocks = (p.features + kReduceColumns - 1) / kReduceColumns;
  for (int64_t block = blockIdx.x; block < blocks * a.vectors; block += gridDim.x) {
    const int64_t vector = block / blocks;
    const int64_t column = block % blocks * kReduceColumns + lane;
    const float* partial = p.workspace + vector * a.partials * p.features + column;
    float sum = 0.f;
    if (column < p.features) {
#pragma unroll 8
      for (int64_t i = slice; i < a.partials; i += kReduceRows) {
        sum += load_scalar(partial + i * p.features);
      }
    }
    block_barrier();  // the sums of the block before may still be in use
    shared_store(sums + threadIdx.x, sum);
    for (int half = kReduceRows / 2; half > 0; half /= 2) {
      block_barrier();
      if (slice >= half) continue;
      sum += shared_load(sums + threadIdx.x + half * kReduceColumns);
      shared_store(sums + threadIdx.x, sum);
    }
    if (slice != 0 || column >= p.features) continue;
    const bool weight = vector == 0 && p.d_weight != nullptr;
    store_as(weight ? p.d_weight : p.d_bias, weight ? p.weight_dtype : p.bias_dtype, column, sum);
  }
}

struct BackwardPlan {
  Plan plan;
  int block, vectors;
  int64_t partials;
};

// Depends on shapes only, so that gradients have the same bits on every GPU and in every run.
inline BackwardPlan backward_plan(const RowNormBackwardParams& p) {
  const int lanes = p.dtype == DType::f32 ? kLanes<float> : kLanes<bf16>;
  const Plan plan = choose(kBackward, row_chunks(p.features, lanes));
  const int vectors = (p.d_weight != nullptr ? 1 : 0) + (p.d_bias != nullptr ? 1 : 0);
  if (plan.held == 0) {
    return {plan, kBackwardBlock, vectors, p.rows < kColumnSplits ? p.rows : kColumnSplits};
  }
  const int block = block_of(plan.group);
  const int64_t per_block = block / plan.group;
  int64_t partials = (p.rows + per_block - 1) / per_block;
  const int64_t round = kBackwardThreads / block;
  if (partials > round) {
    const int64_t rounds = p.rows / (round * kRowsOfBlock);
    partials = round * (rounds < 1 ? 1 : rounds > kMostRounds ? kMostRounds : rounds);
    // The rows of a group must begin at the same place of a chunk.
    if (p.features % lanes != 0) partials -= partials % lanes;
  }
  return {plan, block, vectors, partials};
}

inline int64_t backward_workspace(const RowNormBackwardParams& p) {
  const BackwardPlan plan = backward_plan(p);
  return plan.vectors * plan.partials * p.features;
}

template <bool kRms>
void backward(const char* name, const RowNormBackwardParams& params, void* stream) {
  if (params.features == 0) return;
  const BackwardPlan plan = backward_plan(params);
  BackwardArgs a{params};
  a.share = 1.f / static_cast<float>(params.features);
  a.group = plan.plan.group;
  a.partials = plan.partials;
  a.vectors = plan.vectors;
  constexpr int64_t kChunk = sizeof(Chunk);
  with_type(params.dtype, [&]<class T>() {
    if (params.rows == 0) return;
    if (plan.plan.held != 0) {
      const int arrays = params.grad_summed == nullptr ? 2 : 3;
      a.stage_chunks = arrays * plan.plan.held * plan.block;
      const int64_t stage = kChunk * a.stage_chunks;
      const auto kernel =
          plan.plan.held == 2 ? backward_held<T, kRms, 2> : backward_held<T, kRms, 4>;
      const int stages = 2 * stage <= dynamic_shared_room(name, kernel) ? 2 : 1;
      a.row_step = plan.partials * (plan.block / plan.plan.group);
      if (stages == 2) a.ahead = a.row_step;
      return launch(name, kernel, grid_for(plan.partials, 1), plan.block, stages * stage, stream,
                    a);
    }
    a.cached = cached_chunks(name, backward_wide<T, kRms>, plan.plan.chunks, 2);
    launch(name, backward_wide<T, kRms>, grid_for(params.rows, 1), kBackwardBlock,
           a.cached * 2 * kChunk, stream, a);
    if (plan.vectors == 0) return;
    constexpr int64_t kPerBlock = static_cast<int64_t>(kColumnBlock) * kLanes<T>;
    const int64_t blocks = (params.features + kLanes<T> + kPerBlock - 1) / kPerBlock;
    launch(name, backward_columns<T, kRms>, grid_for(blocks * plan.partials, 1), kColumnBlock, 0,
           stream, a);
  });
  if (plan.vectors == 0) return;
  const int64_t blocks = (params.features + kReduceColumns - 1) / kReduceColumns;
  launch(name, sum_partials, grid_for(blocks * plan.vectors, 1), kReduceColumns * kReduceRows, 0,
         stream, a);
}

}  // namespace ft::cuda::row_norm
