// The walks of attention's backward pass (see backward.h). A block owns a tile of rows, either
// queries (with Q and dO) or keys (with K and V), each warp 16 or 32 of them, and walks over tiles
// of the others, which cp.async brings in while the tile before is worked on. In each step a warp
// has, of its rows × kStep columns,
//   s = own1 · walked1ᵀ   dp = own2 · walked2ᵀ      (q·kᵀ and dO·vᵀ, or their transposes)
// turns s into the weights p and dp into the score gradients ds, and adds
//   first += ds · walked1  (dQ or dK)       second += p · walked2  (dV)
// with p and ds as A operands straight from registers: rows of a warp are its own from the first
// product to the last sum, so a step has one barrier, which is the tiles' alone.
// Bound: tensor cores, and beside them shared memory: an operand of 8 columns serves 16 or 32 rows,
// so 16 rows cost as many cycles of shared memory as of tensor cores.
#pragma once
#include <stdexcept>

#include "cuda/attention/backward_scores.h"

namespace ft::cuda {

// What a warp knows of the block's item, in shared memory: the products need the registers.
struct alignas(16) Kept {
  int first;  // row of the block
  int b, own_head, first_head;
  int own_length;
  int walked_first, walked_end;  // rows of memory that are walked over
  int per_head;                  // steps
  Runs runs;
  int64_t out_row;  // of `first` and the head
  int exist;        // rows of the output from `first` on: those behind key_lengths too
  int values_pass;
  Sequence sequence;
  uint64_t seed;
  int64_t item;
};

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, int kHead, Walk kWalk, bool kPlain>
FT_GLOBAL void __launch_bounds__(kMostWarps* kWarp, 1)
    attention_backward_walk(const BackwardArgs a) {
  using S = Shape<T, kHead, kWalk, kPlain>;
  using OwnTile = Tile<T, kMostWarps * S::kRows, kHead>;
  using WalkedTile = Tile<T, S::kStep, kHead>;
  constexpr bool kOwnsQueries = S::kOwnsQueries;
  constexpr int kTiles = S::kTiles, kStep = S::kStep, kN = kStep / 8, kColumns = kHead / 8;
  FT_SHARED_ARRAY(uint32_t, votes, kMostWarps);
  FT_SHARED_ARRAY(Kept, kept_items, kMostWarps);
  constexpr bool kSums = kOwnsQueries && !kPlain;  // may find rows' sums again
  FT_SHARED_ARRAY(RowSums, all_row_sums, kSums ? kMostWarps * S::kRows : 1);
  Kept* const kept = kept_items + warp_index();
  const AttentionBackwardParams& p = a.p;
  const int thread = thread_index(), threads = a.warps * kWarp, lane = lane_index();
  const int g = lane / 4;
  const int rows = a.warps * S::kRows;          // of the block
  const int own_row = warp_index() * S::kRows;  // of the warp's first, in the block
  T* const own_memory = dynamic_shared<T>();
  const OwnTile own1{own_memory}, own2{own_memory + rows * kHead};
  T* const walked_memory = own_memory + 2 * rows * kHead;
  const auto walked1 = [&](int stage) {
    return WalkedTile{walked_memory + stage * 2 * kStep * kHead};
  };
  const auto walked2 = [&](int stage) {
    return WalkedTile{walked_memory + (stage * 2 + 1) * kStep * kHead};
  };
  // Of what is walked over, if queries: top, delta, shift and d_lse.
  float* const numbers = reinterpret_cast<float*>(walked_memory + a.stages * 2 * kStep * kHead);

  const int group = a.group;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);

