// conv_xproj_many.cu: both convs + SiLU + x_proj for many tokens where conv_xproj_wide.cu cannot run: a block's warps take
// different tokens and share the weights through shared memory. u is made in the registers that the product takes as its A
// operand and never stored.
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

constexpr int kDepth = 32;  // channels of a step: two mma k-steps, 8 channels a lane

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Tokens of all images are counted through in scan order: position f is token `f % L` of image f / L, backward L - 1 -
// that. The conv window must not reach into the image before. A lane owns kTokens consecutive positions.
template <int kTokens>
struct ImageEdges {
  int lead;        // the first `lead` of the window's three earlier positions belong to the image before
  unsigned start;  // bit s: position s is the first of an image (s > 0)
  __device__ __forceinline__ ImageEdges(int64_t position, int seqlen) : lead(0), start(0) {
    int k = static_cast<int>(position % seqlen);
    if (k < 3) lead = 3 - k;
#pragma unroll
    for (int s = 1; s < kTokens; s++) {
      k = k + 1 == seqlen ? 0 : k + 1;
      if (k == 0) start |= 1u << s;
    }
  }
  __device__ __forceinline__ bool any() const { return lead > 0 || start != 0; }
};

// u of kTokens positions and 8 channels, rounded to T, as pairs of channels. window: 3 + kTokens positions.
// taps(c), bias(h): of channel c and channel pair h of the lane.
template <typename T, int kTokens, bool kEdges, typename Taps, typename Bias>
__device__ __forceinline__ void conv_silu(const uint4 (&window)[kTokens + 3], const ImageEdges<kTokens>& edges,
                                          Taps taps, Bias bias, uint32_t (&u)[kTokens][4]) {
#pragma unroll
  for (int h = 0; h < 4; h++) {
    const float4 w0 = taps(2 * h), w1 = taps(2 * h + 1);
    const float2 b = bias(h);
    float2 v[kTokens + 3];
#pragma unroll
    for (int i = 0; i < kTokens + 3; i++) {
      v[i] = Pair<T>::unpack(word(window[i], h));
      if (kEdges && i < 3 && i < edges.lead) v[i] = make_float2(0.f, 0.f);
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      if (kEdges && t > 0 && (edges.start >> t & 1)) v[t] = v[t + 1] = v[t + 2] = make_float2(0.f, 0.f);
      const float s0 = fmaf(w0.x, v[t].x, fmaf(w0.y, v[t + 1].x, fmaf(w0.z, v[t + 2].x, fmaf(w0.w, v[t + 3].x, b.x))));
      const float s1 = fmaf(w1.x, v[t].y, fmaf(w1.y, v[t + 1].y, fmaf(w1.z, v[t + 2].y, fmaf(w1.w, v[t + 3].y, b.y))));
      u[t][h] = Pair<T>::pack(silu_of_half(.5f * s0), silu_of_half(.5f * s1));
    }
  }
}


template <typename T_, int kTiles_>
struct ManyTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;  // of 8 outputs: row <= 8 kTiles
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSM = kTiles > 8 ? 3 : 4;
  static constexpr int kTokens = 32 * kWarps;  // of a block; a lane owns 4
  static constexpr int kStages = 3;
};

template <int kTokens, int kTiles>
struct ManyStage {
  uint4 x[(kTokens + 4) * 4];  // 64-byte rows, 3 earlier positions first; see x_slot
  uint4 weight[8 * kTiles * 4];
  float4 taps[kDepth];         // channel c at 4 (c % 8) + c / 8: the four lanes' taps lie side by side
  float bias[kDepth];
};

// Lanes g and g + 1 read rows four apart: an exchange of odd and even rows in every second group of four keeps them on
// different banks.
__device__ __forceinline__ int x_slot(int row, int piece) { return (row * 4 + piece) ^ ((row >> 2 & 1) << 2); }

// Grid (token tiles, 2 directions). A warp computes 32 positions x all outputs; the mma's rows g and g + 8 of m-tile i
// are the lane's positions 2i and 2i + 1, and its columns of k are the lane's channels in any order, as long as the
// weights come in the same.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void many_kernel(
    const __grid_constant__ ConvXProjParams p) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kTiles, kThreads = Traits::kThreads, kTokens = Traits::kTokens;
  constexpr int kStages = Traits::kStages;
  constexpr int kCopies = ((kTokens + 3) * 4 + kThreads - 1) / kThreads;  // 16-byte pieces of x a thread brings
  __shared__ __align__(16) ManyStage<kTokens, kTiles> stages[kStages];

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3, dir = blockIdx.y;
  const int L = p.seqlen, E = p.d_inner, row = p.row, steps = E / kDepth;
  const int64_t tokens = static_cast<int64_t>(p.batch) * L, base = static_cast<int64_t>(blockIdx.x) * kTokens;

  unsigned x_source[kCopies];  // in 16-byte pieces of xz
  unsigned x_exists = 0;
