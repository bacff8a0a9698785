// patch_rows.h: the patches of images as rows of a matrix (im2row), so that the patch embedding is one GEMM.
#pragma once
#include "types.h"

namespace stm {

constexpr int32_t kMaxPatch = 256;

struct PatchRowsParams {  // contiguous; extents in elements
  int32_t batch, height, width;
  int32_t patch, stride;  // square patches, overlapping if stride < patch; what no whole patch covers is not read
  int32_t cls_index;      // -1: patches only; else a row of zeros, the class token's, stands at this place among them
  DataType type;          // T
  const float* images;    // (batch, 3, height, width)
  void* rows;             // (batch, seqlen, 3 patch^2), T; a row is (channel, y, x), as the convolution's weight
};

// Rows an image makes: its patches in row-major order, and the class token's. Needs height and width >= patch.
constexpr int64_t patch_rows_seqlen(int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t cls_index) {
  return ((height - patch) / stride + 1) * ((width - patch) / stride + 1) + (cls_index >= 0 ? 1 : 0);
}

// Enqueues only: no allocation, synchronisation or exception, so it may be captured. Needs no workspace.
cudaError_t patch_rows(const PatchRowsParams& p, cudaStream_t stream);

}  // namespace stm
