// Norms of rows, with or without a residual added first, in one pass over memory:
//   summed = residual + dropout(input)                              (without kAdd: the input)
//   normed = (summed − mean) · rstd · weight + bias                 (kRms: mean 0, no bias)
// A group of threads (4 lanes of a warp … a block) owns a row and keeps it in registers as raw
// 16-byte chunks while it takes the statistics: the mean, then the squares of the centred values,
// where the sum of what centring left corrects both. One or two reads, one or two writes, bound by
// memory. Rows too wide for registers go to `wide`, which leaves what it read in shared memory.
// Sources: Ba, Kiros, Hinton, 2016 (arXiv:1607.06450); Zhang, Sennrich, 2019 (arXiv:1910.07467);
// Chan, Golub, LeVeque, 1983, eq. 1.7 (the correction) and 1979 (merging moments); QuACK's table of
// threads per row.
#pragma once
#include "cuda/device/dropout.h"
#include "cuda/device/reduce.h"
#include "cuda/device/scalar.h"
#include "cuda/norm_scale.h"
#include "cuda/row_plan.h"
#include "params/row_norm.h"

namespace ft::cuda::row_norm {

// By the row's 16-byte chunks (8 elements of 16 bits, 4 of 32). After QuACK's published table, cut
// at what registers hold; not measured here: no GPU was at hand.
constexpr Plan kForward[] = {{8, 2, 4},    {16, 2, 8},   {32, 2, 16},   {64, 2, 32},
                             {128, 4, 32}, {256, 4, 64}, {512, 4, 128}, {1024, 4, 256}};
constexpr int kForwardBlock = 256,
              kForwardBlocks = 3;  // largest block, and how many an SM has room for
constexpr int kWideBlock = 512;    // block size of the wide kernels, two on an SM where rows fit
// Wide: chunks that a thread asks for before it waits, 64 bytes of one array or of two together.
template <bool kAdd>
constexpr int kForwardAhead = kAdd ? 2 : 4;

struct ForwardArgs {
  RowNormParams p;
  int group = 0;
  int64_t cached = 0;  // wide: chunks that shared memory holds
};

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

// Puts `value` in the place of the elements outside [0, end) of the chunk at `column`.
template <class T, class Index>
FT_DEVICE void fill_outside(float (&x)[kLanes<T>], Index column, Index end, float value) {
  if (column >= 0 && column + kLanes<T> <= end) return;
  const uint32_t bits = inside<T>(column, end);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((bits >> i & 1) == 0) x[i] = value;
  }
}

template <class T, class Index>
FT_DEVICE float count_inside(Index column, Index end) {
  const Index low = column < 0 ? 0 : column;
  const Index high = column + kLanes<T> < end ? column + kLanes<T> : end;
  return high > low ? static_cast<float>(high - low) : 0.f;
}

template <class T, bool kRms, class Index>
FT_DEVICE Chunk norm_chunk(const Chunk& summed, float mean, float rstd, const RowNormParams& p,
                           Index column, Index end) {
  float x[kLanes<T>], weight[kLanes<T>];
  unpack<T>(summed, x);
  load_vector(p.weight, column, end, 1.f, weight);
  if constexpr (kRms) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = x[i] * rstd * weight[i];
  } else {
    float bias[kLanes<T>];
    load_vector(p.bias, column, end, 0.f, bias);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  }
  return pack<T>(x);
}

// Where a row's arrays lie, and which of them share the alignment of the row's chunks.
template <class T, bool kAdd>
struct ForwardRow {
  const T *input, *residual = nullptr;
  T *summed = nullptr, *normed;
  int64_t begin;  // position of the row's first element
  int shift;      // of which its first chunk begins this many elements ahead
};

template <class T, bool kAdd>
FT_DEVICE ForwardRow<T, kAdd> forward_row(const RowNormParams& p, int64_t row) {
  ForwardRow<T, kAdd> r;
  r.begin = row * p.features;
  r.shift = chunk_shift<T>(row, p.features);
  r.input = static_cast<const T*>(p.input) + row * p.input_stride;
  r.normed = static_cast<T*>(p.normed) + r.begin;
  if constexpr (kAdd) {
    r.residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    r.summed = static_cast<T*>(p.summed) + r.begin;
  }
  return r;
}

template <bool kRms>
FT_DEVICE void store_statistics(const RowNormParams& p, int64_t row, float mean, float rstd) {
  if constexpr (!kRms) store_scalar(p.mean + row, mean);
  store_scalar(p.rstd + row, rstd);
}

