// Which tile a product takes, in how many splits of K, and where its rows are normed: one estimate
// of time for each choice, in multiply-adds that one SM could have done meanwhile, and the least
// wins. No number was measured: no GPU was at hand.
//   product   ⌈tiles · splits / SMs⌉ · tile's m · n · (K / splits + kFill) / the tile's rate
//   splits    a launch, and their float sums written and read; none where tiles fill all SMs
//   norm      in the tile (rows that fit one, 16-bit): nothing more; else a launch, and rows read
//             and written once more
// Float takes kFloatTimes as long: four products at half the rate.
#include "cuda/linear_add/matmul.h"
#include "cuda/linear_add/rows.h"

namespace ft::cuda {
namespace {

constexpr double kFill = 128;    // K's worth of time that a tile's start and end take
constexpr double kLaunch = 3e6;  // 2 µs of an A100's SM
constexpr double kFloatTimes = 8;
constexpr double kPerByte = 100;       // an A100's 156e12 multiply-adds by 1.55e12 bytes a second
constexpr double kPerCachedByte = 40;  // L2 is some 2.5 times as fast
constexpr int64_t kLeastSplit = 256;   // of K
constexpr int kMostSplits = 64;
// Float goes without tensor cores on sm_86, sm_89 and sm_120, known by their shared memory: their
// tf32 is at most as fast as their float, of which four products make a quarter. And for short
// sums: two tf32 hold 23 of a float's 24 bits, which only a longer sum's own rounding hides.
constexpr int64_t kSmallShared = 100 * 1024;
constexpr int64_t kPlainDepth = 64;
constexpr int kSkinnyRows = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles in flight: as many as leave room for the tile's blocks on an SM; 0: the tile has no room.
int stages_for(const TileSpec& t, int64_t shared) {
  const int64_t stage = int64_t{t.m + t.n} * t.depth;
  for (int blocks = t.blocks; blocks > 0; --blocks) {
    // An SM has what a block can have and the system's share of one block. That share is left free
    // for a single block too, since from sm_90 on it counts among a kernel's static bytes.
    const int64_t on_sm = (shared + kSystemShared) / blocks;
    const int64_t room = (on_sm < shared ? on_sm : shared) - kSystemShared - kItemBytes;
    const int64_t fit = room / stage < t.stages ? room / stage : t.stages;
    if (fit >= 3 || (blocks == 1 && fit == 2)) return static_cast<int>(fit);
  }
  return 0;
}

int64_t shared_bytes(const TileSpec& t, int stages) {
  const int warps = t.warps_m * t.warps_n * t.warps_k;
  const int64_t staging = int64_t{warps} * 16 * (t.n / t.warps_n + 8) * 4;
  const int64_t statistics = int64_t{t.m} * (t.warps_n + 1) * 8;
  const int64_t tiles = int64_t{t.m + t.n} * t.depth * stages;
  return tiles > staging + statistics ? tiles : staging + statistics;
}

struct Problem {
  int64_t m, n, k;
  bool is_float, norm;
  int sms;
  int64_t shared;

