// conv_xproj_wide.cu: both convs + SiLU + x_proj for many tokens: a block takes both directions of its tokens, so that x
// and the weights come from L2 once for many of them. u is made in the registers that x_proj takes as its A operand and
// never stored.
#include <algorithm>
#include <climits>

#include "conv_xproj_impl.h"
#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

// A lane group (four lanes) owns 6 or 4 consecutive tokens of one image, a warp 48 or 32, a block 96 or 64. Images are
// padded to a multiple of 6 or 4, so that an image's edge lies only between groups.
constexpr int kLongGroup = 6, kShortGroup = 4, kHalo = 3;
constexpr int kDepth = 64;  // channels of a stage: rows of 128 bytes
constexpr int kLine = 128;

template <typename T_, int kTiles_>
struct WideTraits {
  using T = T_;
  static constexpr int kTiles = kTiles_;  // of 8 outputs: row <= 8 kTiles
  static constexpr int kLeastRow = kTiles > 7 ? 64 : kTiles > 6 ? 56 : 8;
  static constexpr int kSpans = 2;  // of 8 groups in a block; a warp for each span and direction
  static constexpr int kGroups = 8 * kSpans;
  static constexpr int kWarps = 2 * kSpans, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSM = 2;  // one block of twice the size is 2 to 9 % slower, where it divides the tokens as well
  static constexpr int kStages = 3;
  static constexpr int kRows = kGroups * kLongGroup + 2 * kHalo;  // of x at most
  static constexpr int kOutputs = 16 * kTiles;      // rows of x_proj_weight in a stage, both directions
  static constexpr int kRowsAtOnce = kThreads / 8;  // rows that the block brings in one go, a thread 16 bytes of each
  // A stage, in bytes: x, three rows of zeros, weights, taps and bias of both directions.
  static constexpr int kZeros = kRows * kLine, kWeights = kZeros + kHalo * kLine;
  static constexpr int kTaps = kWeights + kOutputs * kLine, kBias = kTaps + 2 * kDepth * 16;
  static constexpr int kStage = kBias + 2 * kDepth * 4;
  static constexpr int kOutPitch = 16 * (kTiles | 1);  // bytes of a token's outputs; odd for the banks
  static constexpr size_t kBytes = kStages * kStage + (kRows * 4 + 15) / 16 * 16;
  static_assert(kWarps * 8 * kLongGroup * kOutPitch <= kStages * kStage);
};

// A row's 16-byte pieces lie in order, or with the two halves exchanged: lanes 0 to 7 read the same half of two rows, of
// which one is exchanged, so they meet all banks. `odd` is that of the token's group, or of the output.
__device__ __forceinline__ int piece_place(int piece, int odd) { return (piece ^ (odd << 2)) * 16; }