  for (int64_t item = blockIdx.x; item < a.items; item = shared_load(&kept->item) + gridDim.x) {
    // Tiles of queries are taken from the end, where causal rows are longest.
    const uint32_t tiles = static_cast<uint32_t>(a.tiles), all = static_cast<uint32_t>(item);
    const int index = static_cast<int>(all % tiles);
    const int first = (kOwnsQueries ? static_cast<int>(a.tiles) - 1 - index : index) * rows;
    int rest = static_cast<int>(all / tiles);
    bool values_pass = false;
    if constexpr (kWalk == Walk::keys_in_passes) {
      values_pass = rest % 2 != 0;
      rest /= 2;
    }
    const int own_heads = static_cast<int>(kOwnsQueries ? p.heads : p.kv_heads);
    const int own_head = rest % own_heads, b = rest / own_heads;
    const int first_head = kOwnsQueries ? own_head : own_head * group;
    const Sequence sequence = sequence_of(p, b);
    const int own_length = kOwnsQueries ? sequence.queries : sequence.keys;
    const int walked_length = kOwnsQueries ? sequence.keys : sequence.queries;
    const int last = at_most(first + rows, own_length) - 1;
    Runs runs = {0, 0, 0, 0};
    if (first < own_length) {
      runs = kOwnsQueries ? key_runs(sequence, first, last, kStep)
                          : query_runs(sequence, first, last, kStep);
    }
    const int per_head = (runs.end - runs.begin + kStep - 1) / kStep;
    const int steps = per_head * (kOwnsQueries ? 1 : group);

    warp_barrier();  // the item before may still read
    if (lane == 0) {
      const uint64_t seed = !kPlain && p.dropout.threshold != 0 ? seed_of(p.dropout) : 0;
      const int base = kOwnsQueries ? sequence.key_start : sequence.query_start;
      const bool packed = p.cu_seqlens_q != nullptr;
      const int length = packed ? own_length : static_cast<int>(kOwnsQueries ? p.q_len : p.kv_len);
      const int64_t token =
          (kOwnsQueries ? first_query_of(p, sequence, b) : first_key_of(p, sequence, b)) + first;
      shared_store(kept, {first, b, own_head, first_head, own_length, base + runs.begin,
                          base + walked_length, per_head, runs, token * own_heads + own_head,
                          length - first, values_pass, sequence, seed, item});
    }
    warp_barrier();

    const auto load_walked = [&](int step) {
      const int stage = step & (a.stages - 1), thread = hidden(thread_index());
      const int per_head = shared_load(&kept->per_head), b = shared_load(&kept->b);
      const int in_head = kOwnsQueries && kPlain ? step : step % per_head;
      const int start = shared_load(&kept->walked_first) + in_head * kStep;
      const int exist = shared_load(&kept->walked_end) - start;
      const int h = kOwnsQueries ? shared_load(&kept->own_head) / group
                                 : shared_load(&kept->first_head) + step / per_head;
      const HeadsView& view1 = kOwnsQueries ? p.key : p.query;
      const HeadsView& view2 = kOwnsQueries ? p.value : p.grad_out;
      load_rows(walked1(stage), kStep, exist, head_dim, kPlain || a.walked_aligned[0],
                head_of<T>(view1, b, h) + start * view1.row, view1.row, thread, threads);
      load_rows(walked2(stage), kStep, exist, value_dim, kPlain || a.walked_aligned[1],
                head_of<T>(view2, b, h) + start * view2.row, view2.row, thread, threads);
      if constexpr (!kOwnsQueries) {
        const int64_t at = first_row_of(p, b, h) + start;
        for (int i = thread; i < kStep; i += threads) {
          float* const to = numbers + stage * 4 * kStep + i;
          const bool there = i < exist;  // the others' weights meet zeros only
          copy_async<4>(to, p.top + (there ? at + i : 0), there);
          copy_async<4>(to + kStep, p.delta + (there ? at + i : 0), there);
          if constexpr (!kPlain) {
            copy_async<4>(to + 2 * kStep, p.shift + (there ? at + i : 0), there);
            if (p.grad_lse != nullptr) {
              copy_async<4>(to + 3 * kStep, p.grad_lse + (there ? at + i : 0), there);
            }
          }
        }
      }
    };

    bool again = false;  // the rows' maximum, sum and delta are found first
    if constexpr (kOwnsQueries && !kPlain) {
      bool coarse = false;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first + own_row + 16 * m + g + 8 * half;
          if (i >= own_length) continue;
          const int64_t at = first_row_of(p, sequence, b, own_head) + i;
          const float lse = load_scalar(p.top + at);
          coarse = coarse || ((lse > kCoarseLse || lse < -kCoarseLse) && lse - lse == 0.f);
        }
      }
      const bool of_warp = any_lane(coarse);
      block_barrier();  // the item before may still read
      if (lane == 0) shared_store(votes + warp_index(), of_warp ? 1u : 0u);
      block_barrier();
      again = runs.end - runs.begin <= kShortRow;
      for (int w = 0; w < a.warps; ++w) again = again || shared_load(votes + w) != 0;
    }
    const int total = again ? 2 * steps : steps;
    if (steps > 0) {
      block_barrier();  // the item before may still read
      const int own_first = first + (kOwnsQueries ? sequence.query_start : sequence.key_start);
      const HeadsView& view1 = kOwnsQueries ? p.query : p.key;
      const HeadsView& view2 = kOwnsQueries ? p.grad_out : p.value;
      load_rows(own1, rows, own_length - first, head_dim, kPlain || a.own_aligned[0],
                head_of<T>(view1, b, own_head) + own_first * view1.row, view1.row, thread, threads);
      load_rows(own2, rows, own_length - first, value_dim, kPlain || a.own_aligned[1],
                head_of<T>(view2, b, own_head) + own_first * view2.row, view2.row, thread, threads);
      load_walked(0);
      copy_async_commit();
    }
    // A row's sums are its quad's first lane's alone, in shared memory: the loop has no registers
    // left.
    const auto row_sums = [&](int m, int half) {
      return all_row_sums + own_row + 16 * m + g + 8 * half;
    };
    if constexpr (kSums) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (lane % 4 == 0) shared_store(row_sums(i / 2, i % 2), {-infinity(), 0.f, 0.f});
      }
    }
    float first_sum[kTiles][kColumns][4] = {};
    float second_sum[kWalk == Walk::keys ? kTiles : 1][kWalk == Walk::keys ? kColumns : 1][4] = {};
