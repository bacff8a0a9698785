// conv_xproj_impl.h: the parts behind conv_xproj.h, one translation unit each. The caller has checked the extents.
#pragma once
#include <type_traits>

#include "conv_xproj.h"

namespace stm {

cudaError_t conv_xproj_simple(const ConvXProjParams& p, cudaStream_t stream);

bool conv_xproj_tensor_core_supported(int32_t d_inner, int32_t row, DataType type);
cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, cudaStream_t stream);

// run(std::integral_constant<int, tiles>()) with the tiles of 8 outputs that hold a row of x_dbl: ViM-Ti, S, B and longer
// ones; `beyond` where that is over kMost.
template <int kMost, typename Result, typename Run>
Result with_tiles(int32_t row, Result beyond, Run run) {
  if (row <= 48) return run(std::integral_constant<int, 6>());
  if (row <= 56) return run(std::integral_constant<int, 7>());
  if (row <= 80) return run(std::integral_constant<int, 10>());
  if constexpr (kMost >= 12)
    if (row <= 96) return run(std::integral_constant<int, 12>());
  return beyond;
}

// How the tensor-core tactic lays its work out. Tests and timings name a shape; otherwise tokens and the card choose.
// kFew*: 16 tokens a block, or a cluster of 2, 4, 8 blocks (sm_90). kSplit*: 8, 4 or 2 warps share the channels of 48
// tokens. kWide: 96 or 64 tokens, both directions, in a block (d_inner a multiple of 64, row <= 80). kMany: 32 tokens a warp.
// kWgmma: up to 192 tokens, both directions, in a block (Hopper; extents as of kWide).
enum class ConvXProjShape { kFew, kFewCluster2, kFewCluster4, kFewCluster8, kSplit8, kSplit4, kSplit2, kMany, kWide, kWgmma };
constexpr int kConvXProjShapes = 10;
ConvXProjShape conv_xproj_shape(const ConvXProjParams& p);
// cudaErrorInvalidConfiguration: not on this card, or too few or too many channels.
cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream);
cudaError_t conv_xproj_few(const ConvXProjParams& p, int cluster_log2, cudaStream_t stream);
cudaError_t conv_xproj_split(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream);
cudaError_t conv_xproj_many(const ConvXProjParams& p, cudaStream_t stream);
bool conv_xproj_wide_supported(int32_t d_inner, int32_t row);
bool conv_xproj_wide_paired(int32_t row);  // whether a multiprocessor of the current device holds two of its blocks
cudaError_t conv_xproj_wide(const ConvXProjParams& p, cudaStream_t stream);
bool conv_xproj_wgmma_supported(int32_t d_inner, int32_t row);  // asks the current device, too
int32_t conv_xproj_wgmma_tokens(const ConvXProjParams& p);  // tokens of a multiprocessor at once
cudaError_t conv_xproj_wgmma(const ConvXProjParams& p, cudaStream_t stream);

}  // namespace stm
