// mamba_scan_segments.cu: the scan for small batches of short sequences, where a walk of L steps would leave the card
// idle: L is cut into segments walked side by side, with one pass of exponentials (d_state 16).
#include <algorithm>
#include <cstdint>

#include "device.cuh"
#include "launch.cuh"
#include "mamba_scan_impl.h"
#include "merge_weight.cuh"

namespace stm {
namespace {

constexpr int kStates = 16, kMaxRank = 64, kMaxSeqlen = 208;

// A warp walks a group of 8 segments of two channels in one direction: 16 rows of an mma tile. Fewer channels a block
// mean more blocks; more channels read x_dbl less often.
template <typename T_, int kChannels_, int kGroups_, int kFirst_, int kMore_, int kTokens_, int kBlocksPerSM_>
struct SegmentsTraits {
  using T = T_;
  static constexpr int kChannels = kChannels_, kPairs = kChannels / 2;
  static constexpr int kGroups = kGroups_, kSegments = 8 * kGroups;
  // Tokens of a segment: kFirst, then kMore at a time, up to kTokens.
  static constexpr int kFirst = kFirst_, kMore = kMore_, kTokens = kTokens_;
  static constexpr int kBlocksPerSM = kBlocksPerSM_;
  // h of every token too, so that C h is taken once; else once before and once after the incoming state is known.
  static constexpr bool kKeepStates = kTokens <= 13 && kBlocksPerSM == 1;
  static constexpr int kWarps = 2 * kPairs * kGroups, kThreads = 32 * kWarps;
  static constexpr int kTiles = (kChannels + 3) / 4;               // of dt_proj: 8 columns (direction, channel)
  static constexpr int kTileDirs = kPairs == 3 ? 1 : 2;            // directions in a tile, at most
  static constexpr int kPiece = kChannels % 4 == 0 ? 4 : 2;        // channels of x, z or y that a thread takes
  static constexpr int kPieces = kChannels / kPiece, kAtOnce = kThreads / kPieces;  // of a token; tokens at once
};

// Which columns of dt_proj's tile lie with the lanes of quarter q: a pair of channels in one direction.
struct Column {
  int dir, pair;
  bool exists;
};
template <int kPairs>
__device__ __forceinline__ Column column_of(int tile, int q) {
  if (kPairs == 3) return {tile, min(q, 2), q < 3};
  const int column = 4 * tile + q;
  return {column / kPairs, column % kPairs, true};
}

// How L is cut: `tokens` of a segment, 2^32 / tokens rounded up. merge_blocks stand in front of the others and take the
// merge weights.
struct SegmentsCut {
  int tokens;
  uint32_t reciprocal;
  int merge_blocks;
};

template <typename Traits>
struct SegmentsShared {
  static constexpr int kPairs = Traits::kPairs, kChannels = Traits::kChannels, kTokens = Traits::kTokens;
  static constexpr int kStride = Traits::kSegments + 1;  // odd, against bank conflicts
  // Of a direction and pair: by token of the segment, then segment.
  struct Steps {
    // C h leaves the mma in columns 2q, 2q + 1, of which one is the segment's own. So y of the two channels is in elements
    // 0 and 2 of an even segment, in 1 and 3 of an odd one; the others mean nothing.
    float4 y[kTokens * kStride];
    float2 s_delta[kTokens * kStride];
    uint32_t u_delta[kTokens * kStride];  // fp16
  } steps[2 * kPairs];
  uint2 B[2][Traits::kGroups][kTokens][32], C[2][Traits::kGroups][kTokens][32];  // fragments, fp16
  struct alignas(16) {
    float end[2][144], decay[2][144];  // by channel: 8 segments x 16 states, padding; state from zero, its decay
    __half incoming[8][2][kStates];    // state before each segment
  } carry[Traits::kWarps];
  alignas(8) typename Traits::T x[(kMaxSeqlen + 7) * kChannels], z[kMaxSeqlen * kChannels];  // x: three tokens around
};

// 4 or 8 bytes to a shared address, through L1; zeros if not `valid`.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kBytes),
               "r"(valid ? kBytes : 0)
               : "memory");
}
// The two warps that share a pair of channels and a direction.
__device__ __forceinline__ void group_barrier(int id) { asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory"); }

// From global memory, which the compiler cannot tell of a pinned pointer.
__device__ __forceinline__ uint2 load_global8(const char* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_global16(const char* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// Computed here, not where the compiler would rather have it.
__device__ __forceinline__ void pin(const char*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void pin(uint32_t& v) { asm volatile("" : "+r"(v)); }

template <typename T>
__device__ __forceinline__ uint32_t as_half2(uint32_t v);
template <>
__device__ __forceinline__ uint32_t as_half2<__half>(uint32_t v) {
  return v;
}
template <>
__device__ __forceinline__ uint32_t as_half2<__nv_bfloat16>(uint32_t v) {
  const float2 f = Pair<__nv_bfloat16>::unpack(v);
  return Pair<__half>::pack(f.x, f.y);
}

__device__ __forceinline__ __half2 half2_of(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }

// Grid (merge blocks + channel blocks, batch). Position k of a direction is the token k steps into its walk:
// token k % tokens of segment k / tokens. Lane (g, q) = (lane / 4, lane % 4).
// Three steps. First u and delta: a lane takes tokens 2g, 2g + 1 of 16 and two channels (q), dt_proj by mma. Then each
// warp walks its segments from a zero state: lane (g, q) has segment g, two channels and states 4q..4q+3; u delta B and
// C h are mma with the segments as columns, of which a row needs its own alone. It keeps the decay since the segment's
// start in fp16, so that, last, the incoming state is added without a second pass of exponentials.
// Hazard: u delta and h pass through fp16, so |h| must stay below 65,504.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void segments_kernel(
    const __grid_constant__ MambaScanParams p, const __grid_constant__ SegmentsCut cut) {
  using T = typename Traits::T;
  using Shared = SegmentsShared<Traits>;
  constexpr int kChannels = Traits::kChannels, kPairs = Traits::kPairs, kGroups = Traits::kGroups;
  constexpr int kFirst = Traits::kFirst, kMore = Traits::kMore, kTokens = Traits::kTokens, kStride = Shared::kStride;
  constexpr int kWarps = Traits::kWarps, kThreads = Traits::kThreads;
  constexpr int kTiles = Traits::kTiles, kTileDirs = Traits::kTileDirs, kRowSteps = kMaxRank / 32;
  constexpr int kPiece = Traits::kPiece, kPieces = Traits::kPieces, kAtOnce = Traits::kAtOnce;
  constexpr bool kKeepStates = Traits::kKeepStates;
  extern __shared__ __align__(16) unsigned char storage[];
  Shared& shared = *reinterpret_cast<Shared*>(storage);

  const int b = blockIdx.y;
  if (static_cast<int>(blockIdx.x) < cut.merge_blocks) {
    for (int group = blockIdx.x; group < merge_groups(p); group += cut.merge_blocks)
      merge_weights_of_group<T, kThreads, true>(p, group, b, *reinterpret_cast<MergeWeightShared<kThreads>*>(storage));
    return;
  }

  const int tid = threadIdx.x, lane = tid % 32, g = lane >> 2, q = lane & 3;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // uniform, for the compiler too
  const int L = p.seqlen, E = p.d_inner, R = p.dt_rank, cls = p.cls_index, tokens = cut.tokens;
  const int c0 = (static_cast<int>(blockIdx.x) - cut.merge_blocks) * kChannels;
  // Positions that matter: with cls_index each direction stops at that token.
  const int len_forward = cls < 0 ? L : cls + 1, len_backward = cls < 0 ? L : L - cls;
  auto pair_channel = [&](int d, int pair) { return d * E + min(c0 + 2 * pair, E - 2); };  // idle ones repeat the last
  auto segment_of = [&](int position) { return static_cast<int>(__umulhi(position, cut.reciprocal)); };
  auto slot = [&](int position) {  // in y, s_delta, u_delta: (position % tokens) kStride + position / tokens
    return position * kStride - segment_of(position) * (tokens * kStride - 1);
  };
  auto y_of = [&](int row, int position) { return &shared.steps[row].y[slot(position)].x + (segment_of(position) & 1); };

  // ---- weights: a lane keeps its own. Column g of dt_proj's tile is channel g & 1 of pair g >> 1; a lane gets sums
  // 2q and 2q + 1.
  const int tile = warp % kTiles, first_dir = column_of<kPairs>(tile, 0).dir;
  const int tile_dirs = column_of<kPairs>(tile, 3).dir - first_dir + 1;
  uint4 dt_weight[kTileDirs][kRowSteps];  // lane q takes columns 8q..8q+7 of 32
  {
    const Column mine = column_of<kPairs>(tile, g >> 1);
    const T* weight = static_cast<const T*>(p.dt_weight) +
                      static_cast<int64_t>(pair_channel(mine.dir, mine.pair) + (g & 1)) * R + 8 * q;
#pragma unroll
    for (int d = 0; d < kTileDirs; d++)
#pragma unroll
      for (int s = 0; s < kRowSteps; s++) {
        uint2 low = make_uint2(0, 0), high = low;  // beyond dt_rank the rows hold B: weight zero
        const bool used = mine.exists && first_dir + d == mine.dir;
        if (used && 32 * s + 8 * q < R) low = *reinterpret_cast<const uint2*>(weight + 32 * s);
        if (used && 32 * s + 8 * q + 4 < R) high = *reinterpret_cast<const uint2*>(weight + 32 * s + 4);
        dt_weight[d][s] = make_uint4(low.x, low.y, high.x, high.y);
      }
  }
  const Column column = column_of<kPairs>(tile, q);
  float2 bias, skip, conv_bias, taps[4];  // taps by token of the window; conv's halved, for silu_of_half
  {
    const int e = pair_channel(column.dir, column.pair);
    bias = *reinterpret_cast<const float2*>(p.dt_bias + e);
    skip = *reinterpret_cast<const float2*>(p.D + e);
    conv_bias = *reinterpret_cast<const float2*>(p.conv_bias + e);
    conv_bias.x *= .5f, conv_bias.y *= .5f;
    const float4 w0 = load4(p.conv_weight + 4 * e), w1 = load4(p.conv_weight + 4 * e + 4);
    taps[0] = make_float2(.5f * w0.x, .5f * w1.x), taps[1] = make_float2(.5f * w0.y, .5f * w1.y);
    taps[2] = make_float2(.5f * w0.z, .5f * w1.z), taps[3] = make_float2(.5f * w0.w, .5f * w1.w);
    if (column.dir) {
      const float2 t0 = taps[0], t1 = taps[1];
      taps[0] = taps[3], taps[1] = taps[2], taps[2] = t1, taps[3] = t0;
    }
  }

  // ---- addresses, in bytes. Tokens of the batch are counted in 32 bits, and so are a row's bytes.
  const int piece_token = tid / kPieces, piece = tid % kPieces * kPiece;  // of x, z and y: first token, channel
  const bool piece_exists = c0 + piece < E;
  const uint32_t xz_stride = 2 * E * static_cast<uint32_t>(sizeof(T)), xz_step = kAtOnce * xz_stride;
  const uint32_t row_stride = p.row * static_cast<uint32_t>(sizeof(T));
  const uint32_t first_token = b * L, dir_tokens = p.batch * L;
  const char* xz = static_cast<const char*>(p.xz) + (c0 + piece) * sizeof(T);
  const char* x_source = xz + static_cast<int64_t>(static_cast<int>(first_token) + piece_token - 3) * xz_stride;
  const char* x_dbl = static_cast<const char*>(p.x_dbl);
  const char* dt_source = x_dbl + 16 * q + static_cast<uint64_t>(first_token + first_dir * dir_tokens) * row_stride;
  const char* dt_source1 = dt_source + static_cast<uint64_t>(dir_tokens) * row_stride;
  // B, C: a warp takes a token of 8 segments, a lane 8 bytes of two; B's fragment holds two segments of a state.
  constexpr int kOwners = 2 * kGroups, kStep = kWarps / kOwners, kRounds = (kTokens + kStep - 1) / kStep;
  const int bc_dir = warp % kOwners / kGroups, bc_first = warp / kOwners, two = lane >> 3;
  const bool is_B = (lane & 4) == 0;
  const int bc_position = (warp % kGroups * 8 + 2 * two) * tokens + bc_first;
  const int bc_last = (bc_dir ? len_backward : len_forward) - 1;
  const int bc_stride = static_cast<int>(bc_dir ? -row_stride : row_stride);
  const uint32_t bc_row = first_token + (bc_dir ? dir_tokens + L - 1 : 0);
  const char* bc_source = x_dbl + (R + 4 * (lane & 7)) * sizeof(T) + static_cast<uint64_t>(bc_row) * row_stride;
  uint32_t x_target = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.x[piece_token * kChannels + piece]));
  constexpr int kCopyBytes = kPiece * sizeof(T), kCopyStep = kAtOnce * kChannels * sizeof(T);
  pin(x_source), pin(dt_source), pin(dt_source1), pin(bc_source), pin(x_target);
  wait_for_previous();
  let_next_start();

  // ---- all loads at once
  const int x_left = L + 6 - piece_token;
#pragma unroll
  for (int i = 0; i * kAtOnce < kMaxSeqlen + 6; i++) {
    const int ahead = i * kAtOnce, token = piece_token + ahead - 3;
    if (ahead < x_left)
      copy_async<kCopyBytes>(x_target + i * kCopyStep, x_source + i * xz_step,
                             piece_exists && token >= 0 && token < L);
  }
  copy_async_commit();

  const int blocks = (L + 15) / 16;  // of 16 tokens
  auto load_rows = [&](int block, uint4 (&v)[kTileDirs][kRowSteps][2]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t t = min(16 * block + 2 * g + k, L - 1);
#pragma unroll
      for (int d = 0; d < kTileDirs; d++) {
        if (d >= tile_dirs) break;
        const char* from = (d ? dt_source1 : dt_source) + static_cast<uint64_t>(t) * row_stride;
        v[d][0][k] = load_global16(from);
        if (R > 32) v[d][1][k] = load_global16(from + 64);
      }
    }
  };
  uint4 dt_rows[kTileDirs][kRowSteps][2];
  load_rows(warp / kTiles, dt_rows);

  uint2 bc[kRounds][2];
#pragma unroll
  for (int j = 0; j < kRounds; j++)
#pragma unroll
    for (int k = 0; k < 2; k++) {  // past the end any finite number will do: the last token's
      const int position = min(bc_position + j * kStep + k * tokens, bc_last);
      bc[j][k] = load_global8(bc_source + static_cast<int64_t>(position) * bc_stride);
    }
  const int dir = warp / (kPairs * kGroups), pair = warp / kGroups % kPairs, group = warp % kGroups;  // of the walk
  const float* A = p.A + static_cast<int64_t>(pair_channel(dir, pair)) * kStates + 4 * q;
  const float4 A0 = load4(A), A1 = load4(A + kStates);

  // ---- what is needed later, in the shadow of these loads
  const int z_begin = max(cls, 0), z_end = cls < 0 ? L : cls + 1;
  const int z_left = z_end - z_begin - piece_token;
  const char* z_source = xz + E * sizeof(T) + static_cast<uint64_t>(first_token + z_begin + piece_token) * xz_stride;
  const uint32_t z_target =
      static_cast<uint32_t>(__cvta_generic_to_shared(&shared.z[(z_begin + piece_token) * kChannels + piece]));
#pragma unroll
  for (int i = 0; i * kAtOnce < kMaxSeqlen; i++)
    if (i * kAtOnce < z_left)
      copy_async<kCopyBytes>(z_target + i * kCopyStep, z_source + i * xz_step, piece_exists);
  copy_async_commit();
#pragma unroll
  for (int d = 0; d < 2; d++) {  // past the end delta is 0 and the state stays
    const int end = d ? len_backward : len_forward, missing = Traits::kSegments * tokens - end;
#pragma unroll 1
    for (int i = tid; i < missing * kPairs; i += kThreads) {
      const int at = slot(end + i / kPairs), row = d * kPairs + i % kPairs;
      shared.steps[row].s_delta[at] = make_float2(0.f, 0.f);
      shared.steps[row].u_delta[at] = 0;
    }
  }
  uint2* bc_target = (is_B ? shared.B : shared.C)[bc_dir][warp % kGroups][bc_first] +
                     (is_B ? 8 * (lane & 3) + two : 8 * two + (lane & 3));
  const uint32_t low = is_B ? 0x5410 : 0x3210, high = is_B ? 0x7632 : 0x7654;
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    if (bc_first + j * kStep >= tokens) break;
    const uint32_t v0 = as_half2<T>(bc[j][0].x), v1 = as_half2<T>(bc[j][0].y);
    const uint32_t w0 = as_half2<T>(bc[j][1].x), w1 = as_half2<T>(bc[j][1].y);
    bc_target[j * kStep * 32] = make_uint2(__byte_perm(v0, w0, low), __byte_perm(v1, w1, low));
    bc_target[j * kStep * 32 + 4] = make_uint2(__byte_perm(v0, w0, high), __byte_perm(v1, w1, high));
  }
  copy_async_wait<1>();
  __syncthreads();

  // ---- delta, u, D u
  {
    const int dir = column.dir;
    auto& steps = shared.steps[dir * kPairs + column.pair];
    // of the tokens that exist, those whose position matters; cls_index leaves out some
    const int from = dir ? L - len_backward : 0, to = column.exists ? (dir ? L : len_forward) : 0;
    const float biases[4] = {bias.x, bias.y, bias.x, bias.y};
    const uint32_t* window_base = reinterpret_cast<const uint32_t*>(shared.x) + (dir ? 3 : 0) * kPairs + column.pair;
#pragma unroll 1
    for (int block = warp / kTiles; block < blocks; block += kWarps / kTiles) {
      float delta[4];  // two channels, two tokens
#pragma unroll
      for (int d = 0; d < kTileDirs; d++) {
        if (d >= tile_dirs) break;
#pragma unroll
        for (int s = 0; s < kRowSteps; s++) {
          if (32 * s >= R) break;
          const uint4 v = dt_rows[d][s][0], w = dt_rows[d][s][1], weight = dt_weight[d][s];
          mma_k16_onto<T>(delta, make_uint4(v.x, w.x, v.y, w.y), make_uint2(weight.x, weight.y),
                          d == 0 && s == 0 ? biases : delta);
          mma_k16<T>(delta, make_uint4(v.z, w.z, v.w, w.w), make_uint2(weight.z, weight.w));
        }
      }
      if (block + kWarps / kTiles < blocks) load_rows(block + kWarps / kTiles, dt_rows);
      const int t = 16 * block + 2 * g;
      float u[4] = {conv_bias.x, conv_bias.y, conv_bias.x, conv_bias.y};
#pragma unroll
      for (int i = 0; i < 5; i++) {
        const float2 v = Pair<T>::unpack(window_base[(t + i) * kPairs]);
        if (i < 4) u[0] = fmaf(taps[i].x, v.x, u[0]), u[1] = fmaf(taps[i].y, v.y, u[1]);
        if (i > 0) u[2] = fmaf(taps[i - 1].x, v.x, u[2]), u[3] = fmaf(taps[i - 1].y, v.y, u[3]);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) u[k] = silu_of_half(u[k]), delta[k] = softplus_fast(delta[k]);
      float scale[2] = {1.f, 1.f};
      if (p.decay_scale) {
#pragma unroll
        for (int k = 0; k < 2; k++) scale[k] = p.decay_scale[min(t + k, L - 1)];
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int at = slot(dir ? L - 1 - t - k : t + k);
        const float2 step = make_float2(scale[k] * delta[2 * k], scale[k] * delta[2 * k + 1]);
        const float2 skipped = make_float2(skip.x * u[2 * k], skip.y * u[2 * k + 1]);
        const uint32_t ud = Pair<__half>::pack(u[2 * k] * delta[2 * k], u[2 * k + 1] * delta[2 * k + 1]);
        if (t + k >= from && t + k < to) {
          steps.s_delta[at] = step, steps.u_delta[at] = ud;
          steps.y[at] = make_float4(skipped.x, skipped.x, skipped.y, skipped.y);
        }
      }
    }
  }
  __syncthreads();

  // ---- local walk
  const bool mine = g >> 1 == q, odd = g & 1;  // the lane that gets the y of segment g
  const uint32_t select0 = mine ? (odd ? 0x1044 : 0x4410) : 0x4444, select1 = mine ? (odd ? 0x3244 : 0x4432) : 0x4444;
  auto& steps = shared.steps[dir * kPairs + pair];
  float4* y = steps.y + 8 * group + g;
  const float2* s_delta = steps.s_delta + 8 * group + g;
  const uint32_t* u_delta = steps.u_delta + 8 * group + g;
  const uint2* B = shared.B[dir][group][0] + lane;
  const uint2* C = shared.C[dir][group][0] + lane;
  // Only the lane that writes a y reads it: a lane of another column would read beside the write, for nothing.
  auto add_to_y = [&](int i, float4 y_now, const uint32_t (&h)[4], uint2 c2) {
    const float sum[4] = {y_now.x, y_now.y, y_now.z, y_now.w};
    float sums[4];
    mma_k16_onto<__half>(sums, make_uint4(h[0], h[1], h[2], h[3]), c2, sum);
    if (mine) y[i * kStride] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  };
  auto& carry = shared.carry[warp];
  uint32_t gain[kTokens][4], states[kKeepStates ? kTokens : 1][4];  // decay since the segment's start, h; fp16
  {
    // h, decay, a: [n-tile][r]: channel r >> 1, state 4q + 2 n-tile + (r & 1)
    const float a[2][4] = {{A0.x * kLog2e, A0.y * kLog2e, A1.x * kLog2e, A1.y * kLog2e},
                           {A0.z * kLog2e, A0.w * kLog2e, A1.z * kLog2e, A1.w * kLog2e}};
    float h[2][4] = {}, decay[2][4] = {{1.f, 1.f, 1.f, 1.f}, {1.f, 1.f, 1.f, 1.f}};
    float2 step = s_delta[0];
    uint32_t ud = u_delta[0];
    uint2 b2 = B[0], c2 = C[0];
    float4 y_next = {};
    if (mine) y_next = y[0];
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (i >= kFirst && (i - kFirst) % kMore == 0 && i >= tokens) break;
      const uint32_t ud0 = __byte_perm(ud, 0, select0), ud1 = __byte_perm(ud, 0, select1);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float decayed[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float d = ex2((r < 2 ? step.x : step.y) * a[j][r]);
          decayed[r] = d * h[j][r];
          decay[j][r] *= d;
        }
        mma_k8(h[j], ud0, ud1, j ? b2.y : b2.x, decayed);
        gain[i][2 * j] = Pair<__half>::pack(decay[j][0], decay[j][1]);
        gain[i][2 * j + 1] = Pair<__half>::pack(decay[j][2], decay[j][3]);
      }
      uint32_t (&now)[4] = states[kKeepStates ? i : 0];
      now[0] = Pair<__half>::pack(h[0][0], h[0][1]), now[1] = Pair<__half>::pack(h[0][2], h[0][3]);
      now[2] = Pair<__half>::pack(h[1][0], h[1][1]), now[3] = Pair<__half>::pack(h[1][2], h[1][3]);
      const uint2 c_now = c2;
      const float4 y_now = y_next;
      if (i + 1 < kTokens) {  // ahead of the store, which the compiler lets no load pass
        step = s_delta[(i + 1) * kStride], ud = u_delta[(i + 1) * kStride], b2 = B[(i + 1) * 32];
        if (!kKeepStates) c2 = C[(i + 1) * 32];
        if (!kKeepStates && mine) y_next = y[(i + 1) * kStride];
      }
      if (!kKeepStates) add_to_y(i, y_now, now, c_now);
    }
    const int at = g * kStates + 4 * q;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      store4(&carry.end[k][at], make_float4(h[0][2 * k], h[0][2 * k + 1], h[1][2 * k], h[1][2 * k + 1]));
      store4(&carry.decay[k][at],
             make_float4(decay[0][2 * k], decay[0][2 * k + 1], decay[1][2 * k], decay[1][2 * k + 1]));
    }
  }

  // ---- the state before each segment
  if (kGroups == 1) __syncwarp();
  else group_barrier(1 + dir * kPairs + pair);
  const int channel = lane >> 4, n = lane & 15;
  float state = 0.f;
