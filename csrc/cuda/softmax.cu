// softmax and log_softmax over the last dimension, forward and backward.
//   out = exp(s − max s) / Σ exp(s − max s),   s = scale · x over the allowed entries
// A group of threads (4 lanes of a warp … a block of 256) owns a row and keeps it in registers as
// raw 16-byte chunks, so that memory is read once and written once, which is all that bounds the
// kernel. Rows that registers can't hold go to the `wide` kernels: one online pass (running maximum
// and sum) that leaves as much of the row as fits in shared memory, and a second pass that reads
// the rest again. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
// (arXiv:1805.02867); QuACK's table of threads per row by columns (Dao-AILab/quack).
#include "cuda/device/index.h"
#include "cuda/device/reduce.h"
#include "cuda/device/scalar.h"
#include "cuda/row_plan.h"
#include "params/softmax.h"

namespace ft::cuda {
namespace {

// Threads per row and chunks per thread by the row's 16-byte chunks (8 elements of 16 bits, 4 of
// 32). After QuACK's published table, cut at what registers hold; not measured here: no GPU was at
// hand.
constexpr Plan kForward[] = {{8, 2, 4},    {16, 2, 8},   {32, 2, 16},    {64, 2, 32},
                             {256, 8, 32}, {512, 8, 64}, {1024, 8, 128}, {2048, 8, 256}};
// The backward pass holds two arrays, hence half the chunks.
constexpr Plan kBackward[] = {{8, 2, 4},    {16, 2, 8},   {32, 2, 16},   {64, 2, 32},
                              {128, 4, 32}, {256, 4, 64}, {512, 4, 128}, {1024, 4, 256}};
constexpr int kHeldBlock = 256;  // largest block of the held kernels
constexpr int kHeldBlocks = 3;   // of them on an SM at least: 128 registers a thread
constexpr int kWideBlock =
    512;  // block size of the wide kernels, two on an SM where their rows fit

// ---- rows ---------------------------------------------------------------------------------------

struct ForwardArgs {
  SoftmaxParams p;               // dims collapsed
  float sign = 1.f, size = 1.f;  // scale = sign · size
  int64_t period = 1;            // size of dimension −2, for the causal rule
  int group = 0;
  int64_t cached = 0;  // wide: chunks that shared memory holds
};

template <class T>
struct Row {
  const T* input;
  const bool* mask;
  int64_t end;  // columns that the causal rule allows
};

template <class T>
FT_DEVICE Row<T> locate(const ForwardArgs& a, int64_t row) {
  const SoftmaxParams& p = a.p;
  Row<T> r = {static_cast<const T*>(p.input), p.mask, p.columns};
  int64_t rest = row;
  for (int d = p.dims - 1; d > 0; --d) {
    const int64_t i = divide(rest, p.sizes[d]);
    r.input += i * p.input_strides[d];
    if (p.mask != nullptr) r.mask += i * p.mask_strides[d];
  }
  r.input += rest * p.input_strides[0];
  if (p.mask != nullptr) r.mask += rest * p.mask_strides[0];
  if (p.is_causal) {
    int64_t whole = row;
    const int64_t position = divide(whole, a.period);
    if (position + 1 < p.columns) r.end = position + 1;
  }
  return r;
}

// One bit per element of the chunk at `column` that takes part.
template <class T, class Index>
FT_DEVICE uint32_t allowed_bits(const Row<T>& r, int64_t mask_stride, Index column, Index end) {
  uint32_t bits = inside<T>(column, end);
  if (r.mask == nullptr || bits == 0) return bits;
  constexpr int kCount = kLanes<T>;
  const unsigned char* mask = reinterpret_cast<const unsigned char*>(r.mask);
  if (mask_stride == 1 && column >= 0 && column + kCount <= end &&
      (reinterpret_cast<uintptr_t>(mask + column) & (kCount - 1)) == 0) {
    uint32_t got = 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      // The multiplication gathers the lowest bit of each of the four bytes into the top four bits.
      const uint32_t word = load_scalar(reinterpret_cast<const uint32_t*>(mask + column + i));
      got |= (((word & 0x01010101u) * 0x10204080u) >> 28) << i;
    }
    return got;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if ((bits >> i & 1) && load_scalar(mask + (column + i) * mask_stride) == 0) bits &= ~(1u << i);
  }
  return bits;
}

// The order of scores is that of sign · x, whose maximum is subtracted before it is scaled: scores
// then have a relative error of their own size, not of the maximum's, and the largest is exactly 0.
FT_DEVICE float signed_input(float x, float sign, uint32_t bits, int i) {
  return (bits >> i & 1) ? x * sign : -infinity();
}
FT_DEVICE float centred(float x, const ForwardArgs& a, float top, uint32_t bits, int i) {
  return (bits >> i & 1) ? (x * a.sign - top) * a.size : -infinity();
}
// What turns scores into outputs once the row's maximum and sum are known. A row without an allowed
// entry is told by the mask, never by the sum: a row of −inf scores, or with a NaN, comes out NaN.
struct Finish {
  float top, scale, shift;  // out = exp(centred) · scale, or for log centred − shift
  bool log, empty;
};

template <class T>
FT_DEVICE Chunk finish_chunk(const Chunk& raw, const ForwardArgs& a, uint32_t bits,
                             const Finish& f) {
  float x[kLanes<T>];
  unpack<T>(raw, x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    const float d = centred(x[i], a, f.top, bits, i);
    if (f.log) {
      x[i] = (bits >> i & 1) ? d - f.shift : -infinity();
    } else {
      x[i] = f.empty ? 0.f : exponential<T>(d) * f.scale;
    }
  }
  return pack<T>(x);
}

// ---- forward ------------------------------------------------------------------------------------

template <class T, int kHeld>
FT_GLOBAL void __launch_bounds__(kHeldBlock, kHeldBlocks) softmax_held(const ForwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const SoftmaxParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const bool active = row < p.rows;
    const Row<T> r = locate<T>(a, active ? row : first);
    const int width = active ? static_cast<int>(p.columns) : 0;
    const int end = active ? static_cast<int>(r.end) : 0;
    const int shift = chunk_shift<T>(row, p.columns);
    const bool aligned = chunks_aligned(r.input, shift);
    const int start = lane * kLanes<T> - shift;
    const int step = a.group * kLanes<T>;

    constexpr int kPerWord = 32 / kLanes<T>;  // chunks whose allowed bits share a register
    uint32_t bits[(kHeld + kPerWord - 1) / kPerWord] = {};
    uint32_t any = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const uint32_t own = allowed_bits<T>(r, p.mask_column_stride, start + k * step, end);
      bits[k / kPerWord] |= own << (k % kPerWord * kLanes<T>);
      any |= own;
    }
    const auto bits_of = [&](int k) { return bits[k / kPerWord] >> (k % kPerWord * kLanes<T>); };
    Chunk raw[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      raw[k] = load_chunk(r.input, start + k * step, end, aligned);
    }
    float top = -infinity();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      float x[kLanes<T>];
      unpack<T>(raw[k], x);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i)
        top = maximum(top, signed_input(x[i], a.sign, bits_of(k), i));
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) keep_packed(raw[k]);
    top = group_reduce(top, a.group, -infinity(), scratch,
                       [](float x, float y) { return maximum(x, y); });
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * step >= end) continue;
      float x[kLanes<T>];
      unpack<T>(raw[k], x);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        sum += exponential<T>(centred(x[i], a, top, bits_of(k), i));
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) keep_packed(raw[k]);
    sum = group_sum(sum, a.group, scratch);
    Finish f = {top, 1.f / sum, 0.f, p.log, false};
    if (p.log) f.shift = natural_log(sum);
    if (p.mask != nullptr) { f.empty = group_sum(any ? 1.f : 0.f, a.group, scratch) == 0.f; }
    T* out = static_cast<T*>(p.output) + row * p.columns;
    const bool out_aligned = chunks_aligned(out, shift);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * step >= width) continue;
      store_chunk(out, start + k * step, width, out_aligned,
                  finish_chunk<T>(raw[k], a, bits_of(k), f));
    }
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kWideBlock, 2) softmax_wide(const ForwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();
  const SoftmaxParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Row<T> r = locate<T>(a, row);
    const int shift = chunk_shift<T>(row, p.columns);
    const bool aligned = chunks_aligned(r.input, shift);
    const int64_t chunks = (p.columns + shift + kCount - 1) / kCount;

    float top = -infinity(), sum = 0.f;
    uint32_t any = 0;
#pragma unroll 4
    for (int64_t c = threadIdx.x; c * kCount - shift < r.end; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      const Chunk raw = load_chunk(r.input, column, r.end, aligned);
      if (c < a.cached) shared_store(cache + c, raw);  // read back by this thread only
      const uint32_t bits = allowed_bits<T>(r, p.mask_column_stride, column, r.end);
      any |= bits;
      float x[kLanes<T>];
      unpack<T>(raw, x);
      float best = top;
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        best = maximum(best, signed_input(x[i], a.sign, bits, i));
      }
      // −inf − (−inf) must not make NaN of a row whose finite scores come later.
      const float base = best == -infinity() ? 0.f : best;
      sum *= rescale(top, base, a.size);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        sum += exponential<T>(centred(x[i], a, base, bits, i));
      }
      top = best;
    }
    const float mine = top;
    top = group_reduce(top, kWideBlock, -infinity(), scratch,
                       [](float x, float y) { return maximum(x, y); });
    if (top == -infinity()) {
      sum = not_a_number();  // nothing but −inf and NaN among the allowed
    } else {
      sum *= rescale(mine, top, a.size);
    }
    sum = group_sum(sum, kWideBlock, scratch);
    Finish f = {top, 1.f / sum, 0.f, p.log, false};
    if (p.log) f.shift = natural_log(sum);
    if (p.mask != nullptr) { f.empty = group_sum(any ? 1.f : 0.f, kWideBlock, scratch) == 0.f; }
    T* out = static_cast<T*>(p.output) + row * p.columns;
    const bool out_aligned = chunks_aligned(out, shift);
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      Chunk raw = {};
      uint32_t bits = 0;
      if (column < r.end) {
        raw = c < a.cached ? shared_load(cache + c) : load_chunk(r.input, column, r.end, aligned);
        bits = allowed_bits<T>(r, p.mask_column_stride, column, r.end);
      }
      store_chunk(out, column, p.columns, out_aligned, finish_chunk<T>(raw, a, bits, f));
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

