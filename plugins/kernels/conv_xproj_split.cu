// conv_xproj_split.cu: both convs + SiLU + x_proj for some hundred to some ten thousand tokens: warps share the channels
// of a span of tokens, and the conv runs on tensor cores too: two taps of 8 channels
// are a product with k = 16 and diagonal weights, which are rounded to T. Its result, after SiLU, lies in the registers
// that x_proj takes as its A operand, so u is never stored.
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

// A lane group (four lanes) owns 6 consecutive tokens of one image, a warp 48. Images are padded to a multiple of 6, so
// that no group's window changes in the middle.
constexpr int kGroupTokens = 6, kWarpTokens = 8 * kGroupTokens, kHalo = 3;
constexpr int kDepth = 32;  // channels of a warp's step: 4 octets

template <typename T_, int kTiles_, int kSpans_, int kDirs_, int kSplits_>
struct SplitTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;    // of 8 outputs: row <= 8 kTiles
  static constexpr int kSpans = kSpans_;    // of 48 tokens in a block
  static constexpr int kDirs = kDirs_;      // directions in a block
  static constexpr int kSplits = kSplits_;  // warps that share the channels of a span and direction
  static constexpr int kWarps = kSpans * kDirs * kSplits, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSM = kWarps > 4 ? 1 : 2;
  static constexpr int kStages = kSplits > 2 ? 2 : 3;
  static constexpr int kTokens = kWarpTokens * kSpans, kRows = kTokens + 2 * kHalo;
  static constexpr int kPieces = kDepth / 8 * kSplits;    // of 16 bytes, of a row in a stage
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // rows that the block brings in one go
  static constexpr int kOutputs = 8 * kTiles * kDirs;     // rows of x_proj_weight in a stage
  // A stage in 16-byte pieces: for each piece of a row a plane with that piece of all rows, so that eight rows' pieces
  // lie side by side for a matrix load; planes are 2 (mod 8) pieces apart for the copies' sake.
  static constexpr int kXPlane = 56 * kSpans + 10, kWeightPlane = kOutputs + 2;
  static constexpr int kWeights = kPieces * kXPlane, kStage = kWeights + kPieces * kWeightPlane;
  static constexpr int kSumPitch = 8 * kTiles + 4;  // floats of a token's sums; no bank conflicts
  static __host__ __device__ int shared_bytes(int d_inner) {
    const int loop = kStages * kStage * 16 + kDirs * d_inner * 12, sums = kWarps * kWarpTokens * kSumPitch * 4;
    return (loop > sums ? loop : sums) + kRows * 4;
  }
};

// A block's tokens are counted from -3 (the halo before) to kTokens + 2. Groups of 6 take 7 places in a plane: the rows
// of 8 groups then lie on different banks. Place 0 holds zeros.
__device__ __forceinline__ int place_of(int token) {
  const int from_group = token + kGroupTokens;
  return from_group + from_group / kGroupTokens;
}

