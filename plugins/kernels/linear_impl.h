// linear_impl.h: the parts behind linear.h, one translation unit each. The caller has checked the extents.
#pragma once
#include <type_traits>

#include "linear.h"

namespace stm {

// Shapes with `wgmma` of kLinearShapes. Shared memory of a block; more than any device has where this build or the current device
// cannot run them.
size_t linear_wgmma_bytes(int32_t shape);
cudaError_t linear_wgmma(const LinearParams& p, int32_t shape, cudaStream_t stream);

// run(std::integral_constant<int, shape>()) for the one of that index
template <int kShape = 0, typename Run>
auto with_linear_shape(int32_t shape, Run run) {
  if constexpr (kShape + 1 < kNbLinearShapes) {
    if (shape != kShape) return with_linear_shape<kShape + 1>(shape, run);
  }
  return run(std::integral_constant<int, kShape>());
}

}  // namespace stm
