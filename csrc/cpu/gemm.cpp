// The matrix product behind linear_add and its gradients, in three forms.
//
// Packed: B is packed once per call into panels that all threads share (a chunk of columns at a
// time when it is large); a task is a block of rows × a block of columns, taken from a shared
// counter, so a slow core takes fewer. Within a task, A is copied (and widened) a block at a time
// into rows that do not collide in L1, and C accumulates as float in thread scratch until the
// epilogue takes it.
//
// Exchanged (few rows): Cᵀ = Bᵀ · Aᵀ, so that the weight is read once, in place, and the small A is
// what gets packed; finished tiles are turned before the epilogue sees them.
//
// Skinny (up to four rows; with AVX-512 eight, or sixteen where L1 holds the input): dot products
// along the weight's rows, bound by reading the weight, from some ten rows on by arithmetic.
#include "cpu/gemm.h"

#include "cpu/amx.h"
#include "cpu/dot_product.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kPackBytes = int64_t{12}
                               << 20;        // packed B per chunk: stays in the last-level cache
constexpr int64_t kTileFloats = 128 * 1024;  // C tile per thread: stays in L2
constexpr int64_t kTaskColumns = 1536;       // columns of a task that may split them
constexpr int64_t kTileTaskColumns = 512;    // the same with AMX,
constexpr int64_t kTilePanelBytes = int64_t{3} << 19;  // whose panels stay in L2
constexpr int64_t kWholeRowColumns = 4096;
#if defined(__AVX512F__)
constexpr int kSkinnyRows = 16, kSkinnyDeepRows = 8;  // as many sums as registers hold
#else
constexpr int kSkinnyRows = 4, kSkinnyDeepRows = 4;
#endif
constexpr int kSkinnyTileRows =
    4;  // with AMX the exchanged form is bound by the weight from few rows on
constexpr int64_t kExchangedRows = 192;  // above, packing the weight is paid back (measured, Zen 4)

constexpr int64_t kSerialWork = 262144;  // multiply-adds below which a second thread costs more

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The grain of a parallel loop over parts of `work` multiply-adds or elements, of which `least` are
// worth a thread.
int64_t grain_of(const Gemm& p, int64_t least, int64_t work) {
  return p.one_thread ? INT64_MAX : ceil_div(least, work + 1);
}

// Row stride of an A block: rows fall into distinct L1 sets.
template <class Unit>
constexpr int kRowUnits = Unit::depth + 16;

// Rows [row, row + rows) and elements [k, k + depth) of A as units with row stride kRowUnits<Unit>.
template <class Unit, class T>
void copy_a(const GemmA& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i, out += kRowUnits<Unit>) {
    const int64_t at = row + i;
    const T* base = static_cast<const T*>(a.data) + at / a.inner_rows * a.outer_stride +
                    at % a.inner_rows * a.row_stride;
    if (a.segment == INT64_MAX) {
      for (int64_t j = 0; j < depth; j += W * Unit::elements) {
        store_units(out + j / Unit::elements, load_units<Unit>(base + k + j, depth - j));
      }
      continue;
    }
    // Heads: gather the run of elements first; a pair of bf16 may straddle two heads.
    T gathered[Unit::depth * Unit::elements];
    for (int64_t j = 0; j < depth;) {
      const int64_t head = (k + j) / a.segment, offset = (k + j) % a.segment;
      const int64_t n = min64(depth - j, a.segment - offset);
      std::memcpy(gathered + j, base + head * a.segment_stride + offset, n * sizeof(T));
      j += n;
    }
    for (int64_t j = 0; j < depth; j += W * Unit::elements) {
      store_units(out + j / Unit::elements, load_units<Unit>(gathered + j, depth - j));
    }
  }
}

// The same of a transposed A: out[unit][kBlockRows].
template <class Unit, class T>
void copy_a_columns(const GemmA& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
                    float* out) {
  for (int64_t j = 0; j < depth; j += Unit::elements, out += kBlockRows) {
    const T* base = static_cast<const T*>(a.data) + (k + j) * a.row_stride + row;
    for (int64_t i = 0; i < rows; i += W) {
      const vi x =
          load_unit_columns<Unit>(base + i, base + a.row_stride + i, j + 1 < depth, rows - i);
      const int64_t room = kBlockRows - i;
      if (room >= W) {
        store_units(out + i, x);
      } else {
        store(out + i, (vf)x, static_cast<int>(room));
      }
    }
  }
}

