// mamba_scan_impl.h: the parts behind mamba_scan.h, one translation unit each. The caller has checked the extents.
#pragma once
#include "mamba_scan.h"

namespace stm {

// What mamba_scan_tactics asks, too; `supported` is false where the kernel has no path. walk and segments write the merge
// weights too: the blocks that compute them are part of the grid.
cudaError_t mamba_scan_simple(const MambaScanParams& p, cudaStream_t stream);
bool mamba_scan_segments_supported(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, DataType type);
cudaError_t mamba_scan_segments(const MambaScanParams& p, int32_t processors, cudaStream_t stream);
bool mamba_scan_walk_supported(int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type);
bool mamba_scan_walk_two_pass_supported(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row,
                                        DataType type);
size_t mamba_scan_walk_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner);  // of two passes; one needs none
// Over L: one, two (where the batch alone fills the card, one), or what is predicted to be faster on a card of that many
// multiprocessors.
enum class WalkPasses { kOne, kTwo, kFaster };
cudaError_t mamba_scan_walk(const MambaScanParams& p, int32_t processors, WalkPasses passes, cudaStream_t stream);

// merge_weights of p.merge_pairs, from x_dbl, dt_weight, dt_bias, A and decay_scale; nothing if there are none.
cudaError_t merge_weights(const MambaScanParams& p, cudaStream_t stream);

}  // namespace stm