#pragma unroll 1
    for (int step = 0; step < total; ++step) {
      const int stage = step & (a.stages - 1);
      if constexpr (kOwnsQueries && !kPlain) {
        if (again && step == steps) {  // every key was seen once: the rows are known now
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int i = shared_load(&kept->first) + own_row + 16 * m + g + 8 * half;
              const int own_head = shared_load(&kept->own_head);
              const int64_t at =
                  first_row_of(p, shared_load(&kept->sequence), shared_load(&kept->b), own_head);
              if (lane % 4 == 0 && i < shared_load(&kept->own_length)) {
                whole_row<T>(a, shared_load(row_sums(m, half)), own_head, at + i);
              }
            }
          }
        }
      }
      copy_async_wait<0>();
      block_barrier();
      if (a.stages > 1 && step + 1 < total) {
        load_walked(step + 1);
        copy_async_commit();
      }
      const WalkedTile tile1 = walked1(stage), tile2 = walked2(stage);
      const float* const walked_numbers = numbers + stage * 4 * kStep;

      const int here = hidden(lane_index()), g = here / 4, t = here % 4 * 2;
      const int own_row = hidden(warp_index()) * S::kRows;
      float s[kTiles][kN][4] = {}, dp[kTiles][kN][4] = {};
      add_score_products<T>(s, own1, tile1, own_row, here);
      const bool values_pass =
          kWalk == Walk::keys_in_passes && shared_load(&kept->values_pass) != 0;
      if (!values_pass) add_score_products<T>(dp, own2, tile2, own_row, hidden(here));

      const int first = shared_load(&kept->first), b = shared_load(&kept->b);
      const int per_head = shared_load(&kept->per_head);
      const Runs runs = shared_load(&kept->runs);
      const Sequence sequence = shared_load(&kept->sequence);
      const uint64_t seed = shared_load(&kept->seed);
      const int at = step < steps ? step : step - steps;
      const int start = runs.begin + (kOwnsQueries ? at : at % per_head) * kStep;
      const int h = kOwnsQueries ? shared_load(&kept->own_head)
                                 : shared_load(&kept->first_head) + at / per_head;
      const bool edges = start < runs.whole_begin || start >= runs.whole_end;
      const ScoreRow head_row =
          kOwnsQueries || kPlain ? ScoreRow{} : score_row(p, sequence, b, h, 0, true);
      // Made again each time: they would take 16 registers or more.
      ScoreRow own_rows[kOwnsQueries && !kPlain ? kTiles : 1][2];
      if constexpr (kOwnsQueries && !kPlain) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = first + own_row + 16 * m + g + 8 * half;
            own_rows[m][half] = score_row(p, sequence, b, h, i, i < sequence.queries);
          }
        }
      }
      const auto query_of = [&](int m, int n, int c) {
        return kOwnsQueries ? first + own_row + 16 * m + g + c / 2 * 8 : start + 8 * n + t + c % 2;
      };
      const auto key_of = [&](int m, int n, int c) {
        return kOwnsQueries ? start + 8 * n + t + c % 2 : first + own_row + 16 * m + g + c / 2 * 8;
      };
      const auto row_of = [&](int m, int n, int c) {
        if constexpr (kOwnsQueries && !kPlain) {
          return own_rows[m][c / 2];
        } else {
          const int i = query_of(m, n, c);
          ScoreRow r = head_row;
          r.position = i + sequence.shift;
          r.low = at_least(r.position - sequence.left, 0);
          r.high =
              i < sequence.queries ? at_most(r.position + sequence.right + 1, sequence.keys) : 0;
          if (!kPlain) {
            if (r.mask != nullptr) r.mask += i * p.mask.row;
            if (r.bias != nullptr) r.bias += i * p.bias.row * (p.bias_dtype == DType::f32 ? 4 : 2);
          }
          return r;
        }
      };
      // Loaded each time too; the barrier above made the row's writes of whole_row visible.
      RowWeight own_weights[kOwnsQueries ? kTiles : 1][2] = {};
      if constexpr (kOwnsQueries) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = first + own_row + 16 * m + g + 8 * half;
            if (i >= sequence.queries) continue;
            const int64_t at = first_row_of(p, sequence, b, h) + i;
            if constexpr (kPlain) {
              own_weights[m][half].top = load_scalar(p.top + at);
              own_weights[m][half].delta = load_scalar(p.delta + at);
            } else {
              own_weights[m][half] = row_weight(p, at);
            }
          }
        }
      }
      const auto weights_of = [&](int m, int n, int c) {
        if constexpr (kOwnsQueries) {
          return own_weights[m][c / 2];
        } else {
          const float* const from = walked_numbers + 8 * n + t + c % 2;
          RowWeight w = {shared_load(from), 0.f, shared_load(from + kStep), 0.f};
          if constexpr (!kPlain) {
            w.shift = shared_load(from + 2 * kStep);
            if (p.grad_lse != nullptr) w.d_lse = shared_load(from + 3 * kStep);
          }
          return w;
        }
      };
      const int64_t head_position = (b * p.heads + h) * p.q_len * p.kv_len;
      bool summing = false;
      if constexpr (kOwnsQueries && !kPlain) {
        summing = again && step < steps;
        if (summing) {
          scores_for_sums<T>(a, edges, head_position, seed, row_of, query_of, key_of, s, dp);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              RowSums of_lane = {-infinity(), 0.f, 0.f};
#pragma unroll
              for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int c = 2 * half; c < 2 * half + 2; ++c) {
                  add_score(of_lane, a.units, s[m][n][c], dp[m][n][c]);
                }
              }
              add_quad(row_sums(m, half), of_lane, a.units);
            }
          }
        }
      }
      if (!summing) {
        gradients_of_scores<T, kPlain>(a, edges, head_position, seed, row_of, query_of, key_of,
                                       weights_of, s, dp);
        if constexpr (kWalk == Walk::keys) add_products<T>(second_sum, s, tile2, hidden(here));
        if constexpr (kWalk == Walk::keys_in_passes) {
          const WalkedTile factor{values_pass ? tile2.data : tile1.data};
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) dp[0][n][c] = values_pass ? s[0][n][c] : dp[0][n][c];
          }
          add_products<T>(first_sum, dp, factor, hidden(here));
        } else {
          add_products<T>(first_sum, dp, tile1, hidden(here));
        }
      }
      if (a.stages == 1 && step + 1 < total) {
        block_barrier();
        load_walked(step + 1 < steps ? step + 1 : step + 1 - steps);
        copy_async_commit();
      }
    }

    // All rows of the output are written, those behind key_lengths too.
    const int heads = static_cast<int>(kOwnsQueries ? p.heads : p.kv_heads);
    const int exist = shared_load(&kept->exist);
    const int alive = shared_load(&kept->own_length) - shared_load(&kept->first);
    const auto write = [&](const auto& sum, void* out, int columns, float factor) {
      T* const to = static_cast<T*>(out) + shared_load(&kept->out_row) * columns;
      write_sums(sum, to, int64_t{heads} * columns, own_row, exist, alive, columns, factor);
    };
    if constexpr (kOwnsQueries) {
      write(first_sum, p.d_query, head_dim, p.scale);
    } else if constexpr (kWalk == Walk::keys) {
      write(first_sum, p.d_key, head_dim, p.scale);
      write(second_sum, p.d_value, value_dim, 1.f);
    } else if (shared_load(&kept->values_pass) != 0) {
      write(first_sum, p.d_value, value_dim, 1.f);
    } else {
      write(first_sum, p.d_key, head_dim, p.scale);
    }
  }
}

