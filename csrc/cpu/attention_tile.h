// What attention's forward and backward share: the products on a tile of scores that lies in cache,
// the rows of a block with what each may see, and the passes that turn products into scores.
#pragma once
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/columns.h"
#include "cpu/dot_product.h"
#include "cpu/philox.h"
#include "cpu/tile.h"
#include "params/attention.h"

namespace ft::FT_ISA {

constexpr int kKeys = 128;  // keys of a tile, a multiple of NR; also the row stride of a score tile
constexpr int kPanelRows = (MR + W - 1) / W * W;  // row stride of a packed strip of queries
static_assert(kKeys % NR == 0);

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- products ---------------------------------------------------------------------------------

// All is counted in units (tile.h): floats, or where bf16 is multiplied as it is, pairs along the
// summed dimension, by vectors or by whole tiles (amx.h).

// Rows of a packed strip. Vectors take it as [units][rows], tiles as [rows][units].
template <class Unit>
constexpr int kStripRows = Unit::step > 1 ? Unit::rows : kPanelRows;

// c[n × columns] = into(a · panel) for panels [units][NR], of which one or two vectors are used.
template <class Unit, class A, class Into>
FT_INLINE void product(int n, int vectors, int64_t units, const A& a, const float* panel, float* c,
                       int64_t c_stride, const Into& into) {
  if (vectors == NV) return micro_rows<Unit, NV>(n, units, a, panel, c, c_stride, into);
  micro_rows<Unit, 1>(n, units, a, panel, c, c_stride, into);
}

// Longer sums are cut, as the rounding errors of one long sum would outgrow those of torch's.
constexpr int64_t kDepthOfSum = 64;

// scores[n × NR] = strip · panel, over head_dim.
template <class Unit>
__attribute__((noinline)) void scores_product(int n, int64_t units, const float* strip,
                                              const float* panel, float* scores) {
  if constexpr (Unit::step > 1) {
    const InPlace rows = {reinterpret_cast<const char*>(strip), units * 4};
    return multiply_tiles<NV>(n, units, rows, panel, scores, kKeys, false);
  }
  for (int64_t k = 0; k == 0 || k < units; k += kDepthOfSum) {
    const int64_t part = units - k < kDepthOfSum ? units - k : kDepthOfSum;
    micro_rows<Unit, NV>(n, part, Columns<kPanelRows>{strip + k * kPanelRows}, panel + k * NR,
                         scores, kKeys, AddToIf{k > 0});
  }
}

// c[n × columns] = factor·c + weights[n × units] · panel.
template <class Unit>
__attribute__((noinline)) void weighted_sum(int n, int vectors, int64_t units, const float* weights,
                                            const float* panel, float* c, int64_t c_stride,
                                            const float* factor) {
  if constexpr (Unit::step > 1) {
    for (int i = 0; i < n; ++i) {
      if (factor[i] == 1.f) continue;
      float* row = c + i * c_stride;
      for (int v = 0; v < vectors; ++v) store(row + v * W, load(row + v * W) * splat(factor[i]));
    }
    return multiply_some<true>(n, vectors * W, units, Rows<kKeys>{weights}, panel, c, c_stride);
  }
  product<Unit>(n, vectors, units, Rows<kKeys>{weights}, panel, c, c_stride, AddToScaled{factor});
}

// Calls f.operator()<Unit>() with the unit that products of T are made in: by vectors …
template <class T, class F>
FT_INLINE void with_vectors(const F& f) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (bf16_dot_is_fast()) return f.template operator()<BfPair>();
  }
#endif
  f.template operator()<Float>();
}
// … and by whatever the CPU has.
template <class T, class F>
FT_INLINE void with_unit(const F& f) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_amx()) return f.template operator()<BfTile>();
  }
#endif
  with_vectors<T>(f);
}

// ---- a block of query rows --------------------------------------------------------------------

// One query: where it reads, and the keys [first, last) that the causal rule, the window and
// key_lengths leave it.
struct Row {
  int64_t head, index;  // index: its place in the sequence
  int64_t token;        // … and among the rows of the query: the same unless sequences are packed
  int64_t position;     // as the keys see it: index + the sequence's shift
  int64_t first, last;
  const bool* mask;
  const char* bias;
  float slope;  // of ALiBi
  bool any;     // some key takes part
};

