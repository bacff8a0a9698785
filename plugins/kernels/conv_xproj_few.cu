// conv_xproj_few.cu: both convs + SiLU + x_proj for few tokens, where latency is all. The channels of 16 tokens are
// spread over the warps of a block, and from sm_90 on over the blocks of a cluster, so that a warp has one step or few,
// each with all its loads in flight at once. u is made in the registers that the product takes as its A operand.
#include <algorithm>
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

constexpr int kDepth = 32;   // channels of a warp's step, 8 a lane
constexpr int kTokens = 16;  // of a tile; a lane owns 2 consecutive ones. Images are padded to an even number of them

template <typename T_, int kTiles_>
struct FewTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;            // of 8 outputs: row <= 8 kTiles
  static constexpr int kMaxWarps = 12;              // 168 registers: room for all loads of a step
  static constexpr int kPitch = 8 * kTiles + 4;     // floats of a token's sums; no bank conflicts
  static constexpr int kColumns = 2 * kTiles;       // of four sums
  static constexpr int kSums = kTokens * kColumns;  // float4 of a tile
};

// ---- thread-block clusters (sm_90) ------------------------------------------------------------------------------

[[maybe_unused]] __device__ __forceinline__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread before cluster_arrive(): the barrier opens once `bytes` have come from send().
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(address_of(barrier))
      : "memory");
#endif
}
// Starts of all the cluster's blocks, and their barriers.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}
// To the same place in a block of the cluster, counted by its barrier.
__device__ __forceinline__ void send(unsigned block, float4* place, uint64_t* barrier, float4 v) {
#if __CUDA_ARCH__ >= 900
  uint32_t to, counted_by;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address_of(place)), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted_by) : "r"(address_of(barrier)), "r"(block));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(counted_by)
               : "memory");
#endif
}

// Grid (cluster * tiles of 16 padded tokens, 2 directions). Warp w of a cluster's block r takes the channel steps
// r + cluster * (w + i * warps). Sums are added in a fixed order: over a warp's steps, a block's warps, the blocks.
template <typename Traits>
__global__ __launch_bounds__(32 * Traits::kMaxWarps) void few_kernel(const __grid_constant__ ConvXProjParams p,
                                                                     int cluster_log2) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kTiles, kPitch = Traits::kPitch, kColumns = Traits::kColumns, kSums = Traits::kSums;
  extern __shared__ __align__(16) float4 shared[];  // what the cluster's blocks send, sums of the warps
  __shared__ int token_of[kTokens];                 // -1 if there is none
  __shared__ uint64_t barrier;

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3, dir = blockIdx.y;
  const int L = p.seqlen, E = p.d_inner, row = p.row, steps = E / kDepth;
  const int cluster = 1 << cluster_log2, tile = blockIdx.x >> cluster_log2, rank = blockIdx.x & (cluster - 1);
  const int warps = min(static_cast<int>(blockDim.x >> 5), (steps - rank + cluster - 1) >> cluster_log2);  // at work
  if (cluster > 1) {  // each block must have started before others send to it
    if (tid == 0) expect_bytes(&barrier, kSums * 16);
    cluster_arrive();
  }

  // The lane's tokens are at positions t and t + 1 in scan order, the window's rows at t - 3 to t + 1.
  const unsigned pairs_per_image = (L + 1) / 2, pair = tile * (kTokens / 2) + g;
  const unsigned image = pair / pairs_per_image;
  const int t = image < static_cast<unsigned>(p.batch) ? static_cast<int>(pair - image * pairs_per_image) * 2 : -8;
  const int first = static_cast<int>(image) * L;
  if (warp == 0 && q < 2) token_of[2 * g + q] = t + q >= 0 && t + q < L ? first + (dir ? L - 1 - t - q : t + q) : -1;
  const int64_t stride = dir ? -2 * static_cast<int64_t>(E) : 2 * static_cast<int64_t>(E);
  const T* x = static_cast<const T*>(p.xz) + static_cast<int64_t>(first + (dir ? L - 1 : 0)) * 2 * E +
               (t - 3) * stride + 8 * q;
  const T* weight = static_cast<const T*>(p.x_proj_weight) + (static_cast<int64_t>(dir) * row + g) * E + 8 * q;
  const float* conv_weight = p.conv_weight + (static_cast<int64_t>(dir) * E + 8 * q) * 4;
  const float* conv_bias = p.conv_bias + static_cast<int64_t>(dir) * E + 8 * q;

  float4* const sent = shared;  // by the cluster's blocks: [rank][kSums / cluster]
  float* const partial = reinterpret_cast<float*>(shared + (cluster > 1 ? kSums : 0));
  float* const own = partial + (warp * kTokens + 2 * g) * kPitch + 2 * q;
  bool first_step = true;