// The same of a transposed A, turned: rows as copy_a() makes them.
template <class Unit, class T>
void copy_a_turned(const GemmA& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
                   float* out) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < depth; j += W * Unit::elements) {
      vi r[W];
      for (int u = 0; u < W; ++u) {
        const int64_t at = j + u * Unit::elements;
        const T* base = static_cast<const T*>(a.data) + (k + at) * a.row_stride + row + i;
        r[u] = at < depth
                   ? load_unit_columns<Unit>(base, base + a.row_stride, at + 1 < depth, rows - i)
                   : vi{};
      }
      transpose(r);
      for (int u = 0; u < W; ++u)
        store_units(out + (i + u) * kRowUnits<Unit> + j / Unit::elements, r[u]);
    }
  }
}

// The part of A that is wanted next, fetched into L2 a few rows at a time between the register
// tiles of the part at work.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;

  void fetch(int64_t part, int64_t parts) const {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const char* row = data + i * stride;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
  }
};

// Rows × one panel, the `part`-th of `parts` panels.
template <class Unit, int nv, class A>
void block(int64_t rows, int64_t units, const A& a, const float* panel, float* c, int64_t c_stride,
           bool accumulate, const Ahead& next, int64_t part, int64_t parts) {
  const int64_t tiles = ceil_div(rows, Unit::rows);
  for (int64_t t = 0, done = 0; t < tiles; ++t) {
    next.fetch(part * tiles + t, parts * tiles);
    if constexpr (Unit::step > 1) {
      const int64_t n = min64(rows - done, Unit::rows);
      multiply_tiles<nv>(n, units, a.below(done), panel, c + done * c_stride, c_stride, accumulate);
      done += n;
    } else {  // even heights: 16 rows are 8 + 8, not 14 + 2
      const int64_t n = ceil_div(rows - done, tiles - t);
      micro_rows<Unit, nv>(static_cast<int>(n), units, a.below(done), panel, c + done * c_stride,
                           c_stride, AddToIf{accumulate});
      done += n;
    }
  }
}

// Rows whose distance is a multiple of this share the few lines of one L1 set and push each other
// out.
constexpr int64_t kAliasBytes = 4096, kTileAliasBytes = 1024;

// Whether A, of T, can be multiplied where it lies: stored as units already, in rows that spread
// over L1. Tiles are read whole.
template <class Unit, class T>
bool in_place(const Gemm& p, int64_t rows) {
  if (Unit::step > 1 && rows % kTileRows != 0) return false;
  return sizeof(T) * Unit::elements == 4 && p.depth % (Unit::elements * Unit::step) == 0 &&
         !p.a.transposed && p.a.segment == INT64_MAX && p.a.inner_rows == INT64_MAX &&
         p.a.row_stride * static_cast<int64_t>(sizeof(T)) %
                 (Unit::step > 1 ? kTileAliasBytes : kAliasBytes) !=
             0;
}

// T: the type of B, TA: that of A.
template <class Unit, class T, class TA = T>
struct Engine {
  // Rows of an A block. Whole register tiles of some 48 KB, which stay in L2.
  static constexpr int64_t kMostRows = Unit::step > 1 ? Unit::rows : kBlockRows;

  const Gemm& p;
  int64_t units, panel_floats;

