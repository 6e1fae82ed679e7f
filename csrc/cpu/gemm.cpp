// The packed matrix product behind linear_add and its gradients.
//
// B is packed once per call into panels that all threads share (a chunk of columns at a time when it
// is large); a task is a block of rows × a block of columns, taken from a shared counter, so a slow
// core takes fewer. Within a task, A is copied (and widened) a block at a time into rows that do not
// collide in L1, and C accumulates as float in thread scratch until the epilogue takes it.
#include "cpu/gemm.h"

#include "cpu/dot_product.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kPackBytes = int64_t{12} << 20;  // packed B per chunk: stays in the last-level cache
constexpr int64_t kTileFloats = 128 * 1024;        // C tile per thread: stays in L2
constexpr int64_t kTaskColumns = 512;              // columns of a task that may split them

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows [row, row + rows) and elements [k, k + depth) of A as units with row stride kRowUnits.
template <class Unit, class T>
void copy_a(const GemmA& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i, out += kRowUnits) {
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
    T gathered[kDepth * Unit::elements];
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
void copy_a_transposed(const GemmA& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
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

template <class Unit, bool transposed>
void block(int64_t rows, int64_t units, const float* a, const float* panel, float* c,
           int64_t c_stride, bool accumulate) {
  const int64_t tiles = ceil_div(rows, MR);
  for (int64_t t = 0, done = 0; t < tiles; ++t) {  // even heights: 16 rows are 8 + 8, not 14 + 2
    const int64_t n = ceil_div(rows - done, tiles - t);
    const float* rows_at = transposed ? a + done : a + done * kRowUnits;
    micro_rows<Unit, transposed>(static_cast<int>(n), units, rows_at, panel, c + done * c_stride,
                                 c_stride, accumulate);
    done += n;
  }
}

template <class Unit, class T>
struct Engine {
  const Gemm& p;
  int64_t units, panel_floats;

  void pack(int64_t column, int64_t columns, float* out) const {
    const T* b = static_cast<const T*>(p.b.data);
    parallel_for(ceil_div(columns, NR), ceil_div(16384, p.depth * NR + 1),
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

  // One task: a tile of C over the whole summed dimension.
  void task(const float* panels, GemmTile tile, float* a_block) const {
    const int64_t blocks = ceil_div(units, kDepth);
    int64_t done = 0;
    for (int64_t s = 0; s < blocks; ++s) {
      const int64_t n = ceil_div(units - done, blocks - s);
      const int64_t k = done * Unit::elements, depth = min64(n * Unit::elements, p.depth - k);
      if (p.a.transposed) {
        copy_a_transposed<Unit, T>(p.a, tile.row, tile.rows, k, depth, a_block);
      } else {
        copy_a<Unit, T>(p.a, tile.row, tile.rows, k, depth, a_block);
      }
      for (int64_t j = 0; j < tile.columns; j += NR) {
        const float* panel = panels + j / NR * panel_floats + done * NR;
        if (p.a.transposed) {
          block<Unit, true>(tile.rows, n, a_block, panel, tile.data + j, tile.stride, s > 0);
        } else {
          block<Unit, false>(tile.rows, n, a_block, panel, tile.data + j, tile.stride, s > 0);
        }
      }
      done += n;
    }
    if (blocks == 0) std::memset(tile.data, 0, sizeof(float) * tile.rows * tile.stride);
    p.epilogue(tile, p.context);
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
    const int threads = num_threads();
    for (int64_t column = 0; column < p.columns; column += chunk) {
      const int64_t columns = min64(chunk, p.columns - column);
      float* panels = static_cast<float*>(thread_scratch(
          Scratch::shared, sizeof(float) * ceil_div(columns, NR) * panel_floats + 64));
      pack(column, columns, panels);
      tasks(panels, column, columns, threads);
    }
  }

  void tasks(const float* panels, int64_t column, int64_t columns, int threads) const {
    int64_t width = p.whole_rows ? columns : min64(columns, kTaskColumns);
    int64_t height = min64(kBlockRows, kTileFloats / (ceil_div(width, NR) * NR));
    height = height < MR ? MR : height / MR * MR;
    // Enough tasks for the threads: first narrower, then lower; never below one register tile.
    const auto count = [&] { return ceil_div(p.rows, height) * ceil_div(columns, width); };
    while (count() < 4 * threads && !p.whole_rows && width > 4 * NR) {
      width = ceil_div(ceil_div(width, 2), NR) * NR;
    }
    while (count() < 3 * threads && height > MR) height -= MR;
    const int64_t row_blocks = ceil_div(p.rows, height), column_blocks = ceil_div(columns, width);
    const int64_t total = row_blocks * column_blocks;
    const int64_t stride = ceil_div(width, NR) * NR;
    const int64_t work = p.rows * columns * p.depth;
    const int64_t workers = work < 32768 ? 1 : min64(threads, total);
    int64_t next = 0;
    parallel_for(workers, 1, [&](int64_t, int64_t) {
      float* c = static_cast<float*>(
          thread_scratch(Scratch::accumulate, sizeof(float) * height * stride));
      float* a = static_cast<float*>(
          thread_scratch(Scratch::pack, sizeof(float) * (kBlockRows * kRowUnits + W)));
      for (;;) {
        const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (t >= total) return;
        const int64_t row = t / column_blocks * height, j = t % column_blocks * width;
        const GemmTile tile = {c,          stride, row, min64(height, p.rows - row), column + j,
                               min64(width, columns - j)};
        task(panels + j / NR * panel_floats, tile, a);
      }
    });
  }
};

template <class Unit, class T>
void run(const Gemm& p) {
  Engine<Unit, T>{p, 0, 0}.run();
}

}  // namespace

void gemm(const Gemm& p) {
  if (p.rows == 0 || p.columns == 0) return;
  switch (p.dtype) {
    case DType::f32: return run<Float, float>(p);
    case DType::f16: return run<Float, f16>(p);
    case DType::bf16:
#if defined(__AVX512BF16__)
      if (bf16_dot_is_fast()) return run<BfPair, bf16>(p);
#endif
      return run<Float, bf16>(p);
  }
}

}  // namespace ft::FT_ISA
