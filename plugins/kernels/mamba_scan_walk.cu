#include "mamba_scan_impl.h"
namespace stm {
bool mamba_scan_walk_supported(int32_t, int32_t, int32_t, int32_t, DataType) { return false; }
cudaError_t mamba_scan_walk(const MambaScanParams&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace stm
