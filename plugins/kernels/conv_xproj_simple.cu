// conv_xproj_simple.cu: both convs + SiLU + x_proj on CUDA cores, for every type and extent.
#include "conv_xproj_impl.h"
#include "device.cuh"

namespace stm {
namespace {

template <typename T_>
struct SimpleConvXProjTraits {
  using T = T_;
  static constexpr int kTokens = 64, kOutputs = 64;  // of a block
  static constexpr int kDepth = 16;                  // channels between two barriers
  static constexpr int kThreads = 256;               // each owns 4 tokens x 4 outputs
  static constexpr int kPad = 4;                     // keeps rows 16-byte aligned and off each other's banks
};

// Grid (token tiles, 2 directions, output tiles). Tokens of all images are counted through; the conv window stops at
// its own image's edge. u exists only as a tile in shared memory, in float32.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void simple_conv_xproj_kernel(
    const __grid_constant__ ConvXProjParams p) {
  using T = typename Traits::T;
  constexpr int kTokens = Traits::kTokens, kOutputs = Traits::kOutputs, kDepth = Traits::kDepth;
  constexpr int kRows = Traits::kThreads / kDepth;  // tile rows filled at a time
  __shared__ __align__(16) float u_tile[kDepth][kTokens + Traits::kPad];
  __shared__ __align__(16) float w_tile[kDepth][kOutputs + Traits::kPad];

  const int dir = blockIdx.y, L = p.seqlen, E = p.d_inner, tid = threadIdx.x;
  const int64_t tokens = static_cast<int64_t>(p.batch) * L, token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int output0 = blockIdx.z * kOutputs;
  const T* xz = static_cast<const T*>(p.xz);
  const T* weight = static_cast<const T*>(p.x_proj_weight) + static_cast<int64_t>(dir) * p.row * E;
  const int fill_channel = tid % kDepth, fill_row = tid / kDepth;
  const int tx = tid % 16, ty = tid / 16;

  float acc[4][4] = {};
  for (int c0 = 0; c0 < E; c0 += kDepth) {
    const int c = c0 + fill_channel;
    float4 taps = make_float4(0.f, 0.f, 0.f, 0.f);
    float bias = 0.f;
    if (c < E) {
      const float* w = p.conv_weight + (static_cast<int64_t>(dir) * E + c) * 4;
      taps = make_float4(w[0], w[1], w[2], w[3]);
      bias = p.conv_bias[dir * E + c];
    }
#pragma unroll
    for (int i = 0; i < kTokens / kRows; i++) {
      const int64_t token = token0 + fill_row + i * kRows;
      float u = 0.f;
      if (c < E && token < tokens) {
        const int t = static_cast<int>(token % L);
        const T* x = xz + token * 2 * E + c;
        const int64_t step = (dir ? 2 : -2) * static_cast<int64_t>(E);  // to the token before in scan order
        const int before = dir ? L - 1 - t : t;                         // tokens before this one in scan order
        u = fmaf(taps.w, to_float(x[0]), bias);
        if (before > 0) u = fmaf(taps.z, to_float(x[step]), u);
        if (before > 1) u = fmaf(taps.y, to_float(x[2 * step]), u);
        if (before > 2) u = fmaf(taps.x, to_float(x[3 * step]), u);
        u = silu_exact(u);
      }
      u_tile[fill_channel][fill_row + i * kRows] = u;
    }
#pragma unroll
    for (int i = 0; i < kOutputs / kRows; i++) {
      const int o = output0 + fill_row + i * kRows;
      w_tile[fill_channel][fill_row + i * kRows] =
          c < E && o < p.row ? to_float(weight[static_cast<int64_t>(o) * E + c]) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const float4 u = *reinterpret_cast<const float4*>(&u_tile[k][4 * ty]);
      const float4 w = *reinterpret_cast<const float4*>(&w_tile[k][4 * tx]);
      const float us[4] = {u.x, u.y, u.z, u.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = fmaf(us[i], ws[j], acc[i][j]);
    }
    __syncthreads();
  }
  T* out = static_cast<T*>(p.x_dbl) + static_cast<int64_t>(dir) * tokens * p.row;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t token = token0 + 4 * ty + i;
    const int o = output0 + 4 * tx;  // row is a multiple of 8: all four exist or none
    if (token < tokens && o < p.row)
      store4(out + token * p.row + o, make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
}

template <typename T>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  using Traits = SimpleConvXProjTraits<T>;
  const int64_t tokens = static_cast<int64_t>(p.batch) * p.seqlen;
  const int64_t tiles = (tokens + Traits::kTokens - 1) / Traits::kTokens;
  const int output_tiles = (p.row + Traits::kOutputs - 1) / Traits::kOutputs;
  if (tiles > INT32_MAX || output_tiles > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(tiles), 2, output_tiles);
  simple_conv_xproj_kernel<Traits><<<grid, Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t conv_xproj_simple(const ConvXProjParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat32: return launch<float>(p, stream);
    case DataType::kFloat16: return launch<__half>(p, stream);
    case DataType::kBFloat16: return launch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