// A score tile holds q·k itself where nothing but masks is done to it, which saves a pass; scale
// then is part of `exponent`. Else it holds scores: scale·q·k, softcap, ALiBi, bias. A scale ≤ 0
// would turn the maximum and −inf round, so it is never left to `exponent`.
struct Units {
  bool raw;
  float lse_scale;  // what a tile's numbers are multiplied by to be scores
  float exponent;   // … and to be powers of 2
};

inline Units units_of_case(const AttentionCase& p) {
  Units u;
  u.raw = p.scale > 0.f && p.softcap == 0.f && !p.bias.data && !p.alibi_slopes;
  u.lse_scale = u.raw ? p.scale : 1.f;
  u.exponent = u.lse_scale * kLog2E;
  return u;
}

FT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

FT_INLINE size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Of batch entry b.
struct Sequence {
  int64_t queries, keys;           // keys: those behind key_lengths too
  int64_t shift;                   // query i stands at key i + shift
  int64_t query_start, key_start;  // its first row where sequences are packed, else 0
};

inline Sequence sequence_of(const AttentionCase& p, int64_t b) {
  Sequence s = {p.q_len, p.kv_len, 0, 0, 0};
  if (p.cu_seqlens_q) {
    s.query_start = p.cu_seqlens_q[b];
    s.queries = p.cu_seqlens_q[b + 1] - s.query_start;
    s.key_start = p.cu_seqlens_k[b];
    s.keys = p.cu_seqlens_k[b + 1] - s.key_start;
  }
  if (p.bottom_right) s.shift = s.keys - s.queries;
  if (p.query_at_end) s.shift = p.key_lengths[b] - s.queries;
  return s;
}

// Where query 0 of (b, h) stands among what there is one of per query …
inline int64_t first_row_of(const AttentionCase& p, const Sequence& s, int64_t b, int64_t h) {
  return ((p.cu_seqlens_q ? 0 : b) * p.heads + h) * p.head_rows + s.query_start;
}
// … and, of all heads, among the tokens of a tensor that has a token's heads beside each other; and
// key 0.
inline int64_t first_query_of(const AttentionCase& p, const Sequence& s, int64_t b) {
  return p.cu_seqlens_q ? s.query_start : b * p.q_len;
}
inline int64_t first_key_of(const AttentionCase& p, const Sequence& s, int64_t b) {
  return p.cu_seqlens_k ? s.key_start : b * p.kv_len;
}

inline Row make_row(const AttentionCase& p, const Sequence& s, int64_t b, int64_t h, int64_t i) {
  Row r;
  r.head = h;
  r.index = i;
  r.token = s.query_start + i;
  r.position = i + s.shift;
  r.first = 0;
  r.last = s.keys;
  if (p.key_lengths) r.last = max64(0, min64(r.last, p.key_lengths[b]));
  if (p.is_causal) r.last = min64(r.last, r.position + 1);
  if (p.window_right >= 0) r.last = min64(r.last, r.position + p.window_right + 1);
  if (p.window_left >= 0) r.first = max64(0, r.position - p.window_left);
  if (r.last <= r.first) r.first = r.last = 0;
  r.mask = nullptr;
  if (p.mask.data) {
    r.mask =
        static_cast<const bool*>(p.mask.data) + b * p.mask.batch + h * p.mask.head + i * p.mask.row;
  }
  r.bias = nullptr;
  if (p.bias.data) {
    r.bias = static_cast<const char*>(p.bias.data) +
             (b * p.bias.batch + h * p.bias.head + i * p.bias.row) *
                 static_cast<int64_t>(size_of(p.bias_dtype));
  }
  r.slope = p.alibi_slopes ? p.alibi_slopes[b * p.heads + h] : 0.f;
  r.any = !r.mask && !r.bias && r.last > r.first;
  return r;
}

template <class T>
FT_INLINE const T* at(const HeadsView& v, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(v.data) + b * v.batch + h * v.head + row * v.row;
}

