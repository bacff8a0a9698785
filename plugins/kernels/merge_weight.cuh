// merge_weight.cuh: how much of a merged token's contribution is left at its target (STM, arXiv 2509.22691), one weight a
// block, so that the weights can ride in the grid of a scan instead of taking a launch of their own.
#pragma once
#include <cmath>

#include "device.cuh"
#include "dt_proj.cuh"
#include "mamba_scan.h"

namespace stm {

struct MergeWeightShared {
  static constexpr int kMaxStates = 64, kMaxWarps = 32;
  float source_b[kMaxStates], target_b[kMaxStates];
  float partial[2][kMaxWarps];
};

// The weight of `pair` in image b, by a whole block of kThreads; needs x_dbl. Threads take channels e = threadIdx.x, +
// kThreads, ... in order and the partial sums are added in a fixed tree, so results repeat bit for bit. delta is projected
// again on the spot: a pair needs it for the tokens of its span only, mostly two.
template <typename T, int kThreads>
__device__ __forceinline__ void merge_weight(const MambaScanParams& p, int pair, int b, MergeWeightShared& shared) {
  constexpr int kWarps = kThreads / 32;
  const int L = p.seqlen, E = p.d_inner, N = p.d_state, R = p.dt_rank;
  const WeightMode mode = p.weight_mode;
  const int source = p.merge_pairs[2 * pair], target = p.merge_pairs[2 * pair + 1];
  float* out = p.merge_weights + static_cast<int64_t>(b) * p.nb_pairs + pair;
  if (source < 0 || target < 0 || source >= L || target >= L) {  // a broken plan shows as NaN, not as a wild read
    if (threadIdx.x == 0) *out = nanf("");
    return;
  }
  const int dir = source < target ? 0 : 1, span = dir ? source - target : target - source;
  const T* rows = static_cast<const T*>(p.x_dbl) + (static_cast<int64_t>(dir) * p.batch + b) * L * p.row;
  for (int n = threadIdx.x; n < N; n += kThreads) {
    shared.source_b[n] = to_float(rows[static_cast<int64_t>(source) * p.row + R + n]);
    shared.target_b[n] = to_float(rows[static_cast<int64_t>(target) * p.row + R + n]);
  }
  __syncthreads();

  float sum = 0.f, square = 0.f;
  for (int e = threadIdx.x; e < E; e += kThreads) {
    const int64_t channel = static_cast<int64_t>(dir) * E + e;
    const T* weight = static_cast<const T*>(p.dt_weight) + channel * R;
    const float bias = p.dt_bias[channel];
    float sigma = 0.f, delta_source = 0.f, delta_target = 0.f;
    auto take = [&](int i, float projected) {  // i: distance from the source
      if (i > span) return;
      const float delta = softplus_exact(projected);
      if (i == 0) delta_source = delta;
      if (i == span) delta_target = delta;
      const int t = dir ? source - i : source + i;
      if (i > 0) sigma += p.decay_scale ? delta * p.decay_scale[t] : delta;
    };
    for (int begin = 0; begin <= span; begin += 2) {
      float delta[2] = {bias, bias};
      int64_t offset[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int i = min(begin + k, span);
        offset[k] = static_cast<int64_t>(dir ? source - i : source + i) * p.row;
      }
      dt_proj(weight, rows, offset, R, delta);
      take(begin, delta[0]);
      take(begin + 1, delta[1]);
    }

    const float* A = p.A + channel * N;
#pragma unroll 4
    for (int n = 0; n < N; n++) {
      const float decay = ex2(A[n] * kLog2e * sigma);
      const float from = delta_source * shared.source_b[n], to = delta_target * shared.target_b[n];
      if (mode == WeightMode::kHsp) {
        sum = fmaf(decay * from, to, sum);
        square = fmaf(to, to, square);
      } else if (mode == WeightMode::kDecay) {
        sum += decay;
      } else {
        sum += decay * from / (to + (to < 0.f ? -1e-6f : 1e-6f));
      }
    }
  }
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, mask);
    square += __shfl_xor_sync(~0u, square, mask);
  }
  if (threadIdx.x % 32 == 0) {
    shared.partial[0][threadIdx.x / 32] = sum;
    shared.partial[1][threadIdx.x / 32] = square;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f, norm = 0.f;
    for (int w = 0; w < kWarps; w++) {
      total += shared.partial[0][w];
      norm += shared.partial[1][w];
    }
    *out = mode == WeightMode::kHsp ? fminf(fmaxf(total / (norm + 1e-12f), 0.f), 1.f)
                                    : total / (static_cast<float>(E) * static_cast<float>(N));
  }
}

}  // namespace stm
