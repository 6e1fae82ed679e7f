// What attention's forward and backward do between a product q·k and its weight, in this order:
//   s = scale · q·k;  softcap · tanh(s / softcap);  − slope · |j − i'|;  + bias;  −inf where masked
// (i' = i + shift, fasttransformer/reference/attention.py has the meaning of every option), and
// which tiles need any of it. The causal rule is a window with nothing to its right, and a window,
// key_lengths and the end of the keys are one thing: the keys [low, high) that a query may see. A
// tile of queries' keys thus fall into three runs: [begin, whole_begin) and [whole_end, end) are
// cut by an edge, [whole_begin, whole_end) is seen by every query as it is.
// Scores pass over a thread's accumulators one option at a time: an option costs one uniform branch
// per tile where it is off.
#pragma once
#include "cuda/device/dropout.h"
#include "cuda/device/scalar.h"
#include "cuda/device/vector.h"
#include "params/attention.h"

namespace ft::cuda {

// ---- what a batch entry is ----------------------------------------------------------------------

// Of batch entry b. Lengths and positions are ints: the launcher refuses what passes 2^30.
struct Sequence {
  int queries, keys;           // keys: those before key_lengths
  int shift;                   // query i stands at key i + shift
  int left, right;             // sees [i + shift − left, i + shift + right]
  int query_start, key_start;  // its first row where sequences are packed, else 0
};

FT_DEVICE Sequence sequence_of(const AttentionCase& p, int64_t b) {
  Sequence s = {static_cast<int>(p.q_len), static_cast<int>(p.kv_len), 0, 0, 0, 0, 0};
  if (p.cu_seqlens_q != nullptr) {
    s.query_start = load_scalar(p.cu_seqlens_q + b);
    s.queries = load_scalar(p.cu_seqlens_q + b + 1) - s.query_start;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.key_start = load_scalar(p.cu_seqlens_k + b);
    s.keys = load_scalar(p.cu_seqlens_k + b + 1) - s.key_start;
  }
  if (p.bottom_right) s.shift = s.keys - s.queries;
  const int64_t far = p.q_len + p.kv_len + 1;  // as good as unbounded, and no sum overflows
  s.left = static_cast<int>(p.window_left < 0 || p.window_left > far ? far : p.window_left);
  s.right = static_cast<int>(p.window_right < 0 || p.window_right > far ? far : p.window_right);
  if (p.is_causal) s.right = 0;
  if (p.key_lengths != nullptr) {
    const int length = load_scalar(p.key_lengths + b);
    if (p.query_at_end) s.shift = length - s.queries;
    s.keys = length < 0 ? 0 : length < s.keys ? length : s.keys;
  }
  return s;
}

// Where row 0 of (b, h)'s head, and query 0 of the sequence, stand among what there is one of per
// query …
FT_DEVICE int64_t first_row_of(const AttentionCase& p, int64_t b, int64_t h) {
  return ((p.cu_seqlens_q != nullptr ? 0 : b) * p.heads + h) * p.head_rows;
}
FT_DEVICE int64_t first_row_of(const AttentionCase& p, const Sequence& s, int64_t b, int64_t h) {
  return first_row_of(p, b, h) + s.query_start;
}
// … and, of all heads, among the tokens of a tensor that has a token's heads beside each other; and
// key 0.
FT_DEVICE int64_t first_query_of(const AttentionCase& p, const Sequence& s, int64_t b) {
  return p.cu_seqlens_q != nullptr ? s.query_start : b * p.q_len;
}
FT_DEVICE int64_t first_key_of(const AttentionCase& p, const Sequence& s, int64_t b) {
  return p.cu_seqlens_k != nullptr ? s.key_start : b * p.kv_len;
}

// ---- which tiles are seen -----------------------------------------------------------------------

struct Runs {
  int begin, whole_begin, whole_end, end;  // all but `end` are multiples of the tile
};

FT_DEVICE int at_least(int x, int low) { return x < low ? low : x; }
FT_DEVICE int at_most(int x, int high) { return x > high ? high : x; }

FT_DEVICE Runs make_runs(int begin, int whole_begin, int whole_end, int end, int tile) {
  Runs r;
  r.begin = begin / tile * tile;
  r.end = at_least(end, r.begin);
  r.whole_begin = at_least((whole_begin + tile - 1) / tile * tile, r.begin);
  r.whole_end = at_least(whole_end, 0) / tile * tile;
  if (r.whole_begin >= r.whole_end) r.whole_begin = r.whole_end = r.begin;
  return r;
}

// The keys that queries first … last see, by tiles of `tile` keys.
FT_DEVICE Runs key_runs(const Sequence& s, int first, int last, int tile) {
  const int from = first + s.shift, to = last + s.shift;
  return make_runs(at_most(at_least(from - s.left, 0), s.keys), at_least(to - s.left, 0),
                   at_most(from + s.right + 1, s.keys), at_most(to + s.right + 1, s.keys), tile);
}

// The queries that see keys first … last, by tiles of `tile` queries; those of whole tiles see all
// of them. Keys at or behind the end are seen by none.
FT_DEVICE Runs query_runs(const Sequence& s, int first, int last, int tile) {
  if (first >= s.keys) return {0, 0, 0, 0};
  const int from = first - s.shift, to = last - s.shift;
  const int whole_end = last < s.keys ? at_most(from + s.left + 1, s.queries) : 0;
  return make_runs(at_most(at_least(from - s.right, 0), s.queries), at_least(to - s.right, 0),
                   whole_end, at_most(to + s.left + 1, s.queries), tile);
}

// ---- units of scores ----------------------------------------------------------------------------

// Where nothing but masks is done to q·k, a tile keeps q·k itself and the scale is part of the
// exponential's factor. A scale ≤ 0 would turn the maximum and −inf round, so it is applied first.
struct Units {
  bool raw;
  float lse_scale;  // what a tile's numbers are multiplied by to be scores
  float exponent;   // … and to be powers of 2
};

inline Units units_of(const AttentionCase& p) {
  Units u;
  u.raw = p.scale > 0.f && p.softcap == 0.f && p.bias.data == nullptr && p.alibi_slopes == nullptr;
  u.lse_scale = u.raw ? p.scale : 1.f;
  u.exponent = u.lse_scale * kLog2E;
  return u;
}

// lse is rounded to float, and with it every weight of a row by the same factor. Where |lse| is
// beyond this (a bias of finfo.min all along), backward finds the row's maximum and sum again.
constexpr float kCoarseLse = 64.f;

// ---- rows ---------------------------------------------------------------------------------------

// One query: the keys [low, high) that position and lengths leave it, and where it reads.
struct ScoreRow {
  int low, high;
  int position;         // i'
  float slope;          // of ALiBi
  const uint8_t* mask;  // at key 0; null: none
  const char* bias;
};

// Query i of head h of batch entry b. A row that is not there (`exists` false) sees nothing.
FT_DEVICE ScoreRow score_row(const AttentionCase& p, const Sequence& s, int64_t b, int64_t h, int i,
                             bool exists) {
  ScoreRow r = {0, 0, i + s.shift, 0.f, nullptr, nullptr};
  if (!exists) return r;
  r.low = at_least(r.position - s.left, 0);
  r.high = at_most(r.position + s.right + 1, s.keys);
  if (p.alibi_slopes != nullptr) r.slope = load_scalar(p.alibi_slopes + b * p.heads + h);
  if (p.mask.data != nullptr) {
    r.mask = static_cast<const uint8_t*>(p.mask.data) + b * p.mask.batch + h * p.mask.head +
             i * p.mask.row;
  }
  if (p.bias.data != nullptr) {
    r.bias = static_cast<const char*>(p.bias.data) +
             (b * p.bias.batch + h * p.bias.head + i * p.bias.row) *
                 (p.bias_dtype == DType::f32 ? 4 : 2);
  }
  return r;
}

// ---- scores -------------------------------------------------------------------------------------
// The functions below work on s[n][c] in a thread's registers, in place; row_of(n, c) gives the
// ScoreRow and key_of(n, c) the key of an element. Either dimension of a tile may be the keys.

// Scale and softcap. Not to be called where units are raw.
template <class T, int kTiles>
FT_DEVICE void scale_scores(const AttentionCase& p, float (&s)[kTiles][4]) {
  const bool capped = p.softcap != 0.f;
  const float inner = capped ? p.scale / p.softcap : p.scale;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[n][c] *= inner;
  }
  if (!capped) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[n][c] = hyperbolic_tangent<T>(s[n][c]) * p.softcap;
  }
}

