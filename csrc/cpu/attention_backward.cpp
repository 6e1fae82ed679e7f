// Attention backward. With P = exp(s − lse), recomputed from the saved lse, and
// delta = Σ_e dO·O − d_lse:   dV = PᵀdO,   dS = P ∘ (dO·Vᵀ − delta),   dK = scale·dSᵀQ,
// dQ = scale·dS·K,   d_bias = dS.
// A work item owns a range of key tiles of one (batch, key head): it sums dK and dV of a tile over
// all queries in cache, and dQ in float over its tiles, so nothing is shared and no order of sums
// depends on the schedule. Where items would be too few, the keys are split into parts, each with a
// dQ of its own, added up in order at the end. An item takes all batches or heads over which a bias
// that wants a gradient broadcasts. Bound by the multiply-add units: five products per tile.
// Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 3.2.
#include "cpu/attention_backward_rows.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "params/attention.h"

namespace ft::FT_ISA {
namespace {

template <class Unit>
constexpr int kBandStrips = Unit::rows > MR ? 2
                            : MR > 8        ? 4
                                            : 8;
template <class Unit>
constexpr int kBandRows = kBandStrips<Unit> * Unit::rows;

// c[n × columns] += scores[n × depth] · panel, and with the scores read transposed.
inline __attribute__((noinline)) void add_product(int n, int vectors, int64_t depth,
                                                  const float* scores, const float* panel, float* c,
                                                  int64_t c_stride) {
  product<Float>(n, vectors, depth, Rows<kKeys>{scores}, panel, c, c_stride, AddTo{});
}
inline __attribute__((noinline)) void add_product_transposed(int n, int vectors, int64_t depth,
                                                             const float* scores,
                                                             const float* panel, float* c,
                                                             int64_t c_stride) {
  product<Float>(n, vectors, depth, Columns<kKeys>{scores}, panel, c, c_stride, AddTo{});
}

// `turned` holds P or dS with its rows across, `piece` a part of dQ: both for products by tiles.
struct Workspace {
  int64_t dim, value_dim;  // rounded up to whole vectors
  float *keys, *keys_down, *values, *query_strips, *grad_strips, *query_down, *grad_down, *weights,
      *d_scores, *turned, *piece, *d_key, *d_value, *derivative;
  Row* rows;
  uint32_t* words;

  template <class Unit>
  static Workspace of(const AttentionBackwardParams& p) {
    constexpr int64_t band = kBandRows<Unit>, strip = int64_t{kBandStrips<Unit>} * kStripRows<Unit>;
    constexpr bool tiles = Unit::step > 1;
    Workspace w;
    w.dim = round_up(p.head_dim, W);
    w.value_dim = round_up(p.value_dim, W);
    const int64_t units = units_of<Unit>(p.head_dim), value_units = units_of<Unit>(p.value_dim);
    int64_t sizes[] = {kKeys * units,
                       kKeys * round_up(p.head_dim, NR),
                       kKeys * value_units,
                       strip * units,
                       strip * value_units,
                       band * round_up(p.head_dim, NR),
                       band * round_up(p.value_dim, NR),
                       band * kKeys,
                       band * kKeys,
                       tiles ? kKeys * band / Unit::elements : 0,
                       tiles ? Unit::rows * NR : 0,
                       kKeys * w.dim,
                       kKeys * w.value_dim,
                       kKeys,
                       band * static_cast<int64_t>(sizeof(Row) / sizeof(float)),
                       random_words_room(kKeys)};
    float** places[] = {&w.keys,       &w.keys_down, &w.values,  &w.query_strips, &w.grad_strips,
                        &w.query_down, &w.grad_down, &w.weights, &w.d_scores,     &w.turned,
                        &w.piece,      &w.d_key,     &w.d_value, &w.derivative};
    constexpr int count = sizeof(places) / sizeof(places[0]);
    int64_t all = 0;
    for (int64_t& size : sizes) all += size = round_up(size, 16);
    float* next = static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * all));
    for (int i = 0; i < count; ++i) {
      *places[i] = next;
      next += sizes[i];
    }
    w.rows = reinterpret_cast<Row*>(next);
    w.words = reinterpret_cast<uint32_t*>(next + sizes[count]);
    return w;
  }
};

inline void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.f;
}

