// Rotary position embedding of query and key in one launch, and the way back.
//   (a, b) → (a · cos − b · sin, b · cos + a · sin), pairs (i, i + half) or interleaved (2i, 2i +
//   1)
// A thread owns one 16-byte chunk's number of pairs of a token, so two chunks of a head's row, for
// kHeads heads: the angles are read once for them. The heads of query and of key are one row of
// heads. Backward is the same kernel with the sines negated. It is limited by memory: one read and
// one write of query and key; the tables are small and come from L2. Source: Su et al., RoFormer,
// 2021 (arXiv:2104.09864).
#include "cuda/device/assert.h"
#include "cuda/device/index.h"
#include "cuda/device/launch.h"
#include "params/rotary_embedding.h"

namespace ft::cuda {
namespace {

// Not measured: no GPU was at hand.
constexpr int kBlock = 256;
constexpr int kHeads = 4;  // per thread: 128 bytes of loads in flight; the angles cost 16 to 64

struct Args {
  RotaryEmbeddingParams p;
  int64_t chunks, head_groups;
};

struct Head {
  const void* input;
  void* output;
};
template <class T>
FT_DEVICE Head head_of(const RotaryTensor& t, const RotaryEmbeddingParams& p, int64_t batch,
                       int64_t head, int64_t position) {
  const int64_t row = (batch * t.heads + head) * p.length + position;
  return {static_cast<const T*>(t.input) + batch * t.batch_stride + head * t.head_stride +
              position * t.position_stride,
          static_cast<T*>(t.output) + row * 2 * p.half};
}

template <class T>
FT_DEVICE void load_angles(const RotaryTable& table, int64_t batch, int64_t row, int column,
                           int half, float (&out)[kLanes<T>]) {
  const int64_t at = batch * table.batch_stride + row * table.row_stride;
  const int64_t bytes = table.data.dtype == DType::f32 ? 4 : 2;
  const VectorArg start = {static_cast<const char*>(table.data.data) + at * bytes,
                           table.data.dtype};
  load_vector(start, column, half, 0.f, out);
}

template <class T, bool kInterleaved>
FT_GLOBAL void __launch_bounds__(kBlock, 2) rotate_pairs(const Args a) {
  const RotaryEmbeddingParams& p = a.p;
  constexpr int kCount = kLanes<T>;
  const int half = static_cast<int>(p.half);
  const int64_t heads = p.query.heads + p.key.heads;
  const int64_t items = p.batch * p.length * a.head_groups * a.chunks;
  for (int64_t item = blockIdx.x * int64_t{kBlock} + threadIdx.x; item < items;
       item += gridDim.x * int64_t{kBlock}) {
    int64_t batch = item;
    const int column = static_cast<int>(divide(batch, a.chunks)) * kCount;  // of the first pair
    const int64_t first = divide(batch, a.head_groups) * kHeads;
    const int64_t position = divide(batch, p.length);
    int64_t row = position;
    if (p.position_ids.data != nullptr)
      row = load_id(p.position_ids, batch * p.ids_stride + position);
    device_assert(row >= 0 && row < p.rows,
                  "rotary_embedding: a position is out of range of cos and sin");
    // The thread's two chunks: at the pairs' first and second features, or one behind the other.
    const int left = kInterleaved ? 2 * column : column;
    const int right = kInterleaved ? left + kCount : column;
    const int end = kInterleaved ? 2 * half : half;
    const int apart = kInterleaved ? 0 : half;
    Chunk x[kHeads][2];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int64_t head = first + h;
      if (head >= heads) continue;
      const bool of_query = head < p.query.heads;
      const RotaryTensor& t = of_query ? p.query : p.key;
      const Head at = head_of<T>(t, p, batch, of_query ? head : head - p.query.heads, position);
      const T* in = static_cast<const T*>(at.input);
      x[h][0] = load_chunk(in, left, end, is_aligned(in));
      x[h][1] = load_chunk(in + apart, right, end, is_aligned(in + apart));
    }
    float cos[kCount], sin[kCount];
    load_angles<T>(p.cos, batch, row, column, half, cos);
    load_angles<T>(p.sin, batch, row, column, half, sin);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sin[i] *= p.sign;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int64_t head = first + h;
      if (head >= heads) continue;
      float both[2][kCount];
      unpack<T>(x[h][0], both[0]);
      unpack<T>(x[h][1], both[1]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float& u = kInterleaved ? both[2 * i / kCount][2 * i % kCount] : both[0][i];
        float& v = kInterleaved ? both[2 * i / kCount][2 * i % kCount + 1] : both[1][i];
        const float turned = u * cos[i] - v * sin[i];
        v = v * cos[i] + u * sin[i];
        u = turned;
      }
      const bool of_query = head < p.query.heads;
      const RotaryTensor& t = of_query ? p.query : p.key;
      const Head at = head_of<T>(t, p, batch, of_query ? head : head - p.query.heads, position);
      T* out = static_cast<T*>(at.output);
      store_chunk(out, left, end, is_aligned(out), pack<T>(both[0]));
      store_chunk(out + apart, right, end, is_aligned(out + apart), pack<T>(both[1]));
    }
  }
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingParams& params, void* stream) {
  const int64_t heads = params.query.heads + params.key.heads;
  if (params.batch * params.length * params.half * heads == 0) return;
  with_type(params.dtype, [&]<class T>() {
    const int64_t chunks = (params.half + kLanes<T> - 1) / kLanes<T>;
    const int64_t groups = (heads + kHeads - 1) / kHeads;
    launch("rotary_embedding", params.interleaved ? rotate_pairs<T, true> : rotate_pairs<T, false>,
           grid_for(params.batch * params.length * groups * chunks, kBlock), kBlock, 0, stream,
           {params, chunks, groups});
  });
}

}  // namespace ft::cuda
