#include "conv_xproj_impl.h"
namespace stm {
bool conv_xproj_tensor_core_supported(int32_t, int32_t, DataType) { return false; }
cudaError_t conv_xproj_tensor_core(const ConvXProjParams&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace stm