// Of one (batch, key head, part): where its sums over tiles go.
struct Sums {
  float* d_query;  // (heads of the group, head_rows, columns)
  int64_t head_rows, columns;
  float* d_bias;  // of this part; null: not wanted
  int64_t bias_strides[4];
};

// P and dS of one row of a tile, in place of the scores and of dO·Vᵀ.
template <bool plain>
FT_INLINE void gradients_row(const AttentionBackwardParams& p, const Units& u, float top,
                             float shift, float delta, int64_t begin, int64_t end,
                             const uint32_t* words, float* s, float* dp) {
  for (int64_t k = begin; k < end; k += W) {
    const vf x = load(s + k);
    const vf below = fma(x, splat(u.lse_scale), splat(-top));
    const vf weight = exp2(fma(below, splat(kLog2E), splat(shift)));
    vf grad = load(dp + k);
    vf kept = weight;
    if (words) {
      kept = dropped(weight, words + k, p.dropout.threshold, p.dropout.scale);
      grad = dropped(grad, words + k, p.dropout.threshold, p.dropout.scale);
    }
    vf ds = weight * (grad - splat(delta));
    if constexpr (!plain) {
      const vi masked = x == splat(-__builtin_inff());
      kept = select(masked, zero(), kept);
      ds = select(masked, zero(), ds);
    }
    store(s + k, kept);
    store(dp + k, ds);
  }
}

// The same for a row that sees keys of this tile alone: softmax anew and delta = Σ P ∘ dO·Vᵀ −
// d_lse, which is free of the rounding of lse and of `out`.
FT_INLINE void whole_row(const Units& u, float grad_lse, int64_t begin, int64_t end, float* s,
                         float* dp) {
  vf most = splat(-__builtin_inff());
  for (int64_t k = begin; k < end; k += W) most = max(load(s + k), most);
  const float top = reduce_max(most);
  const vf shift = splat(top == -__builtin_inff() ? 0.f : top);
  vf sum = zero();
  for (int64_t k = begin; k < end; k += W) {
    const vf e = exp2((load(s + k) - shift) * splat(u.exponent));
    sum += e;
    store(s + k, e);
  }
  const float total = reduce_add(sum);
  // Nothing but masked keys: weights 0.
  const vf factor = splat(top == -__builtin_inff() && total == 0.f ? 0.f : 1.f / total);
  vf product = zero();
  for (int64_t k = begin; k < end; k += W) {
    const vf weight = load(s + k) * factor;
    product += select(weight == zero(), zero(), weight * load(dp + k));
    store(s + k, weight);
  }
  const vf mean = splat(reduce_add(product)), rest = splat(grad_lse);
  for (int64_t k = begin; k < end; k += W) {
    const vf weight = load(s + k);
    store(dp + k, select(weight == zero(), zero(), weight * ((load(dp + k) - mean) + rest)));
  }
}

inline void add_bias_row(const Sums& sums, int64_t b, const Row& row, int64_t j, int64_t begin,
                         int64_t end, const float* ds) {
  float* to = sums.d_bias + b * sums.bias_strides[0] + row.head * sums.bias_strides[1] +
              row.index * sums.bias_strides[2];
  if (sums.bias_strides[3] == 0) {
    vf sum = zero();
    int64_t k = begin;
    for (; k + W <= end; k += W) sum += load(ds + k);
    if (k < end) sum += load(ds + k, static_cast<int>(end - k));
    *to += reduce_add(sum);
    return;
  }
  to += j;
  int64_t k = begin;
  for (; k + W <= end; k += W) store(to + k, load(to + k) + load(ds + k));
  for (; k < end; ++k) to[k] += ds[k];
}

