// merge_weight.cuh: how much of a merged token's contribution is left at its target (STM, arXiv 2509.22691), a group of
// weights a block, so that they can ride in the grid of a scan instead of taking a launch of their own.
#pragma once
#include <cmath>

#include "device.cuh"
#include "dt_proj.cuh"
#include "mamba_scan.h"

namespace stm {

constexpr int kMergeGroup = 8;  // pairs of a block, at most

// Pairs of an image in one block: half of a few pairs, which with the edge rule is one side's.
__host__ __device__ inline int merge_group_size(int nb_pairs) {
  const int half = (nb_pairs + 1) / 2;
  return half < kMergeGroup ? half : kMergeGroup;
}
// Blocks an image; 0 if there are no weights to compute.
__host__ __device__ inline int merge_groups(const MambaScanParams& p) {
  if (p.weight_mode == WeightMode::kNone || p.nb_pairs == 0) return 0;
  const int size = merge_group_size(p.nb_pairs);
  return (p.nb_pairs + size - 1) / size;
}

struct MergeWeightShared {
  static constexpr int kMaxStates = 64, kMaxWarps = 32;
  static constexpr int kMaxRows = 48, kRow = 64;  // tokens of a run whose x_dbl is brought here; dt of one
  alignas(16) float B[kMergeGroup][kMaxStates];   // of the sources of a run
  alignas(16) float target_B[kMaxStates];
  alignas(16) uint16_t rows[kMaxRows][kRow];      // halves, from the target outward
  float partial[kMergeGroup + 1][kMaxWarps];
  int pairs[2 * kMergeGroup];
  int distance[kMergeGroup];  // of a source from the target
  int end, farthest;          // the run: pairs with one target, on one side of it
};

// A state's share of a weight in one channel: exp(A sigma) is what is left of the source.
__device__ __forceinline__ float merge_term(WeightMode mode, float A, float sigma, float delta_source, float source_B,
                                            float delta_target, float target_B) {
  const float decay = ex2(A * sigma), from = delta_source * source_B, to = delta_target * target_B;
  if (mode == WeightMode::kHsp) return decay * from * to;
  if (mode == WeightMode::kDecay) return decay;
  return decay * from / (to + (to < 0.f ? -1e-6f : 1e-6f));
}
__device__ __forceinline__ float merge_terms(WeightMode mode, float4 A, float sigma, float delta_source,
                                             const float* source_B, float delta_target, const float* target_B) {
  const float4 s = load4(source_B), t = load4(target_B);
  return merge_term(mode, A.x, sigma, delta_source, s.x, delta_target, t.x) +
         merge_term(mode, A.y, sigma, delta_source, s.y, delta_target, t.y) +
         merge_term(mode, A.z, sigma, delta_source, s.z, delta_target, t.z) +
         merge_term(mode, A.w, sigma, delta_source, s.w, delta_target, t.w);
}

// The weights of a group in image b, by a whole block of kThreads; needs x_dbl. A run of pairs with one target (with the
// edge rule: all of a side) shares its walk outward from there: delta of each token on the way is projected on the spot,
// once, and what decays a source is the sum of s delta so far. A thread takes kChannels channels at a time, so that their
// loads are in flight together; channels come in a fixed order and the partial sums are added in a fixed tree, so results
// repeat bit for bit. kSixteen: d_state is 16.
template <typename T, int kThreads, bool kSixteen>
__device__ __noinline__ void merge_weights_of_group(const MambaScanParams& p, int group, int b,
                                                    MergeWeightShared& shared) {
  constexpr int kWarps = kThreads / 32, kTokens = 4, kChannels = kSixteen ? 2 : 1;
  const int L = p.seqlen, E = p.d_inner, N = kSixteen ? 16 : p.d_state, R = p.dt_rank, tid = threadIdx.x;
  const int size = merge_group_size(p.nb_pairs), first = group * size, count = min(p.nb_pairs - first, size);
  float* weights = p.merge_weights + static_cast<int64_t>(b) * p.nb_pairs + first;
  if (tid < 2 * count) shared.pairs[tid] = p.merge_pairs[2 * first + tid];
  __syncthreads();
  int begin = 0;
  while (begin < count) {
    const int target = shared.pairs[2 * begin + 1];
    const bool forward = shared.pairs[2 * begin] < target;
    if (tid == 0) {  // where the run ends
      int end = begin, farthest = 0;
      for (; end < count; end++) {
        const int source = shared.pairs[2 * end], q = shared.pairs[2 * end + 1];
        const bool broken = source < 0 || q < 0 || source >= L || q >= L;
        if (end > begin && (broken || q != target || (source < q) != forward)) break;
        shared.distance[end - begin] = forward ? q - source : source - q;
        farthest = max(farthest, shared.distance[end - begin]);
        if (broken) {  // a broken plan shows as NaN, not as a wild read
          weights[end] = nanf("");
          farthest = -1, end++;
          break;
        }
      }
      shared.end = end, shared.farthest = farthest;
    }
    __syncthreads();
    const int pairs = shared.end - begin, farthest = shared.farthest;
    if (farthest >= 0) {
      const int dir = forward ? 0 : 1, outward = dir ? 1 : -1;
      const T* rows = static_cast<const T*>(p.x_dbl) + (static_cast<int64_t>(dir) * p.batch + b) * L * p.row;
      for (int i = tid; i < (pairs + 1) * N; i += kThreads) {
        const int j = i / N, n = i - j * N;
        const int t = j < pairs ? shared.pairs[2 * (begin + j)] : target;
        (j < pairs ? shared.B[j] : shared.target_B)[n] = to_float(rows[static_cast<int64_t>(t) * p.row + R + n]);
      }
      // dt of the run's tokens, if they are halves and fit; else each channel reads them where they are.
      const bool staged = sizeof(T) == 2 && farthest < MergeWeightShared::kMaxRows && R <= MergeWeightShared::kRow;
      if (staged)
        for (int i = tid; i < (farthest + 1) * R; i += kThreads) {
          const int d = i / R, r = i - d * R;
          shared.rows[d][r] =
              reinterpret_cast<const uint16_t*>(rows)[static_cast<int64_t>(target + outward * d) * p.row + r];
        }
      __syncthreads();
      const T* dt = staged ? reinterpret_cast<const T*>(shared.rows[0]) : rows + static_cast<int64_t>(target) * p.row;
      const int64_t step = staged ? MergeWeightShared::kRow : outward * static_cast<int64_t>(p.row);

      float sum[kMergeGroup], square = 0.f, norm = 0.f;
#pragma unroll
      for (int j = 0; j < kMergeGroup; j++) sum[j] = 0.f;
      for (int n = 0; n < N; n++) norm = fmaf(shared.target_B[n], shared.target_B[n], norm);
      for (int e0 = tid; e0 < E; e0 += kThreads * kChannels) {
        const T* weight[kChannels];
        const float* A[kChannels];
        float bias[kChannels], sigma[kChannels], delta_target[kChannels];
        bool exists[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; c++) {
          const int e = e0 + c * kThreads;
          exists[c] = e < E;
          const int64_t channel = static_cast<int64_t>(dir) * E + (exists[c] ? e : e0);
          weight[c] = static_cast<const T*>(p.dt_weight) + channel * R;
          A[c] = p.A + channel * N;
          bias[c] = p.dt_bias[channel];
          sigma[c] = delta_target[c] = 0.f;
          if (kSixteen) asm volatile("prefetch.global.L1 [%0];" ::"l"(A[c]));  // a line holds two channels' or more
        }
        for (int d0 = 0; d0 <= farthest; d0 += kTokens) {
          float delta[kChannels][kTokens], before[kChannels][kTokens];  // before: sigma
          int64_t offset[kTokens];
#pragma unroll
          for (int k = 0; k < kTokens; k++) offset[k] = min(d0 + k, farthest) * step;
#pragma unroll
          for (int c = 0; c < kChannels; c++) {
#pragma unroll
            for (int k = 0; k < kTokens; k++) delta[c][k] = bias[c];
          }
          dt_proj_channels(weight, dt, offset, R, delta);
#pragma unroll
          for (int k = 0; k < kTokens; k++) {
            const float scale = p.decay_scale ? p.decay_scale[target + outward * min(d0 + k, farthest)] : 1.f;
#pragma unroll
            for (int c = 0; c < kChannels; c++) {
              delta[c][k] = softplus_exact(delta[c][k]);
              before[c][k] = sigma[c];
              sigma[c] = fmaf(delta[c][k], scale, sigma[c]);
              if (d0 + k == 0) delta_target[c] = delta[c][k];
            }
          }
#pragma unroll
          for (int j = 0; j < kMergeGroup; j++) {
            if (j >= pairs) break;
            const int k = shared.distance[j] - d0;
            if (k < 0 || k >= kTokens) continue;
#pragma unroll
            for (int c = 0; c < kChannels; c++) {
              const float here = k == 0 ? delta[c][0] : k == 1 ? delta[c][1] : k == 2 ? delta[c][2] : delta[c][3];
              const float decayed =
                  kLog2e * (k == 0 ? before[c][0] : k == 1 ? before[c][1] : k == 2 ? before[c][2] : before[c][3]);
              float total = 0.f;
              if (kSixteen) {
#pragma unroll 2
                for (int n = 0; n < 4; n++)
                  total += merge_terms(p.weight_mode, load4(A[c] + 4 * n), decayed, here, shared.B[j] + 4 * n, delta_target[c],
                                       shared.target_B + 4 * n);
              } else {
                for (int n = 0; n < N; n++)
                  total += merge_term(p.weight_mode, A[c][n], decayed, here, shared.B[j][n], delta_target[c],
                                      shared.target_B[n]);
              }
              if (exists[c]) sum[j] += total;
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kChannels; c++)
          if (exists[c]) square = fmaf(delta_target[c] * delta_target[c], norm, square);
      }
#pragma unroll
      for (int j = 0; j <= kMergeGroup; j++) {
        if (j < kMergeGroup && j >= pairs) continue;
        float v = j < kMergeGroup ? sum[j < kMergeGroup ? j : 0] : square;
#pragma unroll
        for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
        if (tid % 32 == 0) shared.partial[j][tid / 32] = v;
      }
      __syncthreads();
      if (tid < pairs) {
        float total = 0.f, whole = 0.f;
        for (int w = 0; w < kWarps; w++) {
          total += shared.partial[tid][w];
          whole += shared.partial[kMergeGroup][w];
        }
        weights[begin + tid] = p.weight_mode == WeightMode::kHsp
                                   ? fminf(fmaxf(total / (whole + 1e-12f), 0.f), 1.f)
                                   : total / (static_cast<float>(E) * static_cast<float>(N));
      }
    }
    begin += pairs;
    __syncthreads();  // shared is free again
  }
}

}  // namespace stm
