#include "mamba_scan_impl.h"
namespace stm {
bool mamba_scan_segments_supported(int32_t, int32_t, int32_t, int32_t, int32_t, DataType) { return false; }
size_t mamba_scan_segments_workspace_bytes(int64_t, int64_t, int64_t) { return 0; }
cudaError_t mamba_scan_segments(const MambaScanParams&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace stm
