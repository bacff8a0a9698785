// conv_xproj_impl.h: the parts behind conv_xproj.h, one translation unit each. The caller has checked the extents.
#pragma once
#include "conv_xproj.h"

namespace stm {

cudaError_t conv_xproj_simple(const ConvXProjParams& p, cudaStream_t stream);
bool conv_xproj_tensor_core_supported(int32_t d_inner, int32_t row, DataType type);
cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, cudaStream_t stream);

}  // namespace stm
