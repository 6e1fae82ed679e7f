// C = A · B by tensor cores, and the epilogue of linear_add on C while it is in registers.
//   A block owns a kM × kN tile of C and walks K in steps of kK, whose tiles of A and B come to
// shared memory by cp.async, `stages` of them on their way or in use. Its warps own kWarpM × kWarpN
// of the tile each (or with kWarpsK > 1 a part of each step's K, added up in fixed order at the
// end) and keep the fragments of the next 16 of K in registers while they multiply. Blocks walk C
// in groups of row tiles, so that the operands of a group stay in L2.
//   The epilogue turns 16 rows at a time over shared memory into whole chunks of 16 bytes: bias,
// activation and residual are then read, and the result is written, by full sectors.
//   Bound: tensor cores, or for few rows the weight's way from memory. Float is four tf32 products
// (fragment.h); they make NaN of infinities, so a NaN is summed again, plainly. Or it is multiplied
// as such (`plain`), where tf32 is no faster or sums are short.
// Sources: NVIDIA, CUTLASS, "Efficient GEMM in CUDA"; Kerr et al. 2017.
#pragma once
#include "cuda/device/fragment.h"
#include "cuda/device/launch.h"
#include "cuda/linear_add/epilogue.h"

namespace ft::cuda {

constexpr int kGroupTiles = 8;  // row tiles of a group

template <class T_, int kM_, int kN_, int kBytes, int kWarpsM_, int kWarpsN_, int kWarpsK_,
          int kBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kM = kM_, kN = kN_, kK = kBytes / static_cast<int>(sizeof(T));
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kBlocks = kBlocks_;  // on an SM: the limit of registers
  static constexpr int kWarps = kWarpsM * kWarpsN * kWarpsK, kThreads = kWarps * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kSteps = kK / kWarpsK / kDepth<T>;  // of a warp in a tile
  static constexpr int kStage = (kM + kN) * kK;            // elements
  static_assert(kSteps % 2 == 0, "fragments take turns");
  static_assert(kWarpsK == 1 || kWarpM == 16);
  // The epilogue: 16 rows of floats for each warp, rows 8 banks apart.
  static constexpr int kPad = kWarpN + 8;
  static constexpr int kStaging = 16 * kPad;          // floats, of a warp
  static constexpr int kChunks = kWarpN / kLanes<T>;  // of a row of a warp
  static constexpr int kRowsAtOnce = kWarp / kChunks;
  static constexpr int kTurns = 16 / kRowsAtOnce;
};

template <class T, TileKind kKind>
struct ShapeOf {
  static constexpr TileSpec kSpec = tile_spec(sizeof(T) == 4, kKind);
  using Is = Shape<T, kSpec.m, kSpec.n, kSpec.depth, kSpec.warps_m, kSpec.warps_n, kSpec.warps_k,
                   kSpec.blocks>;
};

struct WorkItem {
  int64_t m, n, k, k_end;  // corner of the tile, range of K
  int split;
};
static_assert(sizeof(WorkItem) <= kItemBytes);  // the plan leaves as much free

template <class S>
FT_DEVICE WorkItem work_item(const MatmulArgs& a, int64_t index) {
  const int64_t tiles_m = (a.m + S::kM - 1) / S::kM, tiles_n = (a.n + S::kN - 1) / S::kN;
  const int64_t split = index / (tiles_m * tiles_n), place = index % (tiles_m * tiles_n);
  const int64_t group = place / (kGroupTiles * tiles_n), within = place % (kGroupTiles * tiles_n);
  const int64_t left = tiles_m - group * kGroupTiles;
  const int64_t height = left < kGroupTiles ? left : kGroupTiles;
  const int64_t k = split * a.per_split;
  const int64_t k_end = k + a.per_split < a.k ? k + a.per_split : a.k;
  return {(group * kGroupTiles + within % height) * S::kM, within / height * S::kN, k, k_end,
          static_cast<int>(split)};
}