#pragma unroll 1
  for (int step = rank + cluster * warp; step < steps; step += cluster * warps) {
    const int c0 = step * kDepth;
    uint4 w[kTiles], window[5];
    float4 taps[8];
    float2 bias[4];
#pragma unroll
    for (int c = 0; c < 8; c++) taps[c] = load4(conv_weight + (c0 + c) * 4);
#pragma unroll
    for (int h = 0; h < 4; h++) bias[h] = *reinterpret_cast<const float2*>(conv_bias + c0 + 2 * h);
#pragma unroll
    for (int n = 0; n < kTiles; n++)  // outputs that do not exist repeat the last ones
      w[n] = *reinterpret_cast<const uint4*>(weight + static_cast<int64_t>(min(8 * n, row - 8)) * E + c0);
    if (first_step) {  // a warp without a step waits for the others at the barrier below
      wait_for_previous();
      let_next_start();
    }
#pragma unroll
    for (int i = 0; i < 5; i++)
      window[i] = t - 3 + i >= 0 && t - 3 + i < L ? *reinterpret_cast<const uint4*>(x + i * stride + c0)
                                                  : make_uint4(0, 0, 0, 0);
    uint32_t u[2][4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
      float2 v[5];
#pragma unroll
      for (int i = 0; i < 5; i++)
        v[i] = Pair<T>::unpack(h == 0 ? window[i].x : h == 1 ? window[i].y : h == 2 ? window[i].z : window[i].w);
      const float4 a = taps[2 * h], b = taps[2 * h + 1];
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const float2 *x0 = v + s, *x1 = x0 + 1, *x2 = x0 + 2, *x3 = x0 + 3;
        const float c = fmaf(a.x, x0->x, fmaf(a.y, x1->x, fmaf(a.z, x2->x, fmaf(a.w, x3->x, bias[h].x))));
        const float d = fmaf(b.x, x0->y, fmaf(b.y, x1->y, fmaf(b.z, x2->y, fmaf(b.w, x3->y, bias[h].y))));
        u[s][h] = Pair<T>::pack(silu_of_half(.5f * c), silu_of_half(.5f * d));
      }
    }
    // Rows g and g + 8 of A are the lane's two tokens; its columns of k the lane's channels, in any order that the
    // weights come in as well.
    const float zero[4] = {};
    float acc[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      mma_k16_onto<T>(acc[n], make_uint4(u[0][0], u[1][0], u[0][1], u[1][1]), make_uint2(w[n].x, w[n].y), zero);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      mma_k16<T>(acc[n], make_uint4(u[0][2], u[1][2], u[0][3], u[1][3]), make_uint2(w[n].z, w[n].w));
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        float2* to = reinterpret_cast<float2*>(own + s * kPitch + 8 * n);
        const float2 before = first_step ? make_float2(0.f, 0.f) : *to;
        *to = make_float2(before.x + acc[n][2 * s], before.y + acc[n][2 * s + 1]);
      }
    first_step = false;
  }
  __syncthreads();

  auto add = [](float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  auto store = [&](int i, float4 sum) {
    const int token = token_of[i / kColumns], column = i % kColumns * 4;
    if (token >= 0 && column < row)
      store4(static_cast<T*>(p.x_dbl) + (static_cast<int64_t>(dir) * p.batch * L + token) * row + column, sum);
  };
  const int share = kSums >> cluster_log2;  // sum i is finished by block i % cluster
  if (cluster > 1) cluster_wait();
  for (int i = tid; i < kSums; i += blockDim.x) {
    const float* from = partial + i / kColumns * kPitch + i % kColumns * 4;
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 4
    for (int v = 1; v < warps; v++) add(sum, *reinterpret_cast<const float4*>(from + v * kTokens * kPitch));
    if (cluster == 1) store(i, sum);
    else send(i & (cluster - 1), sent + rank * share + (i >> cluster_log2), &barrier, sum);
  }
  if (cluster == 1) return;
  wait_for_bytes(&barrier);  // all that others send here: the block may end when it has done its share
  for (int i = tid; i < share; i += blockDim.x) {
    float4 sum = sent[i];
    for (int r = 1; r < cluster; r++) add(sum, sent[r * share + i]);
    store(cluster * i + rank, sum);
  }
}

// ---- launch -----------------------------------------------------------------------------------------------------

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, int cluster_log2, cudaStream_t stream) {
  using Traits = FewTraits<T, kTiles>;
  constexpr auto kKernel = few_kernel<Traits>;
  const int64_t pairs = static_cast<int64_t>(p.batch) * ((p.seqlen + 1) / 2);
  const int64_t blocks = (2 * pairs + kTokens - 1) / kTokens << cluster_log2;
  const int steps = p.d_inner / kDepth, cluster = 1 << cluster_log2;
  const bool hopper = can_overlap<few_kernel<Traits>>();  // or later
  if (2 * pairs > INT_MAX || blocks > INT_MAX) return cudaErrorInvalidValue;
  if (cluster > 1 && (!hopper || cluster > steps)) return cudaErrorInvalidConfiguration;
  const int warps = std::min(Traits::kMaxWarps, (steps + cluster - 1) / cluster);
  const int bytes = warps * kTokens * Traits::kPitch * 4 + (cluster > 1 ? Traits::kSums * 16 : 0);
  const cudaError_t status = allow_shared<kKernel>(static_cast<size_t>(bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), 2), config.blockDim = dim3(32 * warps);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = attributes, config.numAttrs = !hopper ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, p, cluster_log2);
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, int cluster_log2, cudaStream_t stream) {
  return with_tiles<12>(p.row, cudaErrorInvalidValue, [&](auto tiles) { return launch<T, tiles>(p, cluster_log2, stream); });
}

}  // namespace

cudaError_t conv_xproj_few(const ConvXProjParams& p, int cluster_log2, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, cluster_log2, stream); });
}

}  // namespace stm
