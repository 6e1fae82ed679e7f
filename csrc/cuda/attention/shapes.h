// Tiles of attention's forward, what a launch hands its kernels, and how a row is finished.
#pragma once
#include "cuda/attention_scores.h"

namespace ft::cuda {

// plain: nothing but positions and lengths decides what a query sees, rows are aligned, 16-bit.
// general: everything, by flags at run time. few: general for up to 16 rows (decode).
enum class Variant { plain, general, few };

struct TileShape {
  int row_tiles, warps;  // a block owns 16 · row_tiles · warps rows of queries, if not
  int keys;              // of a tile
  int blocks;            // that an SM is to hold, by registers and shared memory
  int column_warps = 1;  // that share the output's columns of the same rows

  constexpr int rows() const { return 16 * row_tiles * warps / column_warps; }
};

// By head size (the larger of D and E, the rest of the columns are zeros). Shared memory is Q + K +
// V and below 99 KB everywhere, so that one table serves sm_80 (163 KB), sm_86 and sm_89 (99 KB)
// and sm_90 (227 KB): a second block on an SM hides more than a larger tile would. Reasoned, not
// measured: no GPU was at hand.
// - A warp of 32 rows (row_tiles 2) reads half as much shared memory per product as one of 16,
//   which at 16 rows takes as long as the products themselves; its sums take D registers of a
//   thread's 255, so D 256 has 16.
// - general holds more per row (mask, bias, slope), hence 16 rows.
// - few has a warp to itself, as four of them on an SM then keep four tensor cores and 64 KB and
//   more of loads busy; a block of 128 rows would do eight times the products for nothing.
// - float takes four products of tf32, twice the room and more registers: at 256, two warps make
//   the same weights and take half of the columns each.
struct ShapeRow {
  int bytes;
  Variant variant;
  int head;
  TileShape shape;
};
constexpr ShapeRow kShapes[] = {
    {2, Variant::plain, 32, {2, 4, 64, 3}},    {2, Variant::plain, 64, {2, 4, 64, 2}},
    {2, Variant::plain, 128, {2, 4, 48, 2}},   {2, Variant::plain, 256, {1, 8, 32, 1}},
    {2, Variant::general, 32, {1, 4, 64, 3}},  {2, Variant::general, 64, {1, 4, 64, 3}},
    {2, Variant::general, 128, {1, 4, 64, 2}}, {2, Variant::general, 256, {1, 8, 32, 1}},
    {2, Variant::few, 32, {1, 1, 64, 8}},      {2, Variant::few, 64, {1, 1, 64, 8}},
    {2, Variant::few, 128, {1, 1, 64, 4}},     {2, Variant::few, 256, {1, 1, 32, 4}},
    {4, Variant::general, 32, {1, 4, 64, 2}},  {4, Variant::general, 64, {1, 4, 32, 2}},
    {4, Variant::general, 128, {1, 4, 32, 1}}, {4, Variant::general, 256, {1, 8, 16, 1, 2}},
};
constexpr TileShape tile_shape(int bytes, Variant variant, int head) {
  for (const ShapeRow& row : kShapes) {
    if (row.bytes == bytes && row.variant == variant && row.head == head) return row.shape;
  }
  return {};
}
constexpr int head_bucket(int64_t size) {
  return size <= 32 ? 32 : size <= 64 ? 64 : size <= 128 ? 128 : 256;
}

struct ForwardArgs {
  AttentionParams p;
  Units units;
  int pack = 1, heads = 1;  // query heads that share a tile; how many such packs there are
  int tiles = 0;            // of queries, in a pack
  int section = 1;          // packs whose tiles are taken together; see place_of
  int64_t items = 0;        // of work: tiles of all packs, times splits
  int splits = 1;
  float* partial = nullptr;  // splits × rows × E sums, then splits × rows × (maximum, total)
  bool query_aligned = false, key_aligned = false, value_aligned = false, out_aligned = false;
};

struct Finish {
  float lse, factor;
};

// From a row's maximum and sum to its lse, and to what its weighted values are multiplied by. A
// sink is one more score without a value.
FT_DEVICE Finish finish_row(const AttentionParams& p, float lse_scale, bool some, float top,
                            float total, int64_t head) {
  if (!some) return {p.sinks == nullptr ? -infinity() : load_scalar(p.sinks + head), 0.f};
  top = top == -infinity() ? top : top * lse_scale;
  float factor = 1.f;
  if (p.sinks != nullptr) {
    const float sink = load_scalar(p.sinks + head);
    const float most = maximum(top, sink);
    const float base = most == -infinity() ? 0.f : most;
    factor = exponential<float>(top - base);
    total = total * factor + exponential<float>(sink - base);
    top = most;
  }
  const float base = top == -infinity() ? 0.f : top;
  return {top == infinity() ? top : base + natural_log(total), factor / total * p.dropout.scale};
}

}  // namespace ft::cuda