template <class S, Form kForm>
struct Stage {
  using T = typename S::T;
  static constexpr bool kATransposed = kForm == Form::d_weight;
  static constexpr bool kBTransposed = kForm != Form::forward;
  using TileA = Tile<T, kATransposed ? S::kK : S::kM, kATransposed ? S::kM : S::kK>;
  using TileB = Tile<T, kBTransposed ? S::kK : S::kN, kBTransposed ? S::kN : S::kK>;
  using LoaderA = Loader<T, S::kThreads, TileA::kRows, TileA::kColumns, kATransposed>;
  using LoaderB = Loader<T, S::kThreads, TileB::kRows, TileB::kColumns, kBTransposed>;

  TileA a;
  TileB b;

  FT_DEVICE explicit Stage(T* memory) : a{memory}, b{memory + S::kM * S::kK} {}

  // Tiles number `step` of the item; `left` of K's elements lie in them.
  FT_DEVICE void load(const MatmulArgs& p, LoaderA& from_a, LoaderB& from_b, const WorkItem* item,
                      int step, int left) const {
    if (p.a.plain()) {
      from_a.load(a, p.a, left);
    } else {
      const WorkItem w = shared_load(item);
      const int64_t k = w.k + int64_t{step} * S::kK;
      if constexpr (kATransposed) {
        LoaderA::load_any(a, p.a, k, w.k_end, w.m, p.m);
      } else {
        LoaderA::load_any(a, p.a, w.m, p.m, k, w.k_end);
      }
    }
    if (p.b.plain()) {
      from_b.load(b, p.b, left);
    } else {
      const WorkItem w = shared_load(item);
      const int64_t k = w.k + int64_t{step} * S::kK;
      if constexpr (kBTransposed) {
        LoaderB::load_any(b, p.b, k, w.k_end, w.n, p.n);
      } else {
        LoaderB::load_any(b, p.b, w.n, p.n, k, w.k_end);
      }
    }
  }

  FT_DEVICE T a_at(int m, int k) const {
    return shared_load(kATransposed ? a.at(k, m) : a.at(m, k));
  }
  FT_DEVICE T b_at(int k, int n) const {
    return shared_load(kBTransposed ? b.at(k, n) : b.at(n, k));
  }
  FT_DEVICE void read_a(FragmentA<T>& f, int m, int k) const {
    if constexpr (kATransposed) {
      load_a_transposed(f, a, m, k);
    } else {
      load_a(f, a, m, k);
    }
  }
  FT_DEVICE void read_b(FragmentB<T> (&f)[S::kWarpN / 8], int n, int k) const {
#pragma unroll
    for (int j = 0; j < S::kWarpN / 8; j += 2) {
      FragmentB<T>(&pair)[2] = *reinterpret_cast<FragmentB<T>(*)[2]>(&f[j]);
      if constexpr (kBTransposed) {
        load_b_transposed(pair, b, k, n + j * 8);
      } else {
        load_b(pair, b, k, n + j * 8);
      }
    }
  }
};

template <class S>
using Sums = float[S::kWarpM / 16][S::kWarpN / 8][4];

// Float: fragments are twice as large, and go straight to their products. Or to no tensor core,
// each lane multiplying the elements that it has of mma's sums.
template <class S, Form kForm, class Load>
FT_DEVICE void multiply_float(const MatmulArgs& p, int steps, const Load& load, Sums<S>& sums,
                              int m, int n, int k) {
  using At = Stage<S, kForm>;
  constexpr int kRows = S::kWarpM / 8, kColumns = S::kWarpN / 4;
  int reading = 0, writing = p.stages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait(p.stages - 2);
    block_barrier();
    load(writing, step + p.stages - 1);
    writing = writing + 1 == p.stages ? 0 : writing + 1;
    const At tile(dynamic_shared<float>() + reading * S::kStage);
    reading = reading + 1 == p.stages ? 0 : reading + 1;
    if (p.plain) {
      const int row = m + lane_index() / 4, column = n + lane_index() % 4 * 2;
      // In parts, so that a long sum's terms don't all round at its full size.
      constexpr int kPart = S::kWarpsK > 1 ? 4 : 8;
#pragma unroll 1
      for (int begin = k; begin < k + S::kK / S::kWarpsK; begin += kPart) {
        Sums<S> part = {};
#pragma unroll 2
        for (int kk = begin; kk < begin + kPart; ++kk) {
          float a[kRows], b[kColumns];
#pragma unroll
          for (int i = 0; i < kRows; ++i) a[i] = tile.a_at(row + i * 8, kk);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) b[j] = tile.b_at(kk, column + j / 2 * 8 + j % 2);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              part[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i] * b[j];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            sums[i / 2][j / 2][i % 2 * 2 + j % 2] += part[i / 2][j / 2][i % 2 * 2 + j % 2];
          }
        }
      }
      continue;
    }
