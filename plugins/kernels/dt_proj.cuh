// dt_proj.cuh: the low-rank projection of a few tokens for one channel, on CUDA cores.
#pragma once
#include "device.cuh"

namespace stm {

// acc[k] += sum_r weight[r] rows[offset[k] + r]: the thread's own weights, token rows that the whole warp shares.
template <typename T, int kTokens>
__device__ __forceinline__ void dt_proj(const T* weight, const T* rows, const int64_t (&offset)[kTokens], int dt_rank,
                                        float (&acc)[kTokens]) {
  if (dt_rank % 4 == 0) {
#pragma unroll 3
    for (int r = 0; r < dt_rank; r += 4) {
      const float4 w = load4(weight + r);
#pragma unroll
      for (int k = 0; k < kTokens; k++) {
        const float4 v = load4(rows + offset[k] + r);
        acc[k] = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, acc[k]))));
      }
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < dt_rank; r++) {
      const float w = to_float(weight[r]);
#pragma unroll
      for (int k = 0; k < kTokens; k++) acc[k] = fmaf(w, to_float(rows[offset[k] + r]), acc[k]);
    }
  }
}

// The same for several channels of a thread, whose loads are in flight together.
template <typename T, int kChannels, int kTokens>
__device__ __forceinline__ void dt_proj_channels(const T* const (&weight)[kChannels], const T* rows,
                                                 const int64_t (&offset)[kTokens], int dt_rank,
                                                 float (&acc)[kChannels][kTokens]) {
  if (dt_rank % 4 == 0) {
#pragma unroll 2
    for (int r = 0; r < dt_rank; r += 4) {
      float4 w[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; c++) w[c] = load4(weight[c] + r);
#pragma unroll
      for (int k = 0; k < kTokens; k++) {
        const float4 v = load4(rows + offset[k] + r);
#pragma unroll
        for (int c = 0; c < kChannels; c++)
          acc[c][k] = fmaf(w[c].x, v.x, fmaf(w[c].y, v.y, fmaf(w[c].z, v.z, fmaf(w[c].w, v.w, acc[c][k]))));
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < kChannels; c++) dt_proj(weight[c], rows, offset, dt_rank, acc[c]);
  }
}

}  // namespace stm