template <class T, bool kRms, bool kAdd, int kHeld>
FT_GLOBAL void __launch_bounds__(kForwardBlock, kForwardBlocks) forward_held(const ForwardArgs a) {
  FT_SHARED_ARRAY(Pair, scratch, kWarp);
  const RowNormParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  const int features = static_cast<int>(p.features);
  const float share = 1.f / static_cast<float>(features);
  const int step = a.group * kLanes<T>;
  const uint64_t seed = kAdd ? seed_of(p.dropout) : 0;
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const int width = row < p.rows ? features : 0;
    const ForwardRow<T, kAdd> at = forward_row<T, kAdd>(p, row);
    const int start = lane * kLanes<T> - at.shift;

    Chunk x[kHeld], r[kAdd ? kHeld : 1];
    const bool input_aligned = chunks_aligned(at.input, at.shift);
    const bool residual_aligned = kAdd && chunks_aligned(at.residual, at.shift);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      x[k] = load_chunk(at.input, start + k * step, width, input_aligned);
      if constexpr (kAdd) {
        r[k] = load_chunk(at.residual, start + k * step, width, residual_aligned);
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld && kAdd; ++k) {
      const int column = start + k * step;
      if (column >= width) continue;
      x[k] = add_chunk<T>(x[k], r[k], p.dropout, seed, at.begin + column);
      store_chunk(at.summed, column, width, chunks_aligned(at.summed, at.shift), x[k]);
      keep_packed(x[k]);
    }
    float mean = 0.f, rstd = 0.f, factor = 1.f;
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {  // of which the second is all but never needed
      Pair sums = {0.f, 0.f};                  // of the values, or for kRms of their squares
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (start + k * step >= width) continue;
        float value[kLanes<T>];
        unpack<T>(x[k], value);
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) {  // 0 outside the row
          const float scaled = value[i] * factor;
          sums.a += kRms ? scaled * scaled : scaled;
        }
        keep_packed(x[k]);
      }
      float variance = 0.f;
      if constexpr (kRms) {
        variance = group_sum(sums, a.group, scratch).a * share;
      } else {
        const float about = group_sum(sums, a.group, scratch).a * share;
        sums = {0.f, 0.f};  // of what centring left, and of its squares
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const int column = start + k * step;
          if (column >= width) continue;
          float value[kLanes<T>];
          unpack<T>(x[k], value);
          fill_outside<T>(value, column, width, about / factor);
#pragma unroll
          for (int i = 0; i < kLanes<T>; ++i) {
            const float apart = value[i] * factor - about;
            sums.a += apart;
            sums.b += apart * apart;
          }
          keep_packed(x[k]);
        }
        sums = group_sum(sums, a.group, scratch);
        const float off = sums.a * share;
        mean = (about + off) / factor;
        variance = sums.b * share - off * off;
        if (variance < 0.f) variance = 0.f;  // by rounding; a NaN stays
      }
      rstd = scaled_rstd(variance, p.eps, factor);
      variance += p.eps * factor * factor;
      // Lanes of a warp stay together; of a larger group all threads decide alike.
      const float other = width > 0 ? scale_for(variance) : 1.f;
      if (round > 0 || !any_lane(other != 1.f)) break;
      factor = other;
    }
    if (lane == 0 && width > 0) store_statistics<kRms>(p, row, mean, rstd);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = start + k * step;
      if (column >= width) continue;
      store_chunk(at.normed, column, width, chunks_aligned(at.normed, at.shift),
                  norm_chunk<T, kRms>(x[k], mean, rstd, p, column, width));
    }
  }
}

// Adds the row's elements among `held` chunks, times `factor`, to the moments of those before; for
// kRms `m2` is the sum of the squares, and nothing else is used.
template <class T, bool kRms, int kHeld>
FT_DEVICE void take_moments(Moments& moments, const Chunk (&held)[kHeld], int64_t first,
                            int64_t step, int64_t features, float factor) {
  Moments own = {0.f, 0.f, 0.f};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    float value[kLanes<T>];
    unpack<T>(held[k], value);
    if constexpr (!kRms) own.count += count_inside<T>(first + k * step, features);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {  // 0 outside the row
      const float scaled = value[i] * factor;
      if constexpr (kRms) {
        own.m2 += scaled * scaled;
      } else {
        own.mean += scaled;
      }
    }
  }
  if constexpr (kRms) {
    moments.m2 += own.m2;
  } else {
    own.mean /= own.count;
    float off = 0.f;  // what centring left
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      float value[kLanes<T>];
      unpack<T>(held[k], value);
      fill_outside<T>(value, first + k * step, features, own.mean / factor);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        const float apart = value[i] * factor - own.mean;
        off += apart;
        own.m2 += apart * apart;
      }
    }
    off /= own.count;
    own.mean += off;
    own.m2 -= own.count * off * off;
    if (own.m2 < 0.f) own.m2 = 0.f;
    moments = merge(moments, own);
  }
}