#pragma unroll 1
    for (int kk = k; kk < k + S::kK / S::kWarpsK; kk += kDepth<float>) {
      FragmentB<float> b[S::kWarpN / 8];
      tile.read_b(b, n, kk);
#pragma unroll
      for (int r = 0; r < S::kWarpM / 16; ++r) {
        FragmentA<float> a;
        tile.read_a(a, m + r * 16, kk);
        mma(sums[r], a, b);
      }
    }
  }
}

// sums += A · B over the item's K. Ends with nothing on its way; shared memory may still be read.
template <class S, Form kForm>
FT_DEVICE void multiply(const MatmulArgs& p, const WorkItem* item, Sums<S>& sums, int warp_m,
                        int warp_n, int warp_k) {
  using T = typename S::T;
  using At = Stage<S, kForm>;
  T* memory = dynamic_shared<T>();
  const WorkItem first = shared_load(item);
  typename At::LoaderA from_a(p.a, first.m, first.k);
  typename At::LoaderB from_b(p.b, first.n, first.k);
  const int64_t depth = first.k_end - first.k;
  const int steps = static_cast<int>((depth + S::kK - 1) / S::kK);
  const int last = static_cast<int>(depth - int64_t{steps - 1} * S::kK);  // of K in the last step
  const auto load = [&](int stage, int step) {
    if (step < steps) {
      At(memory + stage * S::kStage)
          .load(p, from_a, from_b, item, step, step + 1 == steps ? last : S::kK);
    }
    copy_async_commit();
  };
  for (int s = 0; s + 1 < p.stages; ++s) load(s, s);
  if (steps == 0) return;
  const int m = warp_m * S::kWarpM, n = warp_n * S::kWarpN, k = warp_k * (S::kK / S::kWarpsK);
  if constexpr (sizeof(T) == 4) {
    multiply_float<S, kForm>(p, steps, load, sums, m, n, k);
  } else {
    copy_async_wait(p.stages - 2);
    block_barrier();
    int reading = 0, writing = p.stages - 1;
    // B of the next 16 of K has registers of its own; A's are free, 16 rows at a time, when those
    // rows are multiplied, a whole step before they are needed again.
    constexpr int kRows = S::kWarpM / 16;
    FragmentA<T> a[kRows];
    FragmentB<T> b[2][S::kWarpN / 8];
    At(memory).read_b(b[0], n, k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) At(memory).read_a(a[r], m + r * 16, k);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int i = 0; i < S::kSteps; ++i) {
        if (i + 1 == S::kSteps) {
          copy_async_wait(p.stages - 2);
          block_barrier();
          reading = reading + 1 == p.stages ? 0 : reading + 1;
        }
        const At next(memory + reading * S::kStage);
        const int next_k = k + (i + 1) % S::kSteps * kDepth<T>;
        const bool more = i + 1 < S::kSteps || step + 1 < steps;
        if (more) next.read_b(b[(i + 1) % 2], n, next_k);
        if (i == 0) {
          load(writing, step + p.stages - 1);
          writing = writing + 1 == p.stages ? 0 : writing + 1;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          mma(sums[r], a[r], b[i % 2]);
          if (more) next.read_a(a[r], m + r * 16, next_k);
        }
      }
    }
  }
}

// The sum of one element, term by term.
template <class T, Form kForm>
FT_DEVICE float plain_sum(const MatmulArgs& p, const WorkItem& w, int64_t row, int64_t column) {
  float sum = 0.f;
  for (int64_t k = w.k; k < w.k_end && sum == sum; ++k) {
    const T* a = kForm == Form::d_weight ? p.a.at<T>(k, row) : p.a.at<T>(row, k);
    const T* b = kForm == Form::forward ? p.b.at<T>(column, k) : p.b.at<T>(k, column);
    sum += widen(load_scalar(a)) * widen(load_scalar(b));
  }
  return sum;
}

