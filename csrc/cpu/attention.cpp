// Attention forward: out = softmax(scale·QKᵀ + …)·V by tiles of keys with a running maximum, so
// that no more than a tile of scores ever exists. A work item is a block of query rows that read
// the same key head (several short heads of a group share one). Per tile of 128 keys, K and V are
// packed once (widened, K transposed); then, a band of a few strips of MR rows at a time, so that
// the band's scores stay in L1: scores = strip · Kᵀ, the masks, exponentials, out = α·out + scores
// · V. Bound by the multiply-add units. Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691),
// section 3.1; online softmax: Milakov and Gimelshein, 2018.
#include "params/attention.h"

#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

template <class Unit>
constexpr int kBandStrips = Unit::rows > MR ? 1
                            : MR > 8        ? 2
                                            : 4;
template <class Unit>
constexpr int kBandRows = kBandStrips<Unit> * Unit::rows;

// Rows of a block share the packing of keys and values: the more the better, until packed queries
// and sums leave L2.
constexpr int64_t kBlockFloats = 40 * 1024;
constexpr int64_t kTileBlockFloats = 128 * 1024;  // packing costs more of it beside faster products
constexpr int64_t kMostRows = 256;
// Multiply-adds below which a second thread costs more than it gives (about 10 µs of work).
constexpr int64_t kWorkPerThread = 400'000;

constexpr float kOnes[14] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};  // for sums that go on
static_assert(MR <= 14);

struct Plan {
  int64_t heads_per_block, blocks_per_head, rows;  // rows of a head in one block
  int64_t blocks;                                  // of one (batch, key head)
  int64_t items;
};

template <class Unit>
Plan make_plan(const AttentionParams& p, int threads) {
  constexpr bool tiles = Unit::step > 1;
  // Rows that are worth a block, and what its rows are a multiple of.
  constexpr int64_t least = tiles ? Unit::rows : 2 * MR, whole = tiles ? Unit::rows : 1;
  const int64_t group = p.group();
  int64_t most = (tiles ? kTileBlockFloats : kBlockFloats) / (p.head_dim + p.value_dim + 1);
  most = max64(2 * least, min64(most, kMostRows));
  const int64_t groups = p.batch * p.kv_heads, total = groups * group * p.q_len;
  // Enough items for the threads to share the work evenly.
  if (threads > 1) most = max64(least, min64(most, total / (4 * threads) + 1));
  Plan plan;
  plan.heads_per_block = max64(1, min64(group, most / max64(p.q_len, 1)));
  plan.blocks_per_head = (p.q_len + most - 1) / most;
  plan.rows = round_up((p.q_len + plan.blocks_per_head - 1) / plan.blocks_per_head, whole);
  plan.blocks = (group + plan.heads_per_block - 1) / plan.heads_per_block * plan.blocks_per_head;
  plan.items = groups * plan.blocks;
  return plan;
}

// Scratch of one thread. Sums of a row are kept per lane and added up at the end.
struct Workspace {
  int64_t columns;  // of `sums`: value_dim rounded up to whole vectors
  float *queries, *sums, *keys, *values, *scores, *top, *total, *alpha;
  Row* rows;

  // Products by tiles write whole strips.
  template <class Unit>
  static Workspace of(const AttentionParams& p, int64_t most_rows) {
    constexpr int64_t band = kBandRows<Unit>;
    Workspace w;
    w.columns = round_up(p.value_dim, W);
    const int64_t units = units_of<Unit>(p.head_dim);
    const int64_t strips = (most_rows + Unit::rows - 1) / Unit::rows;
    int64_t sizes[] = {strips * kStripRows<Unit> * units,
                       strips * Unit::rows * w.columns,
                       kKeys * units,
                       kKeys * round_up(p.value_dim, NR),
                       band * kKeys,
                       most_rows,
                       most_rows * W,
                       band,
                       most_rows * static_cast<int64_t>(sizeof(Row) / sizeof(float))};
    float** places[] = {&w.queries, &w.sums, &w.keys,  &w.values,
                        &w.scores,  &w.top,  &w.total, &w.alpha};
    int64_t all = 0;
    for (int64_t& size : sizes) all += size = round_up(size, 16);
    float* next = static_cast<float*>(thread_scratch(Scratch::tile, sizeof(float) * all));
    for (int i = 0; i < 8; ++i) {
      *places[i] = next;
      next += sizes[i];
    }
    w.rows = reinterpret_cast<Row*>(next);
    return w;
  }
};