// The rows of a block cut into strips: of nearly equal height, none above a register tile's, or for
// tiles all but the last of whole ones.
template <class Unit>
struct Strips {
  int64_t rows, count;
  explicit Strips(int64_t n) : rows(n), count((n + Unit::rows - 1) / Unit::rows) {}
  int64_t begin(int64_t s) const {
    return Unit::step > 1 ? min64(s * Unit::rows, rows) : rows * s / count;
  }
  int height(int64_t s) const { return static_cast<int>(begin(s + 1) - begin(s)); }
};

// A strip of rows, zeros behind the last.
template <class Unit, class T>
inline void pack_strip(const HeadsView& view, int64_t b, const Row* rows, int n, int64_t dim,
                       float* out) {
  const int64_t units = units_of<Unit>(dim);
  for (int base = 0; base < kStripRows<Unit>; base += W) {
    const T* from[W];
    for (int i = 0; i < W; ++i) {
      from[i] = base + i < n ? at<T>(view, b, rows[base + i].head, rows[base + i].token) : nullptr;
    }
    for (int64_t unit = 0; unit < units; unit += W) {
      vi r[W];
      const int64_t k = unit * Unit::elements;
      for (int i = 0; i < W; ++i) r[i] = from[i] ? load_units<Unit>(from[i] + k, dim - k) : vi{};
      if constexpr (Unit::step > 1) {
        for (int i = 0; i < W; ++i) store_units(out + (base + i) * units + unit, r[i]);
      } else {
        transpose(r);
        const int64_t count = min64(units - unit, W);
        for (int i = 0; i < count; ++i) store_units(out + (unit + i) * kPanelRows + base, r[i]);
      }
    }
  }
}

// Keys [j, j + n) as panels [units][NR], for products over dim.
template <class Unit, class T>
inline void pack_keys(const T* key, int64_t stride, int64_t n, int64_t dim, float* out) {
  for (int64_t j = 0; j < n; j += NR, out += units_of<Unit>(dim) * NR) {
    pack_panel_transposed<Unit>(key + j * stride, stride, min64(NR, n - j), dim, out);
  }
}

// The same rows as panels [units of n][NR] of NR columns each, units of kKeys apart, for products
// over rows.
template <class Unit, class T>
inline void pack_values(const T* value, int64_t stride, int64_t n, int64_t dim, float* out) {
  for (int64_t e = 0; e < dim; e += NR, out += kKeys / Unit::elements * NR) {
    pack_panel<Unit>(value + e, stride, dim - e, n, out);
  }
}

// ---- from products to scores ------------------------------------------------------------------

// tanh: an odd polynomial on [−0.6, 0.6] (our own fit, relative error 1e-8), else by exp.
FT_INLINE vf tanh(vf x) {
  const vf z = x * x;
  vf p = splat(-0.006276389118f);
  p = fma(p, z, splat(0.021116215736f));
  p = fma(p, z, splat(-0.053875137120f));
  p = fma(p, z, splat(0.133329242468f));
  p = fma(p, z, splat(-0.333333313465f));
  const vf near = fma(p * z, x, x);
  const vf far = splat(1.f) - splat(2.f) / (exp(x + x) + splat(1.f));
  return select(z < splat(0.36f), near, far);
}

// Rows of mask and bias with a column stride other than 1 are first copied beside each other.
template <class T>
FT_INLINE const T* beside(const T* p, int64_t stride, int64_t j, int64_t n, T* copy) {
  if (stride == 1) return p + j;
  for (int64_t i = 0; i < n; ++i) copy[i] = p[(j + i) * stride];
  return copy;
}

