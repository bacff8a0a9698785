// conv_xproj_mma.cu: both convs + SiLU + x_proj on tensor cores. u is made in the registers that the product takes as
// its A operand and never stored. Two shapes: many tokens (warps over tokens, weights shared by a block through shared
// memory) and few (the channels of 16 tokens spread over a block's warps, sums added at the end).
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"

namespace stm {
namespace {

constexpr int kDepth = 32;               // channels of a step: two mma k-steps, 8 channels a lane
constexpr int64_t kFewTokens = 3200;     // up to here the second shape keeps more of the card busy

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

// ---- many tokens ------------------------------------------------------------------------------------------------

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
  auto stage = [&](int step) {
    auto& s = stages[step % kStages];
    const int c0 = step * kDepth;
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const int piece = tid + i * kThreads;
      if (piece < (kTokens + 3) * 4)
        copy_async16(&s.x[x_slot(piece >> 2, piece & 3)],
                     static_cast<const uint4*>(p.xz) + (static_cast<int64_t>(x_source[i]) + step * (kDepth / 8)),
                     x_exists >> i & 1);
    }
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
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) stage(step);
    copy_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; all are done with the stage that is filled next
    if (step + kStages - 1 < steps) stage(step + kStages - 1);
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

// ---- few tokens -------------------------------------------------------------------------------------------------

template <typename T_, int kTiles_>
struct FewTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kTokens = 16;    // of a block; a lane owns 2
  static constexpr int kThreads = 384;  // 12 warps with up to 168 registers: a step's loads are all in flight
  static constexpr int kSlots = 6;      // partial sums in shared memory at a time
};

// Grid (token tiles, 2 directions). Warp w takes the channel steps w, w + kWarps, ...; then the warps add their sums in
// six slots, one round after the other, and the block adds the slots: a fixed order.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void few_kernel(const __grid_constant__ ConvXProjParams p) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kTiles, kTokens = Traits::kTokens, kSlots = Traits::kSlots;
  constexpr int kWarps = Traits::kThreads / 32;
  __shared__ __align__(16) float partial[kSlots][kTokens][8 * kTiles + 2];

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3, dir = blockIdx.y;
  const int L = p.seqlen, E = p.d_inner, row = p.row;
  const int64_t tokens = static_cast<int64_t>(p.batch) * L, base = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t lane_position = base + 2 * g;
  const ImageEdges<2> edges(lane_position, L);
  const T* weight = static_cast<const T*>(p.x_proj_weight) + static_cast<int64_t>(dir) * row * E;
  const T* xz = static_cast<const T*>(p.xz);
  auto token_of = [&](int64_t position) {
    const int64_t image = position / L, k = position - image * L;
    return image * L + (dir ? L - 1 - k : k);
  };
  int64_t source[5];  // of the window's positions; -1 if there is none
#pragma unroll
  for (int i = 0; i < 5; i++) {
    const int64_t position = lane_position - 3 + i;
    source[i] = position < 0 || position >= tokens ? -1 : token_of(position) * 2 * E;
  }
  float acc[kTiles][4];
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int r = 0; r < 4; r++) acc[n][r] = 0.f;

#pragma unroll 1
  for (int step = warp; step < E / kDepth; step += kWarps) {
    const int c0 = step * kDepth + 8 * q;
    uint4 window[5], w[kTiles];
#pragma unroll
    for (int i = 0; i < 5; i++)
      window[i] = source[i] < 0 ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(xz + source[i] + c0);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      w[n] = 8 * n < row ? *reinterpret_cast<const uint4*>(weight + static_cast<int64_t>(8 * n + g) * E + c0)
                         : make_uint4(0, 0, 0, 0);
    uint32_t u[2][4];
    const float* conv_weight = p.conv_weight + (static_cast<int64_t>(dir) * E + c0) * 4;
    const float* conv_bias = p.conv_bias + dir * E + c0;
    conv_silu<T, 2, true>(
        window, edges, [&](int c) { return load4(conv_weight + 4 * c); },
        [&](int h) { return *reinterpret_cast<const float2*>(conv_bias + 2 * h); }, u);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      mma_k16<T>(acc[n], make_uint4(u[0][0], u[1][0], u[0][1], u[1][1]), make_uint2(w[n].x, w[n].y));
      mma_k16<T>(acc[n], make_uint4(u[0][2], u[1][2], u[0][3], u[1][3]), make_uint2(w[n].z, w[n].w));
    }
  }
  for (int round = 0; round * kSlots < kWarps; round++) {
    if (warp / kSlots == round) {
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int t = 0; t < 2; t++) {
          float2* slot = reinterpret_cast<float2*>(&partial[warp % kSlots][2 * g + t][8 * n + 2 * q]);
          const float2 before = round ? *slot : make_float2(0.f, 0.f);
          *slot = make_float2(before.x + acc[n][2 * t], before.y + acc[n][2 * t + 1]);
        }
    }
    __syncthreads();
  }
  const int pairs = row / 2;
  for (int i = tid; i < kTokens * pairs; i += Traits::kThreads) {
    const int t = i / pairs, column = i % pairs * 2;
    if (base + t >= tokens) break;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
      const float2 v = *reinterpret_cast<const float2*>(&partial[s][t][column]);
      sum.x += v.x, sum.y += v.y;
    }
    T* out = static_cast<T*>(p.x_dbl) + (static_cast<int64_t>(dir) * tokens + token_of(base + t)) * row + column;
    *reinterpret_cast<uint32_t*>(out) = Pair<T>::pack(sum.x, sum.y);
  }
}

// ---- launch -----------------------------------------------------------------------------------------------------

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  const int64_t tokens = static_cast<int64_t>(p.batch) * p.seqlen;
  if (tokens <= kFewTokens) {
    using Traits = FewTraits<T, kTiles>;
    const dim3 grid(static_cast<unsigned>((tokens + Traits::kTokens - 1) / Traits::kTokens), 2);
    few_kernel<Traits><<<grid, Traits::kThreads, 0, stream>>>(p);
  } else {
    using Traits = ManyTraits<T, kTiles>;
    const int64_t tiles = (tokens + Traits::kTokens - 1) / Traits::kTokens;
    if (tiles > INT_MAX || tokens * (p.d_inner / 4) > UINT32_MAX) return cudaErrorInvalidValue;
    many_kernel<Traits><<<dim3(static_cast<unsigned>(tiles), 2), Traits::kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, cudaStream_t stream) {
  if (p.row <= 48) return launch<T, 6>(p, stream);   // ViM-Ti
  if (p.row <= 56) return launch<T, 7>(p, stream);   // ViM-S
  if (p.row <= 80) return launch<T, 10>(p, stream);  // ViM-B
  if (p.row <= 96) return launch<T, 12>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool conv_xproj_tensor_core_supported(int32_t d_inner, int32_t row, DataType type) {
  return type != DataType::kFloat32 && d_inner % kDepth == 0 && row <= 96;
}

cudaError_t conv_xproj_tensor_core(const ConvXProjParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
    case DataType::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