// d softcap·tanh(x / softcap) / dx at a score as scale_scores leaves it (before ALiBi and bias).
FT_DEVICE float softcap_derivative(const AttentionCase& p, float capped) {
  const float t = capped / p.softcap;
  return 1.f - t * t;
}

template <class T>
FT_DEVICE float load_bias(const AttentionCase& p, const ScoreRow& r, int key) {
  const int64_t at = key * p.bias.column;
  if (p.bias_dtype == DType::f32) return load_scalar(reinterpret_cast<const float*>(r.bias) + at);
  return widen(load_scalar(reinterpret_cast<const T*>(r.bias) + at));
}

// ALiBi, bias, and −inf where a row does not see a key, whatever the product was. `edges`: the tile
// is cut by a row's low or high; else only masks and biases are looked at. see(n, c, allowed) is
// told of each element if there is a mask or a bias, or with `edges`.
template <class T, int kTiles, class RowOf, class KeyOf, class See>
FT_DEVICE void mask_scores(const AttentionCase& p, bool edges, const RowOf& row_of,
                           const KeyOf& key_of, float (&s)[kTiles][4], const See& see) {
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const ScoreRow& r = row_of(n, c);
        const float away = static_cast<float>(key_of(n, c) - r.position);
        s[n][c] -= r.slope * (away < 0.f ? -away : away);
      }
    }
  }
  if (p.mask.data == nullptr && p.bias.data == nullptr && !edges) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const ScoreRow& r = row_of(n, c);
      const int key = key_of(n, c);
      bool allowed = key >= r.low && key < r.high;
      if (allowed && p.mask.data != nullptr) {
        allowed = load_scalar(r.mask + key * p.mask.column) != 0;
      }
      if (allowed && p.bias.data != nullptr) {
        const float bias = load_bias<T>(p, r, key);
        allowed = bias != -infinity();
        s[n][c] += bias;
      }
      if (!allowed) s[n][c] = -infinity();
      see(n, c, allowed);
    }
  }
}

// ---- dropout ------------------------------------------------------------------------------------

// The position of query i's key 0; key j is j further. Packed sequences are numbered as padded.
FT_DEVICE int64_t dropout_position(const AttentionCase& p, int64_t b, int64_t h, int64_t i) {
  return ((b * p.heads + h) * p.q_len + i) * p.kv_len;
}

}  // namespace ft::cuda
