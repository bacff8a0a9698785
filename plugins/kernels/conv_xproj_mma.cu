// conv_xproj_mma.cu: which shape of the tensor-core kernels these tokens take on this card.
#include "conv_xproj_impl.h"
#include "launch.cuh"

namespace stm {

bool conv_xproj_tensor_core_supported(int32_t d_inner, int32_t row, DataType type) {
  return type != DataType::kFloat32 && d_inner % 32 == 0 && row <= 96;
}

// From so many tokens a multiprocessor on wgmma is taken. On an H200 it needs, for ViM-Ti / S / B, 0.98 / 1.01 / 0.86 of the time
// of the best other shape at 24 tokens, 0.86 / 0.90 / 1.00 at 96, 0.85 / 0.87 / 0.89 at 154; at 12 tokens 1.24 / 1.29 / 1.29.
constexpr int32_t kWgmmaTokens = 20;

// The most blocks or warps that still run at once: a second round costs as much as the first.
ConvXProjShape conv_xproj_shape(const ConvXProjParams& p) {
  const int processors = processors_of_device();
  const int64_t few_blocks = (static_cast<int64_t>(p.batch) * ((p.seqlen + 1) / 2) + 7) / 8 * 2;
  const int64_t spans = (static_cast<int64_t>(p.batch) * ((p.seqlen + 5) / 6) + 7) / 8;
  const int steps = p.d_inner / 32;
  if (4 * few_blocks <= processors && steps >= 4) return ConvXProjShape::kFewCluster4;
  if (2 * few_blocks <= processors && steps >= 2) return ConvXProjShape::kFewCluster2;
  if (2 * few_blocks <= 3 * processors) return ConvXProjShape::kFew;
  if (conv_xproj_wgmma_supported(p.d_inner, p.row) && conv_xproj_wgmma_tokens(p) >= kWgmmaTokens)
    return ConvXProjShape::kWgmma;
  if (2 * spans <= processors) return ConvXProjShape::kSplit8;
  const bool wide = conv_xproj_wide_supported(p.d_inner, p.row);
  // On an H200 1.3 to 1.7 times as long as wide blocks, two a multiprocessor (32 images); untimed where one does not fit twice.
  if (spans <= processors && !(wide && conv_xproj_wide_paired(p.row))) return ConvXProjShape::kSplit4;
  if (wide) return ConvXProjShape::kWide;
  return spans <= 2 * processors ? ConvXProjShape::kSplit2 : ConvXProjShape::kMany;
}

cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream) {
  switch (shape) {
    case ConvXProjShape::kFew: return conv_xproj_few(p, 0, stream);
    case ConvXProjShape::kFewCluster2: return conv_xproj_few(p, 1, stream);
    case ConvXProjShape::kFewCluster4: return conv_xproj_few(p, 2, stream);
    case ConvXProjShape::kFewCluster8: return conv_xproj_few(p, 3, stream);
    case ConvXProjShape::kMany: return conv_xproj_many(p, stream);
    case ConvXProjShape::kWide: return conv_xproj_wide(p, stream);
    case ConvXProjShape::kWgmma: return conv_xproj_wgmma(p, stream);
    default: return conv_xproj_split(p, shape, stream);
  }
}

// A card without clusters or with little shared memory takes the next shape that it can.
cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, cudaStream_t stream) {
  const ConvXProjShape shape = conv_xproj_shape(p);
  cudaError_t status = conv_xproj_tensor_core(p, shape, stream);
  if (status == cudaErrorInvalidConfiguration && shape > ConvXProjShape::kFewCluster8)
    status = conv_xproj_many(p, stream);
  if (status == cudaErrorInvalidConfiguration) status = conv_xproj_few(p, 0, stream);
  return status;
}

}  // namespace stm
