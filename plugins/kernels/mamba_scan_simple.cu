// mamba_scan_simple.cu: the scan for every type and extent: a thread walks one channel of one direction.
#include "dt_proj.cuh"
#include "launch.cuh"
#include "mamba_scan_impl.h"

namespace stm {
namespace {

template <typename T_, int kStates_>
struct SimpleScanTraits {
  using T = T_;
  static constexpr int kStates = kStates_;  // d_state, rounded up; the states beyond it stay zero
  static constexpr int kChannels = 32;      // of a block: one warp walks them forward, one backward
  static constexpr int kThreads = 2 * kChannels;
  static constexpr int kChunk = 8;          // tokens between two barriers
};

// Grid (channel tiles, batch). Both warps take chunk n at the same time. The one that comes first to a token leaves its
// sum in y, the other adds and gates a chunk or more later, past a barrier; where both come in the same chunk (the
// middle), and for the single token of cls_index, they meet in shared memory.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void simple_scan_kernel(const __grid_constant__ MambaScanParams p) {
  using T = typename Traits::T;
  constexpr int kStates = Traits::kStates, kChunk = Traits::kChunk, kChannels = Traits::kChannels;
  __shared__ __align__(16) float rows_bc[2][kChunk][2 * kStates];
  __shared__ float deltas[2][kChunk][kChannels];
  __shared__ float meet[2][kChunk][kChannels];

  const int dir = threadIdx.x / kChannels, lane = threadIdx.x % kChannels;
  const int L = p.seqlen, E = p.d_inner, N = p.d_state, R = p.dt_rank, b = blockIdx.y, cls = p.cls_index;
  const int e = blockIdx.x * kChannels + lane, e_safe = min(e, E - 1);  // idle lanes recompute the last channel
  const int channel = dir * E + e_safe;
  const int64_t direction_row = static_cast<int64_t>(dir) * p.batch + b;
  const T* x = static_cast<const T*>(p.xz) + static_cast<int64_t>(b) * L * 2 * E + e_safe;
  const T* z = x + E;
  const T* rows = static_cast<const T*>(p.x_dbl) + direction_row * L * p.row;
  const T* weight = static_cast<const T*>(p.dt_weight) + static_cast<int64_t>(channel) * R;
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(b) * (cls < 0 ? L : 1) * E + e_safe;

  float a[kStates], h[kStates], taps[4];
#pragma unroll
  for (int n = 0; n < kStates; n++) {
    a[n] = n < N ? p.A[static_cast<int64_t>(channel) * N + n] * kLog2e : 0.f;
    h[n] = 0.f;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) taps[j] = p.conv_weight[channel * 4 + j];
  const float conv_bias = p.conv_bias[channel], skip = p.D[channel], bias = p.dt_bias[channel];
  wait_for_previous();
  let_next_start();
  float x1 = 0.f, x2 = 0.f, x3 = 0.f;  // x of the last three tokens