// Tile `tile`, of kGroups groups, of the `images` images from `first_image`.
template <typename Traits, int kGroupTokens>
__device__ __forceinline__ void wide_tile(const ConvXProjParams& p, int tile, int first_image, int images) {
  using T = typename Traits::T;
  constexpr int kPairs = kGroupTokens / 2, kWindow = kGroupTokens + kHalo, kWarpTokens = 8 * kGroupTokens;
  constexpr int kRows = Traits::kGroups * kGroupTokens + 2 * kHalo;
  constexpr bool kEarly = Traits::kTiles * kPairs <= 21;  // registers suffice to keep the weights of two k-steps
  constexpr int kTiles = Traits::kTiles, kOutputs = Traits::kOutputs;
  constexpr int kThreads = Traits::kThreads, kStages = Traits::kStages, kRowsAtOnce = Traits::kRowsAtOnce;
  constexpr int kXCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  constexpr int kWeightCopies = (kOutputs + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kRows <= Traits::kRows && kThreads >= 2 * kDepth && kRowsAtOnce % 2 == 0);
  extern __shared__ __align__(128) unsigned char shared[];
  int* const token_table = reinterpret_cast<int*>(shared + kStages * Traits::kStage);

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int L = p.seqlen, E = p.d_inner, row = p.row, steps = E / kDepth;
  const int dir = warp & 1, span = warp >> 1;
  const unsigned groups_per_image = (L + kGroupTokens - 1) / kGroupTokens;
  const int groups = images * groups_per_image;
  const int first_group = tile * Traits::kGroups;

  // What a thread brings: piece `piece` of every kRowsAtOnce-th row.
  const int first_row = tid >> 3, piece = tid & 7;
  const uint4 *weights_at = static_cast<const uint4*>(p.x_proj_weight), *x_at = static_cast<const uint4*>(p.xz);
  int x_source[kXCopies];  // pieces after that, -1: no such token
  int x_place[kXCopies];   // bytes into a stage
  // Both directions' rows of x_proj_weight follow each other. Where they are fewer than kOutputs, columns that reach no
  // output are computed from what lies there.
  const unsigned weight_source = static_cast<unsigned>(first_row * (E / 8) + piece);  // in pieces
  auto bring_weights = [&](int step, int slot) {
    if (step >= steps) return;
    unsigned char* to = shared + slot * Traits::kStage + Traits::kWeights + first_row * kLine +
                        piece_place(piece, first_row & 1);
#pragma unroll
    for (int i = 0; i < kWeightCopies; i++)
      if ((i + 1) * kRowsAtOnce <= 2 * Traits::kLeastRow || first_row + i * kRowsAtOnce < 2 * row)
        copy_async16(to + i * (kRowsAtOnce * kLine), weights_at + (weight_source + i * (kRowsAtOnce * (E / 8))), true);
    weights_at += kDepth / 8;
  };
  auto bring_x = [&](int step, int slot) {
    if (step >= steps) return;
    unsigned char* to = shared + slot * Traits::kStage;
#pragma unroll
    for (int i = 0; i < kXCopies; i++)
      if (x_source[i] >= 0) copy_async16(to + x_place[i], x_at + static_cast<unsigned>(x_source[i]), true);
    x_at += kDepth / 8;
  };
  // Taps and bias of a channel, halved for SiLU, the taps in the order of the window's rows.
  const int tap_dir = tid >> 6 & 1, tap_channel = (tid >> 5 & 1) * 32 + (tid & 3) * 8 + (tid >> 2 & 7);
  struct Taps {
    float4 w;
    float bias;
  };
  auto read_taps = [&](int step) {
    if (tid >= 2 * kDepth || step >= steps) return Taps{};
    const int channel = tap_dir * E + step * kDepth + tap_channel;
    return Taps{load4(p.conv_weight + static_cast<int64_t>(channel) * 4), p.conv_bias[channel]};
  };
  auto keep_taps = [&](int slot, const Taps& v) {
    if (tid >= 2 * kDepth) return;
    const float4 w = v.w;
    unsigned char* stage = shared + slot * Traits::kStage;
    reinterpret_cast<float4*>(stage + Traits::kTaps)[tid] =
        tap_dir ? make_float4(.5f * w.w, .5f * w.z, .5f * w.y, .5f * w.x)
                : make_float4(.5f * w.x, .5f * w.y, .5f * w.z, .5f * w.w);
    reinterpret_cast<float*>(stage + Traits::kBias)[tap_dir * kDepth + tap_channel] = .5f * v.bias;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) bring_weights(s, s);
  Taps first_taps[kStages - 1];
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) first_taps[s] = read_taps(s);

  for (int r = tid; r < kRows; r += kThreads) {  // row of the tile to token of the input, -1 if there is none
    const int from_group = r - kHalo + kGroupTokens, group = first_group - 1 + from_group / kGroupTokens;
    const unsigned image = static_cast<unsigned>(max(group, 0)) / groups_per_image;
    const int t = (group - static_cast<int>(image * groups_per_image)) * kGroupTokens + from_group % kGroupTokens;
    token_table[r] = group >= 0 && group < groups && t < L ? (first_image + static_cast<int>(image)) * L + t : -1;
  }
  if (tid < kStages * (kHalo * kLine / 16))
    *reinterpret_cast<uint4*>(shared + tid / (kHalo * kLine / 16) * Traits::kStage + Traits::kZeros +
                              tid % (kHalo * kLine / 16) * 16) = make_uint4(0, 0, 0, 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kXCopies; i++) {
    const int r = first_row + i * kRowsAtOnce, group = (r - kHalo + kGroupTokens) / kGroupTokens - 1;
    const int token = r < kRows ? token_table[r] : -1;
    x_place[i] = r * kLine + piece_place(piece, group & 1);
    x_source[i] = token < 0 ? -1 : static_cast<int>(static_cast<unsigned>(token) * static_cast<unsigned>(E / 4)) + piece;
    if (token < 0 && r < kRows)
#pragma unroll
      for (int s = 0; s < kStages; s++)
        *reinterpret_cast<uint4*>(shared + s * Traits::kStage + x_place[i]) = make_uint4(0, 0, 0, 0);
  }

  // The window's rows: three of the group before, the own group; or the own group, three of the group after. In three
  // parts, the first and the last of three rows. What belongs to another image is read from the rows of zeros.
  int window_place[3];
  {
    const int local = 8 * span + g, group = first_group + local;
    const int in_image = group % static_cast<int>(groups_per_image);
    const bool edge = dir ? in_image + 1 == static_cast<int>(groups_per_image) : in_image == 0;
#pragma unroll
    for (int k = 0; k < 3; k++) {
      const int at = kGroupTokens * local + (dir ? kHalo : 0) + (k == 0 ? 0 : k == 1 ? kHalo : kGroupTokens);
      const bool other = k == (dir ? 2 : 0);  // rows of another group
      window_place[k] = (other && edge ? Traits::kZeros : at * kLine) + piece_place(q, (local + other) & 1);
    }
  }
  const int weight_place = Traits::kWeights + (dir * row + g) * kLine + piece_place(q, g & 1);

  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) {
    bring_x(s, s);
    copy_async_commit();
  }
  Taps next_taps = read_taps(kStages - 1);
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) keep_taps(s, first_taps[s]);

  float acc[kPairs][kTiles][4];  // tokens 2m and 2m + 1 of the lane group
