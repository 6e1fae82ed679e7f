// Cross entropy of a linear layer's output, and its gradients, without the logits of all rows.
//   Lᵀ = W · Xᵀ + b,   G = ∂loss/∂Lᵀ,   d_input = Gᵀ · W,   d_weight = G · X,   d_bias = Σ_rows G
// Rows that count are taken a chunk at a time. A chunk's logits lie with the rows side by side, a
// line of them for each class: W is then multiplied where it lies, a lane of a vector is a row, and
// all three products read the buffer from its first line to its last. A finished tile of logits, in
// cache, gives its own maxima and sums (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018, tile by tile); without gradients nothing else is kept of it. With them the
// exponentials are stored, and turned into G in place once the rows' sums are known, in the same
// call: three products for loss and gradients (Hsu et al., Liger Kernel, 2024, arXiv:2410.10989,
// section 3.2). Backward, for gradients of single losses, logits are made again. Bound by
// arithmetic.
#include "params/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/columns.h"
#include "cpu/gemm.h"
#include "cpu/own_vector.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kLogitsBytes = int64_t{32} << 20;  // of a chunk, or of kLeastRows rows
constexpr int64_t kLeastRows = 3 * NR;
constexpr int64_t kMostRows = 1536;  // a tile spans them; with gradients:
constexpr int64_t kMostGradientRows = 1024;

// Classes are shared out to threads in kShares parts, or fewer whose sums for d_input fit.
constexpr int64_t kShares = 32;
constexpr int64_t kShareBytes = int64_t{16} << 20;
constexpr int64_t kTilesAtOnce = 4;  // of a share: their G stays in L2

constexpr int64_t kTile = kBlockRows;  // classes of a tile of logits
constexpr int kAtOnce = 4;             // classes in flight: more than the latency of an addition

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t id_at(const IdsArg& ids, int64_t i) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[i]
                  : static_cast<const int32_t*>(ids.data)[i];
}

// What a call needs beside its chunks.
struct Call {
  const LinearCrossEntropyParams& p;
  OwnVector<int64_t> kept;               // the rows that count
  OwnVector<float> bias, class_weights;  // empty: zeros, ones
  OwnVector<double> tile_weights;        // sums of the classes' weights
  double weight_sum = 0, row_grad = 1;   // forward, each row's grad
  bool gradients;

  explicit Call(const LinearCrossEntropyParams& params)
      : p(params), gradients(params.d_input || params.d_weight || params.d_bias) {
    widen(p.bias, bias);
    widen(p.class_weight, class_weights);
    tile_weights.resize(static_cast<size_t>(ceil_div(p.classes, kTile)));
    for (int64_t c = 0; c < p.classes; ++c) {
      tile_weights[static_cast<size_t>(c / kTile)] += weight_of(c);
    }
    for (const double w : tile_weights) weight_sum += w;
    double total = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t y = id_at(p.target, r);
      if (y == p.ignore_index) continue;
      kept.push_back(r);
      total += weight_of(y);
    }
    if (p.mean) row_grad = 1 / total;
  }

  void widen(const VectorArg& vector, OwnVector<float>& out) const {
    if (vector.data == nullptr) return;
    out.resize(static_cast<size_t>(p.classes));
    widen_vector(vector, p.classes, out.data());
  }
  float weight_of(int64_t c) const {
    return class_weights.empty() ? 1.f : class_weights[static_cast<size_t>(c)];
  }
};

// A chunk of rows. Lane j of the arrays is row rows[j] of the batch; all lanes are padded to
// `stride`.
struct Chunk {
  const Call& call;
  const int64_t* rows = nullptr;
  int64_t count = 0, stride = 0, tiles = 0;  // rows, floats of a line, tiles of classes
  // (classes, stride): exponentials, then G in their place; null: not wanted. A line has room for
  // the wider of both.
  char* lines = nullptr;
  int64_t line_bytes = 0;
  float *tops = nullptr, *sums = nullptr, *smooth = nullptr;  // (tiles, stride)
  float *top = nullptr, *log_sum = nullptr, *target_logit = nullptr;
  float* target_share = nullptr;  // scale · p at the target
  // G = scale · p − hot at the target − even · class weight
  float *scale = nullptr, *hot = nullptr, *even = nullptr;
  int32_t* target = nullptr;
  int64_t shares = 1;
  float* d_input = nullptr;     // (shares, stride, features)
  const void* input = nullptr;  // the chunk's rows, `input_stride` elements apart
  int64_t input_stride = 0;