#pragma unroll
  for (int before = 0; before < kGroups - 1; before++) {
    if (before >= group) break;
    const auto& other = shared.carry[warp - group + before];
#pragma unroll
    for (int s = 0; s < 8; s++)
      state = fmaf(other.decay[channel][s * kStates + n], state, other.end[channel][s * kStates + n]);
  }
  constexpr int kAhead = Traits::kBlocksPerSM == 1 ? 8 : 4;  // loads ahead of the stores, which none may pass
#pragma unroll
  for (int first = 0; first < 8; first += kAhead) {
    float ends[kAhead], decays[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; s++) {
      ends[s] = carry.end[channel][(first + s) * kStates + n];
      decays[s] = carry.decay[channel][(first + s) * kStates + n];
    }
#pragma unroll
    for (int s = 0; s < kAhead; s++) {
      carry.incoming[first + s][channel][n] = __float2half_rn(state);
      state = fmaf(decays[s], state, ends[s]);
    }
  }
  __syncwarp();

  // ---- what it adds
  {
    const uint2 h0 = *reinterpret_cast<const uint2*>(&carry.incoming[g][0][4 * q]);
    const uint2 h1 = *reinterpret_cast<const uint2*>(&carry.incoming[g][1][4 * q]);
    const __half2 incoming[4] = {half2_of(h0.x), half2_of(h1.x), half2_of(h0.y), half2_of(h1.y)};
    float4 y_next = {};
    if (mine) y_next = y[0];
    uint2 c2 = C[0];
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (i >= kFirst && (i - kFirst) % kMore == 0 && i >= tokens) break;
      uint32_t v[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const __half2 decay = half2_of(gain[i][k]);
        v[k] = bits(kKeepStates ? __hfma2(decay, incoming[k], half2_of(states[kKeepStates ? i : 0][k]))
                                : __hmul2(decay, incoming[k]));
      }
      const uint2 c_now = c2;
      const float4 y_now = y_next;
      if (i + 1 < kTokens) c2 = C[(i + 1) * 32];
      if (i + 1 < kTokens && mine) y_next = y[(i + 1) * kStride];
      add_to_y(i, y_now, v, c_now);
    }
  }

  // ---- sum of the directions, gate, store. A thread brought the z that it needs.
  copy_async_wait_all();
  constexpr int kTurns = (kMaxSeqlen + kAtOnce - 1) / kAtOnce;
  float gate[kTurns][kPiece];
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    const int t = z_begin + piece_token + i * kAtOnce;
    const uint32_t* z2 = reinterpret_cast<const uint32_t*>(shared.z) + (t * kChannels + piece) / 2;