// Grid (tiles of kTokens padded tokens, 2 / kDirs).
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void split_kernel(
    const __grid_constant__ ConvXProjParams p) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kTiles, kSplits = Traits::kSplits, kDirs = Traits::kDirs, kRows = Traits::kRows;
  constexpr int kThreads = Traits::kThreads, kStages = Traits::kStages, kPieces = Traits::kPieces;
  constexpr int kRowsAtOnce = Traits::kRowsAtOnce, kOutputs = Traits::kOutputs;
  constexpr int kXCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  constexpr int kWeightCopies = (kOutputs + kRowsAtOnce - 1) / kRowsAtOnce;
  constexpr int kTapsAtOnce = 6;  // channels of a thread
  static_assert(kRows <= kThreads && kStages * kPieces <= kThreads);
  extern __shared__ __align__(16) unsigned char shared[];

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int L = p.seqlen, E = p.d_inner, row = p.row, steps = (E + kDepth * kSplits - 1) / (kDepth * kSplits);
  const int first_dir = kDirs == 2 ? 0 : static_cast<int>(blockIdx.y);
  const int split = warp % kSplits, dir_here = warp / kSplits % kDirs, span = warp / (kSplits * kDirs);
  const int dir = first_dir + dir_here;
  const unsigned groups_per_image = (L + kGroupTokens - 1) / kGroupTokens;
  const int groups = p.batch * groups_per_image;
  const int first_group = blockIdx.x * (Traits::kTokens / kGroupTokens);
  uint4* const stages = reinterpret_cast<uint4*>(shared);
  uint2* const taps_table = reinterpret_cast<uint2*>(stages + kStages * Traits::kStage);
  float* const bias_table = reinterpret_cast<float*>(taps_table + kDirs * E);
  int* const token_table = reinterpret_cast<int*>(shared + Traits::shared_bytes(E)) - kRows;

  // The taps and bias of a channel to shared memory, halved for SiLU, the taps in the order of the window's rows.
  float4 taps_read[kTapsAtOnce];
  float bias_read[kTapsAtOnce];
  auto read_taps = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kTapsAtOnce; k++) {
      const int i = begin + k * kThreads;
      if (i >= kDirs * E) continue;
      taps_read[k] = load4(p.conv_weight + (static_cast<int64_t>(first_dir) * E + i) * 4);
      bias_read[k] = p.conv_bias[static_cast<int64_t>(first_dir) * E + i];
    }
  };
  auto keep_taps = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kTapsAtOnce; k++) {
      const int i = begin + k * kThreads;
      if (i >= kDirs * E) continue;
      const float4 w = taps_read[k];
      const bool backward = kDirs == 2 ? i >= E : first_dir == 1;
      taps_table[i] = backward ? pack4<T>(.5f * w.w, .5f * w.z, .5f * w.y, .5f * w.x)
                               : pack4<T>(.5f * w.x, .5f * w.y, .5f * w.z, .5f * w.w);
      bias_table[i] = .5f * bias_read[k];
    }
  };
  read_taps(tid);

  if (tid < kRows) {  // row of the tile to token of the input, -1 if there is none
    const int from_group = tid - kHalo + kGroupTokens, group = first_group - 1 + from_group / kGroupTokens;
    const unsigned image = static_cast<unsigned>(max(group, 0)) / groups_per_image;
    const int t = (group - static_cast<int>(image * groups_per_image)) * kGroupTokens + from_group % kGroupTokens;
    token_table[tid] = group >= 0 && group < groups && t < L ? static_cast<int>(image) * L + t : -1;
  }
  // A thread brings one piece of every kRowsAtOnce-th row.
  const int first_row = tid / kPieces, piece = tid % kPieces;
  const uint4 *weights_at = static_cast<const uint4*>(p.x_proj_weight), *x_at = static_cast<const uint4*>(p.xz);
  unsigned weight_source[kWeightCopies], x_source[kXCopies];  // pieces after those
  unsigned x_place[kXCopies];                                 // bytes into a stage