// The last three products of a band, from P in w.weights and dS in w.d_scores, of which keys
// [from, to) are set: dV += PᵀdO, dK += dSᵀQ, dQ += dS·K.
template <class Unit>
void add_by_vectors(const Workspace& w, const Strips<Unit>& strips, const Seen* seen, int64_t from,
                    int64_t to, float* d_query, int64_t columns) {
  const Strips<Float> down(to - from);
  const int64_t count = strips.rows;
  for (int64_t e = 0; e < w.value_dim; e += NR) {
    const int vectors = w.value_dim - e > W ? NV : 1;
    for (int64_t s = 0; s < down.count; ++s) {
      const int64_t k = from + down.begin(s);
      add_product_transposed(down.height(s), vectors, count, w.weights + k,
                             w.grad_down + e * kBandRows<Unit>, w.d_value + k * w.value_dim + e,
                             w.value_dim);
    }
  }
  for (int64_t e = 0; e < w.dim; e += NR) {
    const int vectors = w.dim - e > W ? NV : 1;
    for (int64_t s = 0; s < down.count; ++s) {
      const int64_t k = from + down.begin(s);
      add_product_transposed(down.height(s), vectors, count, w.d_scores + k,
                             w.query_down + e * kBandRows<Unit>, w.d_key + k * w.dim + e, w.dim);
    }
    for (int64_t s = 0; s < strips.count; ++s) {
      if (seen[s].end == 0) continue;
      const int64_t i = strips.begin(s), k = seen[s].begin;
      add_product(strips.height(s), vectors, seen[s].end - k, w.d_scores + i * kKeys + k,
                  w.keys_down + e * kKeys + k * NR, d_query + i * columns + e, columns);
    }
  }
}

#if defined(__AMX_BF16__)
// The same with P and dS rounded to bf16, as torch does. [from, to) is whole steps of pairs.
template <class T>
void add_by_tiles(const Workspace& w, const Strips<BfTile>& strips, const Seen* seen, int64_t from,
                  int64_t to, float* d_query, int64_t columns) {
  constexpr int64_t room = kBandRows<BfTile> / BfTile::elements;
  const int64_t count = strips.rows, units = units_of<BfTile>(count);
  // c[keys × columns] += (rows of `scores`)ᵀ · panels
  const auto add_down = [&](const float* scores, const float* panels, float* c, int64_t c_columns) {
    turn_to_pairs(scores + from, kKeys, count, to - from, w.turned, room);
    for (int64_t e = 0; e < c_columns; e += NR) {
      for (int64_t k = from; k < to; k += BfTile::rows) {
        const Rows<room> rows = {w.turned + (k - from) * room};
        multiply_some<true>(BfTile::rows, c_columns - e, units, rows, panels + e * room,
                            c + k * c_columns + e, c_columns);
      }
    }
  };
  add_down(w.weights, w.grad_down, w.d_value, w.value_dim);
  add_down(w.d_scores, w.query_down, w.d_key, w.dim);
  for (int64_t s = 0; s < strips.count; ++s) {
    if (seen[s].end == 0) continue;
    const int64_t i = strips.begin(s), k = seen[s].begin, end = round_up(seen[s].end, NR);
    const int n = strips.height(s);
    for (int64_t r = i; r < i + n; ++r) {
      float* row = w.d_scores + r * kKeys;
      for (int64_t at = k; at < end; at += W) store(reinterpret_cast<T*>(row) + at, load(row + at));
    }
    const Rows<kKeys> rows = {w.d_scores + i * kKeys + k / 2};
    for (int64_t e = 0; e < w.dim; e += NR) {
      const float* panel = w.keys_down + e * (kKeys / 2) + k / 2 * NR;
      float* c = d_query + i * columns + e;
      if (n % kTileRows == 0) {
        multiply_some<true>(n, w.dim - e, (end - k) / 2, rows, panel, c, columns);
        continue;
      }
      // Rows behind the last are others' own.
      multiply_some<false>(n, w.dim - e, (end - k) / 2, rows, panel, w.piece, NR);
      const int64_t width = min64(NR, w.dim - e);
      for (int r = 0; r < n; ++r) {
        for (int64_t v = 0; v < width; v += W) {
          float* at = c + r * columns + v;
          store(at, load(at) + load(w.piece + r * NR + v));
        }
      }
    }
  }
}
#endif