#pragma unroll
  for (int m = 0; m < kPairs; m++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[m][n][r] = 0.f;

  auto product = [](float* sums, const uint32_t (&u)[kGroupTokens][4], int m, int k, uint4 w) {
    mma_k16<T>(sums, make_uint4(u[2 * m][2 * k], u[2 * m + 1][2 * k], u[2 * m][2 * k + 1], u[2 * m + 1][2 * k + 1]),
               k == 0 ? make_uint2(w.x, w.y) : make_uint2(w.z, w.w));
  };

  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; all are done with the stage that is filled next
    const int next = step + kStages - 1, next_slot = slot == 0 ? kStages - 1 : slot - 1;
    bring_weights(next, next_slot);
    bring_x(next, next_slot);
    copy_async_commit();
    keep_taps(next_slot, next_taps);
    next_taps = read_taps(next + 1);
    const unsigned char* stage = shared + slot * Traits::kStage;
    slot = slot + 1 == kStages ? 0 : slot + 1;

#pragma unroll
    for (int sub = 0; sub < 2; sub++) {  // 32 channels: 8 of a lane, two k-steps
      uint4 window[kWindow];
#pragma unroll
      for (int i = 0; i < kWindow; i++) {
        const int part = i < kHalo ? 0 : i < kGroupTokens ? 1 : 2;
        const int row_of_part = i - (part == 0 ? 0 : part == 1 ? kHalo : kGroupTokens);
        window[i] = *reinterpret_cast<const uint4*>(stage + (window_place[part] ^ sub * 64) + row_of_part * kLine);
      }
      auto weights_of = [&](int n) {
        return *reinterpret_cast<const uint4*>(stage + (weight_place ^ sub * 64) + n * (8 * kLine));
      };
      uint32_t u[kGroupTokens][4];
      uint4 w[kTiles];
#pragma unroll
      for (int h = 0; h < 4; h++) {  // 2 channels of a lane
        const float4* taps = reinterpret_cast<const float4*>(stage + Traits::kTaps) + dir * kDepth + sub * 32 + q;
        const float4 w0 = taps[8 * h], w1 = taps[8 * h + 4];
        const float2 b =
            *(reinterpret_cast<const float2*>(stage + Traits::kBias) + dir * (kDepth / 2) + sub * 16 + 4 * q + h);
        float2 v[kWindow];
#pragma unroll
        for (int i = 0; i < kWindow; i++) v[i] = Pair<T>::unpack(reinterpret_cast<const uint32_t*>(&window[i])[h]);
#pragma unroll
        for (int t = 0; t < kGroupTokens; t++) {
          const float s0 =
              fmaf(w0.x, v[t].x, fmaf(w0.y, v[t + 1].x, fmaf(w0.z, v[t + 2].x, fmaf(w0.w, v[t + 3].x, b.x))));
          const float s1 =
              fmaf(w1.x, v[t].y, fmaf(w1.y, v[t + 1].y, fmaf(w1.z, v[t + 2].y, fmaf(w1.w, v[t + 3].y, b.y))));
          u[t][h] = Pair<T>::pack(silu_of_half(s0), silu_of_half(s1));
        }
        if (kEarly && h == 1)  // the first k-step's products beside the other channels' conv
#pragma unroll
          for (int n = 0; n < kTiles; n++) {
            w[n] = weights_of(n);
#pragma unroll
            for (int m = 0; m < kPairs; m++) product(acc[m][n], u, m, 0, w[n]);
          }
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        if (!kEarly) w[n] = weights_of(n);
#pragma unroll
        for (int m = 0; m < kPairs; m++) {
          if (!kEarly) product(acc[m][n], u, m, 0, w[n]);
          product(acc[m][n], u, m, 1, w[n]);
        }
      }
    }
  }

  // Through shared memory, to be written in rows.
  copy_async_wait<0>();
  __syncthreads();
  unsigned char* const outputs = shared + warp * (kWarpTokens * Traits::kOutPitch);