  int size() const { return is_float ? 4 : 2; }
  int lanes() const { return 16 / size(); }
};

// The plan with `splits`, or fewer where a split would be empty; without a cost where impossible.
ProductPlan plan_with(const Problem& p, TileKind kind, int splits) {
  const TileSpec& t = tile_spec(p.is_float, kind);
  ProductPlan plan;
  plan.cost = -1;
  if (t.m == 0 || (plan.stages = stages_for(t, p.shared)) == 0) return plan;
  const int64_t deep = t.depth / p.size();
  plan.kind = kind;
  plan.plain = p.is_float && (p.shared <= kSmallShared || p.k <= kPlainDepth);
  plan.per_split = ceil_div(ceil_div(p.k, splits), deep) * deep;
  if (plan.per_split == 0) plan.per_split = deep;
  plan.splits = p.k == 0 ? 1 : static_cast<int>(ceil_div(p.k, plan.per_split));
  plan.tiles = ceil_div(p.m, t.m) * ceil_div(p.n, t.n);
  plan.shared = shared_bytes(t, plan.stages);
  plan.sum_stride = ceil_div(p.n, 8) * 8;
  plan.strip = plan.splits > 1 ? kWarp * p.lanes() : t.n / t.warps_n;
  const double sms = p.sms, items = static_cast<double>(plan.tiles) * plan.splits;
  double waves = static_cast<double>(ceil_div(plan.tiles * plan.splits, p.sms));
  if (kind == TileKind::skinny) waves = items > sms ? items / sms : 1;  // they share memory's rate
  plan.cost = waves * t.m * t.n * (static_cast<double>(plan.per_split) + kFill) / t.rate *
              (p.is_float ? kFloatTimes : 1);
  const double elements = static_cast<double>(p.m) * static_cast<double>(p.n);
  if (plan.splits > 1) plan.cost += kLaunch + elements * plan.splits * 8 * kPerCachedByte / sms;
  if (p.norm && !plan.norms_rows()) {
    plan.cost += kLaunch + elements * 2 * p.size() * kPerByte / sms;
  }
  return plan;
}

void take_better(ProductPlan& best, const ProductPlan& other) {
  if (other.cost >= 0 && (best.cost < 0 || other.cost < best.cost)) best = other;
}

}  // namespace

ProductPlan plan_product(const char* name, DType dtype, Form form, int64_t m, int64_t n, int64_t k,
                         bool norm) {
  const Problem p = {
      m, n, k, dtype == DType::f32, norm, multiprocessors(name), max_shared_memory(name)};
  ProductPlan best;
  best.cost = -1;
  for (TileKind kind : {TileKind::large, TileKind::medium, TileKind::skinny}) {
    if ((kind == TileKind::skinny) != (form == Form::forward && m <= kSkinnyRows)) continue;
    for (int splits = 1; splits <= kMostSplits; splits += splits < 4 ? 1 : splits / 4) {
      if (splits > 1 && ceil_div(k, splits) < kLeastSplit) break;
      const ProductPlan plan = plan_with(p, kind, splits);
      if (plan.splits > 1 && plan.tiles > p.sms) break;  // sums as large as C several times
      take_better(best, plan);
    }
  }
  if (best.cost < 0) best = plan_with(p, TileKind::medium, 1);
  if (norm && n <= 512) {
    take_better(best, plan_with(p, n <= 256 ? TileKind::row256 : TileKind::row512, 1));
  }
  if (best.cost < 0) {
    throw std::runtime_error(std::string("fasttransformer: ") + name +
                             ": too little shared memory on this device");
  }
  return best;
}

int64_t product_workspace(const ProductPlan& plan, int64_t m, int64_t n, bool norm) {
  return plan.sum_floats(m) + (norm && !plan.norms_rows() ? 2 * m * plan.strips(n) : 0);
}

void run_product(const char* name, DType dtype, Form form, const ProductPlan& plan, MatmulArgs args,
                 float* workspace, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  const bool norm = args.norm.normed != nullptr;
  float* moments = norm && !plan.norms_rows() ? workspace + plan.sum_floats(args.m) : nullptr;
  args.stages = plan.stages;
  args.splits = plan.splits;
  args.plain = plan.plain;
  args.items = plan.tiles * plan.splits;
  args.per_split = plan.per_split;
  args.sum_stride = plan.sum_stride;
  args.split_sums = workspace;
  args.epilogue.moments = moments;
  with_type(dtype, [&]<class T>() {
    launch_product<T>(name, form, plan, args, stream);
    const int64_t per_block = kRowBlock / kWarp;
    if (plan.splits > 1) {
      const int64_t strips = ceil_div(args.n, kStripOf<T>);
      launch(name, linear_sum_splits<T>, grid_for(args.m * strips, per_block), kRowBlock, 0, stream,
             {args.epilogue, workspace, plan.splits, args.m, args.n, plan.sum_stride});
    }
    if (moments != nullptr) {
      const int64_t segments = ceil_div(args.n, int64_t{kStripOf<T>} * kNormTurns);
      launch(name, linear_norm_rows<T>, grid_for(args.m * segments, per_block), kRowBlock, 0,
             stream,
             {args.norm, args.epilogue.out.data, moments, plan.strip, args.epilogue.out.width == 16,
              args.m, args.n});
    }
  });
}

// ---- column sums --------------------------------------------------------------------------------

namespace {

ColumnArgs column_plan(DType dtype, int64_t m, int64_t n) {
  const int64_t strip = kWarp * (dtype == DType::f32 ? 4 : 8);
  constexpr int64_t kLeastRows = 64, kMost = 64, kBlocks = 512;
  int64_t splits = kBlocks / ceil_div(n, strip);
  if (splits > kMost) splits = kMost;
  if (splits > ceil_div(m, kLeastRows)) splits = ceil_div(m, kLeastRows);
  if (splits < 1) splits = 1;
  ColumnArgs a;
  a.m = m;
  a.n = n;
  a.per_split = ceil_div(m, splits);
  a.splits = m == 0 ? 1 : static_cast<int>(ceil_div(m, a.per_split));
  a.stride = ceil_div(n, 8) * 8;
  return a;
}

}  // namespace

int64_t column_sums_workspace(DType dtype, int64_t m, int64_t n) {
  const ColumnArgs a = column_plan(dtype, m, n);
  return n == 0 ? 0 : a.splits * a.stride;
}

void run_column_sums(const char* name, DType dtype, const Matrix& rows, void* out, float* workspace,
                     void* stream) {
  if (rows.columns == 0) return;
  ColumnArgs a = column_plan(dtype, rows.rows, rows.columns);
  a.rows = rows.data;
  a.row_stride = rows.row_stride;
  a.aligned = rows.width == 16;
  a.sums = workspace;
  with_type(dtype, [&]<class T>() {
    const int64_t strips = ceil_div(a.n, kStripOf<T>);
    launch(name, linear_column_sums<T>, grid_for(strips * a.splits, 1), kRowBlock, 0, stream, a);
    SumArgs sum;
    sum.epilogue.out = row_matrix(out, 1, a.n, a.n, dtype);
    sum.sums = workspace;
    sum.splits = a.splits;
    sum.m = 1;
    sum.n = a.n;
    sum.stride = a.stride;
    launch(name, linear_sum_splits<T>, grid_for(strips, kRowBlock / kWarp), kRowBlock, 0, stream,
           sum);
  });
}

// ---- params -------------------------------------------------------------------------------------

namespace {

// The widest access that fits all of an operand's chunks.
int width_of(const Matrix& m, DType dtype) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const int64_t all =
      reinterpret_cast<intptr_t>(m.data) |
      (m.row_stride | m.outer_stride | m.head_dim | (m.head_dim ? m.head_stride : 0)) * size;
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 0;
}

}  // namespace

