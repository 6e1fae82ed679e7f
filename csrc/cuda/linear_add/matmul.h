// The matrix product of linear_add and its relatives, as its launchers see it: arguments, tiles,
// and the plan for a problem. product.h has the kernel, plan.cu the rules.
#pragma once
#include "cuda/linear_add/operand.h"
#include "params/linear_add_layer_norm.h"

namespace ft::cuda {

// What is multiplied: A · Bᵀ (input · weightᵀ), A · B (grad · weight), Aᵀ · B (gradᵀ · input).
enum class Form : int { forward, d_input, d_weight };
constexpr int kForms = 3;

// The tile of a block; those of rows hold whole rows and norm them.
enum class TileKind : int { large, medium, skinny, row256, row512 };
constexpr int kTileKinds = 5;

// m × n of C and `depth` bytes of K at a time; warps along m, n and k; `blocks` on an SM, with the
// registers for it; tiles in flight at most; and the share of an SM's matrix rate that it reaches
// when it runs there, by the shared memory's bandwidth: a warp of 64 × 64 reads 4 KB for 32 mma, of
// 32 × 32 2 KB for 8. Skinny's is memory's. None was measured: no GPU was at hand.
struct TileSpec {
  int m, n, depth, warps_m, warps_n, warps_k, blocks, stages;
  double rate;
};
constexpr TileSpec kTiles[2][kTileKinds] = {
    {{128, 128, 64, 2, 2, 1, 2, 4, 1.0},   // 16-bit: large
     {64, 64, 128, 2, 2, 1, 3, 4, 0.55},   // medium
     {16, 32, 512, 1, 1, 8, 2, 4, 0.15},   // skinny
     {64, 256, 64, 1, 4, 1, 1, 4, 0.9},    // row256
     {64, 512, 64, 1, 8, 1, 1, 4, 0.9}},   // row512
    {{128, 128, 64, 2, 4, 1, 1, 5, 1.0},   // float: large; a warp of 64 × 64 has no room to split
     {64, 64, 128, 2, 2, 1, 2, 4, 0.7},    // medium
     {16, 32, 512, 1, 1, 8, 2, 4, 0.15}},  // skinny
};
constexpr const TileSpec& tile_spec(bool is_float, TileKind kind) {
  return kTiles[is_float ? 1 : 0][static_cast<int>(kind)];
}

// What happens to a finished sum x: y = dropout(act(x + bias)) + residual, rounded, goes to `out`.
struct Epilogue {
  VectorArg bias;
  Activation activation = Activation::none;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  bool residual_aligned = false;  // its rows begin on 16 bytes
  Dropout dropout;                // an element's position: row · n + column
  Matrix out;
  // Norms: (mean, Σ (y − mean)²) of every strip of a row, strips behind one another; null: no norm.
  // Without `centred` (RMS) the mean is 0.
  float* moments = nullptr;
  bool centred = false;
};

// The norm of rows y, in the same block or by norm_rows.
struct RowNorm {
  VectorArg weight, bias;
  void* normed = nullptr;
  float* mean = nullptr;  // null: RMS
  float* rstd = nullptr;
  float eps = 0.f;
  bool aligned = false;    // rows of normed begin on 16 bytes
  bool write_sum = false;  // y itself is wanted (of the block's norm)
};

struct MatmulArgs {
  Matrix a, b;
  int64_t m = 0, n = 0, k = 0;
  int64_t items = 0;  // tiles · splits
  Epilogue epilogue;
  RowNorm norm;
  // K in parts of per_split, whose float sums go to split_sums[split][m][sum_stride].
  int splits = 1;
  int64_t per_split = 0, sum_stride = 0;
  float* split_sums = nullptr;
  int stages = 2;
  bool plain = false;  // float without tensor cores
};

struct ProductPlan {
  TileKind kind = TileKind::medium;
  int stages = 2, splits = 1, block = 0;
  int64_t per_split = 0, tiles = 0, shared = 0, sum_stride = 0;
  bool plain = false;
  int strip = 0;    // columns of a strip of moments
  double cost = 0;  // multiply-adds of one SM's time

  bool norms_rows() const { return kind == TileKind::row256 || kind == TileKind::row512; }
  int64_t sum_floats(int64_t m) const { return splits > 1 ? splits * m * sum_stride : 0; }
  int64_t strips(int64_t n) const { return (n + strip - 1) / strip; }
};

// Bytes of the product kernel's shared memory that are not the launch's: its work item.
constexpr int64_t kItemBytes = 48;

// For C (m × n) with a sum over k; `norm` says that C's rows are normed.
ProductPlan plan_product(const char* name, DType dtype, Form form, int64_t m, int64_t n, int64_t k,
                         bool norm);
// Floats of scratch memory that run_product needs.
int64_t product_workspace(const ProductPlan& plan, int64_t m, int64_t n, bool norm);
// The product, its split sums added up, and the norm where args.norm.normed is set.
void run_product(const char* name, DType dtype, Form form, const ProductPlan& plan, MatmulArgs args,
                 float* workspace, void* stream);

// out[n] = Σ rows, summed in parts of rows and the parts in order.
int64_t column_sums_workspace(DType dtype, int64_t m, int64_t n);
void run_column_sums(const char* name, DType dtype, const Matrix& rows, void* out, float* workspace,
                     void* stream);

// Instances: linear_add_{f32,f16,bf16}.cu.
template <class T>
void launch_product(const char* name, Form form, const ProductPlan& plan, const MatmulArgs& args,
                    void* stream);

// Launcher-side views of the operators' params.
Matrix input_matrix(const LinearAddParams& p, const void* data, bool contiguous);
Matrix row_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, DType dtype);
MatmulArgs forward_args(const LinearAddParams& p);
void linear_add_norm(const char* name, const LinearAddNormParams& p, void* stream);

}  // namespace ft::cuda