#pragma unroll
  for (int i = 0; i < kWeightCopies; i++) {  // rows that do not exist repeat the last one: they reach no output
    const int output = first_row + i * kRowsAtOnce, d = output / (8 * kTiles), o = min(output % (8 * kTiles), row - 1);
    weight_source[i] = static_cast<unsigned>(((first_dir + d) * row + o) * (E / 8) + piece);
  }
  auto bring_weights = [&](int step, int slot) {
    if (step * kPieces + piece >= E / 8) return;
    uint4* to = stages + slot * Traits::kStage + Traits::kWeights + piece * Traits::kWeightPlane + first_row;
#pragma unroll
    for (int i = 0; i < kWeightCopies; i++)
      if ((i + 1) * kRowsAtOnce <= kOutputs || first_row + i * kRowsAtOnce < kOutputs)
        copy_async16(to + i * kRowsAtOnce, weights_at + weight_source[i], true);
    weights_at += kPieces;
  };
  auto bring_x = [&](int step, int slot) {
    if (step * kPieces + piece >= E / 8) return;
    unsigned char* to = shared + slot * (Traits::kStage * 16);
#pragma unroll
    for (int i = 0; i < kXCopies; i++)
      if ((i + 1) * kRowsAtOnce <= kRows || first_row + i * kRowsAtOnce < kRows)
        copy_async_line16(to + x_place[i], x_at + x_source[i]);
    x_at += kPieces;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) bring_weights(s, s);
  if (tid < kStages * kPieces)
    stages[tid / kPieces * Traits::kStage + tid % kPieces * Traits::kXPlane] = make_uint4(0, 0, 0, 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kXCopies; i++) {  // tokens that do not exist repeat the first one: matrix loads pass them by
    const int r = min(first_row + i * kRowsAtOnce, kRows - 1);
    x_source[i] = static_cast<unsigned>(max(token_table[r], 0)) * static_cast<unsigned>(E / 4) + piece;
    x_place[i] = (piece * Traits::kXPlane + place_of(r - kHalo)) * 16;
  }

  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) {
    bring_x(s, s);
    copy_async_commit();
  }
  for (int begin = tid; begin < kDirs * E; begin += kTapsAtOnce * kThreads) {
    if (begin != tid) read_taps(begin);
    keep_taps(begin);
  }

  // What the lane gives to matrix loads. x: quad k has the rows 2k, 2k + 1, 2k + 1, 2k + 2 of each group's window, in
  // that order: A of the tokens 2k and 2k + 1 for the window's rows 0 and 1, of 2k - 2 and 2k - 1 for its rows 2 and 3.
  const uint32_t shared_address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t x_address[4];
  {
    const int local = 8 * span + (lane & 7), group = first_group + local;
    const int t0 = group < groups ? static_cast<int>(group % groups_per_image) * kGroupTokens : L + kHalo;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int o = (dir ? 0 : -kHalo) + 2 * k + ((lane >> 3) + 1) / 2, t = t0 + o;
      const int place = t >= 0 && t < L ? place_of(kGroupTokens * local + o) : 0;
      x_address[k] = shared_address + (kDepth / 8 * split * Traits::kXPlane + place) * 16;
    }
  }
  const uint32_t weight_address =
      shared_address + (Traits::kWeights + (kDepth / 8 * split + (lane >> 3 & 1)) * Traits::kWeightPlane +
                        8 * kTiles * dir_here + (lane >> 4) * 8 + (lane & 7)) * 16;
  // B of the conv: lane (g, q) has rows 2q, 2q + 1 and column g, zero but on the diagonal.
  const bool diagonal = g >> 1 == q, odd = g & 1;
  const unsigned pick_first = !diagonal ? 0x4444 : odd ? 0x1044 : 0x4410;   // of a word's two taps
  const unsigned pick_second = !diagonal ? 0x4444 : odd ? 0x3244 : 0x4432;
  const uint2* taps = taps_table + dir_here * E + kDepth * split + g;
  const float* bias = bias_table + dir_here * E + kDepth * split + 2 * q;

  float acc[3][kTiles][4];  // tokens 2m and 2m + 1 of the lane group
#pragma unroll
  for (int m = 0; m < 3; m++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[m][n][r] = 0.f;

  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; all are done with the stage that is filled next
    const int next = step + kStages - 1, next_slot = slot == 0 ? kStages - 1 : slot - 1;
    bring_weights(next, next_slot);
    bring_x(next, next_slot);
    copy_async_commit();
    const uint32_t stage = slot * (Traits::kStage * 16);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    if (kSplits > 1 && (step * kSplits + split) * kDepth >= E) continue;  // uniform in a warp, no barrier below

#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint4 u[3];  // A of x_proj: 16 tokens, 16 channels
#pragma unroll
      for (int o = 0; o < 2; o++) {
        const int octet = 2 * half + o;
        uint4 window[4];
#pragma unroll
        for (int k = 0; k < 4; k++) window[k] = load_matrices(x_address[k] + stage + octet * Traits::kXPlane * 16);
        const uint2 w = taps[8 * octet];
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * octet);
        const uint2 early = make_uint2(__byte_perm(w.x, 0, pick_first), __byte_perm(w.x, 0, pick_second));
        const uint2 late = make_uint2(__byte_perm(w.y, 0, pick_first), __byte_perm(w.y, 0, pick_second));
        const float start[4] = {b.x, b.y, b.x, b.y};
#pragma unroll
        for (int m = 0; m < 3; m++) {
          float h[4];
          mma_k16_onto<T>(h, window[m], early, start);
          mma_k16<T>(h, window[m + 1], late);
          const uint32_t first = Pair<T>::pack(silu_of_half(h[0]), silu_of_half(h[1]));
          const uint32_t second = Pair<T>::pack(silu_of_half(h[2]), silu_of_half(h[3]));
          if (o == 0) u[m].x = first, u[m].y = second;
          else u[m].z = first, u[m].w = second;
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        const uint32_t at = weight_address + stage + (2 * half * Traits::kWeightPlane + 8 * n) * 16;
        uint4 w = {};
        if (n + 1 < kTiles) w = load_matrices(at);
        else load_two_matrices(at, w.x, w.y);
#pragma unroll
        for (int m = 0; m < 3; m++) mma_k16<T>(acc[m][n], u[m], make_uint2(w.x, w.y));
        if (n + 1 < kTiles)
#pragma unroll
          for (int m = 0; m < 3; m++) mma_k16<T>(acc[m][n + 1], u[m], make_uint2(w.z, w.w));
      }
    }
    taps += kDepth * kSplits, bias += kDepth * kSplits;
  }

  // Sums to shared memory, over the splits in order, and out in rows.
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < 3; m++)
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        *reinterpret_cast<float2*>(sums + (warp * kWarpTokens + kGroupTokens * g + 2 * m + t) * Traits::kSumPitch +
                                   8 * n + 2 * q) = make_float2(acc[m][n][2 * t], acc[m][n][2 * t + 1]);
  __syncthreads();
