// What attention's backward pass knows of each row before it walks over the keys, and the sinks'
// gradients, which follow from that alone.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {

constexpr int64_t kGrain = 16384;

// lse is rounded to float, and with it every weight of a row by the same factor: beyond this, by
// more than torch's own error (at finfo.min it says nothing of the sum at all). The row's maximum
// and sum are found again then: weight = exp2((s − top)·log2(e) + shift). So they are where the
// forward pass added up its scores in another order (attention_few.cpp): where one key has nearly
// all of a row's weight, the last bit of its score is a bit of the weight.
constexpr float kCoarse = 64.f;

// Rows of one head whose sums are found together, with their scores made exactly as the backward
// pass makes them.
template <class Unit, class T>
struct CoarseRows {
  const AttentionBackwardParams& p;
  const Units& u;
  int64_t b, h;
  Sequence seq;
  int count = 0;
  Row rows[Unit::rows];

  void add(int64_t i) { rows[count++] = make_row(p, seq, b, h, i); }

  // Writes p.top and p.shift of the rows added, and forgets the rows.
  void find_sums() {
    if (count == 0) return;
    const int64_t g = h / p.group(), dim = p.head_dim, units = units_of<Unit>(dim);
    const int64_t strip_floats = round_up(kStripRows<Unit> * units, 16);
    float* strip = static_cast<float*>(thread_scratch(
        Scratch::tile, sizeof(float) * (strip_floats + kKeys * (units + Unit::rows))));
    float *keys = strip + strip_floats, *scores = keys + kKeys * units;
    float top[Unit::rows];
    vf total[Unit::rows];
    int64_t first = p.kv_len, last = 0;
    for (int i = 0; i < count; ++i) {
      top[i] = -__builtin_inff();
      total[i] = zero();
      if (rows[i].first >= rows[i].last) continue;
      first = min64(first, rows[i].first);
      last = max64(last, rows[i].last);
    }
    [[maybe_unused]] const typename Unit::Registers registers;
    pack_strip<Unit, T>(p.query, b, rows, count, dim, strip);
    for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys) {
      const int64_t n = min64(kKeys, last - j), end = round_up(n, W);
      pack_keys<Unit>(at<T>(p.key, b, g, seq.key_start + j), p.key.row, n, dim, keys);
      for (int64_t k = 0; k < n; k += NR) {
        scores_product<Unit>(count, units, strip, keys + k * units, scores + k);
      }
      for (int i = 0; i < count; ++i) {
        if (rows[i].first >= rows[i].last) continue;
        add_scores(rows[i], j, n, end, scores + i * kKeys, top + i, total + i);
      }
    }
    for (int i = 0; i < count; ++i) write(rows[i], top[i], reduce_add(total[i]));
    count = 0;
  }

 private:
  void add_scores(Row& row, int64_t j, int64_t n, int64_t end, float* s, float* top, vf* total) {
    finish_scores<T>(p, u, row, j, 0, end, n, s);
    const float below = raise_top(s, 0, end, top);
    if (*top == -__builtin_inff()) return;
    vf sum = *total * exp2(splat(below * u.exponent));
    for (int64_t k = 0; k < end; k += W) {
      sum += exp2((load(s + k) - splat(*top)) * splat(u.exponent));
    }
    *total = sum;
  }

  void write(const Row& row, float product, float sum) {
    float top = product * u.lse_scale;
    // What the backward pass's fused multiply-add leaves of the largest score.
    float left = fma(splat(product), splat(u.lse_scale), splat(-top))[0];
    if (p.sinks) {
      const float most = p.sinks[h] > top ? p.sinks[h] : top;
      sum = sum * __builtin_expf(top - most) + __builtin_expf(p.sinks[h] - most);
      if (most != top) left = 0.f;
      top = most;
    }
    const int64_t r = first_row_of(p, seq, b, h) + row.index;
    p.top[r] = top;
    p.shift[r] = -__builtin_log2f(sum) - left * kLog2E;
  }
};

// delta = Σ dO·O − d_lse of every row, and what its weights are made with.
template <class Unit, class T>
void prepare_rows(const AttentionBackwardParams& p, const Units& u) {
  const bool few = p.group() * p.q_len <= kFewRows;
  parallel_for(p.rows(), kGrain / (p.value_dim + 1) + 1, [&](int64_t begin, int64_t end) {
    CoarseRows<Unit, T> coarse = {p, u, -1, -1, {}, 0, {}};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r % p.head_rows, h = r / p.head_rows % p.heads;
      int64_t b = r / p.head_rows / p.heads;
      const T* grad = at<T>(p.grad_out, b, h, i);
      const T* out = at<T>(p.out, b, h, i);
      vf sum = zero();
      int64_t e = 0;
      for (; e + W <= p.value_dim; e += W) sum = fma(load(grad + e), load(out + e), sum);
      if (e < p.value_dim) {
        const int have = static_cast<int>(p.value_dim - e);
        sum = fma(load(grad + e, have), load(out + e, have), sum);
      }
      const float lse = p.lse[r];
      p.delta[r] = reduce_add(sum) - (p.grad_lse ? p.grad_lse[r] : 0.f);
      p.top[r] = lse;
      p.shift[r] = 0.f;
      if (lse - lse != 0.f || !(few || lse > kCoarse || lse < -kCoarse)) continue;
      if (p.cu_seqlens_q) {
        while (b + 1 < p.batch && p.cu_seqlens_q[b + 1] <= i) ++b;
      }
      if (b != coarse.b || h != coarse.h || coarse.count == Unit::rows) {
        coarse.find_sums();
        coarse.b = b;
        coarse.h = h;
        coarse.seq = sequence_of(p, b);
      }
      coarse.add(i - coarse.seq.query_start);
    }
    coarse.find_sums();
  });
}

// The sink's value is 0: its score's gradient is −weight·delta.
inline void sink_gradients(const AttentionBackwardParams& p) {
  const int64_t rows = p.entries() * p.head_rows;
  parallel_for(p.heads, kGrain / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double total = 0.0;
      for (int64_t b = 0; b < p.entries(); ++b) {
        for (int64_t i = 0; i < p.head_rows; ++i) {
          const int64_t r = (b * p.heads + h) * p.head_rows + i;
          if (p.lse[r] == -__builtin_inff()) continue;
          const double below = double{p.sinks[h]} - double{p.top[r]};
          const double power = below * double{1.4426950408889634} + double{p.shift[r]};
          total -= __builtin_exp2(power) * double{p.delta[r]};
        }
      }
      p.d_sinks[h] = static_cast<float>(total);
    }
  });
}

}  // namespace ft::FT_ISA