  void pack(int64_t column, int64_t columns, float* out) const {
    const T* b = static_cast<const T*>(p.b.data);
    parallel_for(ceil_div(columns, NR), grain_of(p, 16384, p.depth * NR),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t j = column + i * NR, n = min64(NR, column + columns - j);
                     float* panel = out + i * panel_floats;
                     if (p.b.transposed) {
                       pack_panel_transposed<Unit>(b + j * p.b.row_stride, p.b.row_stride, n,
                                                   p.depth, panel);
                     } else {
                       pack_panel<Unit>(b + j, p.b.row_stride, n, p.depth, panel);
                     }
                   }
                 });
  }

  // `rows` rows from `row` on, elements [k, k + depth); nothing where rows do not lie in a line.
  Ahead ahead(int64_t row, int64_t rows, int64_t k, int64_t depth) const {
    if (p.a.transposed || p.a.segment != INT64_MAX || p.a.inner_rows != INT64_MAX) return {};
    const int64_t stride = p.a.row_stride * static_cast<int64_t>(sizeof(TA));
    const char* data = static_cast<const char*>(p.a.data) + row * stride;
    return {data + k * static_cast<int64_t>(sizeof(TA)), stride, min64(rows, p.rows - row),
            depth * static_cast<int64_t>(sizeof(TA))};
  }

  // One task: a tile of C over the whole summed dimension. `next_row`: where the thread's next
  // tile probably begins.
  void task(const float* panels, GemmTile tile, int64_t next_row, float* a_block) const {
    const int64_t blocks = ceil_div(units, Unit::depth);
    int64_t done = 0;
    for (int64_t s = 0; s < blocks; ++s) {
      const int64_t n = ceil_div(ceil_div(units - done, blocks - s), Unit::step) * Unit::step;
      const int64_t k = done * Unit::elements, depth = min64(n * Unit::elements, p.depth - k);
      const float* panel = panels + done * NR;
      const Ahead next = s + 1 < blocks ? ahead(tile.row, tile.rows, k + depth, depth)
                                        : ahead(next_row, tile.rows, 0, depth);
      if (in_place<Unit, TA>(p, tile.rows)) {
        const int64_t stride = p.a.row_stride * static_cast<int64_t>(sizeof(TA));
        const char* rows = static_cast<const char*>(p.a.data) + tile.row * stride;
        multiply(InPlace{rows + done * 4, stride}, tile, panel, n, next, s > 0);
      } else if (!p.a.transposed) {
        copy_a<Unit, TA>(p.a, tile.row, tile.rows, k, depth, a_block);
        multiply(Rows<kRowUnits<Unit>>{a_block}, tile, panel, n, next, s > 0);
      } else if constexpr (Unit::step == 1) {
        copy_a_columns<Unit, TA>(p.a, tile.row, tile.rows, k, depth, a_block);
        multiply(Columns<kBlockRows>{a_block}, tile, panel, n, next, s > 0);
      } else {
        copy_a_turned<Unit, TA>(p.a, tile.row, tile.rows, k, depth, a_block);
        multiply(Rows<kRowUnits<Unit>>{a_block}, tile, panel, n, next, s > 0);
      }
      done += n;
    }
    if (blocks == 0) std::memset(tile.data, 0, sizeof(float) * tile.rows * tile.stride);
    p.epilogue(tile, p.context);
  }

  template <class A>
  void multiply(const A& a, const GemmTile& tile, const float* panel, int64_t n, const Ahead& next,
                bool accumulate) const {
    const int64_t count = ceil_div(tile.columns, NR);
    for (int64_t i = 0; i < count; ++i, panel += panel_floats) {
      const int64_t j = i * NR;
      float* c = tile.data + j;
      if (tile.columns - j > W) {
        block<Unit, NV>(tile.rows, n, a, panel, c, tile.stride, accumulate, next, i, count);
      } else {
        block<Unit, 1>(tile.rows, n, a, panel, c, tile.stride, accumulate, next, i, count);
      }
    }
  }

  void run() {
    units = units_of<Unit>(p.depth);
    panel_floats = units * NR;
    // Columns are packed in chunks; a caller that wants whole rows gets one chunk.
    int64_t chunk = p.columns;
    if (!p.whole_rows && panel_floats > 0) {
      const int64_t fit = kPackBytes / 4 / panel_floats * NR;
      chunk = min64(p.columns, fit < 4 * NR ? 4 * NR : fit);
    }
    const int threads = p.one_thread ? 1 : num_threads();
    for (int64_t column = 0; column < p.columns; column += chunk) {
      const int64_t columns = min64(chunk, p.columns - column);
      float* panels = static_cast<float*>(thread_scratch(
          Scratch::shared, sizeof(float) * ceil_div(columns, NR) * panel_floats + 64));
      pack(column, columns, panels);
      tasks(panels, column, columns, threads);
    }
  }

  void tasks(const float* panels, int64_t column, int64_t columns, int threads) const {
    int64_t most = kTaskColumns;
    if constexpr (Unit::step > 1) {
      const int64_t fit = kTilePanelBytes / 4 / (units + 1) / NR * NR;
      most = fit < 4 * NR ? 4 * NR : min64(fit, kTileTaskColumns);
    }
    int64_t width = p.whole_rows ? columns : min64(columns, most);
    constexpr int64_t low = Unit::rows;  // a register tile
    int64_t height = min64(kMostRows, kTileFloats / (ceil_div(width, NR) * NR));
    height = height < low ? low : height / low * low;
    // Enough tasks for the threads: first narrower, then lower; never below one register tile.
    const auto count = [&] { return ceil_div(p.rows, height) * ceil_div(columns, width); };
    if (p.fixed_tiles) {
      height = kBlockRows;
    } else {
      while (count() < 4 * threads && !p.whole_rows && width > 4 * NR) {
        width = ceil_div(ceil_div(width, 2), NR) * NR;
      }
      while (count() < 3 * threads && height > low) height -= low;
      height = ceil_div(ceil_div(p.rows, ceil_div(p.rows, height)), low) * low;  // even ones
    }
    const int64_t row_blocks = ceil_div(p.rows, height), column_blocks = ceil_div(columns, width);
    const int64_t total = row_blocks * column_blocks;
    const int64_t stride = ceil_div(width, NR) * NR;
    const int64_t work = p.rows * columns * p.depth;
    const int64_t workers = work < kSerialWork ? 1 : min64(threads, total);
    int64_t next = 0;
    parallel_for(workers, 1, [&](int64_t, int64_t) {
      const int64_t room = ceil_div(height, low) * low;  // products by tiles write whole ones
      float* c =
          static_cast<float*>(thread_scratch(Scratch::accumulate, sizeof(float) * room * stride));
      float* a = static_cast<float*>(thread_scratch(
          Scratch::pack,
          sizeof(float) * ((room > kBlockRows ? room : kBlockRows) * kRowUnits<Unit> + W)));
      [[maybe_unused]] const typename Unit::Registers registers;
      for (;;) {
        const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (t >= total) return;
        const int64_t row = (Unit::step > 1 ? t % row_blocks : t / column_blocks) * height;
        const int64_t j = (Unit::step > 1 ? t / row_blocks : t % column_blocks) * width;
        const GemmTile tile = {
            c, stride, row, min64(height, p.rows - row), column + j, min64(width, columns - j)};
        const int64_t then = t + workers;
        const int64_t next_row = Unit::step > 1 ? then % row_blocks : then / column_blocks;
        task(panels + j / NR * panel_floats, tile, next_row * height, a);
      }
    });
  }
};