template <class Unit, class T>
void block(const AttentionParams& p, const Units& u, Workspace& w, const Sequence& seq, int64_t b,
           int64_t g, const Strips<Unit>& strips) {
  const int64_t dim = p.head_dim, units = units_of<Unit>(dim), columns = w.columns;
  // Pairs are of bf16 numbers, whose results hide how long sums were rounded.
  constexpr int64_t chain = Unit::elements == 1 ? kChain : kKeys;
  constexpr int band_strips = kBandStrips<Unit>, band_rows = kBandRows<Unit>;
  int64_t first = p.kv_len, last = 0;
  for (int64_t i = 0; i < strips.rows; ++i) {
    if (w.rows[i].first < w.rows[i].last) {
      first = min64(first, w.rows[i].first);
      last = max64(last, w.rows[i].last);
    }
  }
  for (int64_t i = 0; i < strips.rows; ++i) {
    w.top[i] = -__builtin_inff();
    store(w.total + i * W, zero());
  }
  for (int64_t i = 0; i < strips.rows * columns; i += W) store(w.sums + i, zero());
  for (int64_t s = 0; s < strips.count; ++s) {
    pack_strip<Unit, T>(p.query, b, w.rows + strips.begin(s), strips.height(s), dim,
                        w.queries + s * kStripRows<Unit> * units);
  }
  for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys) {
    const int64_t n = min64(kKeys, last - j);
    pack_keys<Unit>(at<T>(p.key, b, g, seq.key_start + j), p.key.row, n, dim, w.keys);
    pack_values<Unit>(at<T>(p.value, b, g, seq.key_start + j), p.value.row, n, p.value_dim,
                      w.values);
    for (int64_t band = 0; band < strips.count; band += band_strips) {
      const int64_t band_end = min64(band + band_strips, strips.count);
      Seen seen[band_strips];
      int64_t from = n, to = 0;
      for (int64_t s = band; s < band_end; ++s) {
        Seen& see = seen[s - band];
        see = seen_by(p, u, w.rows + strips.begin(s), strips.height(s), j, n);
        if (see.end == 0) continue;
        from = min64(from, see.begin);
        to = max64(to, see.end);
      }
      const int64_t row0 = strips.begin(band);
      for (int64_t k = from; k < to; k += NR) {
        for (int64_t s = band; s < band_end; ++s) {
          if (k < seen[s - band].begin || k >= seen[s - band].end) continue;
          scores_product<Unit>(strips.height(s), units, w.queries + s * kStripRows<Unit> * units,
                               w.keys + k * units, w.scores + (strips.begin(s) - row0) * kKeys + k);
        }
      }
      const auto each_row = [&](const auto& f) {
        for (int64_t s = band; s < band_end; ++s) {
          const Seen& see = seen[s - band];
          if (see.end == 0) continue;
          for (int64_t i = strips.begin(s); i < strips.begin(s + 1); ++i) {
            f(i, w.scores + (i - row0) * kKeys, see, round_up(see.end, W));
          }
        }
      };
      each_row([&](int64_t i, float* row, const Seen& see, int64_t end) {
        if (!see.plain) finish_scores<T>(p, u, w.rows[i], j, see.begin, end, n, row);
        w.alpha[i - row0] = raise_top(row, see.begin, end, w.top + i);
      });
      for (int64_t i = 0; i < band_rows; i += W) {
        const int have = static_cast<int>(min64(W, band_rows - i));
        store(w.alpha + i, exp2(load(w.alpha + i, have) * splat(u.exponent)), have);
      }
      each_row([&](int64_t i, float* row, const Seen& see, int64_t end) {
        // Pairs are made of numbers of T, in place.
        using P = std::conditional_t<Unit::elements == 2, T, float>;
        const auto weigh = [&]<class To>() __attribute__((always_inline)) {
          weights_row<To>(row, see.begin, end, u.exponent, w.top[i], w.alpha[i - row0],
                          w.total + i * W);
        };
        if (p.dropout.on()) {
          const int64_t position =
              ((b * p.heads + w.rows[i].head) * p.q_len + w.rows[i].index) * p.kv_len + j +
              see.begin;
          weigh.template operator()<float>();
          drop_row(p, position, see.begin, end, row);
          if constexpr (!std::is_same_v<P, float>) {
            for (int64_t k = see.begin; k < end; k += W) {
              store(reinterpret_cast<P*>(row) + k, load(row + k));
            }
          }
        } else {
          weigh.template operator()<P>();
        }
        if (Unit::step > 1 && end % NR != 0) store(reinterpret_cast<P*>(row) + end, zero());
      });
      for (int64_t e = 0; e < columns; e += NR) {
        const int vectors = columns - e > W ? NV : 1;
        for (int64_t s = band; s < band_end; ++s) {
          const Seen& see = seen[s - band];
          if (see.end == 0) continue;
          const int64_t i = strips.begin(s);
          for (int64_t k = see.begin; k < see.end; k += chain) {
            const int64_t unit = k / Unit::elements;
            weighted_sum<Unit>(strips.height(s), vectors, units_of<Unit>(min64(chain, see.end - k)),
                               w.scores + (i - row0) * kKeys + unit,
                               w.values + e * (kKeys / Unit::elements) + unit * NR,
                               w.sums + i * columns + e, columns,
                               k == see.begin ? w.alpha + (i - row0) : kOnes);
          }
        }
      }
    }
  }
}