#pragma unroll
  for (int m = 0; m < kPairs; m++)
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        *reinterpret_cast<uint32_t*>(outputs + (kGroupTokens * g + 2 * m + t) * Traits::kOutPitch + 16 * n + 4 * q) =
            Pair<T>::pack(acc[m][n][2 * t], acc[m][n][2 * t + 1]);
  __syncwarp();
  T* const out = static_cast<T*>(p.x_dbl) + static_cast<int64_t>(dir) * p.batch * L * row;
#pragma unroll 4
  for (int i = lane; i < kWarpTokens * kTiles; i += 32) {
    const int t = i / kTiles, column = i % kTiles;
    const int token = token_table[kHalo + kWarpTokens * span + t];
    if (token < 0 || 8 * column >= row) continue;
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * row + 8 * column) =
        *reinterpret_cast<const uint4*>(outputs + t * Traits::kOutPitch + 16 * column);
  }
}

// Grid (tiles of long groups, for the first images; then tiles of short groups).
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void wide_kernel(
    const __grid_constant__ ConvXProjParams p, int long_images, int long_tiles) {
  const int block = blockIdx.x;
  if (block < long_tiles)
    wide_tile<Traits, kLongGroup>(p, block, 0, long_images);
  else
    wide_tile<Traits, kShortGroup>(p, block - long_tiles, long_images, p.batch - long_images);
}

constexpr int64_t kRoundTokens = 105;  // a round takes as long as so many tokens more than it has

struct Division {
  int64_t long_images, long_tiles, blocks;
};

