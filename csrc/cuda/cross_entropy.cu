// Cross entropy of logits against classes, per row, forward and backward.
//   loss = −(1 − s) · w[y] · log p[y] − s/C · Σ_c w[c] · log p[c],   log p = x − top − log_sum
// Forward: a group of threads (4 lanes of a warp … a block of 256) goes once through its row, with
// a running maximum and the sums relative to it; what it keeps is 16 bytes a row. Since nothing is
// written per element, no row is too long for one read. Backward: a thread turns four 16-byte
// chunks of logits into gradients from those 16 bytes, without another reduction. Both are limited
// by memory: one read of the logits forward, one read and one write backward. Rows that are left
// out are not read. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax,
// 2018 (arXiv:1805.02867); label smoothing: Szegedy et al., 2015 (arXiv:1512.00567).
#include "cuda/device/assert.h"
#include "cuda/device/index.h"
#include "cuda/device/reduce.h"
#include "cuda/device/scalar.h"
#include "cuda/row_plan.h"
#include "params/cross_entropy.h"

namespace ft::cuda {
namespace {

// Threads per row by the row's 16-byte chunks; forward each takes kBatch chunks at a time. Not
// measured: no GPU was at hand. The last plan is for any length.
constexpr int kBatch = 4;  // loads in flight per thread: 64 bytes, 48 KB an SM at 768 threads
constexpr Plan kForward[] = {{8, kBatch, 4},          {16, kBatch, 8},   {32, kBatch, 16},
                             {256, kBatch, 32},       {512, kBatch, 64}, {1024, kBatch, 128},
                             {INT64_MAX, kBatch, 256}};
constexpr Plan kBackward[] = {{8, kBatch, 2},     {16, kBatch, 4},         {32, kBatch, 8},
                              {64, kBatch, 16},   {128, kBatch, 32},       {256, kBatch, 64},
                              {512, kBatch, 128}, {INT64_MAX, kBatch, 256}};
constexpr int kLargestBlock = 256;   // forward, three on an SM at least: 80 registers a thread
constexpr int kBackwardBlock = 256;  // backward, four on an SM: 64 registers a thread

constexpr const char* kBadTarget =
    "cross_entropy: a target is out of range; it must be in [0, classes) or ignore_index";

struct ForwardArgs {
  CrossEntropyParams p;
  int group = 0;
};

struct Target {
  int64_t id;
  bool kept;
};
FT_DEVICE Target target_of(const CrossEntropyParams& p, int64_t row) {
  const int64_t id = load_id(p.target, row);
  const bool kept = id != p.ignore_index;
  device_assert(!kept || (id >= 0 && id < p.columns), kBadTarget);
  return {id, kept};
}

FT_DEVICE float weight_at(const VectorArg& weight, int64_t at) {
  float w[1];
  load_vector(weight, at, at + 1, 1.f, w);
  return w[0];
}

// Σ exp(x − base), Σ w · (x − base) and Σ w over the columns that a thread has seen, with base the
// largest of them (0 while that is −inf, so that −inf − (−inf) makes no NaN).
struct Sums {
  float top, exponentials, weighted, weights;
};
FT_DEVICE float base_of(float top) { return top == -infinity() ? 0.f : top; }

// What lies outside of the row counts as −inf, which changes neither maximum nor sum: asked for
// once a chunk, not once an element.
template <class T>
FT_DEVICE void lower_outside(Chunk& raw, int column, int width) {
  const uint32_t bits = inside<T>(column, width);
  float x[kLanes<T>];
  unpack<T>(raw, x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = (bits >> i & 1) ? x[i] : -infinity();
  raw = pack<T>(x);
}

template <class T>
FT_GLOBAL void __launch_bounds__(kLargestBlock, 3) cross_entropy_rows(const ForwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const CrossEntropyParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  const bool smooth = p.label_smoothing != 0.f;
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const bool active = row < p.rows;
    const Target target = target_of(p, active ? row : first);
    const int width = active && target.kept ? static_cast<int>(p.columns) : 0;
    const T* input = static_cast<const T*>(p.input) + (active ? row : first) * p.row_stride;
    // Chunks begin where memory is aligned, whatever the row's address.
    const int shift =
        static_cast<int>(reinterpret_cast<uintptr_t>(input) & 15) / static_cast<int>(sizeof(T));

    Sums mine = {-infinity(), 0.f, 0.f, 0.f};
    for (int c = lane; c * kCount - shift < width; c += kBatch * a.group) {
      Chunk raw[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int column = (c + k * a.group) * kCount - shift;
        raw[k] = load_chunk(input, column, width, true);
        if (column < 0 || column + kCount > width) lower_outside<T>(raw[k], column, width);
      }
      float best = mine.top;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        float x[kCount];
        unpack<T>(raw[k], x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) best = maximum(best, x[i]);
        keep_packed(raw[k]);
      }
      const float base = base_of(best);
      mine.exponentials *= rescale(mine.top, base, 1.f);
      mine.weighted += mine.weights * (base_of(mine.top) - base);
      mine.top = best;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        float x[kCount];
        unpack<T>(raw[k], x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) mine.exponentials += exponential<T>(x[i] - base);
        if (!smooth) continue;
        const int column = (c + k * a.group) * kCount - shift;
        const uint32_t bits = inside<T>(column, width);
        float w[kCount];
        load_vector(p.weight, column, width, 1.f, w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (!(bits >> i & 1)) continue;
          mine.weighted += w[i] * (x[i] - base);
          mine.weights += w[i];
        }
      }
    }

