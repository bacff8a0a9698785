// linear_impl.h: the parts behind linear.h, one translation unit each. The caller has checked the extents.
#pragma once
#include <type_traits>

#include "linear.h"

namespace stm {

// Shapes with `wgmma` of kLinearShapes, if this build and the current device run them; a block's shared memory.
bool linear_wgmma_supported();
size_t linear_wgmma_bytes(int32_t shape, bool with_residual);
cudaError_t linear_wgmma(const LinearParams& p, int32_t shape, cudaStream_t stream);

// Tiles of so many rows that hold all of x.
inline int64_t row_tiles(const LinearParams& p, int rows) {
  const int64_t run = p.left + p.right > 0 ? p.seqlen : p.rows;
  return run == 0 ? 0 : p.rows / run * ((run + rows - 1) / rows);
}

// run(std::integral_constant<int, shape>()) for the one of that index
template <int kShape = 0, typename Run>
auto with_linear_shape(int32_t shape, Run run) {
  if constexpr (kShape + 1 < kNbLinearShapes) {
    if (shape != kShape) return with_linear_shape<kShape + 1>(shape, run);
  }
  return run(std::integral_constant<int, kShape>());
}

}  // namespace stm