// ---- exchanged --------------------------------------------------------------------------------

struct Exchanged {
  GemmEpilogue epilogue;
  const void* context;
};

// Turns a finished tile of Cᵀ and hands it to the epilogue as a tile of C.
void turn(const GemmTile& tile, const void* context) {
  const Exchanged& e = *static_cast<const Exchanged*>(context);
  const int64_t stride = ceil_div(tile.rows, W) * W;
  float* out = static_cast<float*>(
      thread_scratch(Scratch::tile, sizeof(float) * stride * ceil_div(tile.columns, W) * W));
  for (int64_t i = 0; i < tile.rows; i += W) {
    for (int64_t j = 0; j < tile.columns; j += W) {
      vi r[W];
      for (int64_t k = 0; k < W; ++k) {
        r[k] = i + k < tile.rows ? (vi)load(tile.data + (i + k) * tile.stride + j) : vi{};
      }
      transpose(r);
      for (int64_t k = 0; k < W; ++k) store_units(out + (j + k) * stride + i, r[k]);
    }
  }
  e.epilogue({out, stride, tile.column, tile.columns, tile.row, tile.rows}, e.context);
}

// Rows of A as one contiguous matrix: A itself where it is one already.
template <class T>
const T* contiguous_rows(const Gemm& p, int64_t* row_stride) {
  const GemmA& a = p.a;
  const T* data = static_cast<const T*>(a.data);
  if (a.segment == INT64_MAX && (a.inner_rows == INT64_MAX || a.inner_rows >= p.rows)) {
    *row_stride = a.row_stride;
    return data;
  }
  T* out = static_cast<T*>(thread_scratch(Scratch::rows, sizeof(T) * p.rows * p.depth));
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* base = data + i / a.inner_rows * a.outer_stride + i % a.inner_rows * a.row_stride;
    const int64_t run = min64(a.segment, p.depth);
    for (int64_t k = 0; k < p.depth; k += run) {
      std::memcpy(out + i * p.depth + k, base + k / run * a.segment_stride, run * sizeof(T));
    }
  }
  *row_stride = p.depth;
  return out;
}

