// Rotary position embedding of query and key, and the way back.
//   (a, b) → (a · cos − b · sin, b · cos + a · sin), pairs (i, i + half) or interleaved (2i, 2i +
//   1)
// A thread owns tiles of kPositions neighbouring tokens. It widens their angles once, in the order
// in which its walk reads them, and then takes head after head of query and key: so a head's rows
// are written one behind the other, and the angles stay in the nearest cache for all heads. An
// interleaved pair is two neighbouring lanes: x · cos + swapped(x) · (−sin, sin). Backward is the
// same with the sines negated. Bound by memory: one read and one write of query and key. Source: Su
// et al., RoFormer, 2021 (arXiv:2104.09864).
#include "params/rotary_embedding.h"

#include "cpu/columns.h"
#include "cpu/ids.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 32768;   // elements below which a second thread costs more than it gives
constexpr int64_t kPositions = 16;  // tokens of a tile: 16 KB of angles for heads of 128

template <bool Past, class T>
FT_INLINE void rotate_halves(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  over_columns<2, T>(half, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto a = load(x + j, part), b = load(x + half + j, part);
    const auto c = load(cos + j, part), s = load(sin + j, part);
    put<Past>(out + j, a * c - b * s, part);
    put<Past>(out + half + j, b * c + a * s, part);
  });
}

template <bool Past, class T>
FT_INLINE void rotate_pairs(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  over_columns<2>(2 * half, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const vf both = load(x + j, part);
    put<Past>(out + j, both * load(cos + j, part) + swap_pairs(both) * load(sin + j, part), part);
  });
}

// One token's angles: as halves, or each twice with the sine of a pair's first number negated.
template <class T, bool Interleaved>
void widen_angles(const RotaryEmbeddingParams& p, int64_t batch, int64_t token, float* room,
                  float* cos, float* sin) {
  int64_t row = token;
  if (p.position_ids.data != nullptr) row = id_at(p.position_ids, batch * p.ids_stride + token);
  const auto widen = [&](const RotaryTable& table, float* out) {
    const int64_t at = batch * table.batch_stride + row * table.row_stride;
    const int64_t bytes = table.data.dtype == DType::f32 ? 4 : 2;
    const VectorArg start = {static_cast<const char*>(table.data.data) + at * bytes,
                             table.data.dtype};
    const float* from = Interleaved ? float_vector<float>(start, p.half, 0.f, out)
                                    : float_vector<T>(start, p.half, 0.f, out);
    if (from != out) std::memcpy(out, from, static_cast<size_t>(p.half) * sizeof(float));
  };
  if constexpr (Interleaved) {
    widen(p.cos, room);
    for (int64_t i = 0; i < p.half; ++i) cos[2 * i] = cos[2 * i + 1] = room[i];
    widen(p.sin, room);
    for (int64_t i = 0; i < p.half; ++i) {
      sin[2 * i] = -p.sign * room[i];
      sin[2 * i + 1] = p.sign * room[i];
    }
  } else {
    widen(p.cos, cos);
    widen(p.sin, sin);
    if (p.sign == 1.f) return;
    for (int64_t i = 0; i < p.half; ++i) sin[i] = p.sign * sin[i];
  }
}

template <class T, bool Interleaved, bool Past>
void tiles(const RotaryEmbeddingParams& p, int64_t per_sequence, int64_t begin, int64_t end) {
  const int64_t width = (Interleaved ? 2 : 1) * p.half, room = width + 2 * W;
  float* cos = static_cast<float*>(thread_scratch(
      Scratch::tile, sizeof(float) * static_cast<size_t>((2 * kPositions + 1) * room)));
  float *sin = cos + kPositions * room, *spare = sin + kPositions * room;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t batch = tile / per_sequence, first = tile % per_sequence * kPositions;
    const int64_t left = p.length - first, count = left < kPositions ? left : kPositions;
    for (int64_t i = 0; i < count; ++i) {
      widen_angles<T, Interleaved>(p, batch, first + i, spare, cos + i * room, sin + i * room);
    }
    const auto rotate = [&](const RotaryTensor& t) {
      for (int64_t head = 0; head < t.heads; ++head) {
        const T* x = static_cast<const T*>(t.input) + batch * t.batch_stride +
                     head * t.head_stride + first * t.position_stride;
        T* out =
            static_cast<T*>(t.output) + ((batch * t.heads + head) * p.length + first) * 2 * p.half;
        for (int64_t i = 0; i < count; ++i) {
          if constexpr (Interleaved) {
            rotate_pairs<Past>(x, cos + i * room, sin + i * room, p.half, out);
          } else {
            rotate_halves<Past>(x, cos + i * room, sin + i * room, p.half, out);
          }
          x += t.position_stride;
          out += 2 * p.half;
        }
      }
    };
    rotate(p.query);
    rotate(p.key);
  }
  if (Past) end_past();
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingParams& p) {
  const int64_t row = 2 * p.half * (p.query.heads + p.key.heads);
  if (p.batch == 0 || p.length == 0 || row == 0) return;
  const int64_t per_sequence = (p.length + kPositions - 1) / kPositions;
  const int64_t elements = row * (p.length < kPositions ? p.length : kPositions);
  with_type(p.dtype, [&]<class T>() {
    const int64_t rows = p.batch * p.length * (p.query.heads + p.key.heads);
    const auto goes = [&](const RotaryTensor& t) {  // by halves of a row, which are walked apart
      return t.heads == 0 || goes_past(static_cast<T*>(t.output), 2 * rows, p.half, 2);
    };
    const bool past = goes(p.query) && goes(p.key);
    parallel_for(p.batch * per_sequence, kGrain / elements + 1, [&](int64_t begin, int64_t end) {
      with_flags(p.interleaved, past, [&]<bool Interleaved, bool Past>() {
        tiles<T, Interleaved, Past>(p, per_sequence, begin, end);
      });
    });
  });
}

}  // namespace ft::FT_ISA