#pragma unroll
    for (int k = 0; k < kPiece; k += 2) {
      const float2 z = t < z_end ? Pair<T>::unpack(z2[k / 2]) : make_float2(0.f, 0.f);
      gate[i][k] = silu_of_half(.5f * z.x), gate[i][k + 1] = silu_of_half(.5f * z.y);
    }
  }
  __syncthreads();
  if (!piece_exists) return;
  T* y_out = static_cast<T*>(p.y) + (cls < 0 ? static_cast<int64_t>(b) * L : b - z_begin) * E + c0 + piece;
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    const int t = z_begin + piece_token + i * kAtOnce;
    if (t >= z_end) break;
    const float* forward = y_of(piece / 2, t);
    const float* backward = y_of(kPairs + piece / 2, L - 1 - t);
    uint32_t out[2];
#pragma unroll
    for (int k = 0; k < kPiece / 2; k++) {
      constexpr int kRow = sizeof(typename Shared::Steps) / sizeof(float);
      const float *f = forward + k * kRow, *w = backward + k * kRow;
      out[k] = Pair<T>::pack((f[0] + w[0]) * gate[i][2 * k], (f[2] + w[2]) * gate[i][2 * k + 1]);
    }
    T* to = y_out + static_cast<int64_t>(t) * E;
    if (kPiece == 4) *reinterpret_cast<uint2*>(to) = make_uint2(out[0], out[1]);
    else *reinterpret_cast<uint32_t*>(to) = out[0];
  }
}