#pragma unroll
  for (int i = 0; i < kCopies; i++) {
    const int piece = tid + i * kThreads;
    const int64_t position = base - 3 + (piece >> 2);
    x_source[i] = 0;
    if (position < 0 || position >= tokens || (piece >> 2) >= kTokens + 3) continue;
    const int64_t image = position / L;
    const int k = static_cast<int>(position - image * L);
    x_source[i] = static_cast<unsigned>((image * L + (dir ? L - 1 - k : k)) * (E / 4) + (piece & 3));
    x_exists |= 1u << i;
  }
  const T* weight = static_cast<const T*>(p.x_proj_weight) + static_cast<int64_t>(dir) * row * E;
  auto stage_weights = [&](int step) {
    auto& s = stages[step % kStages];
    const int c0 = step * kDepth;
    for (int i = tid; i < 8 * kTiles * 4; i += kThreads) {
      const int o = i >> 2;
      copy_async16(&s.weight[i], weight + static_cast<int64_t>(o) * E + c0 + (i & 3) * 8, o < row);
    }
    if (tid < kDepth)
      copy_async16(&s.taps[(tid & 7) * 4 + (tid >> 3)], p.conv_weight + (static_cast<int64_t>(dir) * E + c0 + tid) * 4,
                   true);
    else if (tid < kDepth + kDepth / 4)
      copy_async16(&s.bias[(tid - kDepth) * 4], p.conv_bias + dir * E + c0 + (tid - kDepth) * 4, true);
  };
  auto stage_x = [&](int step) {
    auto& s = stages[step % kStages];
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const int piece = tid + i * kThreads;
      if (piece < (kTokens + 3) * 4)
        copy_async16(&s.x[x_slot(piece >> 2, piece & 3)],
                     static_cast<const uint4*>(p.xz) + (static_cast<int64_t>(x_source[i]) + step * (kDepth / 8)),
                     x_exists >> i & 1);
    }
  };

  const int64_t lane_position = base + 32 * warp + 4 * g;
  const ImageEdges<4> edges(lane_position, L);
  const bool warp_edges = __any_sync(~0u, edges.any());
  float acc[2][kTiles][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[i][n][r] = 0.f;

#pragma unroll
  for (int step = 0; step < kStages - 1; step++)
    if (step < steps) stage_weights(step);
  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) stage_x(step);
    copy_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; all are done with the stage that is filled next
    if (step + kStages - 1 < steps) stage_weights(step + kStages - 1), stage_x(step + kStages - 1);
    copy_async_commit();
    const auto& s = stages[step % kStages];
    uint4 window[7];
#pragma unroll
    for (int i = 0; i < 7; i++) window[i] = s.x[x_slot(32 * warp + 4 * g + i, q)];
    uint32_t u[4][4];
    auto taps = [&](int c) { return s.taps[c * 4 + q]; };
    auto bias = [&](int h) { return *reinterpret_cast<const float2*>(&s.bias[8 * q + 2 * h]); };
    if (warp_edges)
      conv_silu<T, 4, true>(window, edges, taps, bias, u);
    else
      conv_silu<T, 4, false>(window, edges, taps, bias, u);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const uint4 w = s.weight[(8 * n + g) * 4 + q];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_k16<T>(acc[i][n], make_uint4(u[2 * i][0], u[2 * i + 1][0], u[2 * i][1], u[2 * i + 1][1]),
                   make_uint2(w.x, w.y));
        mma_k16<T>(acc[i][n], make_uint4(u[2 * i][2], u[2 * i + 1][2], u[2 * i][3], u[2 * i + 1][3]),
                   make_uint2(w.z, w.w));
      }
    }
  }
  T* out = static_cast<T*>(p.x_dbl) + static_cast<int64_t>(dir) * tokens * row + 2 * q;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const int64_t position = lane_position + t;
    if (position >= tokens) break;
    const int64_t image = position / L, k = position - image * L;
    T* o = out + (image * L + (dir ? L - 1 - k : k)) * row;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      if (8 * n < row)
        *reinterpret_cast<uint32_t*>(o + 8 * n) =
            Pair<T>::pack(acc[t >> 1][n][2 * (t & 1)], acc[t >> 1][n][2 * (t & 1) + 1]);
  }
}

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  using Traits = ManyTraits<T, kTiles>;
  const int64_t tokens = static_cast<int64_t>(p.batch) * p.seqlen;
  const int64_t tiles = (tokens + Traits::kTokens - 1) / Traits::kTokens;
  if (tiles > INT_MAX || tokens * (p.d_inner / 4) > UINT32_MAX) return cudaErrorInvalidConfiguration;
  // Not launch_dependent: a grid of about one wave must find the card empty, or its blocks pile up where the kernel before
  // has left (S, batch 128: 54 us instead of 47).
  many_kernel<Traits><<<dim3(static_cast<unsigned>(tiles), 2), Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, cudaStream_t stream) {
  return with_tiles<12>(p.row, cudaErrorInvalidValue, [&](auto tiles) { return launch<T, tiles>(p, stream); });
}

}  // namespace

cudaError_t conv_xproj_many(const ConvXProjParams& p, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, stream); });
}

}  // namespace stm