Matrix row_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, DType dtype) {
  Matrix m;
  m.data = data;
  m.rows = rows;
  m.columns = columns;
  m.row_stride = stride;
  m.width = width_of(m, dtype);
  return m;
}

Matrix input_matrix(const LinearAddParams& p, const void* data, bool contiguous) {
  if (p.inner_rows == INT64_MAX) {
    return row_matrix(data, p.rows, p.in_features, contiguous ? p.in_features : p.row_stride,
                      p.dtype);
  }
  Matrix m;
  m.data = data;
  m.rows = p.rows;
  m.columns = p.in_features;
  m.inner_rows = p.inner_rows;
  m.row_stride = contiguous ? p.head_dim : p.row_stride;
  m.outer_stride = contiguous ? p.inner_rows * p.in_features : p.outer_stride;
  if (p.heads != 1) {
    m.head_dim = p.head_dim;
    m.head_stride = contiguous ? p.inner_rows * p.head_dim : p.head_stride;
  }
  if (m.outer_stride == m.inner_rows * m.row_stride || p.rows <= m.inner_rows) {
    m.inner_rows = m.outer_stride = 0;
  }
  m.width = width_of(m, p.dtype);
  return m;
}

MatmulArgs forward_args(const LinearAddParams& p) {
  MatmulArgs a;
  a.m = p.rows;
  a.n = p.out_features;
  a.k = p.in_features;
  a.a = input_matrix(p, p.input, false);
  a.b = row_matrix(p.weight, p.out_features, p.in_features, p.in_features, p.dtype);
  a.epilogue.bias = p.bias;
  a.epilogue.activation = p.activation;
  a.epilogue.residual = p.residual;
  a.epilogue.dropout = p.dropout;
  a.epilogue.residual_stride = p.residual_stride;
  a.epilogue.residual_aligned =
      row_matrix(p.residual, p.rows, p.out_features, p.residual_stride, p.dtype).width == 16;
  a.epilogue.out = row_matrix(p.output, p.rows, p.out_features, p.out_features, p.dtype);
  return a;
}

int64_t linear_add_norm_workspace(const LinearAddNormParams& p) {
  const LinearAddParams& l = p.linear;
  const ProductPlan plan = plan_product("linear_add_norm", l.dtype, Form::forward, l.rows,
                                        l.out_features, l.in_features, true);
  return product_workspace(plan, l.rows, l.out_features, true);
}

void linear_add_norm(const char* name, const LinearAddNormParams& p, void* stream) {
  const LinearAddParams& l = p.linear;
  const ProductPlan plan =
      plan_product(name, l.dtype, Form::forward, l.rows, l.out_features, l.in_features, true);
  MatmulArgs a = forward_args(l);
  a.epilogue.centred = p.norm.mean != nullptr;
  a.norm = {p.norm.weight,
            p.norm.bias,
            p.norm.normed,
            p.norm.mean,
            p.norm.rstd,
            p.norm.eps,
            row_matrix(p.norm.normed, l.rows, l.out_features, l.out_features, l.dtype).width == 16,
            l.output != p.norm.normed};
  run_product(name, l.dtype, Form::forward, plan, a, l.workspace, stream);
}

}  // namespace ft::cuda