template <class Unit, class T>
void run_exchanged(const Gemm& p) {
  const Exchanged context{p.epilogue, p.context};
  Gemm g = p;
  g.rows = p.columns;
  g.columns = p.rows;
  g.a = GemmA{};
  g.a.data = p.b.data;
  g.a.row_stride = p.b.row_stride;
  g.b.transposed = true;
  g.b.data = contiguous_rows<T>(p, &g.b.row_stride);
  g.epilogue = turn;
  g.context = &context;
  Engine<Unit, T>{g, 0, 0}.run();
}

// ---- skinny -----------------------------------------------------------------------------------

constexpr int64_t kSkinnyAhead = 8192;       // bytes of the weight between what is fetched and read
constexpr int64_t kSkinnyInput = 24 * 1024;  // bytes of the input that stay in L1 beside the weight
constexpr int64_t kSkinnyColumns = 32;       // columns per task

// Lane i of the result is the sum of acc[i]'s lanes.
template <int rows>
FT_INLINE void add_lanes(const vf (&acc)[rows], float* out) {
#if defined(__AVX512F__)
  if constexpr (rows > 4) {
    // Four rows become one vector by two levels of pairs, four of those one by two more.
    const auto row = [&](int i) __attribute__((always_inline)) {
      return i < rows ? (__m512)acc[i < rows ? i : 0] : _mm512_setzero_ps();
    };
    __m512 four[4];
#  pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      if (4 * g >= rows) {
        four[g] = _mm512_setzero_ps();
        continue;
      }
      const __m512 a = row(4 * g), b = row(4 * g + 1), c = row(4 * g + 2), d = row(4 * g + 3);
      const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
      const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
      four[g] = (__m512)(_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd)) +
                (__m512)(_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    }
    const __m512 low =
        _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
    const __m512 high =
        _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
    _mm512_storeu_ps(out,
                     _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd));
    return;
  }
#endif
  for (int i = 0; i < rows; ++i) out[i] = reduce_add(acc[i]);
}

// The input's rows as units, W of each row behind one another: a column's loop then needs one
// pointer for all rows. Zeros stand behind a row's end.
template <class Unit, class T, int rows>
const float* interleaved_rows(const Gemm& p) {
  constexpr int64_t step = W * Unit::elements;
  int64_t stride;
  const T* x = contiguous_rows<T>(p, &stride);
  const int64_t steps = ceil_div(p.depth, step);
  float* out =
      static_cast<float*>(thread_scratch(Scratch::shared, sizeof(float) * (steps * rows + 1) * W));
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x + i * stride + s * step;
      store_units(out + (s * rows + i) * W, load_units<Unit>(from, p.depth - s * step));
    }
  }
  return out;
}

// out[i] = row i of x · w over n elements. `ahead`: what will be read some rows of the weight
// later.
template <class Unit, class T, int rows>
FT_INLINE void skinny_column(const float* x, const T* w, const T* ahead, int64_t n, float* out) {
  constexpr int parts = rows > 8 ? 1 : rows > 4 ? 2 : 4;  // sums along the row: hide the latency
  constexpr int64_t step = W * Unit::elements;
  vf acc[rows][parts] = {};
  const auto add = [&](int64_t k, int64_t count, int part) __attribute__((always_inline)) {
    __builtin_prefetch(ahead + k, 0, 3);
    const vf b = (vf)load_units<Unit>(w + k, count);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) { acc[i][part] = Unit::fma(load(x + i * W), b, acc[i][part]); }
    x += rows * W;
  };
  int64_t k = 0;
  for (; k + parts * step <= n; k += parts * step) {
#pragma GCC unroll 4
    for (int u = 0; u < parts; ++u) add(k + u * step, step, u);
  }
  for (; k < n; k += step) add(k, n - k, 0);
  vf total[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    total[i] = acc[i][0];
    if constexpr (parts >= 2) total[i] += acc[i][1];
    if constexpr (parts == 4) total[i] += acc[i][2] + acc[i][3];
  }
  add_lanes<rows>(total, out);
}