// Where a lane is in the epilogue: its column, and rows kRowsAtOnce apart.
template <class S>
struct Seat {
  int lane, warp_n, warp_k;
  int64_t row, column;  // of the first of 16 rows
  int count;            // columns of its chunk that are inside
};

template <class S>
FT_DEVICE Seat<S> take_seat(const MatmulArgs& p, const WorkItem& w, int warp_m, int warp_n,
                            int warp_k) {
  using T = typename S::T;
  const int lane = lane_index();
  const int64_t column = w.n + warp_n * S::kWarpN + lane % S::kChunks * kLanes<T>;
  const int64_t left = p.n - column;
  return {lane,   warp_n,
          warp_k, w.m + warp_m * S::kWarpM + lane / S::kChunks,
          column, left <= 0 ? 0 : left < kLanes<T> ? static_cast<int>(left) : kLanes<T>};
}

// 16 rows of a warp's sums to its staging memory.
template <class S>
FT_DEVICE void stage_sums(float* mine, const float (&sums)[S::kWarpN / 8][4]) {
  struct alignas(8) Two {
    float x, y;
  };
  const int g = lane_index() / 4, t = lane_index() % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::kWarpN / 8; ++j) {
    float* at = mine + g * S::kPad + j * 8 + t;
    shared_store(reinterpret_cast<Two*>(at), Two{sums[j][0], sums[j][1]});
    shared_store(reinterpret_cast<Two*>(at + 8 * S::kPad), Two{sums[j][2], sums[j][3]});
  }
}