  const int steps = cls < 0 ? L : dir ? L - cls : cls + 1;
  const int chunks = ((cls < 0 ? L : max(cls + 1, L - cls)) + kChunk - 1) / kChunk;
  auto token = [&](int position) { return dir ? L - 1 - position : position; };
  auto finish = [&](int t, int t_out, float sum) {
    const float gate = silu_exact(to_float(z[static_cast<int64_t>(t) * 2 * E]));
    if (e < E) y[static_cast<int64_t>(t_out) * E] = from_float<T>(sum * gate);
  };

#pragma unroll 1
  for (int n = 0; n < chunks; n++) {
    const int begin = n * kChunk;
    __syncthreads();  // y of earlier chunks is visible, shared rows are free
    if (begin < steps) {
      for (int i = lane; i < kChunk * 2 * kStates; i += kChannels) {
        const int k = i / (2 * kStates), c = i % (2 * kStates), state = c % kStates, position = begin + k;
        const int column = R + (c < kStates ? 0 : N) + state;
        rows_bc[dir][k][c] = state < N && position < steps
                                 ? to_float(rows[static_cast<int64_t>(token(position)) * p.row + column])
                                 : 0.f;
      }
      float delta[kChunk];
      int64_t offset[kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; k++) {
        delta[k] = bias;
        offset[k] = static_cast<int64_t>(token(min(begin + k, steps - 1))) * p.row;
      }
      dt_proj(weight, rows, offset, R, delta);
#pragma unroll
      for (int k = 0; k < kChunk; k++) deltas[dir][k][lane] = softplus_exact(delta[k]);
      __syncwarp();

#pragma unroll 1
      for (int k = 0; k < kChunk && begin + k < steps; k++) {
        const int t = token(begin + k);
        const float x0 = to_float(x[static_cast<int64_t>(t) * 2 * E]);
        const float u = silu_exact(
            fmaf(taps[3], x0, fmaf(taps[2], x1, fmaf(taps[1], x2, fmaf(taps[0], x3, conv_bias)))));
        x3 = x2, x2 = x1, x1 = x0;
        const float d = deltas[dir][k][lane], du = d * u, decay = p.decay_scale ? d * p.decay_scale[t] : d;
        float sum = skip * u;
#pragma unroll
        for (int i = 0; i < kStates; i += 4) {
          const float4 B = *reinterpret_cast<const float4*>(&rows_bc[dir][k][i]);
          const float4 C = *reinterpret_cast<const float4*>(&rows_bc[dir][k][kStates + i]);
          h[i] = fmaf(ex2(decay * a[i]), h[i], du * B.x);
          h[i + 1] = fmaf(ex2(decay * a[i + 1]), h[i + 1], du * B.y);
          h[i + 2] = fmaf(ex2(decay * a[i + 2]), h[i + 2], du * B.z);
          h[i + 3] = fmaf(ex2(decay * a[i + 3]), h[i + 3], du * B.w);
          sum = fmaf(h[i], C.x, fmaf(h[i + 1], C.y, fmaf(h[i + 2], C.z, fmaf(h[i + 3], C.w, sum))));
        }
        if (cls >= 0) {
          if (t == cls) meet[dir][0][lane] = sum;
        } else {
          const int other = (L - 1 - (begin + k)) / kChunk;  // the chunk in which the other warp comes to t
          if (n < other) {
            if (e < E) y[static_cast<int64_t>(t) * E] = from_float<T>(sum);
          } else if (n > other) {
            if (e < E) finish(t, t, sum + to_float(y[static_cast<int64_t>(t) * E]));
          } else {
            meet[dir][k][lane] = sum;
          }
        }
      }
    }
    if (cls < 0) {
      // tokens that both directions reach in this chunk: t and L - 1 - t lie in [begin, begin + kChunk)
      const int from = max(begin, L - kChunk - begin), to = min(begin + kChunk - 1, L - 1 - begin);
      if (from <= to) {
        __syncthreads();
        if (dir == 0)
          for (int t = from; t <= to; t++) finish(t, t, meet[0][t - begin][lane] + meet[1][L - 1 - t - begin][lane]);
      }
    }
  }
  if (cls >= 0) {
    __syncthreads();
    if (dir == 0) finish(cls, 0, meet[0][0][lane] + meet[1][0][lane]);
  }
}

template <typename T, int kStates>
cudaError_t launch(const MambaScanParams& p, cudaStream_t stream) {
  using Traits = SimpleScanTraits<T, kStates>;
  const dim3 grid((p.d_inner + Traits::kChannels - 1) / Traits::kChannels, p.batch);
  return launch_dependent<simple_scan_kernel<Traits>>(grid, Traits::kThreads, 0, stream, p);
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, cudaStream_t stream) {
  if (p.d_state <= 16) return launch<T, 16>(p, stream);
  if (p.d_state <= 32) return launch<T, 32>(p, stream);
  if (p.d_state <= 64) return launch<T, 64>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t mamba_scan_simple(const MambaScanParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat32: return dispatch<float>(p, stream);
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