// Blocks an image for the merge weights: one a group where there is room beside the others, else fewer, with several
// each.
int merge_blocks_of(const MambaScanParams& p, int64_t blocks, int processors) {
  const int64_t groups = merge_groups(p), waves = (blocks + processors - 1) / processors;
  const int64_t room = (waves * processors - blocks) / p.batch;
  return static_cast<int>(std::min(groups, std::max(room, int64_t{1})));
}

template <typename Traits>
int channel_blocks(const MambaScanParams& p) {
  return (p.d_inner + Traits::kChannels - 1) / Traits::kChannels;
}

// An estimate of the time, in hundredths of a microsecond on an H100: 1.5 us a round of resident blocks, 0.47 us a
// channel of a multiprocessor.
template <typename Traits>
int64_t cost(const MambaScanParams& p, int processors, size_t shared_bytes) {
  if (p.seqlen > Traits::kSegments * Traits::kTokens || sizeof(SegmentsShared<Traits>) > shared_bytes) return INT64_MAX;
  const int64_t blocks = int64_t{channel_blocks<Traits>(p)} * p.batch;
  const int64_t merging = int64_t{merge_blocks_of(p, blocks, processors)} * p.batch;
  const int64_t each = (blocks + merging + processors - 1) / processors;  // blocks of a multiprocessor
  return (each + Traits::kBlocksPerSM - 1) / Traits::kBlocksPerSM * 150 + each * 47 * Traits::kChannels;
}