// One band of rows of one head against the tile of keys at j, of which `n` are packed.
template <class Unit, class T>
void band(const AttentionBackwardParams& p, const Units& u, Workspace& w, const Sums& sums,
          const Sequence& seq, int64_t b, int64_t h, int64_t at_head, int64_t row0, int64_t count,
          int64_t j, int64_t n) {
  for (int64_t i = 0; i < count; ++i) w.rows[i] = make_row(p, seq, b, h, row0 + i);
  const Strips<Unit> strips(count);
  Seen seen[kBandStrips<Unit>];
  int64_t from = n, to = 0;
  for (int64_t s = 0; s < strips.count; ++s) {
    seen[s] = seen_by(p, u, w.rows + strips.begin(s), strips.height(s), j, n);
    if (seen[s].end == 0) continue;
    from = min64(from, seen[s].begin);
    to = max64(to, seen[s].end);
  }
  if (to == 0) return;
  using Down =
      std::conditional_t<(Unit::step > 1), Unit, Float>;  // of sums over rows, or over keys
  const int64_t dim = p.head_dim, value_dim = p.value_dim,
                whole = round_up(to, Unit::step > 1 ? NR : W);
  const int64_t units = units_of<Unit>(dim), value_units = units_of<Unit>(value_dim);
  for (int64_t s = 0; s < strips.count; ++s) {
    const Row* rows = w.rows + strips.begin(s);
    pack_strip<Unit, T>(p.query, b, rows, strips.height(s), dim,
                        w.query_strips + s * kStripRows<Unit> * units);
    pack_strip<Unit, T>(p.grad_out, b, rows, strips.height(s), value_dim,
                        w.grad_strips + s * kStripRows<Unit> * value_units);
  }
  const int64_t room = kBandRows<Unit> / Down::elements;
  const T* query = at<T>(p.query, b, h, seq.query_start + row0);
  for (int64_t e = 0; e < dim; e += NR) {
    pack_panel<Down>(query + e, p.query.row, dim - e, count, w.query_down + e * room);
  }
  const T* grad = at<T>(p.grad_out, b, h, seq.query_start + row0);
  for (int64_t e = 0; e < value_dim; e += NR) {
    pack_panel<Down>(grad + e, p.grad_out.row, value_dim - e, count, w.grad_down + e * room);
  }
  for (int64_t k = from; k < to; k += NR) {
    for (int64_t s = 0; s < strips.count; ++s) {
      if (k < seen[s].begin || k >= seen[s].end) continue;
      const int64_t place = strips.begin(s) * kKeys + k;
      scores_product<Unit>(strips.height(s), units, w.query_strips + s * kStripRows<Unit> * units,
                           w.keys + k * units, w.weights + place);
      scores_product<Unit>(strips.height(s), value_units,
                           w.grad_strips + s * kStripRows<Unit> * value_units,
                           w.values + k * value_units, w.d_scores + place);
    }
  }
  const int64_t lse_at = first_row_of(p, seq, b, h) + row0;
  const int64_t first_position = ((b * p.heads + h) * p.q_len + row0) * p.kv_len;
  // A bias that all rows share: a band's rows are summed before they go to the long sum.
  const bool rows_share_bias =
      sums.d_bias && p.softcap == 0.f && sums.bias_strides[2] == 0 && sums.bias_strides[3] != 0;
  for (int64_t s = 0; s < strips.count; ++s) {
    const int64_t begin = seen[s].begin, end = round_up(seen[s].end, W);
    for (int64_t i = strips.begin(s); i < strips.begin(s + 1); ++i) {
      float *weights = w.weights + i * kKeys, *ds = w.d_scores + i * kKeys;
      Row& row = w.rows[i];
      if (seen[s].end == 0) {
        clear(weights + from, whole - from);
        clear(ds + from, whole - from);
        continue;
      }
      if (p.softcap != 0.f) {
        for (int64_t k = begin; k < end; k += W) {
          const vf t = tanh(load(weights + k) * splat(p.scale / p.softcap));
          store(w.derivative + k, splat(1.f) - t * t);
        }
      }
      if (!seen[s].plain) finish_scores<T>(p, u, row, j, begin, end, n, weights);
      const uint32_t* words = nullptr;
      if (p.dropout.on()) {
        const int64_t position = first_position + i * p.kv_len + j + begin;
        words =
            random_words(p.dropout.seed, static_cast<uint64_t>(position), end - begin, w.words) -
            begin;
      }
      const float delta = p.delta[lse_at + i], top = p.top[lse_at + i], shift = p.shift[lse_at + i];
      const bool whole_row_here = row.first >= j && row.last <= j + n;
      if (whole_row_here && !p.sinks && !words) {
        whole_row(u, p.grad_lse ? p.grad_lse[lse_at + i] : 0.f, begin, end, weights, ds);
      } else if (seen[s].plain) {
        gradients_row<true>(p, u, top, shift, delta, begin, end, words, weights, ds);
      } else {
        gradients_row<false>(p, u, top, shift, delta, begin, end, words, weights, ds);
      }
      if (sums.d_bias && !rows_share_bias)
        add_bias_row(sums, b, row, j, begin, min64(seen[s].end, n), ds);
      if (p.softcap != 0.f) {
        for (int64_t k = begin; k < end; k += W)
          store(ds + k, load(ds + k) * load(w.derivative + k));
      }
      clear(weights + from, begin - from);
      clear(ds + from, begin - from);
      clear(weights + end, whole - end);
      clear(ds + end, whole - end);
    }
  }
  if (rows_share_bias) {
    float* out = sums.d_bias + b * sums.bias_strides[0] + h * sums.bias_strides[1] + j;
    for (int64_t k = from; k < to; k += W) {
      vf sum[4] = {};
      for (int64_t i = 0; i < count; ++i) sum[i % 4] += load(w.d_scores + i * kKeys + k);
      const int have = static_cast<int>(min64(W, min64(to, n) - k));
      store(out + k, load(out + k, have) + ((sum[0] + sum[1]) + (sum[2] + sum[3])), have);
    }
  }
  float* d_query = sums.d_query + (at_head * sums.head_rows + row0) * sums.columns;
  if constexpr (Unit::step > 1) {
    add_by_tiles<T>(w, strips, seen, from, whole, d_query, sums.columns);
  } else {
    add_by_vectors(w, strips, seen, from, to, d_query, sums.columns);
  }
}