// One row of the weight after another: a single stream is what the memory delivers fastest (four at
// a time: half of it). An input that L1 does not hold is taken in stretches of its depth.
template <class Unit, class T, int rows>
void skinny(const Gemm& p) {
  constexpr int64_t kOut = rows > 4 ? W : rows;  // floats that add_lanes writes
  constexpr int64_t step = W * Unit::elements;
  const float* x = interleaved_rows<Unit, T, rows>(p);
  const T* w = static_cast<const T*>(p.b.data);
  const int64_t fit = kSkinnyInput / (rows * W * static_cast<int64_t>(sizeof(float))) * step;
  const int64_t parts = p.depth > fit ? ceil_div(p.depth, fit) : 1;
  const int64_t stretch = ceil_div(ceil_div(p.depth + 1, parts), step) * step;  // not 0
  const int64_t bytes = stretch * static_cast<int64_t>(sizeof(T)) + 1;
  const int64_t ahead = ceil_div(kSkinnyAhead, bytes) * p.b.row_stride;
  const int64_t tasks = ceil_div(p.columns, kSkinnyColumns);
  const int64_t grain = grain_of(p, 32768, p.depth * kSkinnyColumns);
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kSkinnyColumns * kOut], c[rows * kSkinnyColumns];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t column = t * kSkinnyColumns,
                    columns = min64(kSkinnyColumns, p.columns - column);
      std::memset(c, 0, sizeof(c));
      for (int64_t k = 0; k == 0 || k < p.depth; k += stretch) {
        const T* base = w + column * p.b.row_stride + k;
        const int64_t n = min64(stretch, p.depth - k);
        for (int64_t j = 0; j < columns; ++j) {
          const T* row = base + j * p.b.row_stride;
          skinny_column<Unit, T, rows>(x + k / step * rows * W, row, row + ahead, n,
                                       sums + j * kOut);
        }
        for (int i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) c[i * kSkinnyColumns + j] += sums[j * kOut + i];
        }
      }
      p.epilogue({c, kSkinnyColumns, 0, rows, column, columns}, p.context);
    }
  });
}

// Calls the product of p.rows ≤ `rows` rows.
template <class Unit, class T, int rows>
void run_skinny(const Gemm& p) {
  if (p.rows == rows) return skinny<Unit, T, rows>(p);
  if constexpr (rows > 1) run_skinny<Unit, T, rows - 1>(p);
}

// ---- choice -----------------------------------------------------------------------------------

enum class Form { packed, exchanged, skinny };

template <class Unit, class T>
Form form_of(const Gemm& p) {
  if (p.a.transposed || !p.b.transposed || p.whole_rows || p.fixed_tiles) return Form::packed;
  const int64_t input = p.rows * units_of<Unit>(p.depth) * static_cast<int64_t>(sizeof(float));
  const int64_t skinny = Unit::step > 1          ? kSkinnyTileRows
                         : input <= kSkinnyInput ? kSkinnyRows
                                                 : kSkinnyDeepRows;
  if (p.rows <= skinny) return Form::skinny;
  return p.rows <= kExchangedRows && p.rows <= p.columns ? Form::exchanged : Form::packed;
}

template <class Unit, class T>
void run(const Gemm& p) {
  switch (form_of<Unit, T>(p)) {
    case Form::packed: return Engine<Unit, T>{p, 0, 0}.run();
    case Form::exchanged: return run_exchanged<Unit, T>(p);
    case Form::skinny: return run_skinny<typename Unit::Vectors, T, kSkinnyRows>(p);
  }
}

}  // namespace

bool can_own_whole_rows(const Gemm& p) {
  return p.columns <= kWholeRowColumns && form_of<Float, float>(p) == Form::packed;
}

bool multiplies_pairs([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
  return dtype == DType::bf16 && (has_amx() || bf16_dot_is_fast());
#else
  return false;
#endif
}

void gemm(const Gemm& p) {
  if (p.rows == 0 || p.columns == 0) return;
  switch (p.dtype) {
    case DType::f32: return run<Float, float>(p);
    case DType::f16:
      if (p.wide_a) return Engine<Float, f16, float>{p, 0, 0}.run();
      return run<Float, f16>(p);
    case DType::bf16:
      if (p.wide_a) return Engine<Float, bf16, float>{p, 0, 0}.run();
#if defined(__AVX512BF16__)
      if (has_amx()) return run<BfTile, bf16>(p);
      if (bf16_dot_is_fast()) return run<BfPair, bf16>(p);
#endif
      return run<Float, bf16>(p);
  }
}

}  // namespace ft::FT_ISA