// s[k] for keys j + k, k in [begin, end), begin a multiple of W: bias added, −inf where the row
// does not see the key. `n` keys of the tile exist. Whole vectors are written.
template <class B, bool has_bias, bool has_mask>
FT_INLINE void mask_row(const AttentionCase& p, Row& row, int64_t j, int64_t begin, int64_t end,
                        int64_t n, float* s) {
  alignas(64) B bias_copy[has_bias ? kKeys : 1];
  alignas(64) bool mask_copy[has_mask ? kKeys : 1];
  [[maybe_unused]] const B* bias = nullptr;
  [[maybe_unused]] const bool* mask = nullptr;
  if constexpr (has_bias) {
    bias = beside(reinterpret_cast<const B*>(row.bias), p.bias.column, j, n, bias_copy);
  }
  if constexpr (has_mask) mask = beside(row.mask, p.mask.column, j, n, mask_copy);
  const vi low = splat_int(static_cast<int32_t>(max64(row.first - j, 0)));
  const vi high = splat_int(static_cast<int32_t>(max64(min64(row.last - j, n), 0)));
  vi any = {};
  for (int64_t k = begin; k < end; k += W) {
    const vi at = lanes() + splat_int(static_cast<int32_t>(k));
    vi allowed = (at >= low) & (at < high);
    vf x = load(s + k);
    const int have = static_cast<int>(min64(W, n - k));
    if constexpr (has_mask) {
      allowed &= have == W ? load_flags(mask + k, Whole{}) : load_flags(mask + k, Part{have});
    }
    if constexpr (has_bias) {
      const vf add = have == W ? load(bias + k) : load(bias + k, have);
      allowed &= ~(add == splat(-__builtin_inff()));
      x += add;
    }
    store(s + k, select(allowed, x, splat(-__builtin_inff())));
    any |= allowed;
  }
  if (!row.any && reduce_max(select(any, splat(1.f), zero())) > 0.f) row.any = true;
}

// Scale, softcap, ALiBi, bias and masks on one row of a tile's products.
template <class T>
inline __attribute__((noinline)) void finish_scores(const AttentionCase& p, const Units& u,
                                                    Row& row, int64_t j, int64_t begin, int64_t end,
                                                    int64_t n, float* s) {
  if (p.softcap != 0.f) {
    const vf inner = splat(p.scale / p.softcap), outer = splat(p.softcap);
    for (int64_t k = begin; k < end; k += W) store(s + k, tanh(load(s + k) * inner) * outer);
  } else if (!u.raw) {
    for (int64_t k = begin; k < end; k += W) store(s + k, load(s + k) * splat(p.scale));
  }
  if (p.alibi_slopes) {
    for (int64_t k = begin; k < end; k += W) {
      const int64_t from = j + k - row.position;  // exact in float up to 2^24
      const vf away = splat(static_cast<float>(from)) + __builtin_convertvector(lanes(), vf);
      const vf distance = max(away, zero() - away);
      store(s + k, fma(distance, splat(-row.slope), load(s + k)));
    }
  }
  if (row.bias && row.mask) {
    if (p.bias_dtype == DType::f32) return mask_row<float, true, true>(p, row, j, begin, end, n, s);
    return mask_row<T, true, true>(p, row, j, begin, end, n, s);
  }
  if (row.bias) {
    if (p.bias_dtype == DType::f32)
      return mask_row<float, true, false>(p, row, j, begin, end, n, s);
    return mask_row<T, true, false>(p, row, j, begin, end, n, s);
  }
  if (row.mask) return mask_row<float, false, true>(p, row, j, begin, end, n, s);
  mask_row<float, false, false>(p, row, j, begin, end, n, s);
}

// The keys [begin, end) of the tile at j that some row of a strip sees, and whether every row sees
// all `n` of them as they are, so that the products are the scores.
struct Seen {
  int64_t begin, end;
  bool plain;
};

inline Seen seen_by(const AttentionCase& p, const Units& u, const Row* rows, int count, int64_t j,
                    int64_t n) {
  int64_t begin = n, end = 0, all_from = 0, all_to = n;
  for (int i = 0; i < count; ++i) {
    const int64_t from = max64(rows[i].first - j, 0), to = min64(rows[i].last - j, n);
    if (from < to) {
      begin = min64(begin, from);
      end = max64(end, to);
    }
    all_from = max64(all_from, from);
    all_to = min64(all_to, to);
  }
  if (begin >= end) return {0, 0, false};
  begin = begin / NR * NR;
  return {begin, end, u.raw && !p.mask.data && end % W == 0 && all_from <= begin && all_to >= end};
}

