// Where the elements of a product's matrices lie, and how a thread brings its part of a tile to
// shared memory. Rows and columns may be cut: rows of attention's output are (batch, position), its
// columns (head, element).
#pragma once
#include "cuda/device/tile.h"

namespace ft::cuda {

struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0;
  int64_t inner_rows = 0, outer_stride = 0;  // inner_rows 0: rows are not cut
  int64_t head_dim = 0, head_stride = 0;     // head_dim 0: columns are not cut
  int width = 0;  // bytes that any 16 at a column divisible by 16 / size can be read by: 16, 4, 0

  FT_DEVICE bool plain() const { return inner_rows == 0 && head_dim == 0; }
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
// chunks and every kPass-th row. The tile's rows start at `row`, its columns at `column`; what lies
// behind the matrix's end is filled with zeros.
template <class T, int kThreads, int kRows, int kColumns>
struct Loader {
  using Shape = Tile<T, kRows, kColumns>;
  static constexpr int kPass = kThreads / Shape::kChunks;
  static constexpr int kSteps = kRows / kPass;
  static_assert(kThreads % Shape::kChunks == 0 && kRows % kPass == 0);
  static_assert(kPass % 8 == 0, "the rows of a thread share their permutation of chunks");

  int first, chunk;  // its first row, its chunk

  FT_DEVICE explicit Loader(int thread)
      : first(thread / Shape::kChunks), chunk(thread % Shape::kChunks) {}

  FT_DEVICE void load(const Shape& tile, const Matrix& m, int64_t row, int64_t row_end,
                      int64_t column, int64_t column_end) const {
    constexpr int kSize = static_cast<int>(sizeof(T));
    column += chunk * kLanes<T>;
    row += first;
    const int rows = row_end - row < kRows ? static_cast<int>(row_end - row) : kRows;
    const int64_t left = column_end - column;
    const int count = left <= 0 ? 0 : left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
    T* to = tile.chunk(first, chunk);
    if (m.width == 16) {
      const int bytes = count * kSize;
      if (m.plain()) {
        const T* from = static_cast<const T*>(m.data) + row * m.row_stride + column;
        const int64_t step = m.row_stride * kPass;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          copy_async_part(to + i * kPass * kColumns, from + i * step, i * kPass < rows ? bytes : 0);
        }
        return;
      }
      const int64_t offset = count > 0 ? m.column_offset(column) : 0;
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) {
        const bool inside = i * kPass < rows && count > 0;
        const T* from =
            static_cast<const T*>(m.data) + (inside ? m.row_offset(row + i * kPass) + offset : 0);
        copy_async_part(to + i * kPass * kColumns, from, inside ? bytes : 0);
      }
      return;
    }
    const bool words = m.width == 4 && count * kSize % 4 == 0;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      T* at = to + i * kPass * kColumns;
      const int n = i * kPass < rows ? count : 0;
      const T* base = static_cast<const T*>(m.data) + (n > 0 ? m.row_offset(row + i * kPass) : 0);
      if (words) {
        constexpr int kWord = 4 / kSize;
#pragma unroll
        for (int j = 0; j < kLanes<T>; j += kWord) {
          const bool inside = j < n;
          copy_async<4>(at + j, base + (inside ? m.column_offset(column + j) : 0), inside);
        }
      } else {
        Chunk c = {};
#pragma unroll
        for (int j = 0; j < kLanes<T>; ++j) {
          if (j >= n) continue;
          const T* from = base + m.column_offset(column + j);
          if constexpr (kSize == 4) {
            c.word[j] = float_to_bits(load_scalar(from));
          } else {
            c.word[j / 2] |= static_cast<uint32_t>(load_scalar(from).bits) << (j % 2 * 16);
          }
        }
        shared_store(reinterpret_cast<Chunk*>(at), c);
      }
    }
  }
};

}  // namespace ft::cuda
