// Where the elements of a product's matrices lie, and how a thread brings its part of a tile to
// shared memory. Rows and columns may be cut: rows of attention's output are (batch, position), its
// columns (head, element).
#pragma once
#include "cuda/device/tile.h"
#include "cuda/device/warp.h"

namespace ft::cuda {

struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0;
  int64_t inner_rows = 0, outer_stride = 0;  // inner_rows 0: rows are not cut
  int64_t head_dim = 0, head_stride = 0;     // head_dim 0: columns are not cut
  int width = 0;  // bytes that any 16 at a column divisible by 16 / size can be read by: 16, 4, 0

  // Whether Loader::load can read it.
  FT_DEVICE bool plain() const { return inner_rows == 0 && head_dim == 0 && width == 16; }
  FT_DEVICE int64_t row_offset(int64_t row) const {
    if (inner_rows == 0) return row * row_stride;
    return row / inner_rows * outer_stride + row % inner_rows * row_stride;
  }
  FT_DEVICE int64_t column_offset(int64_t column) const {
    if (head_dim == 0) return column;
    return column / head_dim * head_stride + column % head_dim;
  }
  template <class T>
  FT_DEVICE const T* at(int64_t row, int64_t column) const {
    return static_cast<const T*>(data) + row_offset(row) + column_offset(column);
  }
};

// One of a block's kThreads threads, as a loader of kRows × kColumns tiles: it owns a column of
// chunks and every kPass-th row. Tile follows tile along K, which is the matrix's rows (kAlongRows)
// or its columns. What lies behind the matrix's end is filled with zeros. Rows that lie plainly and
// begin on 16 bytes cost few registers: a pointer and a count, the rest is the matrix's.
template <class T, int kThreads, int kRows, int kColumns, bool kAlongRows>
struct Loader {
  using Shape = Tile<T, kRows, kColumns>;
  static constexpr int kPass = kThreads / Shape::kChunks;
  static constexpr int kSteps = kRows / kPass;
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static_assert(kThreads % Shape::kChunks == 0 && kRows % kPass == 0);
  static_assert(kPass % 8 == 0, "the rows of a thread share their permutation of chunks");

  const T* from;  // of its first chunk of the next tile
  int fixed;      // what the other dimension has left: rows from its first on, or bytes of a chunk

  // `other`: where the tile starts in the dimension that is not K; `k`: in K.
  FT_DEVICE Loader(const Matrix& m, int64_t other, int64_t k) {
    const int64_t row = (kAlongRows ? k : other) + first();
    const int64_t column = (kAlongRows ? other : k) + chunk() * kLanes<T>;
    from = static_cast<const T*>(m.data) + row * m.row_stride + column;
    fixed = kAlongRows ? bytes_of(clip(m.columns - column, kLanes<T>)) : clip(m.rows - row, kRows);
  }

  FT_DEVICE static int first() { return thread_index() / Shape::kChunks; }
  FT_DEVICE static int chunk() { return thread_index() % Shape::kChunks; }
  FT_DEVICE static int clip(int64_t left, int most) {
    return left < most ? static_cast<int>(left) : most;
  }
  FT_DEVICE static int bytes_of(int count) {
    return count <= 0 ? 0 : count < kLanes<T> ? count * kSize : 16;
  }

  // The next tile, of which `k_left` of K (more than 0) lie before K's end.
  FT_DEVICE void load(const Shape& tile, const Matrix& m, int k_left) {
    const int rows = kAlongRows ? k_left - first() : fixed;
    const int bytes = kAlongRows ? fixed : bytes_of(k_left - chunk() * kLanes<T>);
    T* to = tile.chunk(first(), chunk());
    const int64_t step = m.row_stride * kPass;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      copy_async_part(to + i * kPass * kColumns, from + i * step, i * kPass < rows ? bytes : 0);
    }
    from += kAlongRows ? m.row_stride * kRows : kColumns;
  }

  // A tile of any matrix: rows or columns cut, rows that begin anywhere.
  FT_DEVICE static void load_any(const Shape& tile, const Matrix& m, int64_t row, int64_t row_end,
                                 int64_t column, int64_t column_end) {
    column += chunk() * kLanes<T>;
    row += first();
    const int rows = clip(row_end - row, kRows);
    const int count = clip(column_end - column, kLanes<T>);
    T* to = tile.chunk(first(), chunk());
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      T* at = to + i * kPass * kColumns;
      const int n = i * kPass < rows && count > 0 ? count : 0;
      const T* base = static_cast<const T*>(m.data) + (n > 0 ? m.row_offset(row + i * kPass) : 0);
      if (m.width == 16) {
        copy_async_part(at, base + (n > 0 ? m.column_offset(column) : 0), n * kSize);
      } else if (m.width == 4 && n * kSize % 4 == 0) {
        constexpr int kWord = 4 / kSize;
#pragma unroll 1
        for (int j = 0; j < kLanes<T>; j += kWord) {
          const bool inside = j < n;
          copy_async<4>(at + j, base + (inside ? m.column_offset(column + j) : 0), inside);
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < kLanes<T>; ++j) {
          T one = {};
          if (j < n) one = load_scalar(base + m.column_offset(column + j));
          shared_store(at + j, one);
        }
      }
    }
  }
};

}  // namespace ft::cuda