template <class T>
inline void write_row(T* to, const float* from, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i) * splat(factor));
  if (i < n) {
    const int have = static_cast<int>(n - i);
    store(to + i, load(from + i, have) * splat(factor), have);
  }
}

// The key tiles [tile, tile_end) of one (batch, key head).
template <class Unit, class T>
void item(const AttentionBackwardParams& p, const Units& u, Workspace& w, const Sums& sums,
          const Sequence& seq, int64_t b, int64_t g, int64_t tile, int64_t tile_end) {
  const int64_t group = p.group();
  // Keys that no row may see are not read: they may be anything.
  const int64_t first = make_row(p, seq, b, 0, 0).first;
  int64_t last = 0;
  for (int64_t i = seq.queries - 1; i >= 0 && last == 0; --i) {
    last = make_row(p, seq, b, 0, i).last;
  }
  for (; tile < tile_end && tile * kKeys < seq.keys; ++tile) {
    const int64_t j = tile * kKeys, tile_rows = min64(kKeys, seq.keys - j);
    const int64_t n = min64(tile_rows, last - j);
    clear(w.d_key, kKeys * w.dim);
    clear(w.d_value, kKeys * w.value_dim);
    if (n > 0 && first < j + n) {
      const T* key = at<T>(p.key, b, g, seq.key_start + j);
      pack_keys<Unit>(key, p.key.row, n, p.head_dim, w.keys);
      pack_values<std::conditional_t<(Unit::step > 1), Unit, Float>>(key, p.key.row, n, p.head_dim,
                                                                     w.keys_down);
      pack_keys<Unit>(at<T>(p.value, b, g, seq.key_start + j), p.value.row, n, p.value_dim,
                      w.values);
      for (int64_t h = 0; h < group; ++h) {
        for (int64_t i = 0; i < seq.queries; i += kBandRows<Unit>) {
          const int64_t count = min64(kBandRows<Unit>, seq.queries - i);
          band<Unit, T>(p, u, w, sums, seq, b, g * group + h, h, i, count, j, n);
        }
      }
    }
    for (int64_t k = 0; k < tile_rows; ++k) {
      const int64_t row = (first_key_of(p, seq, b) + j + k) * p.kv_heads + g;
      write_row(static_cast<T*>(p.d_key) + row * p.head_dim, w.d_key + k * w.dim, p.head_dim,
                p.scale);
      write_row(static_cast<T*>(p.d_value) + row * p.value_dim, w.d_value + k * w.value_dim,
                p.value_dim, 1.f);
    }
  }
}

int64_t bias_size(const AttentionBackwardParams& p) {
  const int64_t* n = p.d_bias_sizes;
  return n[0] * n[1] * n[2] * n[3];
}

