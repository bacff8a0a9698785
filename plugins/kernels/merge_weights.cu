// merge_weights.cu: how much of a merged token's contribution is left at its target (STM, arXiv 2509.22691).
#include <cmath>

#include "dt_proj.cuh"
#include "mamba_scan_impl.h"

namespace stm {
namespace {

template <typename T_, WeightMode kMode_>
struct MergeWeightsTraits {
  using T = T_;
  static constexpr WeightMode kMode = kMode_;
  static constexpr int kThreads = 1024;  // one channel a thread up to ViM-S: the latency of a block is what shows at batch 1
  static constexpr int kMaxStates = 64;
};

// Grid (pairs, batch): a block owns one weight; threads take channels e = threadIdx.x, + kThreads, ... in order and the
// partial sums are added in a fixed tree, so results repeat bit for bit. delta is projected again on the spot: a pair
// needs it for the tokens of its span only, mostly two.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void merge_weights_kernel(const __grid_constant__ MambaScanParams p) {
  using T = typename Traits::T;
  constexpr WeightMode kMode = Traits::kMode;
  constexpr int kWarps = Traits::kThreads / 32;
  __shared__ float source_b[Traits::kMaxStates], target_b[Traits::kMaxStates];
  __shared__ float partial[2][kWarps];

  const int pair = blockIdx.x, b = blockIdx.y, L = p.seqlen, E = p.d_inner, N = p.d_state, R = p.dt_rank;
  const int source = p.merge_pairs[2 * pair], target = p.merge_pairs[2 * pair + 1];
  float* out = p.merge_weights + static_cast<int64_t>(b) * p.nb_pairs + pair;
  if (source < 0 || target < 0 || source >= L || target >= L) {  // a broken plan shows as NaN, not as a wild read
    if (threadIdx.x == 0) *out = nanf("");
    return;
  }
  const int dir = source < target ? 0 : 1, span = dir ? source - target : target - source;
  const T* rows = static_cast<const T*>(p.x_dbl) + (static_cast<int64_t>(dir) * p.batch + b) * L * p.row;
  for (int n = threadIdx.x; n < N; n += Traits::kThreads) {
    source_b[n] = to_float(rows[static_cast<int64_t>(source) * p.row + R + n]);
    target_b[n] = to_float(rows[static_cast<int64_t>(target) * p.row + R + n]);
  }
  __syncthreads();

  float sum = 0.f, square = 0.f;
  for (int e = threadIdx.x; e < E; e += Traits::kThreads) {
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
    auto chunk = [&](int begin, auto& delta) {
      constexpr int kTokens = sizeof(delta) / sizeof(float);
      int64_t offset[kTokens];
#pragma unroll
      for (int k = 0; k < kTokens; k++) {
        const int i = min(begin + k, span);
        delta[k] = bias;
        offset[k] = static_cast<int64_t>(dir ? source - i : source + i) * p.row;
      }
      dt_proj(weight, rows, offset, R, delta);
#pragma unroll
      for (int k = 0; k < kTokens; k++) take(begin + k, delta[k]);
    };
    float first[2];
    chunk(0, first);
    for (int begin = 2; begin <= span; begin += 8) {
      float more[8];
      chunk(begin, more);
    }

    const float* A = p.A + channel * N;
    for (int n = 0; n < N; n++) {
      const float decay = ex2(A[n] * kLog2e * sigma);
      const float from = delta_source * source_b[n], to = delta_target * target_b[n];
      if (kMode == WeightMode::kHsp) {
        sum = fmaf(decay * from, to, sum);
        square = fmaf(to, to, square);
      } else if (kMode == WeightMode::kDecay) {
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
    partial[0][threadIdx.x / 32] = sum;
    partial[1][threadIdx.x / 32] = square;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f, norm = 0.f;
    for (int w = 0; w < kWarps; w++) {
      total += partial[0][w];
      norm += partial[1][w];
    }
    *out = kMode == WeightMode::kHsp ? fminf(fmaxf(total / (norm + 1e-12f), 0.f), 1.f)
                                     : total / (static_cast<float>(E) * static_cast<float>(N));
  }
}

template <typename T, WeightMode kMode>
cudaError_t launch(const MambaScanParams& p, cudaStream_t stream) {
  using Traits = MergeWeightsTraits<T, kMode>;
  merge_weights_kernel<Traits><<<dim3(p.nb_pairs, p.batch), Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, cudaStream_t stream) {
  switch (p.weight_mode) {
    case WeightMode::kNone: return cudaSuccess;
    case WeightMode::kHsp: return launch<T, WeightMode::kHsp>(p, stream);
    case WeightMode::kDecay: return launch<T, WeightMode::kDecay>(p, stream);
    case WeightMode::kHspLiteral: return launch<T, WeightMode::kHspLiteral>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t merge_weights(const MambaScanParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat32: return dispatch<float>(p, stream);
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