// ---- a row's running softmax and its end
// ---------------------------------------------------------

// Keys whose values are added up in registers before they go to a row's sum: twice as many are a
// percent faster and round worse than the number contract allows.
constexpr int64_t kChain = 32;

// The new maximum of a row into `top`; returns what it rose by, which earlier sums shrink by.
FT_INLINE float raise_top(const float* s, int64_t begin, int64_t end, float* top) {
  vf most = splat(-__builtin_inff());
  for (int64_t k = begin; k < end; k += W) most = max(load(s + k), most);
  const float before = *top;
  float now = reduce_max(most);
  now = now > before ? now : before;
  *top = now;
  return before == -__builtin_inff() ? before : before - now;
}

// exp(score − top) in place, as numbers of P from the row's beginning on, and their sum per lane
// added to `total`, which shrinks by `alpha`. To the last bits of a float whatever the inputs are:
// lse is a float.
template <class P>
FT_INLINE void weights_row(float* s, int64_t begin, int64_t end, float exponent, float top,
                           float alpha, float* total) {
  // Of a row that has seen −inf only, every exponential must come out 0.
  const vf shift = splat(top == -__builtin_inff() ? 0.f : top);
  vf sum = zero();
  for (int64_t k = begin; k < end; k += W) {
    const vf e = exp2((load(s + k) - shift) * splat(exponent));
    store(reinterpret_cast<P*>(s) + k, e);
    sum += e;
  }
  store(total, fma(load(total), splat(alpha), sum));
}

inline void drop_row(const AttentionParams& p, int64_t position, int64_t begin, int64_t end,
                     float* s) {
  uint32_t buffer[random_words_room(kKeys)];
  const uint32_t* words =
      random_words(p.dropout.seed, static_cast<uint64_t>(position), end - begin, buffer);
  for (int64_t k = begin; k < end; k += W) {
    store(s + k, dropped(load(s + k), words + (k - begin), p.dropout.threshold, p.dropout.scale));
  }
}

// Divides the rows' sums, per lane in `totals` and `columns` apart in `all_sums`, and writes them.
template <class T>
void write_rows(const AttentionParams& p, const Units& u, const Sequence& seq, int64_t b,
                const Row* rows, int64_t count, const float* tops, const float* totals,
                const float* all_sums, int64_t columns) {
  const int64_t dim = p.value_dim;
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = rows[i];
    const int64_t token = first_query_of(p, seq, b) + row.index;
    T* out = static_cast<T*>(p.out) + (token * p.heads + row.head) * dim;
    float top = tops[i], factor = 0.f;
    float* lse = p.lse + first_row_of(p, seq, b, row.head) + row.index;
    if (!row.any) {  // told by the masks, never by the sum
      for (int64_t e = 0; e < dim; ++e) out[e] = from_float<T>(0.f);
      *lse = p.sinks ? p.sinks[row.head] : -__builtin_inff();
      continue;
    }
    float total = reduce_add(load(totals + i * W));
    top *= u.lse_scale;
    if (p.sinks) {
      const float sink = p.sinks[row.head], most = sink > top ? sink : top;
      const vf e = exp(select(lanes() == splat_int(0), splat(top - most), splat(sink - most)));
      total = total * e[0] + e[1];
      factor = e[0] / total;
      top = most;
    } else {
      factor = 1.f / total;
    }
    *lse = top == __builtin_inff() ? top : top + __builtin_logf(total);
    const float* sums = all_sums + i * columns;
    int64_t e = 0;
    for (; e + W <= dim; e += W) store(out + e, load(sums + e) * splat(factor));
    if (e < dim) store(out + e, load(sums + e) * splat(factor), static_cast<int>(dim - e));
  }
}

// ---- few queries -------------------------------------------------------------------------------

// Up to so many rows that read one key head, packing keys costs more than it gives: attention()
// then leaves the call to attention_few().
constexpr int64_t kFewRows = 8;
void attention_few(const AttentionParams& p);

}  // namespace ft::FT_ISA