// Up to two blocks a multiprocessor, the fullest one sets the time, by its tokens t (as 105 + t for ViM-S on an H100): so
// the least of 64, 96, 64 + 64, 96 + 64, 96 + 96 that suffices. Blocks are dealt in order, one to each multiprocessor
// before any gets its second: of 96 + 64 the 96 come first, at most one for each. Beyond that rounds of 96, which read
// weights less often, and blocks of 64 for what is left where that ends sooner.
Division division_of(const ConvXProjParams& p, int64_t groups_of_tile, int64_t processors) {
  const int64_t batch = p.batch;
  const int64_t in_long = (p.seqlen + kLongGroup - 1) / kLongGroup;
  const int64_t in_short = (p.seqlen + kShortGroup - 1) / kShortGroup;
  auto tiles = [&](int64_t images, int64_t groups) { return (images * groups + groups_of_tile - 1) / groups_of_tile; };
  const int64_t all_long = tiles(batch, in_long), all_short = tiles(batch, in_short);
  if (all_short <= processors || (all_long > processors && all_short <= 2 * processors)) return {0, 0, all_short};
  const int64_t images = processors * groups_of_tile / in_long, long_tiles = tiles(images, in_long);
  if (images < batch) {
    const int64_t blocks = long_tiles + tiles(batch - images, in_short);
    if (blocks <= 2 * processors) return {images, long_tiles, blocks};
  }
  const int64_t round = 2 * processors;
  auto cost = [&](int64_t longs, int64_t shorts) {
    int64_t time = 0;
    for (int64_t from = 0; from < longs + shorts; from += round) {
      const int64_t here = std::min(round, longs + shorts - from);
      const int64_t first = from < longs ? kLongGroup : kShortGroup;
      const int64_t second = here <= processors ? 0 : from + processors < longs ? kLongGroup : kShortGroup;
      time += kRoundTokens + (first + second) * groups_of_tile;
    }
    return time;
  };
  Division best = {batch, all_long, all_long};
  int64_t least = cost(all_long, 0);
  for (int64_t rounds = (all_long - 1) / round; rounds > 0; rounds--) {  // of equals the one with the most blocks of 96
    const int64_t in_rounds = rounds * round * groups_of_tile / in_long;
    const int64_t longs = tiles(in_rounds, in_long), shorts = tiles(batch - in_rounds, in_short);
    const int64_t time = cost(longs, shorts);
    if (time < least) least = time, best = {in_rounds, longs, longs + shorts};
  }
  return best;
}

template <typename T, int kTiles>
cudaError_t launch(const ConvXProjParams& p, cudaStream_t stream) {
  using Traits = WideTraits<T, kTiles>;
  if (static_cast<int64_t>(p.batch) * (p.seqlen + kLongGroup) > INT_MAX - Traits::kRows) return cudaErrorInvalidValue;
  if (p.d_inner % kDepth != 0 || static_cast<int64_t>(p.batch) * p.seqlen * (p.d_inner / 4) > INT_MAX)
    return cudaErrorInvalidConfiguration;
  if (Traits::kBytes > shared_bytes_of_device()) return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared<wide_kernel<Traits>>(Traits::kBytes);
  if (status != cudaSuccess) return status;
  const Division d = division_of(p, Traits::kGroups, processors_of_device());
  // Not launch_dependent: see conv_xproj_many.cu.
  wide_kernel<Traits><<<static_cast<unsigned>(d.blocks), Traits::kThreads, Traits::kBytes, stream>>>(
      p, static_cast<int>(d.long_images), static_cast<int>(d.long_tiles));
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const ConvXProjParams& p, cudaStream_t stream) {
  // more than 10 would not fit into registers
  return with_tiles<10>(p.row, cudaErrorInvalidConfiguration, [&](auto tiles) { return launch<T, tiles>(p, stream); });
}

}  // namespace

bool conv_xproj_wide_supported(int32_t d_inner, int32_t row) { return d_inner % kDepth == 0 && row <= 80; }

bool conv_xproj_wide_paired(int32_t row) {
  constexpr size_t kReserved = 1024;  // of a block, by the system
  const size_t bytes = with_tiles<10>(row, SIZE_MAX / 4, [](auto tiles) { return WideTraits<__half, tiles>::kBytes; });
  return 2 * (bytes + kReserved) <= shared_bytes_of_processor();
}

cudaError_t conv_xproj_wide(const ConvXProjParams& p, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, stream); });
}

}  // namespace stm
