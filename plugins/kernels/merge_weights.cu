// merge_weights.cu: all merge weights as a launch of their own, for the scans that do not carry them in their grid.
#include "launch.cuh"
#include "mamba_scan_impl.h"
#include "merge_weight.cuh"

namespace stm {
namespace {

constexpr int kThreads = 512;

template <typename T>
__global__ __launch_bounds__(kThreads) void merge_weights_kernel(const __grid_constant__ MambaScanParams p) {
  __shared__ MergeWeightShared<kThreads> shared;
  merge_weights_of_group<T, kThreads, false>(p, blockIdx.x, blockIdx.y, shared);
}

template <typename T>
cudaError_t launch(const MambaScanParams& p, cudaStream_t stream) {
  return launch_dependent<merge_weights_kernel<T>>(dim3(merge_groups(p), p.batch), kThreads, 0, stream, p);
}

}  // namespace

cudaError_t merge_weights(const MambaScanParams& p, cudaStream_t stream) {
  if (merge_groups(p) == 0) return cudaSuccess;
  switch (p.type) {
    case DataType::kFloat32: return launch<float>(p, stream);
    case DataType::kFloat16: return launch<__half>(p, stream);
    case DataType::kBFloat16: return launch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