  template <class T>
  T* line(int64_t v) const {
    return reinterpret_cast<T*>(lines + v * line_bytes);
  }
};

template <class F>
FT_INLINE void over_lanes(int64_t n, const F& f) {
  over_columns<1>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) { f(j, part); });
}

// ---- a tile of logits -------------------------------------------------------------------------

void add_bias(const GemmTile& tile, const Call& call) {
  if (call.bias.empty()) return;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const vf b = splat(call.bias[static_cast<size_t>(tile.row + i)]);
    float* line = tile.data + i * tile.stride;
    for (int64_t j = 0; j < tile.columns; j += W) store(line + j, load(line + j) + b);
  }
}

// The tile's maxima and sums, and the targets' logits; its exponentials as E, if not void.
template <class E>
void summarize(const GemmTile& tile, const void* context) {
  const Chunk& c = *static_cast<const Chunk*>(context);
  const bool smooth = c.call.p.label_smoothing != 0.f;
  const float* weights = c.call.class_weights.empty() ? nullptr : c.call.class_weights.data();
  add_bias(tile, c.call);
  for (int64_t j = 0; j < tile.columns; ++j) {
    const int64_t i = c.target[tile.column + j] - tile.row;
    if (i >= 0 && i < tile.rows) c.target_logit[tile.column + j] = tile.data[i * tile.stride + j];
  }
  const int64_t at = tile.row / kTile * c.stride + tile.column;
  over_lanes(tile.columns, [&](int64_t j, auto part) __attribute__((always_inline)) {
    const float* x = tile.data + j;
    vf high[kAtOnce], sum[kAtOnce] = {};
    for (vf& h : high) h = splat(-INFINITY);
    int64_t i = 0;
    for (; i + kAtOnce <= tile.rows; i += kAtOnce) {
      FT_UNROLL for (int u = 0; u < kAtOnce; ++u) {
        high[u] = max(load(x + (i + u) * tile.stride), high[u]);
      }
    }
    for (; i < tile.rows; ++i) high[0] = max(load(x + i * tile.stride), high[0]);
    const vf top = max(max(high[0], high[1]), max(high[2], high[3]));
    const vf about = select(top == splat(-INFINITY), zero(), top);  // −inf less −inf is NaN
    const auto exponential = [&](int64_t row) __attribute__((always_inline)) {
      const vf e = exp_below(load(x + row * tile.stride) - about);
      if constexpr (!std::is_void_v<E>) {
        store(c.line<E>(tile.row + row) + tile.column + j, e, part);
      }
      return e;
    };
    for (i = 0; i + kAtOnce <= tile.rows; i += kAtOnce) {
      FT_UNROLL for (int u = 0; u < kAtOnce; ++u) sum[u] += exponential(i + u);
    }
    for (; i < tile.rows; ++i) sum[0] += exponential(i);
    store(c.tops + at + j, top, part);
    store(c.sums + at + j, (sum[0] + sum[1]) + (sum[2] + sum[3]), part);
    if (smooth) {  // Σ w · (x − about): of small terms, so that the sum keeps its digits
      vf total = zero();
      for (i = 0; i < tile.rows; ++i) {
        const vf d = load(x + i * tile.stride) - about;
        total = weights ? fma(splat(weights[tile.row + i]), d, total) : total + d;
      }
      store(c.smooth + at + j, total, part);
    }
  });
}

// ---- G ----------------------------------------------------------------------------------------

// n lanes from `from` on of G of class v, whose share of p is share(j, part); their sum. With
// Rounded shares the target's, of which scale may leave little, is taken from `target_share`.
template <class T, bool Rounded, class S>
FT_INLINE float gradient_line(const Chunk& c, int64_t v, int64_t from, int64_t n, T* out,
                              const S& share) {
  const vf weight = splat(-c.call.weight_of(v));
  const vi here = splat_int(static_cast<int32_t>(v));
  vf total = zero();
  over_lanes(n, [&](int64_t j, auto part) __attribute__((always_inline)) {
    vi target;
    std::memcpy(&target, c.target + from + j, sizeof(target));
    vf p = share(j, part);
    if constexpr (Rounded) p = select(target == here, load(c.target_share + from + j), p);
    vf g = fma(weight, load(c.even + from + j), p);
    g -= select(target == here, load(c.hot + from + j), zero());
    total += keep(g, part);
    store(out + j, g, part);
  });
  return reduce_add(total);
}

