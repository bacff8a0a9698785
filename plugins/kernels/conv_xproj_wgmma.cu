// conv_xproj_wgmma.cu: both convs + SiLU + x_proj for many tokens on Hopper. Three warpgroups take up to 192 tokens and both
// directions: a lane owns two channels and slides along tokens, so that x is read and unpacked once for both; u goes to
// shared memory, where wgmma takes it from, a step of 64 channels behind. A fourth brings x and weights. Its code is for
// sm_90a only; everywhere else the kernel is empty and conv_xproj_wgmma_supported says no.
#include <algorithm>
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace stm {
namespace {

constexpr int kHalo = 3, kDepth = 64, kLine = 2 * kDepth;  // channels of a step; a row of them, in bytes
constexpr int kWarpgroups = 3, kWarps = 4 * kWarpgroups;
constexpr int kBringers = 4;         // warps that bring x and weights
constexpr int kThreads = 32 * (kWarps + kBringers);
constexpr int kRun = 16;              // tokens of a warp at most: its rows of the warpgroup's m64
constexpr int kTokens = kWarps * kRun;
constexpr int kRows = kTokens + 12;   // of x in a step: tokens, halo, three rows of zeros between images; a multiple of 4
constexpr int kAheadRows = 4;         // a lane reads x so many rows before it needs them, and one more for a run of odd length

template <typename T_, int kTiles_>
struct WgmmaTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;                   // of 8 outputs: row <= 8 kTiles
  static constexpr int kXSlots = kTiles > 7 ? 2 : 3;       // more do not fit
  static constexpr int kWeightSlots = 3;
  static constexpr int kU = kTokens * kLine;               // bytes of u: a step of one direction
  static constexpr int kWeights = 4 * kU;                  // after two steps of both
  static constexpr int kWeightSlot = 2 * kTiles * 8 * kLine;
  static constexpr int kX = kWeights + kWeightSlots * kWeightSlot;
  static constexpr int kXSlot = (kRows + kAheadRows + 1) * kLine;
  static constexpr int kTaps = kX + kXSlots * kXSlot;      // and bias, of both directions
  static constexpr int kBias = 2 * kDepth * 16;            // after the taps
  static constexpr int kTapsSlot = kBias + 2 * kDepth * 4;
  static constexpr int kSources = kTaps + kXSlots * kTapsSlot;
  static constexpr int kBarriers = kSources + kRows * 4;
  static constexpr size_t kBytes = kBarriers + 16 * (kXSlots + kWeightSlots) + 8 * kWarpgroups;
  static_assert(kBarriers % 8 == 0);
  static_assert(kBytes <= 227 * 1024);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

struct Taps {  // of a lane's two channels, forward and backward, halved for silu_of_half
  float4 forward0, forward1, backward0, backward1;
  float2 forward_bias, backward_bias;
};

__device__ __forceinline__ float4 half_of(float4 v) { return make_float4(.5f * v.x, .5f * v.y, .5f * v.z, .5f * v.w); }
__device__ __forceinline__ float2 half_of(float2 v) { return make_float2(.5f * v.x, .5f * v.y); }

// The window of x as a lane slides along tokens: rows as they lie in shared memory, and unpacked.
struct Window {
  uint32_t packed[kRun + 2 * kHalo];
  float2 v[kRun + 2 * kHalo];
};

template <typename T>
__device__ __forceinline__ void conv_start(Window& window, const unsigned char* x) {
#pragma unroll
  for (int i = 0; i < 2 * kHalo + kAheadRows; i++) window.packed[i] = *reinterpret_cast<const uint32_t*>(x + i * kLine);
#pragma unroll
  for (int i = 0; i < 2 * kHalo; i++) window.v[i] = Pair<T>::unpack(window.packed[i]);
}

// u of tokens kFrom .. kTo - 1 of a run in one image, as far as it has `count`, for rows first_row .. of the warp's 16.
// x is the lane's two channels of the token three before the first; u the address of its place in row 0 of the warp's, where
// an eighth of a row has its own number; those of the second direction lie kPitch bytes on.
template <typename T, int kPitch, int kFrom, int kTo>
__device__ __forceinline__ void conv_tokens(Window& window, const unsigned char* x, uint32_t u, int first_row, int count,
                                            const Taps& w) {
  constexpr int kNext = 2 * kHalo + kAheadRows;
  auto& v = window.v;
#pragma unroll
  for (int t = kFrom; t < kTo; t++) {
    if (t % 2 == 0 && t >= count) break;
    if (t + kNext < kRun + 2 * kHalo) window.packed[t + kNext] = *reinterpret_cast<const uint32_t*>(x + (t + kNext) * kLine);
    v[t + 2 * kHalo] = Pair<T>::unpack(window.packed[t + 2 * kHalo]);
    const float4 f0 = w.forward0, f1 = w.forward1, b0 = w.backward0, b1 = w.backward1;
    const float s0 =
        fmaf(f0.x, v[t].x, fmaf(f0.y, v[t + 1].x, fmaf(f0.z, v[t + 2].x, fmaf(f0.w, v[t + 3].x, w.forward_bias.x))));
    const float s1 =
        fmaf(f1.x, v[t].y, fmaf(f1.y, v[t + 1].y, fmaf(f1.z, v[t + 2].y, fmaf(f1.w, v[t + 3].y, w.forward_bias.y))));
    const float r0 =
        fmaf(b0.w, v[t + 3].x, fmaf(b0.z, v[t + 4].x, fmaf(b0.y, v[t + 5].x, fmaf(b0.x, v[t + 6].x, w.backward_bias.x))));
    const float r1 =
        fmaf(b1.w, v[t + 3].y, fmaf(b1.z, v[t + 4].y, fmaf(b1.y, v[t + 5].y, fmaf(b1.x, v[t + 6].y, w.backward_bias.y))));
    const uint32_t forward = Pair<T>::pack(silu_of_half(s0), silu_of_half(s1));
    const uint32_t backward = Pair<T>::pack(silu_of_half(r0), silu_of_half(r1));
    const int row = first_row + t;
    const uint32_t to = (u ^ ((row & 7) << 4)) + row * kLine;
    if (t % 2 == 0 || t < count) {
      store_shared(to, forward);
      store_shared(to + kPitch, backward);
    }
  }
}

// Grid: tiles of `tokens` tokens of the batch, in order; a warp takes a twelfth of them; four more bring x and weights. x lies
// in shared memory with three rows of zeros between images, so that a window never reaches into another image.
template <typename Traits>
__device__ __forceinline__ void wgmma_tile(const ConvXProjParams& p, int tokens) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kTiles, kXSlots = Traits::kXSlots, kWeightSlots = Traits::kWeightSlots;
  static_assert(kThreads - 32 * kWarps == 2 * kDepth);  // a bringer brings the taps of a channel and direction
  extern __shared__ __align__(1024) unsigned char shared[];

  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(~0u, tid >> 5, 0), warpgroup = warp >> 2;  // uniform, for the compiler too
  const int L = p.seqlen, E = p.d_inner, row = p.row, steps = E / kDepth, total = p.batch * L;
  auto padded = [&](int token) { return token + kHalo * (token / L); };  // the place among images of L + 3 rows

  const int tile_first = blockIdx.x * tokens, tile_end = min(tile_first + tokens, total);
  const int x_first = padded(tile_first) - kHalo, x_rows = padded(tile_end - 1) + kHalo + 1 - x_first;
  const uint32_t shared_at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t x_full = shared_at + Traits::kBarriers, x_empty = x_full + 8 * kXSlots;
  const uint32_t weights_full = x_empty + 8 * kXSlots, weights_empty = weights_full + 8 * kWeightSlots;
  const uint32_t u_made = weights_empty + 8 * (kWeightSlots + warpgroup);
  int* const sources = reinterpret_cast<int*>(shared + Traits::kSources);

  if (tid == 0) {
    for (int s = 0; s < kXSlots; s++) barrier_init(x_full + 8 * s, 32 * kBringers), barrier_init(x_empty + 8 * s, kWarps);
    for (int s = 0; s < kWeightSlots; s++) barrier_init(weights_full + 8 * s, kBringers), barrier_init(weights_empty + 8 * s, kWarps);
    for (int g = 0; g < kWarpgroups; g++) barrier_init(weights_empty + 8 * (kWeightSlots + g), 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int r = tid; r < kRows; r += kThreads) {  // where a row's x comes from: 16-byte pieces after the first token's, -1: nowhere
    const int place = x_first + r, image = place / (L + kHalo), t = place - image * (L + kHalo);
    const bool exists = r < x_rows && place >= 0 && t < L && image < p.batch;
    sources[r] = exists ? (image * L + t) * (E / 4) : -1;
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();

  if (warp >= kWarps) {  // ---- brings
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    constexpr int kRowsAtOnce = 4 * kBringers, kXCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
    const int thread = tid - 32 * kWarps, first_row = thread >> 3, piece = thread & 7;
    const uint4* x_at = static_cast<const uint4*>(p.xz) + piece;
    const uint4* weights_at = static_cast<const uint4*>(p.x_proj_weight) + first_row * (E / 8) + piece;
    const int tap_dir = thread / kDepth, tap = thread % kDepth;  // of a direction those of even channels, then of odd ones
    const float* taps_at = p.conv_weight + 4 * (tap_dir * E + tap);
    const float* bias_at = p.conv_bias + (thread / (kDepth / 4)) * E + 4 * (thread % (kDepth / 4));
    const int taps_place = tap_dir * (kDepth * 16) + (tap & 1) * (kDepth * 8) + (tap >> 1) * 16;
    const int weight_step = kRowsAtOnce * (E / 8), weight_place = first_row * kLine + ((piece ^ (first_row & 7)) << 4);
    int source[kXCopies];
#pragma unroll
    for (int i = 0; i < kXCopies; i++) source[i] = sources[min(first_row + kRowsAtOnce * i, kRows - 1)];
    Ring<kXSlots> x;
    Ring<kWeightSlots> w;
    auto weights_are_here = [&](int slot) {
      fence_for_wgmma();
      __syncwarp();
      if (lane == 0) barrier_arrive(weights_full + 8 * slot);
    };
    int last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      barrier_wait(x_empty + 8 * x.slot, x.phase ^ 1);
      {
        unsigned char* const to = shared + Traits::kX + x.slot * Traits::kXSlot + first_row * kLine + piece * 16;
#pragma unroll
        for (int i = 0; i < kXCopies; i++)  // rows of zeros are made here, too
          if (kRowsAtOnce * i < x_rows)
            copy_async16(to + i * (kRowsAtOnce * kLine), x_at + static_cast<unsigned>(max(source[i], 0)), source[i] >= 0);
        unsigned char* const taps = shared + Traits::kTaps + x.slot * Traits::kTapsSlot;
        copy_async16(taps + taps_place, taps_at, true);
        if (thread < kDepth / 2) copy_async16(taps + Traits::kBias + thread * 16, bias_at, true);
        barrier_arrive_after_copies(x_full + 8 * x.slot);
        x_at += kDepth / 8, taps_at += 4 * kDepth, bias_at += kDepth;
        x.next();
      }
      barrier_wait(weights_empty + 8 * w.slot, w.phase ^ 1);
      {
        // Both directions' rows follow each other, 1,024 bytes eight of them. Where they are fewer than 16 kTiles, columns
        // that reach no output are computed from what lies there.
        unsigned char* const to = shared + Traits::kWeights + w.slot * Traits::kWeightSlot + weight_place;
        const uint4* from = weights_at;
#pragma unroll
        for (int i = 0; i < kTiles; i++, from += weight_step)  // 2 row is a multiple of 16
          if (kRowsAtOnce * i < 2 * row) copy_async16(to + i * (kRowsAtOnce * kLine), from, true);
        copy_async_commit();
        weights_at += kDepth / 8;
      }
      if (step > 0) {
        copy_async_wait<1>();
        weights_are_here(last);
      }
      last = w.slot;
      w.next();
    }
    copy_async_wait<0>();
    weights_are_here(last);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");

  const int pairs = (tokens + 1) >> 1;  // an odd token takes as long as two
  const int first = tile_first + 2 * (warp * pairs / kWarps);
  const int count = max(min(tile_first + 2 * ((warp + 1) * pairs / kWarps), tile_end) - first, 0);
  const int in_first_image = count == 0 ? 0 : min(count, L - first % L);
  const int first_row = count == 0 ? 0 : padded(first) - kHalo - x_first;
  // A lane's places: of its two channels in x, in u (row 0 of its warp), in the taps.
  const int x_place = kept(first_row * kLine + lane * 4), taps_place = kept(Traits::kTaps + lane * 16);
  const int u_place = kept(shared_at + warp * (kRun * kLine) + (lane >> 2 << 4) + (lane & 3) * 4);
  float sums[2][4 * kTiles];

  Ring<kXSlots> x_ring;
  Ring<kWeightSlots> w_ring;
  // x_proj of a step: when all four warps have made their rows of u and the weights are here.
  auto multiply = [&](int step) {
    barrier_wait(u_made, step & 1);
    barrier_wait(weights_full + 8 * w_ring.slot, w_ring.phase);
    pin(sums[0]);
    pin(sums[1]);
    wgmma_arrive();
    const uint32_t u_at = shared_at + (step & 1) * (2 * Traits::kU) + warpgroup * (4 * kRun * kLine);
    const uint32_t w_at = shared_at + Traits::kWeights + w_ring.slot * Traits::kWeightSlot;
#pragma unroll
    for (int dir = 0; dir < 2; dir++) {
      const uint64_t a = tile_descriptor(u_at + dir * Traits::kU), b = tile_descriptor(w_at + dir * row * kLine);
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++) Wgmma<T, kTiles>::run(sums[dir], a + 2 * k, b + 2 * k, step > 0 || k > 0);
    }
    wgmma_commit();
    pin(sums[0]);
    pin(sums[1]);
  };
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    barrier_wait(x_full + 8 * x_ring.slot, x_ring.phase);
    const unsigned char* x = shared + Traits::kX + x_ring.slot * Traits::kXSlot + x_place;
    const uint32_t u = u_place + (step & 1) * (2 * Traits::kU);
    Taps taps;
    {
      const unsigned char* const at = shared + x_ring.slot * Traits::kTapsSlot + taps_place;
      const float4* w = reinterpret_cast<const float4*>(at);
      const float2* bias = reinterpret_cast<const float2*>(at + Traits::kBias - lane * 8);
      taps.forward0 = half_of(w[0]), taps.forward1 = half_of(w[kDepth / 2]);
      taps.backward0 = half_of(w[kDepth]), taps.backward1 = half_of(w[kDepth + kDepth / 2]);
      taps.forward_bias = half_of(bias[0]), taps.backward_bias = half_of(bias[kDepth / 2]);
    }
    Window window;
    conv_start<T>(window, x);
    conv_tokens<T, Traits::kU, 0, kRun / 2>(window, x, u, 0, in_first_image, taps);
    if (step > 0) multiply(step - 1);  // in the middle: nobody waits for the slowest of the four, nor for the products
    if (in_first_image > kRun / 2)
      conv_tokens<T, Traits::kU, kRun / 2, kRun>(window, x, u, 0, in_first_image, taps);
#pragma unroll 1
    for (int done = in_first_image; done < count; done += L) {
      x += (done == in_first_image ? in_first_image + kHalo : L + kHalo) * kLine;
      Window other;
      conv_start<T>(other, x);
      conv_tokens<T, Traits::kU, 0, kRun>(other, x, u, done, min(count - done, L), taps);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(x_empty + 8 * x_ring.slot);
    x_ring.next();
    if (step > 0) {
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(weights_empty + 8 * w_ring.slot);
      w_ring.next();
    }
    fence_for_wgmma();
    __syncwarp();
    if (lane == 0) barrier_arrive(u_made);
  }
  multiply(steps - 1);
  wgmma_wait<0>();
  pin(sums[0]);
  pin(sums[1]);

  // A lane has columns 8 n + 2 q, + 1 of rows g and g + 8.
  const int g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int dir = 0; dir < 2; dir++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (8 * half + g >= count) continue;
      T* const out = static_cast<T*>(p.x_dbl) + (static_cast<int64_t>(dir) * total + first + 8 * half + g) * row + 2 * q;
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        if (8 * n < row)
          *reinterpret_cast<uint32_t*>(out + 8 * n) =
              Pair<T>::pack(sums[dir][4 * n + 2 * half], sums[dir][4 * n + 2 * half + 1]);
    }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename Traits>
__global__ __launch_bounds__(kThreads, 1) void wgmma_kernel(const __grid_constant__ ConvXProjParams p, int tokens) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  wgmma_tile<Traits>(p, tokens);
#endif
}

// As few rounds of one block a multiprocessor as hold all tokens, and equal tiles in them.
int tokens_of_tile(const ConvXProjParams& p, int64_t processors) {
  const int64_t total = static_cast<int64_t>(p.batch) * p.seqlen;
  int most = kTokens;  // short images have more rows of zeros between them
  while (most + kHalo * ((most + p.seqlen - 2) / p.seqlen) > kRows - 2 * kHalo) most--;
  const int64_t rounds = (total + processors * most - 1) / (processors * most);
  return static_cast<int>((total + processors * rounds - 1) / (processors * rounds));
}

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  using Traits = WgmmaTraits<T, kTiles>;
  const int64_t total = static_cast<int64_t>(p.batch) * p.seqlen;
  if (static_cast<int64_t>(p.batch) * (p.seqlen + kHalo) > INT_MAX - kRows || total * (p.d_inner / 4) > INT_MAX)
    return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared<wgmma_kernel<Traits>>(Traits::kBytes);
  if (status != cudaSuccess) return status;
  const int tokens = tokens_of_tile(p, processors_of_device());
  // One block a multiprocessor, so none can pile up where the kernel before has left.
  return launch_dependent<wgmma_kernel<Traits>>(dim3(static_cast<unsigned>((total + tokens - 1) / tokens)), dim3(kThreads),
                                                Traits::kBytes, stream, p, tokens);
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, cudaStream_t stream) {
  return with_tiles<10>(p.row, cudaErrorInvalidConfiguration, [&](auto tiles) { return launch<T, tiles>(p, stream); });
}

}  // namespace

int32_t conv_xproj_wgmma_tokens(const ConvXProjParams& p) { return tokens_of_tile(p, processors_of_device()); }

bool conv_xproj_wgmma_supported(int32_t d_inner, int32_t row) {
#ifdef STM_SM90A
  return d_inner % kDepth == 0 && row <= 80 && device_attribute(cudaDevAttrComputeCapabilityMajor, 0) == 9;
#else
  static_cast<void>(d_inner), static_cast<void>(row);
  return false;
#endif
}

cudaError_t conv_xproj_wgmma(const ConvXProjParams& p, cudaStream_t stream) {
  if (!conv_xproj_wgmma_supported(p.d_inner, p.row)) return cudaErrorInvalidConfiguration;
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, stream); });
}

}  // namespace stm
