// linear.h: a linear layer for few rows: y = x weight^T, as in_proj and out_proj of a ViM mixer in small batches. It starts while
// the kernel before it still runs and brings its weights meanwhile; with many rows a library's GEMM is faster.
//
// Residual add and RMSNorm between two of them need no kernel: the first, given the residual, puts out the sum r, the sums of r^2
// over each 16 columns, and r / 16 in T; the second, given those squares, multiplies its rows by 16 / sqrt(mean(r^2) + epsilon).
// The norm's weight is for the caller to multiply into the second's weight. A sixteenth: so that r may be as large as 1e6 in fp16.
// Tokens at both ends of an image may merge in between (STM's edge rule, arXiv 2509.22691, eq. 11): the first merges its sums r.
#pragma once
#include "types.h"

namespace stm {

struct LinearParams {  // contiguous; extents in elements
  int64_t rows;                       // batch x seqlen
  int32_t in_features, out_features;
  DataType type;                      // T
  const void* x;                      // (rows, in_features), T
  const void* weight;                 // (out_features, in_features), T
  void* y;                            // (rows, out_features), T, fewer rows where tokens merge; sums in float32
  const float* squares;               // (rows, in_features / 16), or null: x is what a linear with a residual has put out
  float epsilon;                      // of that norm
  const float* residual;              // (rows, out_features), or null: y is the sum / 16
  float* residual_out;                // (rows, out_features); the sum
  float* squares_out;                 // (rows, out_features / 16)
  int32_t seqlen;                     // tokens of an image, where some merge; rows is a multiple of it
  int32_t left, right;                // up to kMostMerged: sources 0..left-1 -> left; the last `right` tokens -> seqlen - right - 1. Need a
                                      // residual; rows of y, residual_out, squares_out: batch x (seqlen - left - right)
  const float* merge_weights;         // (batch or 1, left + right)
  bool weights_per_image;             // batch
};
constexpr float kStreamScale = 1.f / 16;
constexpr int32_t kSquaredColumns = 16;
constexpr int32_t kMostMerged = 11;  // at an end: no tile of rows is so small that it would not hold these and their target

// Stored in engines: never renumber; zero is reserved by TensorRT.
enum class LinearTactic : int32_t { kTensorCore = 1 };

// How the work is cut: so many rows and columns of y a block. Tests run every shape.
struct LinearShape {
  int32_t rows, columns;
  int32_t across, along;  // warps across the columns, each such set with a part of in_features; wgmma: warpgroups of 64 columns
  int32_t wgmma = 0;      // Hopper's products, in_features a multiple of 64; registers for so many blocks a multiprocessor
};
constexpr LinearShape kLinearShapes[] = {{24, 16, 1, 4},    {24, 32, 2, 4},     {40, 32, 2, 2},     {40, 32, 2, 4},
                                         {40, 64, 4, 2},    {40, 128, 4, 2},    {40, 64, 1, 1, 1},  {80, 64, 1, 1, 1},
                                         {40, 128, 2, 1, 1}, {56, 128, 2, 1, 1}, {80, 128, 2, 1, 1}, {80, 128, 2, 1, 2}};
constexpr int32_t kNbLinearShapes = sizeof kLinearShapes / sizeof *kLinearShapes;
constexpr bool holds_merged(int32_t shape = 0) {  // an image's tiles, as equal as can be, have (rows + 1) / 2 rows or more
  return shape == kNbLinearShapes || ((kLinearShapes[shape].rows + 1) / 2 > kMostMerged && holds_merged(shape + 1));
}
static_assert(holds_merged());

// fp16 and bf16; in_features a multiple of 128 and out_features of 16, or of 64 and 32, as far as shared memory goes; on Hopper
// any multiples of 64, too.
bool linear_supported(int32_t in_features, int32_t out_features, DataType type);
// Index of the shape that is expected to be the fastest; -1 if none runs these extents.
int32_t linear_shape(const LinearParams& p);
// Enqueues only: no allocation, synchronisation or exception, so it may be captured. Needs no workspace.
cudaError_t linear(const LinearParams& p, cudaStream_t stream);
// With one of kLinearShapes; cudaErrorInvalidConfiguration where it does not fit.
cudaError_t linear(const LinearParams& p, int32_t shape, cudaStream_t stream);

}  // namespace stm