struct Gradient {
  const Chunk& chunk;
  float* d_bias;  // null: not wanted
};

// Exponentials, of E, become G in place, for classes [first, last). A narrower T is written before
// what is still to be read.
template <class E, class T>
void gradient_of_exponentials(const Gradient& g, int64_t first, int64_t last) {
  const Chunk& c = g.chunk;
  for (int64_t v = first; v < last; ++v) {
    const E* line = c.line<E>(v);
    const float* factor = c.tops + v / kTile * c.stride;
    const auto share = [&](int64_t j, auto part) __attribute__((always_inline)) {
      return load(line + j, part) * load(factor + j);
    };
    const float sum =
        gradient_line<T, sizeof(E) != sizeof(float)>(c, v, 0, c.count, c.line<T>(v), share);
    if (g.d_bias) g.d_bias[v] += sum;
  }
}

// A tile of logits becomes G by the rows' statistics.
template <class T>
void gradient_of_logits(const GemmTile& tile, const void* context) {
  const Gradient& g = *static_cast<const Gradient*>(context);
  const Chunk& c = g.chunk;
  add_bias(tile, c.call);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t v = tile.row + i;
    const float* x = tile.data + i * tile.stride;
    T* out = c.line<T>(v) + tile.column;
    const auto share = [&](int64_t j, auto) __attribute__((always_inline)) {
      const int64_t at = tile.column + j;
      return load(c.scale + at) * exp((load(x + j) - load(c.top + at)) - load(c.log_sum + at));
    };
    const float sum = gradient_line<T, false>(c, v, tile.column, tile.columns, out, share);
    if (g.d_bias) g.d_bias[v] += sum;
  }
}

// ---- statistics -------------------------------------------------------------------------------

// Lane j's gradient in terms of p.
void set_gradient(const Chunk& c, int64_t j, float grad, const RowStatistics& s) {
  const LinearCrossEntropyParams& p = c.call.p;
  c.hot[j] = grad * (1.f - p.label_smoothing) * s.target_weight;
  c.even[j] = grad * (p.label_smoothing / static_cast<float>(p.classes));
  c.scale[j] = c.hot[j] + c.even[j] * s.weight_sum;
}

// The tiles' maxima and sums as the rows': their statistics and losses.
void merge(const Chunk& c) {
  const LinearCrossEntropyParams& p = c.call.p;
  float* sum_of = c.log_sum;
  over_lanes(c.count, [&](int64_t j, auto) __attribute__((always_inline)) {
    vf top = splat(-INFINITY), sum = zero();
    for (int64_t t = 0; t < c.tiles; ++t) top = max(load(c.tops + t * c.stride + j), top);
    for (int64_t t = 0; t < c.tiles; ++t) {
      const int64_t at = t * c.stride + j;
      sum = fma(load(c.sums + at), exp_below(load(c.tops + at) - top), sum);
    }
    store(c.top + j, top);
    store(sum_of + j, sum);
  });
  const double s = p.label_smoothing;
  for (int64_t j = 0; j < c.count; ++j) {
    RowStatistics stats = {c.top[j], __builtin_logf(sum_of[j]), c.call.weight_of(c.target[j]),
                           static_cast<float>(c.call.weight_sum)};
    // Less the maximum first: what is left is exact where it is small.
    const double below = static_cast<double>(c.target_logit[j]) - stats.top;
    double loss = (1 - s) * stats.target_weight * (stats.log_sum - below);
    if (s != 0) {
      double total = 0;  // Σ w · (x − top)
      for (int64_t t = 0; t < c.tiles; ++t) {
        const int64_t at = t * c.stride + j;
        const float about = c.tops[at] == -INFINITY ? 0.f : c.tops[at];
        total += c.smooth[at] + c.call.tile_weights[static_cast<size_t>(t)] *
                                    (static_cast<double>(about) - stats.top);
      }
      const double even = s / static_cast<double>(p.classes);
      loss += even * (c.call.weight_sum * stats.log_sum - total);
    }
    p.losses[c.rows[j]] = static_cast<float>(loss);
    p.statistics[c.rows[j]] = stats;
    set_gradient(c, j, static_cast<float>(c.call.row_grad), stats);
    c.scale[j] /= sum_of[j];
    c.target_share[j] = c.scale[j] * __builtin_expf(static_cast<float>(below));
  }
}