// Items are counted in 32 bits: their tensors would have 2^36 rows and more.
constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;

// ---- launching ----------------------------------------------------------------------------------

// As many warps as the table's registers and shared memory allow, fewer where rows are few.
template <class T, int kHead, Walk kWalk, bool kPlain>
void launch_walk(BackwardArgs args, void* stream) {
  using S = Shape<T, kHead, kWalk, kPlain>;
  const AttentionBackwardParams& p = args.p;
  const char* const name = S::kOwnsQueries ? "attention_backward_dq" : "attention_backward_dkdv";
  const int64_t length = S::kOwnsQueries ? p.q_len : p.kv_len;
  const auto kernel = attention_backward_walk<T, kHead, kWalk, kPlain>;
  const int64_t most = dynamic_shared_room(name, kernel);
  const auto bytes = [](int warps, int stages) {
    return warps * S::kWarpBytes + stages * S::kStageBytes;
  };
  // Up to head size 64 two blocks of 4 warps share a multiprocessor.
  int warps = kHead <= 64 ? 4 : kMostWarps, stages = 2;
  while (warps > 4 && bytes(warps, stages) > most) warps /= 2;
  if (bytes(warps, stages) > most) stages = 1;
  while (warps > 2 && bytes(warps, stages) > most) warps /= 2;
  while (warps > 2 && warps / 2 * S::kRows >= length) warps /= 2;
  const int64_t rows = warps * S::kRows;
  args.warps = warps;
  args.stages = stages;
  const HeadsView* const views[] = {&p.query, &p.grad_out, &p.key, &p.value};
  for (int i = 0; i < 2; ++i) {
    args.own_aligned[i] = rows_on_16_bytes(*views[S::kOwnsQueries ? i : 2 + i], sizeof(T));
    args.walked_aligned[i] = rows_on_16_bytes(*views[S::kOwnsQueries ? 2 + i : i], sizeof(T));
  }
  args.tiles = (length + rows - 1) / rows;
  const int64_t heads = S::kOwnsQueries ? p.heads : p.kv_heads;
  args.items = args.tiles * heads * p.batch * (kWalk == Walk::keys_in_passes ? 2 : 1);
  if (args.items == 0) return;
  if (args.items > kMostItems) {
    throw std::invalid_argument("fasttransformer: attention takes up to 2^31 tiles of rows");
  }
  launch(name, kernel, grid_for(args.items, 1), warps * kWarp, bytes(warps, stages), stream, args);
}

