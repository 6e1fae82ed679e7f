// d_bias of attention's backward pass (see backward.h): the score gradients dS, summed over what
// the bias broadcasts over. A block owns a tile of 64 × 64 of the unexpanded d_bias, each warp 16
// of its rows, and goes in a fixed order through every (batch, head, tile of queries, tile of keys)
// that lies on it, making s and dp of each again: memory stays linear in the lengths. Heads of any
// size come in slices of 64 columns, so that one kernel serves them all. Where the tiles are too
// few to fill a GPU, their work is cut into parts, which are added in order afterwards.
// Bound: tensor cores and the loads of the slices, two products per tile of scores.
#pragma once
#include "cuda/attention/backward_walk.h"

namespace ft::cuda {

constexpr int kBiasTile = 64, kBiasWarps = 4, kBiasThreads = kBiasWarps * kWarp;

FT_DEVICE int64_t take(int64_t& rest, int64_t size) {
  const int64_t at = rest % size;
  rest /= size;
  return at;
}

// d += x · yᵀ over `columns` columns of two tensors of heads, by slices of a tile's width.
template <class T, class BiasTile>
FT_DEVICE void sliced_products(float (&d)[1][kBiasTile / 8][4], const BiasTile& left,
                               const BiasTile& right, const T* x, int64_t x_row, int x_exist,
                               bool x_aligned, const T* y, int64_t y_row, int y_exist,
                               bool y_aligned, int columns) {
  const int thread = thread_index();
  for (int from = 0; from < columns; from += kBiasTile) {
    block_barrier();  // the slice before may still be read
    load_rows(left, kBiasTile, x_exist, columns - from, x_aligned, x + from, x_row, thread,
              kBiasThreads);
    load_rows(right, kBiasTile, y_exist, columns - from, y_aligned, y + from, y_row, thread,
              kBiasThreads);
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    add_score_products<T>(d, left, right, warp_index() * 16, hidden(lane_index()));
  }
}

template <class T>
FT_GLOBAL void __launch_bounds__(kBiasThreads, 2) attention_backward_dbias(const BackwardArgs a) {
  using BiasTile = Tile<T, kBiasTile, kBiasTile>;
  constexpr int kN = kBiasTile / 8;
  FT_SHARED_ARRAY(T, left_memory, kBiasTile * kBiasTile);
  FT_SHARED_ARRAY(T, right_memory, kBiasTile * kBiasTile);
  FT_SHARED_ARRAY(float, totals, kBiasTile* kBiasWarps);
  const BiasTile left{left_memory}, right{right_memory};
  const AttentionBackwardParams& p = a.p;
  const int lane = lane_index(), g = lane / 4, t = lane % 4 * 2, row = warp_index() * 16;
  const int group = a.group;
  const uint64_t seed = p.dropout.threshold != 0 ? seed_of(p.dropout) : 0;
  const bool query_aligned = view_aligned<T>(p.query), key_aligned = view_aligned<T>(p.key);
  const bool grad_aligned = view_aligned<T>(p.grad_out), value_aligned = view_aligned<T>(p.value);
  const int64_t* const sizes = p.d_bias_sizes;
  const auto tiles_of = [](int64_t length) { return (length + kBiasTile - 1) / kBiasTile; };
  const bool one_batch = sizes[0] == 1, one_head = sizes[1] == 1;
  const bool one_row = sizes[2] == 1, one_column = sizes[3] == 1;
  const int64_t over_keys = one_column ? tiles_of(p.kv_len) : 1;
  const int64_t over_queries = one_row ? tiles_of(p.q_len) : 1;
  const int64_t over_heads = one_head ? p.heads : 1, over_batches = one_batch ? p.batch : 1;
  const int64_t over = over_keys * over_queries * over_heads * over_batches;

  for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
    int64_t rest = item;
    const int64_t out_j = take(rest, tiles_of(sizes[3])), out_i = take(rest, tiles_of(sizes[2]));
    const int64_t out_h = take(rest, sizes[1]), out_b = take(rest, sizes[0]), part = rest;
    float sum[kN][4] = {};
    const int64_t end = over * (part + 1) / p.parts;
    for (int64_t r = over * part / p.parts; r < end; ++r) {
      int64_t place = r;
      const int j0 = static_cast<int>(out_j + take(place, over_keys)) * kBiasTile;
      const int i0 = static_cast<int>(out_i + take(place, over_queries)) * kBiasTile;
      const int64_t h = out_h + take(place, over_heads), b = out_b + place;
      const Sequence sequence = sequence_of(p, b);
      const int last = at_most(i0 + kBiasTile, sequence.queries) - 1;
      const Runs runs = key_runs(sequence, i0, last, kBiasTile);
      if (j0 < runs.begin || j0 >= runs.end) continue;
      float s[1][kN][4] = {}, dp[1][kN][4] = {};
      const int queries = sequence.queries - i0, keys = sequence.keys - j0;
      const int query0 = sequence.query_start + i0, key0 = sequence.key_start + j0;
      sliced_products(s, left, right, head_of<T>(p.query, b, h) + query0 * p.query.row, p.query.row,
                      queries, query_aligned, head_of<T>(p.key, b, h / group) + key0 * p.key.row,
                      p.key.row, keys, key_aligned, static_cast<int>(p.head_dim));
      sliced_products(dp, left, right, head_of<T>(p.grad_out, b, h) + query0 * p.grad_out.row,
                      p.grad_out.row, queries, grad_aligned,
                      head_of<T>(p.value, b, h / group) + key0 * p.value.row, p.value.row, keys,
                      value_aligned, static_cast<int>(p.value_dim));
      ScoreRow rows[2];
      RowWeight weights[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i0 + row + g + 8 * half;
        const bool exists = i < sequence.queries;
        rows[half] = score_row(p, sequence, b, h, i, exists);
        if (!exists) continue;
        const int64_t at = first_row_of(p, sequence, b, h) + i;
        weights[half] = row_weight(p, at);
      }
      scores_for_sums<T>(
          a, j0 < runs.whole_begin || j0 >= runs.whole_end, (b * p.heads + h) * p.q_len * p.kv_len,
          seed, [&](int, int, int c) { return rows[c / 2]; },
          [&](int, int, int c) { return i0 + row + g + c / 2 * 8; },
          [&](int, int n, int c) { return j0 + 8 * n + t + c % 2; }, s, dp);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const RowWeight& w = weights[c / 2];
          const float weight = power_of_2<T>(weight_of(a.units, s[0][n][c], w.top, w.shift));
          const float ds = weight * ((dp[0][n][c] - w.delta) + w.d_lse);
          if (s[0][n][c] != -infinity()) sum[n][c] += ds;
        }
      }
    }

    const int64_t size = sizes[0] * sizes[1] * sizes[2] * sizes[3];
    float* const out = (p.parts > 1 ? p.partial_bias + part * size : p.d_bias) +
                       (out_b * sizes[1] + out_h) * sizes[2] * sizes[3];
    const int i0 = static_cast<int>(out_i) * kBiasTile, j0 = static_cast<int>(out_j) * kBiasTile;
    if (one_row) {  // columns of a warp's rows, then those of the warps
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float column = sum[n][c] + sum[n][c + 2];
#pragma unroll
          for (int offset = 4; offset < kWarp; offset *= 2) column += shuffle_xor(column, offset);
          sum[n][c] = column;
          sum[n][c + 2] = 0.f;
        }
      }
    }
    if (one_column) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n) total += sum[n][2 * half] + sum[n][2 * half + 1];
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) total += shuffle_xor(total, offset);
        sum[0][2 * half] = total;
      }
    }
    if (one_row) {
      block_barrier();  // the item before may still read
      if (g == 0) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          shared_store(totals + warp_index() * kBiasTile + 8 * n + t, sum[n][0]);
          shared_store(totals + warp_index() * kBiasTile + 8 * n + t + 1, sum[n][1]);
        }
      }
      block_barrier();
      const int columns = one_column ? 1 : kBiasTile, j = thread_index();
      if (j < columns && j0 + j < sizes[3]) {
        float total = 0.f;
        for (int w = 0; w < kBiasWarps; ++w) total += shared_load(totals + w * kBiasTile + j);
        store_scalar(out + j0 + j, total);
      }
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = i0 + row + g + 8 * half;
      if (i >= sizes[2]) continue;
      if (one_column) {
        if (t == 0) store_scalar(out + i, sum[0][2 * half]);
        continue;
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t j = j0 + 8 * n + t + c;
          if (j < sizes[3]) store_scalar(out + i * sizes[3] + j, sum[n][2 * half + c]);
        }
      }
    }
  }
}

template <class T>
void backward_bias(const BackwardArgs& given, void* stream) {
  BackwardArgs args = given;
  const int64_t* const sizes = args.p.d_bias_sizes;
  const auto tiles_of = [](int64_t length) { return (length + kBiasTile - 1) / kBiasTile; };
  args.items = sizes[0] * sizes[1] * tiles_of(sizes[2]) * tiles_of(sizes[3]) * args.p.parts;
  if (args.items == 0) return;
  launch("attention_backward_dbias", attention_backward_dbias<T>, grid_for(args.items, 1),
         kBiasThreads, 0, stream, args);
}

}  // namespace ft::cuda