// `tops` become what makes p's share of G of the tiles' exponentials.
void set_factors(const Chunk& c) {
  over_lanes(c.count, [&](int64_t j, auto) __attribute__((always_inline)) {
    const vf top = load(c.top + j), scale = load(c.scale + j);
    for (int64_t t = 0; t < c.tiles; ++t) {
      float* at = c.tops + t * c.stride + j;
      store(at, exp_below(load(at) - top) * scale);
    }
  });
}

// ---- products ---------------------------------------------------------------------------------

void multiply_logits(const Chunk& c, GemmEpilogue epilogue, const void* context) {
  const LinearCrossEntropyParams& p = c.call.p;
  Gemm g;
  g.dtype = p.dtype;
  g.rows = p.classes;
  g.columns = c.count;
  g.depth = p.features;
  g.a.data = p.weight;
  g.a.row_stride = p.features;
  g.b = {c.input, true, c.input_stride};
  g.fixed_tiles = true;
  g.epilogue = epilogue;
  g.context = context;
  gemm(g);
}

// Where a sum over chunks or tiles lies, and where it goes after the last of them.
struct Sum {
  float* total;
  void* out;  // null: stays
  int64_t stride;
  bool first, last;
};

template <class T>
void add_up(const GemmTile& tile, const void* context) {
  const Sum& s = *static_cast<const Sum*>(context);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t at = (tile.row + i) * s.stride + tile.column;
    const float* x = tile.data + i * tile.stride;
    over_lanes(tile.columns, [&](int64_t j, auto part) __attribute__((always_inline)) {
      vf y = load(x + j, part);
      if (!s.first) y += load(s.total + at + j, part);
      if (s.last) {
        store(static_cast<T*>(s.out) + at + j, y, part);
      } else {
        store(s.total + at + j, y, part);
      }
    });
  }
}

// G, of type TG, as the left operand of a product.
template <class T, class TG>
Gemm product_of_gradient(const Chunk& c, int64_t from_class) {
  const LinearCrossEntropyParams& p = c.call.p;
  Gemm g;
  g.dtype = p.dtype;
  g.wide_a = sizeof(TG) != sizeof(T);
  g.columns = p.features;
  g.a.data = c.line<TG>(from_class);
  g.a.row_stride = c.line_bytes / static_cast<int64_t>(sizeof(TG));
  g.epilogue = add_up<T>;
  return g;
}

// Classes [first, last), on this thread: G where it is not there yet, and their part in the sums.
// `d_input` is this share's.
template <class T, class E, class TG>
void take_share(const Gradient& gradient, int64_t first, int64_t last, const Sum& d_weight,
                float* d_input) {
  const Chunk& c = gradient.chunk;
  const LinearCrossEntropyParams& p = c.call.p;
  for (int64_t v = first; v < last; v += kTilesAtOnce * kTile) {
    const int64_t classes = std::min(kTilesAtOnce * kTile, last - v), at = v * p.features;
    if (p.losses) gradient_of_exponentials<E, TG>(gradient, v, v + classes);
    Gemm g = product_of_gradient<T, TG>(c, v);
    g.one_thread = true;
    if (p.d_weight) {
      const Sum sum = {d_weight.total + at, static_cast<T*>(d_weight.out) + at, p.features,
                       d_weight.first, d_weight.last};
      g.rows = classes;
      g.depth = c.count;
      g.b = {c.input, false, c.input_stride};
      g.context = &sum;
      gemm(g);
    }
    if (p.d_input) {
      const Sum sum = {d_input, nullptr, p.features, v == first, false};
      g.a.transposed = true;
      g.rows = c.count;
      g.depth = classes;
      g.b = {static_cast<const T*>(p.weight) + at, false, p.features};
      g.context = &sum;
      gemm(g);
    }
  }
}