template <class T, Walk kWalk>
void launch_walk(const BackwardArgs& args, bool plain, void* stream) {
  const int64_t dim = args.p.head_dim > args.p.value_dim ? args.p.head_dim : args.p.value_dim;
  constexpr Walk kLargest = kWalk == Walk::queries ? Walk::queries : Walk::keys_in_passes;
  const auto run = [&]<bool kPlain>() {
    if (dim <= 32) return launch_walk<T, 32, kWalk, kPlain>(args, stream);
    if (dim <= 64) {
      return launch_walk<T, 64, sizeof(T) == 2 ? kWalk : kLargest, kPlain>(args, stream);
    }
    if (dim <= 128) {
      return launch_walk<T, 128, sizeof(T) == 2 ? kWalk : kLargest, kPlain>(args, stream);
    }
    launch_walk<T, 256, kLargest, kPlain>(args, stream);
  };
  if constexpr (sizeof(T) == 2) {
    if (plain) return run.template operator()<true>();
  }
  run.template operator()<false>();
}

template <class T>
void backward_queries(const BackwardArgs& args, bool plain, void* stream) {
  launch_walk<T, Walk::queries>(args, plain, stream);
}
template <class T>
void backward_keys(const BackwardArgs& args, bool plain, void* stream) {
  launch_walk<T, Walk::keys>(args, plain, stream);
}

}  // namespace ft::cuda
