// Attention backward: the order of its kernels (backward.h says what each does), and the small
// ones. rows: a group of lanes owns a query; bound by memory. sinks: a block owns a head.
#include "cuda/attention/backward.h"
#include "cuda/device/reduce.h"
#include "cuda/device/vector.h"

namespace ft::cuda {
namespace {

constexpr int kRowsBlock = 128, kSinksBlock = 256, kPartsBlock = 256;

struct RowsArgs {
  AttentionBackwardParams p;
  bool plain = false;
  int group = 0;  // lanes of a row
};

template <class T>
FT_GLOBAL void __launch_bounds__(kRowsBlock) attention_backward_rows(const RowsArgs a) {
  const AttentionBackwardParams& p = a.p;
  const int64_t rows = p.rows(), per_block = kRowsBlock / a.group;
  const int lane = thread_index() & (a.group - 1), end = static_cast<int>(p.value_dim);
  const auto at = [](const HeadsView& v, int64_t b, int64_t h, int64_t i) {
    return static_cast<const T*>(v.data) + b * v.batch + h * v.head + i * v.row;
  };
  for (int64_t first = blockIdx.x * per_block; first < rows; first += gridDim.x * per_block) {
    const int64_t r = first + thread_index() / a.group;
    float sum = 0.f;
    if (r < rows) {
      const int64_t i = r % p.head_rows, head = r / p.head_rows;
      const int64_t h = head % p.heads, b = head / p.heads;
      const T *grad = at(p.grad_out, b, h, i), *out = at(p.out, b, h, i);
      const bool grad_aligned = chunks_aligned(grad, 0), out_aligned = chunks_aligned(out, 0);
      for (int c = lane * kLanes<T>; c < end; c += a.group * kLanes<T>) {
        float x[kLanes<T>], y[kLanes<T>];
        unpack<T>(load_chunk(grad, c, end, grad_aligned), x);
        unpack<T>(load_chunk(out, c, end, out_aligned), y);
#pragma unroll
        for (int k = 0; k < kLanes<T>; ++k) sum += x[k] * y[k];
      }
    }
    sum = group_sum(sum, a.group, nullptr);
    if (r < rows && lane == 0) {
      const float lse = load_scalar(p.lse + r);
      const float top = lse == -infinity() ? infinity() : lse;
      if (a.plain && p.grad_lse != nullptr) sum -= load_scalar(p.grad_lse + r);
      if (lse == -infinity()) sum = 0.f;
      store_scalar(p.delta + r, sum);
      store_scalar(p.top + r, a.plain ? top * kLog2E : top);
      store_scalar(p.shift + r, 0.f);
    }
  }
}

struct SinksArgs {
  AttentionBackwardParams p;
  bool plain = false;
};

// The sink's value is 0: its score's gradient is −weight·delta.
FT_GLOBAL void __launch_bounds__(kSinksBlock) attention_backward_sinks(const SinksArgs a) {
  FT_SHARED_ARRAY(float, scratch, kWarp);
  const AttentionBackwardParams& p = a.p;
  for (int64_t h = blockIdx.x; h < p.heads; h += gridDim.x) {
    const float sink = load_scalar(p.sinks + h);
    float sum = 0.f, lost = 0.f;  // Kahan's summation: rows are many
    for (int64_t b = 0; b < p.entries(); ++b) {
      const int64_t first = (b * p.heads + h) * p.head_rows;
      for (int64_t r = first + thread_index(); r < first + p.head_rows; r += kSinksBlock) {
        const float lse = load_scalar(p.lse + r);
        if (lse == -infinity()) continue;
        const float power = a.plain ? (sink - lse) * kLog2E
                                    : (sink - load_scalar(p.top + r)) * kLog2E +
                                          load_scalar(p.shift + r);
        float delta = load_scalar(p.delta + r);
        if (!a.plain && p.grad_lse != nullptr) delta -= load_scalar(p.grad_lse + r);
        const float term = -power_of_2<float>(power) * delta - lost;
        const float next = sum + term;
        lost = next - sum - term;
        sum = next;
      }
    }
    sum = group_sum(sum, kSinksBlock, scratch);
    if (thread_index() == 0) store_scalar(p.d_sinks + h, sum);
  }
}

struct PartsArgs {
  const float* parts;
  float* sum;
  int64_t count, size;
};

FT_GLOBAL void __launch_bounds__(kPartsBlock) attention_backward_add_parts(const PartsArgs a) {
  const int64_t step = int64_t{gridDim.x} * kPartsBlock;
  for (int64_t i = int64_t{blockIdx.x} * kPartsBlock + thread_index(); i < a.size; i += step) {
    float sum = 0.f;
    for (int64_t part = 0; part < a.count; ++part) {
      sum += load_scalar(a.parts + part * a.size + i);
    }
    store_scalar(a.sum + i, sum);
  }
}

template <class T>
void run(const AttentionBackwardParams& p, void* stream) {
  BackwardArgs args;
  args.p = p;
  args.units = units_of(p);
  args.group = p.kv_heads == 0 ? 1 : static_cast<int>(p.heads / p.kv_heads);
  bool aligned = true;
  for (const HeadsView* v : {&p.query, &p.key, &p.value, &p.grad_out}) {
    aligned = aligned && rows_on_16_bytes(*v, sizeof(T));
  }
  const bool plain =
      sizeof(T) == 2 && aligned && args.units.raw && p.mask.data == nullptr && !p.dropout.on();
  const int64_t rows = p.rows();
  if (rows > 0) {
    RowsArgs of_rows = {p, plain, 1};
    while (of_rows.group < kWarp && of_rows.group * kLanes<T> < p.value_dim) of_rows.group *= 2;
    launch("attention_backward_rows", attention_backward_rows<T>,
           grid_for(rows, kRowsBlock / of_rows.group), kRowsBlock, 0, stream, of_rows);
    backward_queries<T>(args, plain, stream);
  }
  backward_keys<T>(args, plain, stream);
  if (p.d_bias != nullptr) {
    backward_bias<T>(args, stream);
    const int64_t size =
        p.d_bias_sizes[0] * p.d_bias_sizes[1] * p.d_bias_sizes[2] * p.d_bias_sizes[3];
    if (p.parts > 1 && size > 0) {
      launch("attention_backward_add_parts", attention_backward_add_parts,
             grid_for(size, kPartsBlock), kPartsBlock, 0, stream,
             {p.partial_bias, p.d_bias, p.parts, size});
    }
  }
  if (p.d_sinks != nullptr && p.heads > 0) {
    launch("attention_backward_sinks", attention_backward_sinks, grid_for(p.heads, 1), kSinksBlock,
           0, stream, {p, plain});
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, void* stream) {
  with_type(p.dtype, [&]<class T>() { run<T>(p, stream); });
}

}  // namespace ft::cuda