    const float top = group_reduce(mine.top, a.group, -infinity(), scratch,
                                   [](float x, float y) { return maximum(x, y); });
    float sum = not_a_number();  // nothing but −inf and NaN in the row
    if (top != -infinity()) sum = mine.exponentials * rescale(mine.top, top, 1.f);
    sum = group_sum(sum, a.group, scratch);
    RowStatistics statistics = {top, natural_log(sum), 1.f, static_cast<float>(p.columns)};
    float weighted = 0.f;
    if (smooth) {
      weighted =
          group_sum(mine.weighted + mine.weights * (base_of(mine.top) - top), a.group, scratch);
      statistics.weight_sum = group_sum(mine.weights, a.group, scratch);
    }
    if (!active || lane != 0) continue;
    float loss = 0.f;
    if (target.kept) {
      const float x = widen(load_scalar(input + target.id));
      statistics.target_weight = weight_at(p.weight, target.id);
      const float log_p = (x - top) - statistics.log_sum;
      loss = -(1.f - p.label_smoothing) * statistics.target_weight * log_p;
      if (smooth) {
        const float all = weighted - statistics.log_sum * statistics.weight_sum;
        loss -= p.label_smoothing / static_cast<float>(p.columns) * all;
      }
    } else {
      statistics = {0.f, 0.f, 0.f, 0.f};
    }
    store_scalar(p.losses + row, loss);
    store16(p.statistics + row,
            {{float_to_bits(statistics.top), float_to_bits(statistics.log_sum),
              float_to_bits(statistics.target_weight), float_to_bits(statistics.weight_sum)}});
  }
}

struct BackwardArgs {
  CrossEntropyBackwardParams p;
  int group = 0;
  int64_t segments = 1;  // parts of a row, each of kBatch chunks for every thread of a group
};

template <class T>
FT_GLOBAL void __launch_bounds__(kBackwardBlock, 4) cross_entropy_gradients(const BackwardArgs a) {
  const CrossEntropyParams& p = a.p.forward;
  constexpr int kCount = kLanes<T>;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = kBackwardBlock / a.group, items = p.rows * a.segments;
  for (int64_t item = blockIdx.x * per_block + threadIdx.x / a.group; item < items;
       item += gridDim.x * per_block) {
    int64_t row = item;
    const int first = static_cast<int>(divide(row, a.segments)) * kBatch * a.group + lane;
    const int shift = chunk_shift<T>(row, p.columns);
    const T* input = static_cast<const T*>(p.input) + row * p.row_stride;
    T* d_input = static_cast<T*>(a.p.d_input) + row * p.columns;
    const bool input_aligned = chunks_aligned(input, shift);
    const bool aligned = chunks_aligned(d_input, shift);
    const Target target = target_of(p, row);
    const int columns = static_cast<int>(p.columns);
    const int width = target.kept ? columns : 0;
    Chunk raw[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      raw[k] = load_chunk(input, (first + k * a.group) * kCount - shift, width, input_aligned);
    }
    float s[4];
    unpack<float>(load16(p.statistics + row), s);
    const float grad = load_scalar(a.p.grad + row * a.p.grad_stride);
    const float uniform = grad * (p.label_smoothing / static_cast<float>(p.columns));
    const float hit = grad * (1.f - p.label_smoothing) * s[2];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int column = (first + k * a.group) * kCount - shift;
      if (column >= columns) continue;
      float x[kCount];
      unpack<T>(raw[k], x);
      if (target.kept) {
        float w[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) w[i] = 1.f;
        if (uniform != 0.f) load_vector(p.weight, column, columns, 1.f, w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float probability = exponential<T>((x[i] - s[0]) - s[1]);
          const float sharp = probability - (column + i == target.id ? 1.f : 0.f);
          x[i] = hit * sharp + uniform * (probability * s[3] - w[i]);
        }
      }
      store_chunk(d_input, column, columns, aligned, pack<T>(x));
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& params, void* stream) {
  if (params.rows == 0) return;
  with_type(params.dtype, [&]<class T>() {
    const Plan plan = choose(kForward, row_chunks(params.columns, kLanes<T>));
    const int block = block_of(plan.group);
    launch("cross_entropy", cross_entropy_rows<T>, grid_for(params.rows, block / plan.group), block,
           0, stream, {params, plan.group});
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& params, void* stream) {
  const CrossEntropyParams& p = params.forward;
  if (p.rows == 0 || p.columns == 0) return;
  with_type(p.dtype, [&]<class T>() {
    const int64_t chunks = row_chunks(p.columns, kLanes<T>);
    const Plan plan = choose(kBackward, chunks);
    const int64_t part = int64_t{kBatch} * plan.group;
    const int64_t segments = (chunks + part - 1) / part;
    launch("cross_entropy_backward", cross_entropy_gradients<T>,
           grid_for(p.rows * segments, kBackwardBlock / plan.group), kBackwardBlock, 0, stream,
           {params, plan.group, segments});
  });
}

}  // namespace ft::cuda