struct BackwardArgs {
  SoftmaxBackwardParams p;
  int group = 0;
  int64_t cached = 0;
};

// One term of the row's sum: grad·output, or for log grad. An output of −inf in log form is an
// entry that was left out, whose grad does not count.
FT_DEVICE float backward_term(float g, float y, bool log) {
  if (log) return y == -infinity() ? 0.f : g;
  return g * y;
}

template <class T>
FT_DEVICE Chunk backward_chunk(const Chunk& grad, const Chunk& output, float sum, float scale,
                               bool log) {
  float g[kLanes<T>], y[kLanes<T>];
  unpack<T>(grad, g);
  unpack<T>(output, y);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (log) {
      g[i] = y[i] == -infinity() ? 0.f : scale * (g[i] - exponential<T>(y[i]) * sum);
    } else {
      g[i] = scale * y[i] * (g[i] - sum);
    }
  }
  return pack<T>(g);
}

template <class T>
FT_DEVICE float backward_sum(const Chunk& grad, const Chunk& output, bool log) {
  float g[kLanes<T>], y[kLanes<T>];
  unpack<T>(grad, g);
  unpack<T>(output, y);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) sum += backward_term(g[i], y[i], log);
  return sum;
}

template <class T, int kHeld>
FT_GLOBAL void __launch_bounds__(kHeldBlock, kHeldBlocks)
    softmax_backward_held(const BackwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const SoftmaxBackwardParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) & (a.group - 1);
  const int64_t per_block = blockDim.x / a.group;
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / a.group;
    const int width = row < p.rows ? static_cast<int>(p.columns) : 0;
    const T* grad = static_cast<const T*>(p.grad) + row * p.columns;
    const T* output = static_cast<const T*>(p.output) + row * p.columns;
    T* d_input = static_cast<T*>(p.d_input) + row * p.columns;
    const int shift = chunk_shift<T>(row, p.columns);
    const bool grad_aligned = chunks_aligned(grad, shift);
    const bool output_aligned = chunks_aligned(output, shift);
    const int start = lane * kLanes<T> - shift;
    const int step = a.group * kLanes<T>;

    Chunk g[kHeld], y[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      g[k] = load_chunk(grad, start + k * step, width, grad_aligned);
      y[k] = load_chunk(output, start + k * step, width, output_aligned);
    }
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      sum += backward_sum<T>(g[k], y[k], p.log);
      keep_packed(g[k]);
      keep_packed(y[k]);
    }
    sum = group_sum(sum, a.group, scratch);
    const bool aligned = chunks_aligned(d_input, shift);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * step >= width) continue;
      store_chunk(d_input, start + k * step, width, aligned,
                  backward_chunk<T>(g[k], y[k], sum, p.scale, p.log));
    }
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kWideBlock, 2) softmax_backward_wide(const BackwardArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  Chunk* cache = dynamic_shared<Chunk>();  // grad and output in turn
  const SoftmaxBackwardParams& p = a.p;
  constexpr int64_t kCount = kLanes<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* grad = static_cast<const T*>(p.grad) + row * p.columns;
    const T* output = static_cast<const T*>(p.output) + row * p.columns;
    T* d_input = static_cast<T*>(p.d_input) + row * p.columns;
    const int shift = chunk_shift<T>(row, p.columns);
    const bool grad_aligned = chunks_aligned(grad, shift);
    const bool output_aligned = chunks_aligned(output, shift);
    const int64_t chunks = (p.columns + shift + kCount - 1) / kCount;

    float sum = 0.f;
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      const Chunk g = load_chunk(grad, column, p.columns, grad_aligned);
      const Chunk y = load_chunk(output, column, p.columns, output_aligned);
      if (c < a.cached) {
        shared_store(cache + 2 * c, g);
        shared_store(cache + 2 * c + 1, y);
      }
      sum += backward_sum<T>(g, y, p.log);
    }
    sum = group_sum(sum, kWideBlock, scratch);
    const bool aligned = chunks_aligned(d_input, shift);
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < chunks; c += kWideBlock) {
      const int64_t column = c * kCount - shift;
      Chunk g, y;
      if (c < a.cached) {
        g = shared_load(cache + 2 * c);
        y = shared_load(cache + 2 * c + 1);
      } else {
        g = load_chunk(grad, column, p.columns, grad_aligned);
        y = load_chunk(output, column, p.columns, output_aligned);
      }
      store_chunk(d_input, column, p.columns, aligned,
                  backward_chunk<T>(g, y, sum, p.scale, p.log));
    }
  }
}