// All shares, in whatever order threads come to them, and d_input as their sum, in theirs.
template <class T, class E, class TG>
void multiply_gradients(const Gradient& gradient, const Sum& d_weight) {
  const Chunk& c = gradient.chunk;
  const LinearCrossEntropyParams& p = c.call.p;
  const int64_t size = c.stride * p.features;
  int64_t next = 0;
  parallel_for(std::min<int64_t>(num_threads(), c.shares), 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t s = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (s >= c.shares) return;
      const int64_t first = c.tiles * s / c.shares * kTile;
      const int64_t last = std::min(c.tiles * (s + 1) / c.shares * kTile, p.classes);
      take_share<T, E, TG>(gradient, first, last, d_weight, c.d_input + s * size);
    }
  });
  if (p.d_input == nullptr) return;
  parallel_for(c.count, 16384 / (p.features * c.shares + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* out = static_cast<T*>(p.d_input) + c.rows[j] * p.features;
      const float* from = c.d_input + j * p.features;
      over_lanes(p.features, [&](int64_t k, auto part) __attribute__((always_inline)) {
        vf total = load(from + k, part);
        for (int64_t s = 1; s < c.shares; ++s) total += load(from + s * size + k, part);
        store(out + k, total, part);
      });
    }
  });
}

// ---- chunks -----------------------------------------------------------------------------------

// Takes parts of one block of scratch memory; without a block, counts them.
struct Parts {
  char* block = nullptr;
  size_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* part = block ? reinterpret_cast<T*>(block + used) : nullptr;
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return part;
  }
};

// The chunk's memory, for up to `stride` rows. Returns where a copy of its input may lie.
template <class T>
T* place(Chunk& c, Parts parts, size_t* bytes = nullptr) {
  const LinearCrossEntropyParams& p = c.call.p;
  const bool statistics = p.losses != nullptr;
  c.lines = parts.take<char>(c.call.gradients ? p.classes * c.line_bytes : 0);
  if (!c.call.gradients) c.lines = nullptr;
  c.tops = parts.take<float>(statistics ? c.tiles * c.stride : 0);
  c.sums = parts.take<float>(statistics ? c.tiles * c.stride : 0);
  c.smooth = parts.take<float>(statistics && p.label_smoothing != 0.f ? c.tiles * c.stride : 0);
  for (float** array :
       {&c.top, &c.log_sum, &c.target_logit, &c.target_share, &c.scale, &c.hot, &c.even}) {
    *array = parts.take<float>(c.stride);
  }
  c.target = parts.take<int32_t>(c.stride);
  c.d_input = parts.take<float>(p.d_input ? c.shares * c.stride * p.features : 0);
  T* copy = parts.take<T>(c.stride * p.features);
  if (bytes) *bytes = parts.used;
  return copy;
}

// The chunk's rows of the input: in place where they follow one another, else as a copy.
template <class T>
void set_input(Chunk& c, T* copy) {
  const LinearCrossEntropyParams& p = c.call.p;
  const T* input = static_cast<const T*>(p.input);
  if (c.rows[c.count - 1] - c.rows[0] == c.count - 1) {
    c.input = input + c.rows[0] * p.row_stride;
    c.input_stride = p.row_stride;
    return;
  }
  for (int64_t j = 0; j < c.count; ++j) {
    std::memcpy(copy + j * p.features, input + c.rows[j] * p.row_stride,
                static_cast<size_t>(p.features) * sizeof(T));
  }
  c.input = copy;
  c.input_stride = p.features;
}

template <class T, class E, class TG>
void run_chunk(const Chunk& c, float* d_bias, const Sum& d_weight) {
  const LinearCrossEntropyParams& p = c.call.p;
  const Gradient gradient = {c, d_bias};
  if (p.losses == nullptr) {  // backward
    if (c.lines == nullptr) return;  // gradients without elements
    for (int64_t j = 0; j < c.count; ++j) {
      const RowStatistics& s = p.statistics[c.rows[j]];
      c.top[j] = s.top;
      c.log_sum[j] = s.log_sum;
      set_gradient(c, j, p.grad[c.rows[j] * p.grad_stride], s);
    }
    multiply_logits(c, gradient_of_logits<TG>, &gradient);
  } else {
    multiply_logits(c, c.lines ? summarize<E> : summarize<void>, &c);
    merge(c);
    if (c.lines == nullptr) return;
    set_factors(c);
  }
  multiply_gradients<T, E, TG>(gradient, d_weight);
}