template <typename Traits>
cudaError_t launch(const MambaScanParams& p, int processors, cudaStream_t stream) {
  constexpr size_t bytes = sizeof(SegmentsShared<Traits>);
  static_assert(bytes >= sizeof(MergeWeightShared<Traits::kThreads>));
  constexpr auto kKernel = segments_kernel<Traits>;
  const cudaError_t status = allow_shared<kKernel>(bytes);
  if (status != cudaSuccess) return status;
  const int blocks = channel_blocks<Traits>(p);
  const int longest = p.cls_index < 0 ? p.seqlen : std::max(p.cls_index + 1, p.seqlen - p.cls_index);
  const int needed = (longest + Traits::kSegments - 1) / Traits::kSegments - Traits::kFirst;
  SegmentsCut cut{};
  cut.tokens = Traits::kFirst + (needed > 0 ? (needed + Traits::kMore - 1) / Traits::kMore * Traits::kMore : 0);
  cut.reciprocal = static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint64_t>(cut.tokens) + 1);
  cut.merge_blocks = merge_blocks_of(p, int64_t{blocks} * p.batch, processors);
  return launch_dependent<kKernel>(dim3(cut.merge_blocks + blocks, p.batch), Traits::kThreads, bytes, stream, p, cut);
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, int processors, cudaStream_t stream) {
  using Narrow = SegmentsTraits<T, 4, 2, 5, 2, 13, 2>;
  using Middle = SegmentsTraits<T, 6, 2, 5, 2, 13, 1>;
  using Wide = SegmentsTraits<T, 12, 1, 13, 3, 25, 1>;
  const size_t shared_bytes = shared_bytes_of_device();
  const int64_t narrow = cost<Narrow>(p, processors, shared_bytes), middle = cost<Middle>(p, processors, shared_bytes);
  const int64_t wide = cost<Wide>(p, processors, shared_bytes);
  if (wide < middle && wide < narrow) return launch<Wide>(p, processors, stream);
  return middle < narrow ? launch<Middle>(p, processors, stream) : launch<Narrow>(p, processors, stream);
}

}  // namespace

bool mamba_scan_segments_supported(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, DataType type) {
  return type != DataType::kFloat32 && seqlen <= kMaxSeqlen && d_state == kStates && d_inner % 4 == 0 &&
         dt_rank % 4 == 0 && dt_rank <= kMaxRank;
}

cudaError_t mamba_scan_segments(const MambaScanParams& p, int32_t processors, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, processors, stream); });
}

}  // namespace stm