template <class Unit, class T>
void run(const AttentionParams& p) {
  const int64_t work = p.rows() * max64(p.kv_len, 1) * (p.head_dim + p.value_dim);
  const int64_t threads = max64(1, min64(num_threads(), work / kWorkPerThread));
  const Plan plan = make_plan<Unit>(p, static_cast<int>(threads));
  const Units u = units_of_case(p);
  const int64_t group = p.group();
  int64_t next = 0;
  // Items are taken one by one, the longest first, as their lengths differ with a causal mask.
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    Workspace w = Workspace::of<Unit>(p, plan.heads_per_block * plan.rows);
    [[maybe_unused]] const typename Unit::Registers registers;
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= plan.items) break;
      const int64_t b = item / (p.kv_heads * plan.blocks);
      const int64_t g = item / plan.blocks % p.kv_heads;
      const int64_t at = plan.blocks - 1 - item % plan.blocks;
      const int64_t head = at / plan.blocks_per_head * plan.heads_per_block;
      const int64_t heads = min64(plan.heads_per_block, group - head);
      const int64_t begin = at % plan.blocks_per_head * plan.rows;
      const Sequence seq = sequence_of(p, b);
      const int64_t end = min64(begin + plan.rows, seq.queries);
      if (begin >= end) continue;
      int64_t rows = 0;
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = begin; i < end; ++i) {
          w.rows[rows++] = make_row(p, seq, b, g * group + head + h, i);
        }
      }
      block<Unit, T>(p, u, w, seq, b, g, Strips<Unit>(rows));
      write_rows<T>(p, u, seq, b, w.rows, rows, w.top, w.total, w.sums, w.columns);
    }
  });
}

}  // namespace

void attention(const AttentionParams& p) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return;
  if (p.group() * p.q_len <= kFewRows) return attention_few(p);
  with_type(p.dtype, [&]<class T>() { with_unit<T>([&]<class Unit>() { run<Unit, T>(p); }); });
}

}  // namespace ft::FT_ISA