// Rows of a chunk whose lines hold elements of so many bytes.
int64_t most_rows(const Call& call, size_t element) {
  if (!call.gradients) return kMostRows;
  const int64_t fit = kLogitsBytes / static_cast<int64_t>(element) / (call.p.classes + 1);
  return std::clamp(fit / NR * NR, kLeastRows, kMostGradientRows);
}

template <class T, class E, class TG>
void run(const Call& call) {
  const LinearCrossEntropyParams& p = call.p;
  const int64_t kept = static_cast<int64_t>(call.kept.size());
  const size_t element = std::max(sizeof(E), sizeof(TG));
  const int64_t chunks = ceil_div(kept, most_rows(call, element));
  Chunk c{call};
  c.tiles = ceil_div(p.classes, kTile);
  c.stride = chunks == 0 ? 0 : round_up(ceil_div(kept, chunks), NR);
  c.line_bytes = c.stride * static_cast<int64_t>(element);
  const int64_t share = c.stride * p.features * static_cast<int64_t>(sizeof(float));
  const int64_t fit = p.d_input ? kShareBytes / (share + 1) : kShares;
  c.shares = std::min(std::clamp<int64_t>(fit, 1, kShares), c.tiles);
  size_t bytes = 0;
  place<T>(c, Parts{}, &bytes);
  Parts parts{static_cast<char*>(thread_scratch(Scratch::logits, bytes + 64))};
  T* copy = place<T>(c, parts);

  const int64_t weights = p.classes * p.features;
  float* total = static_cast<float*>(p.d_weight);
  if (p.d_weight && sizeof(T) != sizeof(float) && chunks > 1) {
    total = static_cast<float*>(
        thread_scratch(Scratch::sums, static_cast<size_t>(weights) * sizeof(float)));
  }
  OwnVector<float> d_bias(static_cast<size_t>(p.d_bias ? p.classes : 0));
  for (int64_t at = 0; at < kept; at += c.count) {
    c.rows = call.kept.data() + at;
    c.count = std::min(c.stride, kept - at);
    for (int64_t j = 0; j < c.stride; ++j) {
      c.target[j] =
          j < c.count ? static_cast<int32_t>(id_at(p.target, c.rows[j])) : static_cast<int32_t>(-1);
    }
    set_input<T>(c, copy);
    const Sum sum = {total, p.d_weight, p.features, at == 0, at + c.count == kept};
    run_chunk<T, E, TG>(c, p.d_bias ? d_bias.data() : nullptr, sum);
  }
  if (p.d_bias) {
    over_lanes(p.classes, [&](int64_t j, auto part) __attribute__((always_inline)) {
      store(static_cast<T*>(p.d_bias) + j, load(d_bias.data() + j, part), part);
    });
  }
  if (p.d_weight && kept == 0) std::memset(p.d_weight, 0, static_cast<size_t>(weights) * sizeof(T));
}

// What rows that are left out have: no loss and no gradient.
template <class T>
void leave_out(const Call& call) {
  const LinearCrossEntropyParams& p = call.p;
  if (static_cast<int64_t>(call.kept.size()) == p.rows) return;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (id_at(p.target, r) != p.ignore_index) continue;
    if (p.losses) {
      p.losses[r] = 0;
      p.statistics[r] = {0, 0, 0, static_cast<float>(call.weight_sum)};
    }
    if (p.d_input == nullptr) continue;
    T* d_input = static_cast<T*>(p.d_input) + r * p.features;
    std::memset(static_cast<void*>(d_input), 0, static_cast<size_t>(p.features) * sizeof(T));
  }
}

void run(const LinearCrossEntropyParams& p) {
  const Call call(p);
  with_type(p.dtype, [&]<class T>() {
    leave_out<T>(call);
    if constexpr (std::is_same_v<T, bf16>) {
      // Rounded exponentials let twice the rows into a chunk, which halves what d_weight's sum and
      // W's packing cost. A single chunk has neither, and few rows would feel the second rounding.
      const bool one = static_cast<int64_t>(call.kept.size()) <= most_rows(call, sizeof(float));
      if (multiplies_pairs(p.dtype)) {
        return one && p.losses ? run<T, float, T>(call) : run<T, T, T>(call);
      }
    }
    run<T, float, float>(call);
  });
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) { run(p); }

void linear_cross_entropy_backward(const LinearCrossEntropyParams& p) { run(p); }

}  // namespace ft::FT_ISA