template <class T, bool kRms, bool kAdd>
FT_GLOBAL void __launch_bounds__(kWideBlock, 2) forward_wide(const ForwardArgs a) {
  FT_SHARED_ARRAY(Moments, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();
  const RowNormParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  constexpr int kTaken = kForwardAhead<kAdd>;
  constexpr int kWritten = kRms ? 2 : 1;  // two at a time, where 64 registers hold them
  const uint64_t seed = kAdd ? seed_of(p.dropout) : 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const ForwardRow<T, kAdd> at = forward_row<T, kAdd>(p, row);
    const bool input_aligned = chunks_aligned(at.input, at.shift);
    const bool residual_aligned = kAdd && chunks_aligned(at.residual, at.shift);
    const bool summed_aligned = kAdd && chunks_aligned(at.summed, at.shift);
    const bool normed_aligned = chunks_aligned(at.normed, at.shift);
    const int64_t chunks = (p.features + at.shift + kCount - 1) / kCount;

    Moments moments = {0.f, 0.f, 0.f};
    for (int64_t c = threadIdx.x; c < chunks; c += kTaken * kWideBlock) {
      const int64_t column = c * kCount - at.shift;
      Chunk x[kTaken], r[kTaken];
#pragma unroll
      for (int k = 0; k < kTaken; ++k) {
        const int64_t place = column + k * kWideBlock * kCount;
        x[k] = load_chunk(at.input, place, p.features, input_aligned);
        if constexpr (kAdd) r[k] = load_chunk(at.residual, place, p.features, residual_aligned);
      }
#pragma unroll
      for (int k = 0; k < kTaken; ++k) {
        const int64_t place = column + k * kWideBlock * kCount;
        if (place >= p.features) continue;
        if constexpr (kAdd) {
          x[k] = add_chunk<T>(x[k], r[k], p.dropout, seed, at.begin + place);
          store_chunk(at.summed, place, p.features, summed_aligned, x[k]);
        }
        const int64_t own = c + k * kWideBlock;
        if (own < a.cached) shared_store(cache + own, x[k]);  // read back by this thread only
      }
      take_moments<T, kRms>(moments, x, column, kWideBlock * kCount, p.features, 1.f);
    }
    const T* again = kAdd ? at.summed : at.input;
    const bool again_aligned = kAdd ? summed_aligned : input_aligned;
    const auto read_again = [&](int64_t c) {
      return c < a.cached ? shared_load(cache + c)
                          : load_chunk<T>(again, c * kCount - at.shift, p.features, again_aligned);
    };
    const auto reduced = [&](const Moments& own) {
      return group_reduce(own, kWideBlock, Moments{0.f, 0.f, 0.f}, scratch,
                          [](const Moments& x, const Moments& y) {
                            return kRms ? Moments{0.f, 0.f, x.m2 + y.m2} : merge(x, y);
                          });
    };
    moments = reduced(moments);
    float mean = moments.mean, variance = moments.m2 / static_cast<float>(p.features);
    float rstd = scaled_rstd(variance, p.eps, 1.f);
    if (!is_ordinary(variance + p.eps)) {  // all threads decide alike
      const float factor = scale_for(variance + p.eps);
      moments = {0.f, 0.f, 0.f};
#pragma unroll 1
      for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
        const Chunk x[1] = {read_again(c)};
        take_moments<T, kRms>(moments, x, c * kCount - at.shift, 0, p.features, factor);
      }
      moments = reduced(moments);
      mean = moments.mean / factor;
      rstd = scaled_rstd(moments.m2 / static_cast<float>(p.features), p.eps, factor);
    }
    if constexpr (kRms) mean = 0.f;
    if (threadIdx.x == 0) store_statistics<kRms>(p, row, mean, rstd);
#pragma unroll kWritten
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - at.shift;
      const Chunk x = read_again(c);
      store_chunk(at.normed, column, p.features, normed_aligned,
                  norm_chunk<T, kRms>(x, mean, rstd, p, column, p.features));
    }
  }
}

template <bool kRms, bool kAdd>
void forward(const char* name, const RowNormParams& params, void* stream) {
  if (params.rows == 0 || params.features == 0) return;
  with_type(params.dtype, [&]<class T>() {
    ForwardArgs a{params};
    const int64_t chunks = row_chunks(params.features, kLanes<T>);
    const Plan plan = choose(kForward, chunks);
    if (plan.held == 0) {
      a.cached = cached_chunks(name, forward_wide<T, kRms, kAdd>, chunks, 1);
      return launch(name, forward_wide<T, kRms, kAdd>, grid_for(params.rows, 1), kWideBlock,
                    a.cached * static_cast<int64_t>(sizeof(Chunk)), stream, a);
    }
    a.group = plan.group;
    const int block = block_of(plan.group);
    launch(name, plan.held == 2 ? forward_held<T, kRms, kAdd, 2> : forward_held<T, kRms, kAdd, 4>,
           grid_for(params.rows, block / plan.group), block, 0, stream, a);
  });
}

}  // namespace ft::cuda::row_norm
