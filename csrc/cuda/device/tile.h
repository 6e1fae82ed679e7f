// A tile of a matrix in shared memory, and how it gets there. Rows come in chunks of 16 bytes; the
// chunks of a row are permuted by exclusive-or with the row, so that eight rows of a column of
// chunks (what ldmatrix reads at a time) lie in different banks, as do a row's chunks (what
// load_tile writes). Source: CUTLASS, "Efficient GEMM in CUDA", shared-memory layouts.
#pragma once
#include "cuda/device/async.h"
#include "cuda/device/shared.h"
#include "cuda/device/vector.h"

namespace ft::cuda {

template <class T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunks = kColumns / kLanes<T>;  // in a row
  static constexpr int kBytes = kRows * kColumns * static_cast<int>(sizeof(T));
  static_assert(kColumns % kLanes<T> == 0);
  // Chunks of a row that can trade places: the power of two in kChunks, at most 8 (all banks).
  static constexpr int kGroup = (kChunks & -kChunks) < 8 ? (kChunks & -kChunks) : 8;
  // Rows that share a permutation, since together they lie in different banks already.
  static constexpr int kAlike = 8 / kGroup;

  T* data;

  FT_DEVICE T* chunk(int row, int chunk) const {
    return data + (row * kChunks + (chunk ^ (row / kAlike & (kGroup - 1)))) * kLanes<T>;
  }
  FT_DEVICE T* at(int row, int column) const {
    return chunk(row, column / kLanes<T>) + column % kLanes<T>;
  }
};

// Whether rows that start at `base` and lie `stride` elements apart begin on 16 bytes.
template <class T>
FT_DEVICE bool rows_aligned(const T* base, int64_t stride) {
  return ((reinterpret_cast<uintptr_t>(base) |
           static_cast<uintptr_t>(stride * int64_t{sizeof(T)})) &
          15) == 0;
}

// Fills the tile from a matrix in global memory whose row r begins at row_of(r): zeros in rows from
// `rows` on and columns from `columns` on, which are not read. kThreads threads share the work.
// Aligned rows come by cp.async (the caller commits and waits); others come element by element and
// are there on return. Either way a barrier must pass before others read them.
template <int kThreads, class T, int kRows, int kColumns, class RowOf>
FT_DEVICE void load_tile(const Tile<T, kRows, kColumns>& tile, int rows, int columns, bool aligned,
                         int thread, const RowOf& row_of) {
  using Shape = Tile<T, kRows, kColumns>;
  constexpr int kSteps = (kRows * Shape::kChunks + kThreads - 1) / kThreads;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int index = i * kThreads + thread;
    if (kRows * Shape::kChunks % kThreads != 0 && index >= kRows * Shape::kChunks) break;
    const int row = index / Shape::kChunks, chunk = index % Shape::kChunks;
    const int column = chunk * kLanes<T>;
    const int left = row < rows ? columns - column : 0;
    const T* from = row_of(left > 0 ? row : 0) + (left > 0 ? column : 0);
    if (aligned) {
      const int bytes = left * static_cast<int>(sizeof(T));
      copy_async_part(tile.chunk(row, chunk), from, bytes < 0 ? 0 : bytes < 16 ? bytes : 16);
    } else {
      Chunk c = load_chunk<T>(from, 0, left, false);
      shared_store(reinterpret_cast<Chunk*>(tile.chunk(row, chunk)), c);
    }
  }
}

}  // namespace ft::cuda