// ---- host side ----------------------------------------------------------------------------------

// Joins leading dimensions that lie behind one another in memory (for input and mask alike), so
// that a contiguous input of any rank has one: the kernel then divides by nothing to find a row.
void collapse(SoftmaxParams& p) {
  int kept = 0;
  for (int d = 0; d < p.dims; ++d) {
    if (p.sizes[d] == 1) continue;
    const int before = kept - 1;
    if (kept > 0 && p.input_strides[before] == p.sizes[d] * p.input_strides[d] &&
        (p.mask == nullptr || p.mask_strides[before] == p.sizes[d] * p.mask_strides[d])) {
      p.sizes[before] *= p.sizes[d];
      p.input_strides[before] = p.input_strides[d];
      p.mask_strides[before] = p.mask_strides[d];
      continue;
    }
    p.sizes[kept] = p.sizes[d];
    p.input_strides[kept] = p.input_strides[d];
    p.mask_strides[kept] = p.mask_strides[d];
    ++kept;
  }
  if (kept == 0) p.input_strides[0] = p.mask_strides[0] = 0;
  p.dims = kept;
}

}  // namespace

void softmax(const SoftmaxParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return;
  with_type(params.dtype, [&]<class T>() {
    ForwardArgs a{params};
    if (params.scale < 0.f) a.sign = -1.f;
    a.size = params.scale * a.sign;
    if (params.dims > 0) a.period = params.sizes[params.dims - 1];
    collapse(a.p);
    const int64_t chunks = row_chunks(params.columns, kLanes<T>);
    const Plan plan = choose(kForward, chunks);
    a.group = plan.group;
    if (plan.held == 0) {
      a.cached = cached_chunks("softmax", softmax_wide<T>, chunks, 1);
      return launch("softmax", softmax_wide<T>, grid_for(params.rows, 1), kWideBlock,
                    a.cached * static_cast<int64_t>(sizeof(Chunk)), stream, a);
    }
    const int block = block_of(plan.group);
    const int64_t grid = grid_for(params.rows, block / plan.group);
    launch("softmax", plan.held == 2 ? softmax_held<T, 2> : softmax_held<T, 8>, grid, block, 0,
           stream, a);
  });
}

void softmax_backward(const SoftmaxBackwardParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return;
  with_type(params.dtype, [&]<class T>() {
    BackwardArgs a{params};
    const int64_t chunks = row_chunks(params.columns, kLanes<T>);
    const Plan plan = choose(kBackward, chunks);
    a.group = plan.group;
    if (plan.held == 0) {
      a.cached = cached_chunks("softmax_backward", softmax_backward_wide<T>, chunks, 2);
      return launch("softmax_backward", softmax_backward_wide<T>, grid_for(params.rows, 1),
                    kWideBlock, a.cached * 2 * static_cast<int64_t>(sizeof(Chunk)), stream, a);
    }
    const int block = block_of(plan.group);
    const int64_t grid = grid_for(params.rows, block / plan.group);
    launch("softmax_backward",
           plan.held == 2 ? softmax_backward_held<T, 2> : softmax_backward_held<T, 4>, grid, block,
           0, stream, a);
  });
}

}  // namespace ft::cuda