// The lane's chunk of sums in the given turn.
template <class S, Form kForm>
FT_DEVICE void staged_sums(const MatmulArgs& p, const WorkItem& w, const float* mine,
                           const Seat<S>& seat, int64_t row, int turn,
                           float (&x)[kLanes<typename S::T>]) {
  using T = typename S::T;
  const float* at = mine + (seat.lane / S::kChunks + turn * S::kRowsAtOnce) * S::kPad +
                    seat.lane % S::kChunks * kLanes<T>;
#pragma unroll
  for (int i = 0; i < kLanes<T>; i += 4) {
    float sum[4] = {};
#pragma unroll
    for (int part = 0; part < S::kWarpsK; ++part) {
      float four[4];
      unpack<float>(shared_load(reinterpret_cast<const Chunk*>(at + i + part * S::kStaging)), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = part == 0 ? four[j] : sum[j] + four[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i + j] = sum[j];
  }
  if constexpr (sizeof(T) == 4) {
    if (row >= p.m || p.plain) return;
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      if (x[i] != x[i] && i < seat.count) x[i] = plain_sum<T, kForm>(p, w, row, seat.column + i);
    }
  }
}

// Bias, activation, residual, store; or the sums of one split.
template <class S, Form kForm>
FT_DEVICE void write_tile(const MatmulArgs& p, const WorkItem& w, const Sums<S>& sums, int warp_m,
                          int warp_n, int warp_k) {
  using T = typename S::T;
  const Epilogue& e = p.epilogue;
  float* memory = dynamic_shared<float>();
  float* mine = memory + warp_index() * S::kStaging;
  // With kWarpsK > 1 a tile has one warp in m and n: the parts lie behind one another.
  const float* all = S::kWarpsK > 1 ? memory : mine;
  const Seat<S> seat = take_seat<S>(p, w, warp_m, warp_n, warp_k);
  const int64_t strips = (p.n + S::kWarpN - 1) / S::kWarpN;
  const int64_t strip_left = p.n - w.n - warp_n * S::kWarpN;
  const float total = static_cast<float>(strip_left < S::kWarpN ? strip_left : S::kWarpN);
  float bias[kLanes<T>];
  load_vector(e.bias, seat.column, p.n, 0.f, bias);
#pragma unroll 1
  for (int slab = 0; slab < S::kWarpM / 16; ++slab) {
    warp_barrier();
#pragma unroll
    for (int s = 0; s < S::kWarpM / 16; ++s) {
      if (s == slab) stage_sums<S>(mine, sums[s]);
    }
    if constexpr (S::kWarpsK > 1) {
      block_barrier();
    } else {
      warp_barrier();
    }
#pragma unroll 1
    for (int turn = warp_k; turn < S::kTurns; turn += S::kWarpsK) {
      const int64_t row = seat.row + slab * 16 + turn * S::kRowsAtOnce;
      const bool inside = row < p.m && seat.count > 0;
      float x[kLanes<T>];
      staged_sums<S, kForm>(p, w, all, seat, row, turn, x);
      if (p.splits > 1) {
        float* to = p.split_sums + (int64_t{w.split} * p.m + row) * p.sum_stride + seat.column;
#pragma unroll
        for (int i = 0; i < kLanes<T>; i += 4) {
          const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
          if (inside) store16(to + i, pack<float>(four));
        }
        continue;
      }
      Chunk y = {};
      if (inside) {
        y = finish<true, T>(e, x, bias, row, seat.column, p.n);
        store_out<T>(e.out, row, seat.column, p.n, y);
      }
      if (e.moments != nullptr) {
        const Pair moments = strip_moments<S::kChunks, T>(y, seat.count, total, e.centred);
        if (inside && seat.lane % S::kChunks == 0) {
          float* to = e.moments + 2 * (row * strips + seat.column / S::kWarpN);
          store_scalar(to, moments.a);
          store_scalar(to + 1, moments.b);
        }
      }
    }
  }
}

// Sum, statistics and norm of whole rows, which wait for the statistics as rounded chunks.
template <class S, Form kForm>
FT_DEVICE void write_normed(const MatmulArgs& p, const WorkItem& w, const Sums<S>& sums, int warp_m,
                            int warp_n) {
  using T = typename S::T;
  static_assert(S::kWarpsK == 1 && S::kThreads >= S::kM);
  constexpr int kSlabs = S::kWarpM / 16;
  const Epilogue& e = p.epilogue;
  float* mine = dynamic_shared<float>() + warp_index() * S::kStaging;
  Pair* moments = reinterpret_cast<Pair*>(dynamic_shared<float>() + S::kWarps * S::kStaging);
  Pair* statistics = moments + S::kM * S::kWarpsN;
  const Seat<S> seat = take_seat<S>(p, w, warp_m, warp_n, 0);
  const int64_t strip_left = p.n - warp_n * S::kWarpN;
  const float total = static_cast<float>(strip_left <= 0          ? 0
                                         : strip_left < S::kWarpN ? strip_left
                                                                  : S::kWarpN);
  float bias[kLanes<T>];
  load_vector(e.bias, seat.column, p.n, 0.f, bias);
  Chunk held[kSlabs][S::kTurns];
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    warp_barrier();
    stage_sums<S>(mine, sums[slab]);
    warp_barrier();
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const int local = slab * 16 + turn * S::kRowsAtOnce;
      const int64_t row = seat.row + local;
      const bool inside = row < p.m && seat.count > 0;
      float x[kLanes<T>];
      staged_sums<S, kForm>(p, w, mine, seat, row, turn, x);
      Chunk y = {};
      if (inside) {
        y = finish<false, T>(e, x, bias, row, seat.column, p.n);
        if (p.norm.write_sum) store_out<T>(e.out, row, seat.column, p.n, y);
      }
      const Pair strip = strip_moments<S::kChunks, T>(y, seat.count, total, e.centred);
      if (seat.lane % S::kChunks == 0) {
        const int r = warp_m * S::kWarpM + seat.lane / S::kChunks + local;
        shared_store(moments + r * S::kWarpsN + warp_n, strip);
      }
      held[slab][turn] = y;
      keep_packed(held[slab][turn]);
    }
  }
  block_barrier();
  const int thread = thread_index();
  if (thread < S::kM) {
    Moments row = {0.f, 0.f, 0.f};
    float scale = 1.f;
    for (;;) {  // once, but for rows whose squares overflow
      for (int i = 0; i < S::kWarpsN; ++i) {
        const int64_t left = p.n - i * S::kWarpN;
        if (left <= 0) break;
        const Pair strip = shared_load(moments + thread * S::kWarpsN + i);
        const Moments next =
            scaled_moments(static_cast<float>(left < S::kWarpN ? left : S::kWarpN), strip.a,
                           strip.b, scale);
        row = i == 0 ? next : merge(row, next);
      }
      if (row.m2 <= kMostVariance || scale != 1.f) break;
      scale = kDownscale;
    }
    const Pair found = row_statistics(row, p.n, p.norm.eps, scale);
    shared_store(statistics + thread, found);
    if (w.m + thread < p.m) {
      if (p.norm.mean != nullptr) store_scalar(p.norm.mean + w.m + thread, found.a);
      store_scalar(p.norm.rstd + w.m + thread, found.b);
    }
  }
  block_barrier();
  float weight[kLanes<T>], shift[kLanes<T>];
  load_vector(p.norm.weight, seat.column, p.n, 1.f, weight);
  load_vector(p.norm.bias, seat.column, p.n, 0.f, shift);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const int local = slab * 16 + turn * S::kRowsAtOnce;
      const int64_t row = seat.row + local;
      if (row >= p.m || seat.count == 0) continue;
      const Pair found =
          shared_load(statistics + warp_m * S::kWarpM + seat.lane / S::kChunks + local);
      store_chunk(static_cast<T*>(p.norm.normed) + row * p.n, seat.column, p.n, p.norm.aligned,
                  norm_chunk<T>(held[slab][turn], found, weight, shift));
    }
  }
}