template <class Unit, class T>
void run(const AttentionBackwardParams& p) {
  const Units u = units_of_case(p);
  prepare_rows<Unit, T>(p, u);
  if (p.d_sinks) sink_gradients(p);
  float* d_bias = p.partial_bias ? p.partial_bias : p.d_bias;
  const int64_t bias_part = p.partial_bias ? bias_size(p) : 0;
  const int64_t bias_total = p.partial_bias ? p.parts * bias_part : bias_size(p);
  if (p.d_bias) {
    parallel_for(bias_total, kGrain,
                 [&](int64_t begin, int64_t end) { clear(d_bias + begin, end - begin); });
  }
  const int64_t group = p.group(), columns = round_up(p.head_dim, 16);
  const bool all_batches = p.d_bias && p.d_bias_sizes[0] == 1;
  const bool all_heads = p.d_bias && p.d_bias_sizes[1] == 1;
  const int64_t batches = all_batches ? 1 : p.batch, heads = all_heads ? 1 : p.kv_heads;
  const int64_t tiles = (p.kv_len + kKeys - 1) / kKeys, items = batches * heads * p.parts;
  int64_t next = 0;
  const int64_t work = p.rows() * p.kv_len * (p.head_dim + p.value_dim);
  const int64_t threads = work < 400'000 ? 1 : min64(num_threads(), items);
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    Workspace w = Workspace::of<Unit>(p);
    [[maybe_unused]] const typename Unit::Registers registers;
    Sums sums;
    sums.columns = columns;
    int64_t stride = 1;
    for (int d = 3; d >= 0; --d) {
      sums.bias_strides[d] = p.d_bias_sizes[d] == 1 ? 0 : stride;
      stride *= p.d_bias_sizes[d];
    }
    for (;;) {
      const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= items) break;
      const int64_t part = index / (batches * heads), rest = index % (batches * heads);
      const int64_t from = tiles * part / p.parts, to = tiles * (part + 1) / p.parts;
      sums.d_bias = p.d_bias ? d_bias + part * bias_part : nullptr;
      const int64_t one_b = rest / heads, one_g = rest % heads;
      for (int64_t b = all_batches ? 0 : one_b; b < (all_batches ? p.batch : one_b + 1); ++b) {
        for (int64_t g = all_heads ? 0 : one_g; g < (all_heads ? p.kv_heads : one_g + 1); ++g) {
          const Sequence seq = sequence_of(p, b);
          sums.head_rows = p.parts > 1 ? p.q_len : seq.queries;
          const int64_t size = group * sums.head_rows * columns;
          if (p.parts > 1) {
            sums.d_query = p.partial + ((part * p.batch + b) * p.kv_heads + g) * size;
          } else {
            sums.d_query =
                static_cast<float*>(thread_scratch(Scratch::gradient, sizeof(float) * size));
          }
          clear(sums.d_query, size);
          item<Unit, T>(p, u, w, sums, seq, b, g, from, to);
          for (int64_t r = 0; p.parts == 1 && r < group * seq.queries; ++r) {
            const int64_t h = g * group + r / seq.queries, i = r % seq.queries;
            T* d_query = static_cast<T*>(p.d_query);
            write_row(d_query + ((first_query_of(p, seq, b) + i) * p.heads + h) * p.head_dim,
                      sums.d_query + r * columns, p.head_dim, p.scale);
          }
        }
      }
    }
  });
  if (p.parts > 1) {
    const int64_t rows = p.batch * p.heads * p.q_len;
    parallel_for(rows, kGrain / (columns * p.parts) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t i = r % p.q_len, h = r / p.q_len % p.heads, b = r / p.q_len / p.heads;
        const Sequence seq = sequence_of(p, b);
        if (i >= seq.queries) continue;
        float* sum = p.partial + r * columns;
        for (int64_t part = 1; part < p.parts; ++part) {
          const float* add = p.partial + (part * rows + r) * columns;
          for (int64_t e = 0; e < columns; e += W) store(sum + e, load(sum + e) + load(add + e));
        }
        const int64_t token = first_query_of(p, seq, b) + i;
        write_row(static_cast<T*>(p.d_query) + (token * p.heads + h) * p.head_dim, sum, p.head_dim,
                  p.scale);
      }
    });
  }
  if (p.partial_bias) {
    for (int64_t i = 0; i < bias_part; ++i) {
      float sum = 0.f;
      for (int64_t part = 0; part < p.parts; ++part) sum += p.partial_bias[part * bias_part + i];
      p.d_bias[i] = sum;
    }
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { with_unit<T>([&]<class Unit>() { run<Unit, T>(p); }); });
}

}  // namespace ft::FT_ISA