#pragma unroll
  for (int d = 0; d < kDirs; d++) {
    T* const out = static_cast<T*>(p.x_dbl) + static_cast<int64_t>(first_dir + d) * p.batch * L * row;
#pragma unroll 2
    for (unsigned i = tid; i < Traits::kTokens * kTiles; i += kThreads) {
      const unsigned t = i / kTiles, column = i % kTiles * 8;
      const int token = token_table[kHalo + t];
      if (token < 0 || column >= static_cast<unsigned>(row)) continue;
      const float* from = sums + column + ((t / kWarpTokens * kDirs + d) * kSplits * kWarpTokens + t % kWarpTokens) *
                                              Traits::kSumPitch;
      float4 v = *reinterpret_cast<const float4*>(from), w = *reinterpret_cast<const float4*>(from + 4);
#pragma unroll
      for (int s = 1; s < kSplits; s++) {
        const float4* more = reinterpret_cast<const float4*>(from + s * kWarpTokens * Traits::kSumPitch);
        v.x += more[0].x, v.y += more[0].y, v.z += more[0].z, v.w += more[0].w;
        w.x += more[1].x, w.y += more[1].y, w.z += more[1].z, w.w += more[1].w;
      }
      const uint2 low = pack4<T>(v.x, v.y, v.z, v.w), high = pack4<T>(w.x, w.y, w.z, w.w);
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * row + column) =
          make_uint4(low.x, low.y, high.x, high.y);
    }
  }
}

template <typename T, int kTiles, int kSpans, int kDirs, int kSplits>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  using Traits = SplitTraits<T, kTiles, kSpans, kDirs, kSplits>;
  constexpr auto kKernel = split_kernel<Traits>;
  const int64_t groups = static_cast<int64_t>(p.batch) * ((p.seqlen + kGroupTokens - 1) / kGroupTokens);
  const int64_t tiles = (groups * kGroupTokens + Traits::kTokens - 1) / Traits::kTokens;
  if (groups * kGroupTokens > INT_MAX - Traits::kTokens) return cudaErrorInvalidValue;
  if (static_cast<int64_t>(p.batch) * p.seqlen * (p.d_inner / 4) > UINT32_MAX) return cudaErrorInvalidConfiguration;
  const auto bytes = static_cast<size_t>(Traits::shared_bytes(p.d_inner));
  if (bytes > shared_bytes_of_device()) return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared<kKernel>(bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent<kKernel>(dim3(static_cast<unsigned>(tiles), 2 / kDirs), dim3(Traits::kThreads), bytes, stream, p);
}

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream) {
  switch (shape) {
    case ConvXProjShape::kSplit8: return launch<T, kTiles, 1, 1, 8>(p, stream);
    case ConvXProjShape::kSplit4: return launch<T, kTiles, 1, 2, 4>(p, stream);
    case ConvXProjShape::kSplit2: return launch<T, kTiles, 2, 2, 2>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream) {
  return with_tiles<12>(p.row, cudaErrorInvalidValue, [&](auto tiles) { return launch<T, tiles>(p, shape, stream); });
}

}  // namespace

cudaError_t conv_xproj_split(const ConvXProjParams& p, ConvXProjShape shape, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, shape, stream); });
}

}  // namespace stm