template <class S, Form kForm, bool kNorm>
FT_GLOBAL void __launch_bounds__(S::kThreads, S::kBlocks) linear_product(const MatmulArgs p) {
  // In shared memory, as the product has no register to spare for it.
  FT_SHARED_ARRAY(WorkItem, item, 1);
  const int warp = warp_index();
  const int warp_n = warp % S::kWarpsN, warp_m = warp / S::kWarpsN % S::kWarpsM;
  const int warp_k = warp / (S::kWarpsN * S::kWarpsM);
  for (int64_t index = blockIdx.x; index < p.items; index += gridDim.x) {
    if (thread_index() == 0) shared_store(item, work_item<S>(p, index));
    block_barrier();
    Sums<S> sums = {};
    multiply<S, kForm>(p, item, sums, warp_m, warp_n, warp_k);
    block_barrier();  // the tiles' memory is the epilogue's now
    const WorkItem w = shared_load(item);
    if constexpr (kNorm) {
      write_normed<S, kForm>(p, w, sums, warp_m, warp_n);
    } else {
      write_tile<S, kForm>(p, w, sums, warp_m, warp_n, warp_k);
    }
    block_barrier();  // and the next tile's
  }
}

template <class T, TileKind kKind, Form kForm>
void launch_tile(const char* name, const ProductPlan& plan, const MatmulArgs& args, void* stream) {
  using S = typename ShapeOf<T, kKind>::Is;
  constexpr bool kNorm = kKind == TileKind::row256 || kKind == TileKind::row512;
  launch(name, linear_product<S, kForm, kNorm>, grid_for(args.items, 1), S::kThreads, plan.shared,
         stream, args);
}

template <class T>
void launch_product(const char* name, Form form, const ProductPlan& plan, const MatmulArgs& args,
                    void* stream) {
  const auto with = [&]<Form kForm>() {
    if (plan.kind == TileKind::large) {
      return launch_tile<T, TileKind::large, kForm>(name, plan, args, stream);
    }
    if constexpr (kForm == Form::forward) {
      if (plan.kind == TileKind::skinny) {
        return launch_tile<T, TileKind::skinny, kForm>(name, plan, args, stream);
      }
      if constexpr (sizeof(T) == 2) {
        if (plan.kind == TileKind::row256) {
          return launch_tile<T, TileKind::row256, kForm>(name, plan, args, stream);
        }
        if (plan.kind == TileKind::row512) {
          return launch_tile<T, TileKind::row512, kForm>(name, plan, args, stream);
        }
      }
    }
    launch_tile<T, TileKind::medium, kForm>(name, plan, args, stream);
  };
  switch (form) {
    case Form::forward: return with.template operator()<Form::forward>();
    case Form::d_input: return with.template operator()<Form::d_input>();
    case Form::d_weight: return with.template operator()<Form::d_weight>();
  }
}

}  // namespace ft::cuda
