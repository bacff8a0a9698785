// mamba_scan_walk.cu: the scan for large batches and long sequences: conv + SiLU, dt_proj, both scans, D, sum and gate
// in one kernel on tensor cores (d_state 16). Bound by instruction issue and exponentials, not by bytes: the chunk loop
// issues 121 instructions a token for a warp of 32 channels, 65 for one of 16, and whatever is added there costs
// time. What has to wait (convolution, softplus, shared memory) is made for the next chunk beside the walk of this one.
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstddef>
#include <type_traits>

#include "device.cuh"
#include "launch.cuh"
#include "mamba_scan_impl.h"
#include "merge_weight.cuh"

namespace stm {
namespace {

// What of two passes over L a kernel does: the second (or all there is, in one pass), the first, both.
enum class Passes { kWalk, kEnds, kBoth };

template <typename T_, int kSteps_, int kTiles_, Passes kPasses>
struct WalkTraits {
  using T = T_;
  static constexpr int kSteps = kSteps_;        // of 16 columns of dt_proj's sum: dt_rank <= 16 kSteps
  static constexpr int kTiles = kTiles_;        // m-tiles of 16 channels that a warp walks
  static constexpr bool kEndOnly = kPasses == Passes::kEnds;  // only what a piece does to the state
  static constexpr bool kBoth = kPasses == Passes::kBoth;
  static constexpr int kStates = 16;
  static constexpr int kChannels = 16 * kTiles; // of a warp
  static constexpr int kOwn = 2 * kTiles;       // of a lane
  static constexpr int kThreads = 64;           // one warp forward, one backward, over the same channels
  // Up to 168 registers: the walk unrolls, beside what the next chunk needs, without spills.
  static constexpr int kBlocksPerSM = kEndOnly ? 8 : 6;
  static constexpr int kTile = kTiles == 2 ? 80 : 48;  // bytes of a staged token of x, z, y: no bank conflicts
  static constexpr int kMaxRow = kSteps > 3 ? 96 : kSteps > 2 ? 80 : 64;  // elements
  static constexpr int kRowCopies = (kMaxRow + 31) / 32;                  // of 16 bytes of eight rows, a lane
};

// What a lane has of its 2 or 4 neighbouring channels, in float32 and in T.
template <int kTiles>
struct Own;
template <>
struct Own<1> {
  using Floats = float2;
  using Bits = uint32_t;
  template <typename T>
  static __device__ __forceinline__ void unpack(Bits v, float (&out)[2]) {
    const float2 f = Pair<T>::unpack(v);
    out[0] = f.x, out[1] = f.y;
  }
  template <typename T>
  static __device__ __forceinline__ Bits pack(const float (&v)[2]) {
    return Pair<T>::pack(v[0], v[1]);
  }
  static __device__ __forceinline__ void get(Floats v, float (&out)[2]) { out[0] = v.x, out[1] = v.y; }
  static __device__ __forceinline__ Floats make(const float (&v)[2]) { return make_float2(v[0], v[1]); }
};
template <>
struct Own<2> {
  using Floats = float4;
  using Bits = uint2;
  template <typename T>
  static __device__ __forceinline__ void unpack(Bits v, float (&out)[4]) {
    const float4 f = unpack4<T>(v);
    out[0] = f.x, out[1] = f.y, out[2] = f.z, out[3] = f.w;
  }
  template <typename T>
  static __device__ __forceinline__ Bits pack(const float (&v)[4]) {
    return pack4<T>(v[0], v[1], v[2], v[3]);
  }
  static __device__ __forceinline__ void get(Floats v, float (&out)[4]) {
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
  static __device__ __forceinline__ Floats make(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }
};

// One warp's share. A chunk is 8 tokens; lane (g, q) = (lane / 4, lane % 4) owns channels 2 kTiles g .. and states q,
// q + 4, q + 8, q + 12 of the walk, and scan positions 2q, 2q + 1 of what is computed a chunk at a time.
template <typename Traits>
struct WarpShared {
  using Floats = typename Own<Traits::kTiles>::Floats;
  struct Channels {                   // of the lanes of one g; the pad keeps them in different banks
    Floats delta[8];                  // s delta of the chunk, clamped to the polynomial's range
    float4 dt_bias[Traits::kTiles];   // twice each: accumulators of dt_proj
    Floats skip, conv_bias, taps[4];  // conv's halved, for silu_of_half
    float4 pad[Traits::kTiles == 2 ? 1 : 3];
  };
  using Fragments = std::conditional_t<Traits::kEndOnly, uint2, uint4>;  // of B; of B and C
  struct Made {             // of a chunk by the first of both passes, which the second need not make again
    Floats delta[8][9];     // s delta of the channels of one g, clamped; the pad keeps them in different banks
    uint2 u_delta[32];      // of a lane, in fp16, as the walk wants it
    uint2 u[32];            // of a lane, in T
  };
  Fragments bc[8][32];                                  // by token, zero but for the token's own row and column
  uint4 dt_weight[Traits::kTiles][Traits::kSteps][32];  // fragments
  Channels channels[8];
  char x[11 * Traits::kTile];                           // in scan order, from three tokens before the chunk
  char rows[Traits::kRowCopies * 32 * 16];              // dt, B, C of eight tokens in token order, then rubbish
  char zy[Traits::kEndOnly ? 16 : 16 * Traits::kTile];  // z, then the other direction's sum, in scan order
};

// One element of B or C in fp16, in the low half of a register.
__device__ __forceinline__ uint32_t half_bits(const char* p, __half) { return *reinterpret_cast<const uint16_t*>(p); }
__device__ __forceinline__ uint32_t half_bits(const char* p, __nv_bfloat16) {
  return Pair<__half>::pack(__uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p)) << 16), 0.f);
}

// pointer + step in one instruction, a multiplication and an addition. The compiler would take the product out of the
// loop, which leaves two additions and takes a register more; so to the compiler the step changes.
template <typename P>
__device__ __forceinline__ P* moved(P* pointer, int& step) {
  asm volatile("" : "+r"(step));
  return pointer + step;
}

// The forward and the backward warp meet. An immediate barrier number, else the compiler books all 16.
__device__ __forceinline__ void pair_barrier() { asm volatile("bar.sync 1, 64;" ::: "memory"); }

// Eight tokens of the recurrence. A token and 16 channels: decay by 8 exponentials a lane, u delta B by two mma m16n8k8
// (u delta lies in its token's column, B is masked to that token), C h by one mma m16n8k16 on the state rounded to fp16,
// with y as the accumulator (C is masked to the token's column).
// h, a: [m-tile i][n-tile j][r]: channel 2 kTiles g + 2i + (r >> 1), state q + 4 k, k = 0 for (j, r & 1) = (1, 1).
// y: [m-tile i][r]: channel the same, scan position 2q + (r & 1).
// kPolynomial moves the exponentials of k = 0, a quarter, to the FMA pipe: 4 % faster, more is slower.
// between(t) is what the caller computes beside token t; after the last one where the loop is not unrolled, since its t
// must be a constant for the caller's arrays to stay in registers.
template <bool kPolynomial, int kUnroll, bool kEndOnly, typename Traits, typename Between>
__device__ __forceinline__ void walk_chunk(const typename WarpShared<Traits>::Floats* deltas,
                                           const typename WarpShared<Traits>::Fragments* bc,
                                           const float (&a)[Traits::kTiles][2][4], float (&h)[Traits::kTiles][2][4],
                                           const uint32_t (&u_delta)[Traits::kTiles][2], float (&y)[Traits::kTiles][4],
                                           Between between) {
  constexpr int kTiles = Traits::kTiles;
#pragma unroll kUnroll
  for (int t = 0; t < 8; t++) {
    float delta[Traits::kOwn];
    Own<kTiles>::get(deltas[t], delta);
    const auto fragments = bc[32 * t];
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      constexpr float kZero[4] = {0.f, 0.f, 0.f, 0.f};
      float gain0[4], gain1[4];
      mma_k8(gain0, u_delta[i][0], u_delta[i][1], fragments.x, kZero);
      mma_k8(gain1, u_delta[i][0], u_delta[i][1], fragments.y, kZero);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float d = delta[2 * i + (r >> 1)];
        h[i][0][r] = fmaf(ex2(d * a[i][0][r]), h[i][0][r], gain0[r]);
        const float decay = kPolynomial && (r & 1) ? ex2_polynomial(d, a[i][1][r]) : ex2(d * a[i][1][r]);
        h[i][1][r] = fmaf(decay, h[i][1][r], gain1[r]);
      }
      if constexpr (!kEndOnly)
        mma_k16<__half>(y[i],
                        make_uint4(Pair<__half>::pack(h[i][0][0], h[i][0][1]), Pair<__half>::pack(h[i][0][2], h[i][0][3]),
                                   Pair<__half>::pack(h[i][1][0], h[i][1][1]), Pair<__half>::pack(h[i][1][2], h[i][1][3])),
                        make_uint2(fragments.z, fragments.w));
    }
    if constexpr (kUnroll == 8) between(t);
  }
  if constexpr (kUnroll != 8) {
#pragma unroll
    for (int t = 0; t < 8; t++) between(t);
  }
}

// How L is cut for two passes, and what the first leaves of each piece: its state from zero, by direction, image, piece,
// tile of channels and as the lanes hold it; the sum of s delta, by direction, image, piece and channel.
struct Pieces {
  int count, chunks;  // chunks (of 8 tokens) of a piece; one piece: no first pass
  int walks;          // blocks that walk; those of the merge weights follow
  int slices;         // of each group of merge weights
  float* ends;
  float* sums;
  uint32_t* meetings; // of a kernel of both passes, by image and tile: ends that are there, warps that have read them
};

// What is read after it was written before the value that this returns.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Which piece of what a warp walks, and which lane of it this is.
struct WarpPlace {
  int dir, lane, g, q;
  int tile, piece, b;
  bool end_needed;  // by other pieces
};

template <typename Traits>
using MeetShared = typename Own<Traits::kTiles>::Floats[2][8];  // of class tokens, by direction

// A warp's piece from its first chunk to its last. kEndOnly: only to know the state at its end.
template <typename Traits, bool kEndOnly>
__device__ __forceinline__ void walk_piece(const MambaScanParams& p, const Pieces& pieces, const WarpPlace& at,
                                           const float (&a)[Traits::kTiles][2][4], const float (&limit)[Traits::kOwn],
                                           bool polynomial, WarpShared<Traits>& shared, MeetShared<Traits>& meet,
                                           typename WarpShared<Traits>::Made* made) {
  using T = typename Traits::T;
  using Mine = Own<Traits::kTiles>;
  using Floats = typename Mine::Floats;
  using Bits = typename Mine::Bits;
  constexpr int kTile = Traits::kTile, kSteps = Traits::kSteps, kTiles = Traits::kTiles, kOwn = Traits::kOwn;
  constexpr int kBytes = sizeof(T);
  constexpr bool kMakes = !Traits::kBoth || kEndOnly;  // else what the first pass has made
  const int dir = at.dir, lane = at.lane, g = at.g, q = at.q, tile = at.tile, piece = at.piece, b = at.b;
  const int L = p.seqlen, E = p.d_inner, R = p.dt_rank, tiles = E / Traits::kChannels, cls = p.cls_index;
  const int all_chunks = (L + 7) >> 3, warp_channel = tile * Traits::kChannels, lane_channel = warp_channel + kOwn * g;
  float h[kTiles][2][4];
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) h[i][0][r] = h[i][1][r] = 0.f;

  // ---- what the first pass leaves of a piece
  const int64_t direction_row = static_cast<int64_t>(dir) * p.batch + b;
  auto piece_end = [&](int which) {  // of this lane, 32 float4 apart
    return reinterpret_cast<float4*>(pieces.ends) +
           ((direction_row * pieces.count + which) * tiles + tile) * (Traits::kChannels * 4) + lane;
  };
  auto piece_sum = [&](int which) {
    return reinterpret_cast<Floats*>(pieces.sums + (direction_row * pieces.count + which) * E + lane_channel);
  };
  uint32_t* const meeting_point = pieces.meetings + 2 * (b * tiles + tile);

  // ---- addresses. Scan position k of a chunk is token t0 + (dir ? 7 - k : k).
  const int piece_begin = piece * pieces.chunks, piece_end_chunk = min(piece_begin + pieces.chunks, all_chunks);
  const int middle = (piece_end_chunk - piece_begin + 1) >> 1;
  int chunks = piece_end_chunk - piece_begin;
  int meeting = dir ? chunks - middle : middle;  // from here on the other was there
  if (!kEndOnly && cls >= 0) {
    chunks = dir ? piece_end_chunk - (cls >> 3) : (cls >> 3) + 1 - piece_begin;
    meeting = INT_MAX;
  }
  const int t0 = 8 * (dir ? piece_end_chunk - 1 : piece_begin);
  const int sign = dir ? -1 : 1, t_step = kept(8 * sign);
  const int E16 = E / 8;  // 16-byte pieces of a row of y; xz has twice as many
  const uint4* xz_image = static_cast<const uint4*>(p.xz) + static_cast<int64_t>(b) * L * 2 * E16 + warp_channel / 8;
  char* y_image = static_cast<char*>(p.y) + (static_cast<int64_t>(b) * (cls < 0 ? L : 1) * E + warp_channel) * kBytes;
  // x: position and place of the lane's 16 bytes; a warp of two m-tiles copies positions 5, 6, 7 separately
  const int place = lane % (2 * kTiles), x_position = lane / (2 * kTiles) - 3;
  int x_token = t0 + (dir ? 7 - x_position : x_position), x_step = sign * 16 * E16;
  const uint4* x_source = xz_image + static_cast<int64_t>(x_token) * 2 * E16 + place;
  char* x_target = kept(shared.x + (x_position + 3) * kTile + place * 16);  // z and y the same
  // rows: eight are contiguous; behind the chunk's end comes what nobody reads, behind the image's end zeros
  const int row16 = p.row / 8, rows16 = L * row16;
  int row_at = t0 * row16 + lane, row_step = sign * 8 * row16;
  const uint4* row_source = static_cast<const uint4*>(p.x_dbl) + direction_row * rows16 + row_at;
  char* row_target = kept(shared.rows + lane * 16);
  auto stage = [&] {  // the chunk after the next, or outside of the piece what no walk uses
    auto copy_x = [&](char* target) {
      copy_async_line16(target, x_source, static_cast<unsigned>(x_token) < static_cast<unsigned>(L));
    };
    if (kMakes && (kTiles == 2 || lane < 22)) copy_x(x_target);
    x_source = moved(x_source, x_step), x_token += t_step;
    if (kTiles == 2 && lane < 12) copy_x(x_target + 8 * kTile);
#pragma unroll
    for (int i = 0; i < Traits::kRowCopies; i++)
      copy_async16(row_target + 512 * i, row_source + 32 * i,
                   static_cast<unsigned>(row_at) < static_cast<unsigned>(max(rows16 - 32 * i, 0)));
    row_source = moved(row_source, row_step), row_at += row_step;
  };
  // z and the other's sum; with one m-tile a lane takes one or the other
  const int zy_position = lane / (2 * kTiles) & 7, zy_token = dir ? 7 - zy_position : zy_position;
  const bool takes_z = kTiles == 2 || lane < 16;
  const int64_t zy_first = t0 + (meeting < chunks ? meeting : 0) * 8 * sign + zy_token;
  const uint4* y_source = reinterpret_cast<const uint4*>(y_image) + zy_first * E16 + place;
  const uint4* z_source = takes_z ? xz_image + (zy_first * 2 + 1) * E16 + place : y_source;
  int z_step = sign * (takes_z ? 16 : 8) * E16, y_step = sign * 8 * E16;
  constexpr int kZ = offsetof(WarpShared<Traits>, zy) - offsetof(WarpShared<Traits>, x);
  char* zy_target = x_target + kZ;
  // what is written
  const int k_first = dir ? 7 - 2 * q : 2 * q, k_second = k_first + sign;
  constexpr int kPerPiece = 16 / sizeof(Bits);
  int out_step = sign * 8 * kPerPiece * E16, out_second = sign * kPerPiece * E16;
  Bits* out_target = reinterpret_cast<Bits*>(y_image) + static_cast<int64_t>(t0 + k_first) * kPerPiece * E16 + g;
  // Tokens exist below L. Those of a chunk are told by x_token, which is three chunks ahead once the one after the next is
  // staged.
  const int x_lead = x_token + 3 * t_step - t0, zy_limit = kept(L + x_lead - zy_token);
  const int first_limit = kept(L + x_lead - k_first), second_limit = kept(L + x_lead - k_second);
  // in shared memory
  const int row_bytes = p.row * kBytes;
  const char* window = kept(shared.x + 2 * q * kTile + g * kOwn * kBytes);  // positions 2q - 3 ..; z and y the same
  const char* dt_row = kept(shared.rows + (dir ? 7 - g : g) * row_bytes + q * 8);
  const char* c_row = kept(shared.rows + (dir ? 7 - g : g) * row_bytes + (R + 16 + q) * kBytes);
  const char* b_first = kept(shared.rows + k_first * row_bytes + (R + (g >> 1) + (g & 1 ? 0 : 8)) * kBytes);
  const char* b_second = kept(shared.rows + k_second * row_bytes + (R + (g >> 1) + (g & 1 ? 0 : 8)) * kBytes);
  const auto* channels = kept(&shared.channels[g]);
  // s delta of the chunk that is walked, and where the next one's goes
  const Floats* deltas = channels->delta;
  Floats* delta_target = kept(Traits::kBoth ? &made->delta[g][2 * q] : &shared.channels[g].delta[2 * q]);
  uint2* lane_made = nullptr;  // of the next one, too
  if constexpr (Traits::kBoth) deltas = kept(made->delta[g]), lane_made = kept(&made->u_delta[lane]);
  constexpr int kMade = sizeof(*made) / sizeof(*deltas);
  static_assert(sizeof(*made) % 16 == 0);
  const uint4* dt_weight = kept(&shared.dt_weight[0][0][lane]);
  const auto* bc = kept(&shared.bc[0][lane]);
  auto *b_target = kept(&shared.bc[2 * q][lane]), *c_target = kept(&shared.bc[g][lane]);
  // A loop of one turn or none: an if would become predicates, and its instructions would be issued for nothing.
  const int scalings = kept(p.decay_scale ? 1 : 0);
  float delta_sum[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; k++) delta_sum[k] = 0.f;

  stage();
  auto add_pieces_before = [&] {  // the state before the piece; warps of 32 channels walk L in one
    const int before = dir ? pieces.count - 1 - piece : piece;
#pragma unroll 4
    for (int n = 0; n < before; n++) {
      const int which = dir ? pieces.count - 1 - n : n;
      float sum[kOwn];
      Mine::get(__ldcg(piece_sum(which)), sum);
      const float4* ends = piece_end(which);
#pragma unroll
      for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float4 v = __ldcg(ends + 32 * (2 * i + j));
          const float end[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int r = 0; r < 4; r++) h[i][j][r] = fmaf(ex2(sum[2 * i + (r >> 1)] * a[i][j][r]), h[i][j][r], end[r]);
        }
    }
  };
  if (!Traits::kBoth && !kEndOnly && kTiles == 1) add_pieces_before();

  // What a chunk needs before its walk: read from shared memory, made beside the walk of the chunk before, written when
  // that one no longer reads it.
  Bits x[5];
  float delta[kTiles][4], next_u_delta[2][kOwn];
  uint2 b_words[2], c_words;
  uint32_t u_delta[kTiles][2];
  float y[kTiles][4], next_y[kTiles][4];
  uint2 made_u_delta, made_u;
  auto read = [&] {
    if constexpr (kMakes) {
#pragma unroll
      for (int i = 0; i < 5; i++) x[i] = *reinterpret_cast<const Bits*>(window + i * kTile);
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        const float4 bias = channels->dt_bias[i];
        delta[i][0] = bias.x, delta[i][1] = bias.y, delta[i][2] = bias.z, delta[i][3] = bias.w;
      }
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        const uint2 v = *reinterpret_cast<const uint2*>(dt_row + 32 * k);
#pragma unroll
        for (int i = 0; i < kTiles; i++) mma_k16<T>(delta[i], dt_weight[32 * (i * kSteps + k)], v);
      }
    } else {
      made_u_delta = lane_made[0], made_u = lane_made[32];
      lane_made += sizeof(*made) / sizeof(uint2);
    }
    b_words[0] = make_uint2(half_bits(b_first + 4 * kBytes, T()), half_bits(b_first, T()));
    b_words[1] = make_uint2(half_bits(b_second + 4 * kBytes, T()) << 16, half_bits(b_second, T()) << 16);
    if constexpr (!kEndOnly) {
      const uint32_t c0 = half_bits(c_row, T()), c4 = half_bits(c_row + 4 * kBytes, T());
      const uint32_t c8 = half_bits(c_row + 8 * kBytes, T()), c12 = half_bits(c_row + 12 * kBytes, T());
      c_words = make_uint2(__byte_perm(c12, c4, 0x5410), __byte_perm(c8, c0, 0x5410));
    }
  };
  // Of the lane's 2 kOwn values of channel and position, the slice-th eighth.
  auto make = [&](int slice) {
#pragma unroll
    for (int n = 0; n < 2 * kOwn; n++) {
      if (!kMakes || n * 8 / (2 * kOwn) != slice) continue;
      const int k = n >> 1, s = n & 1, i = k >> 1, r = 2 * (k & 1) + s;
      float taps[4];
#pragma unroll
      for (int j = 0; j < 4; j++) taps[j] = reinterpret_cast<const float*>(&channels->taps[j])[k];
      float u = reinterpret_cast<const float*>(&channels->conv_bias)[k];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float v[kOwn];
        Mine::template unpack<T>(x[s + j], v);
        u = fmaf(taps[j], v[k], u);
      }
      u = silu_of_half(u);
      delta[i][r] = softplus_fast(delta[i][r]);
      next_y[i][r] = Traits::kBoth ? u : u * reinterpret_cast<const float*>(&channels->skip)[k];
      next_u_delta[s][k] = u * delta[i][r];
    }
  };
  auto write = [&] {
    if constexpr (kMakes) {
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        u_delta[i][0] = Pair<__half>::pack(next_u_delta[0][2 * i], next_u_delta[1][2 * i]);
        u_delta[i][1] = Pair<__half>::pack(next_u_delta[0][2 * i + 1], next_u_delta[1][2 * i + 1]);
#pragma unroll
        for (int r = 0; r < 4; r++) y[i][r] = next_y[i][r];
      }
    } else {
      u_delta[0][0] = made_u_delta.x, u_delta[0][1] = made_u_delta.y;
      float skip[kOwn];
      Mine::get(channels->skip, skip);
      const float4 u = unpack4<T>(made_u);
      y[0][0] = u.x * skip[0], y[0][1] = u.y * skip[0], y[0][2] = u.z * skip[1], y[0][3] = u.w * skip[1];
    }
    if constexpr (Traits::kBoth && kEndOnly) {
      lane_made[0] = make_uint2(u_delta[0][0], u_delta[0][1]);
      lane_made[32] = pack4<T>(y[0][0], y[0][1], y[0][2], y[0][3]);
      lane_made += sizeof(*made) / sizeof(uint2);
    }
    if constexpr (kMakes) {
      // x_token lies three chunks ahead of the one that is walked, and this is for the one after it
#pragma unroll 1
      for (int n = 0; n < scalings; n++) {
        const int first = x_token + t_step - first_limit + L, second = x_token + t_step - second_limit + L;
        const float s0 = p.decay_scale[max(min(first, L - 1), 0)], s1 = p.decay_scale[max(min(second, L - 1), 0)];
#pragma unroll
        for (int i = 0; i < kTiles; i++) delta[i][0] *= s0, delta[i][1] *= s1, delta[i][2] *= s0, delta[i][3] *= s1;
      }
#pragma unroll
      for (int s = 0; s < 2; s++) {
        float v[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; k++) v[k] = fminf(delta[k >> 1][2 * (k & 1) + s], limit[k]);
        delta_target[s] = Mine::make(v);
      }
      if (Traits::kBoth) delta_target += kMade;
    }
    *reinterpret_cast<uint2*>(b_target) = b_words[0];
    *reinterpret_cast<uint2*>(b_target + 32) = b_words[1];
    if constexpr (!kEndOnly) *reinterpret_cast<uint2*>(&c_target->z) = c_words;
  };
  copy_async_wait_all();
  __syncwarp();
  read();
  __syncwarp();
  stage();
#pragma unroll
  for (int slice = 0; slice < 8; slice++) make(slice);
  write();
  if constexpr (Traits::kBoth && !kEndOnly) {
    if (piece != (dir ? pieces.count - 1 : 0)) {
      if (lane == 0)
        while (load_acquire(meeting_point) < static_cast<uint32_t>((cls < 0 ? 2 : 1) * (pieces.count - 1))) {}
      __syncwarp();
      add_pieces_before();
    }
    if (lane == 0 && atomicAdd(meeting_point + 1, 1u) == (cls < 0 ? 2u * pieces.count : 2u) - 1)
      meeting_point[0] = meeting_point[1] = 0;  // for the next call
  }
  copy_async_wait_all();
  __syncwarp();
#pragma unroll 1
  for (int left = kept(chunks), until = kept(meeting); left > 0; left--, until--) {
    if (kEndOnly) {  // delta is this chunk's until the next one's is read
#pragma unroll
      for (int k = 0; k < kOwn; k++) delta_sum[k] += delta[k >> 1][2 * (k & 1)] + delta[k >> 1][2 * (k & 1) + 1];
    }
    read();
    __syncwarp();
    stage();
    if (!kEndOnly && until <= 0) {
      if (until == 0) pair_barrier();
      const bool exists = x_token < zy_limit;
      copy_async_line16(zy_target, z_source, exists);
      if (kTiles == 2) copy_async_line16(zy_target + 8 * kTile, y_source, exists);
      z_source = moved(z_source, z_step);
      if (kTiles == 2) y_source = moved(y_source, y_step);
    }
    if (polynomial)
      walk_chunk<true, 8, kEndOnly, Traits>(deltas, bc, a, h, u_delta, y, make);
    else
      walk_chunk<false, 2, kEndOnly, Traits>(deltas, bc, a, h, u_delta, y, make);

    copy_async_wait_all();
    __syncwarp();
    // ---- sum of the directions, gate, store
    if (!kEndOnly) {
      float out[2][kOwn];
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int k = 0; k < kOwn; k++) out[s][k] = y[k >> 1][2 * (k & 1) + s];
      if (until <= 0) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const char* place = window + kZ + s * kTile;
          float z[kOwn], other[kOwn];
          Mine::template unpack<T>(*reinterpret_cast<const Bits*>(place), z);
          Mine::template unpack<T>(*reinterpret_cast<const Bits*>(place + 8 * kTile), other);
#pragma unroll
          for (int k = 0; k < kOwn; k++) out[s][k] = (out[s][k] + other[k]) * silu_of_half(.5f * z[k]);
        }
      }
      if (cls < 0) {
        if (x_token < first_limit) *out_target = Mine::template pack<T>(out[0]);
        if (x_token < second_limit) *moved(out_target, out_second) = Mine::template pack<T>(out[1]);
        out_target = moved(out_target, out_step);
      } else {
        if (x_token - first_limit + L == cls) meet[dir][g] = Mine::make(out[0]);
        if (x_token - second_limit + L == cls) meet[dir][g] = Mine::make(out[1]);
      }
    }
    write();
    if (Traits::kBoth) deltas += kMade;
    __syncwarp();
  }

  if (kEndOnly) {
    if (Traits::kBoth && !at.end_needed) return;
    float4* ends = piece_end(piece);
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) ends[32 * (2 * i + j)] = make_float4(h[i][j][0], h[i][j][1], h[i][j][2], h[i][j][3]);
#pragma unroll
    for (int k = 0; k < kOwn; k++) {
      delta_sum[k] += __shfl_xor_sync(~0u, delta_sum[k], 1);
      delta_sum[k] += __shfl_xor_sync(~0u, delta_sum[k], 2);
    }
    if (q == 0) *piece_sum(piece) = Mine::make(delta_sum);
    if (Traits::kBoth) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        atomicAdd(meeting_point, 1u);
      }
    }
    return;
  }
  if (meeting >= chunks) pair_barrier();
  if (cls >= 0 && dir == 0 && q == 0) {
    float forward[kOwn], backward[kOwn], z[kOwn];
    Mine::get(meet[0][g], forward);
    Mine::get(meet[1][g], backward);
    Mine::template unpack<T>(reinterpret_cast<const Bits*>(xz_image + (2 * static_cast<int64_t>(cls) + 1) * E16)[g], z);
#pragma unroll
    for (int k = 0; k < kOwn; k++) forward[k] = (forward[k] + backward[k]) * silu_of_half(.5f * z[k]);
    reinterpret_cast<Bits*>(y_image)[g] = Mine::template pack<T>(forward);
  }
}

// Grid: images x pieces x tiles of channels, the tile fastest; then merge weights, if any, which fill the gaps of the last
// round. Until the warps meet in the middle of the piece each leaves its sums (rounded to T) in y; from there on each adds
// the other's and gates. With cls_index both stop at that token and meet in shared memory; only its piece is walked.
// kEnds: block `piece` walks piece forward and count - 1 - piece backward; those at the end are not needed.
// kBoth: the piece is the fastest; a warp leaves its piece's end, waits for those of its image and tile, and walks the piece
// again. All blocks must be resident.
// Hazard: u delta and h pass through fp16, so |h| must stay below 65,504.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void walk_kernel(
    const __grid_constant__ MambaScanParams p, const __grid_constant__ Pieces pieces) {
  using T = typename Traits::T;
  using Mine = Own<Traits::kTiles>;
  using Floats = typename Mine::Floats;
  using Bits = typename Mine::Bits;
  constexpr int kSteps = Traits::kSteps, kTiles = Traits::kTiles, kOwn = Traits::kOwn;
  __shared__ __align__(16) WarpShared<Traits> warp_shared[2];
  __shared__ Floats meet[2][8];

  const int block = blockIdx.x;
  if constexpr (!Traits::kEndOnly) {
    if (block >= pieces.walks) {
      using Shared = MergeWeightShared<Traits::kThreads>;
      static_assert(sizeof(Shared) <= sizeof(warp_shared));
      const int which = block - pieces.walks, groups = merge_groups(p), group = which / pieces.slices;  // of all images
      merge_weights_of_group<T, Traits::kThreads, true>(p, group % groups, group / groups,
                                                        *reinterpret_cast<Shared*>(warp_shared),
                                                        merge_slice(p, which, pieces.slices));
      return;
    }
  }
  // opaque to the compiler, which otherwise computes them anew in the loop
  int dir = threadIdx.x >> 5, lane = threadIdx.x & 31;
  asm volatile("" : "+r"(dir), "+r"(lane));
  int g = lane >> 2, q = lane & 3;
  asm volatile("" : "+r"(g), "+r"(q));
  auto& shared = warp_shared[dir];
  const int E = p.d_inner, R = p.dt_rank, tiles = E / Traits::kChannels, cls = p.cls_index;
  const int cls_piece = cls < 0 ? -1 : (cls >> 3) / pieces.chunks;
  int tile = block % tiles, piece, b;
  if (Traits::kBoth) {
    piece = block % pieces.count, tile = block / pieces.count % tiles, b = block / pieces.count / tiles;
  } else if (Traits::kEndOnly) {
    const int walked = cls < 0 ? pieces.count - 1 : max(cls_piece, pieces.count - 1 - cls_piece);
    piece = block / tiles % walked, b = block / tiles / walked;
    if (dir) piece = pieces.count - 1 - piece;
  } else {
    const int walked = cls < 0 ? pieces.count : 1;
    piece = cls < 0 ? block / tiles % walked : cls_piece, b = block / tiles / walked;
  }
  const int warp_channel = tile * Traits::kChannels, lane_channel = warp_channel + kOwn * g;

  // ---- weights to shared memory
  {
    const int e = dir * E + lane_channel;
    if (q == 0) {
      auto& channels = shared.channels[g];
      channels.skip = *reinterpret_cast<const Floats*>(p.D + e);
      float bias[kOwn], v[kOwn], taps[4][kOwn];
      Mine::get(*reinterpret_cast<const Floats*>(p.dt_bias + e), bias);
#pragma unroll
      for (int i = 0; i < kTiles; i++)
        channels.dt_bias[i] = make_float4(bias[2 * i], bias[2 * i], bias[2 * i + 1], bias[2 * i + 1]);
      Mine::get(*reinterpret_cast<const Floats*>(p.conv_bias + e), v);
#pragma unroll
      for (int k = 0; k < kOwn; k++) {
        const float4 w = load4(p.conv_weight + 4 * (e + k));
        taps[0][k] = .5f * w.x, taps[1][k] = .5f * w.y, taps[2][k] = .5f * w.z, taps[3][k] = .5f * w.w;
        v[k] *= .5f;
      }
      channels.conv_bias = Mine::make(v);
#pragma unroll
      for (int j = 0; j < 4; j++) channels.taps[j] = Mine::make(taps[j]);
    }
    const T* weight = static_cast<const T*>(p.dt_weight) + static_cast<int64_t>(e) * R;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        const int column = 16 * k + 4 * q;  // beyond dt_rank the rows hold B: weight zero
        uint2 r0 = make_uint2(0, 0), r1 = r0;
        if (column < R) {
          r0 = *reinterpret_cast<const uint2*>(weight + 2 * i * R + column);
          r1 = *reinterpret_cast<const uint2*>(weight + (2 * i + 1) * R + column);
        }
        shared.dt_weight[i][k][lane] = make_uint4(r0.x, r1.x, r0.y, r1.y);
      }
#pragma unroll
    for (int t = 0; t < 8; t++) shared.bc[t][lane] = {};
  }
  float a[kTiles][2][4];
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int64_t row = static_cast<int64_t>(dir) * E + lane_channel + 2 * i + (r >> 1);
      const float* A = p.A + row * Traits::kStates + q;
      a[i][0][r] = A[r & 1 ? 4 : 12] * kLog2e, a[i][1][r] = A[r & 1 ? 0 : 8] * kLog2e;
    }
  // The polynomial wants delta a >= -126 of states 0..3, the flattest of a trained A. delta is clamped for the steepest
  // of them, for all states; the flattest of all has then lost only decays below 2^(-120/8). Other A take exponentials.
  float limit[kOwn];
  bool fits = true;
#pragma unroll
  for (int k = 0; k < kOwn; k++) {
    const int i = k >> 1, r = 2 * (k & 1);
    float steep = a[i][1][r + 1], flat = fmaxf(fmaxf(a[i][0][r], a[i][0][r + 1]), fmaxf(a[i][1][r], a[i][1][r + 1]));
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      steep = fminf(steep, __shfl_xor_sync(~0u, steep, mask));
      flat = fmaxf(flat, __shfl_xor_sync(~0u, flat, mask));
    }
    limit[k] = __fdividef(120.f, -steep);
    fits = fits && flat <= 0.f && 8.f * flat <= steep && steep < -1e-3f;
  }
  const bool polynomial = __all_sync(~0u, fits);
  if (!polynomial) {
#pragma unroll
    for (int k = 0; k < kOwn; k++) limit[k] = FLT_MAX;
  }
  wait_for_previous();
  let_next_start();
  const bool end_needed = dir ? piece > max(cls_piece, 0) : piece < (cls < 0 ? pieces.count - 1 : cls_piece);
  const WarpPlace at = {dir, lane, g, q, tile, piece, b, end_needed};
  if constexpr (Traits::kBoth) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    auto* const made = reinterpret_cast<typename WarpShared<Traits>::Made*>(dynamic_shared) + dir * (pieces.chunks + 1);
    const bool walked = cls < 0 || piece == cls_piece;
    if (end_needed || walked) walk_piece<Traits, true>(p, pieces, at, a, limit, polynomial, shared, meet, made);
    if (walked) walk_piece<Traits, false>(p, pieces, at, a, limit, polynomial, shared, meet, made);
  } else if (!Traits::kEndOnly || end_needed) {
    walk_piece<Traits, Traits::kEndOnly>(p, pieces, at, a, limit, polynomial, shared, meet, nullptr);
  }
}

// ---- how to cut the work ----------------------------------------------------------------------------------------

constexpr int kLongSeqlen = 208;      // two passes only beyond
constexpr int kMaxPieces = 64;        // a piece's walk begins by adding up all before it
constexpr int kMaxPieceBlocks = 1536; // more than are resident on the largest cards; bounds the workspace
static_assert(kMeetingBytes == 2 * sizeof(uint32_t) * kMeetings);
static_assert(2 * kMeetings >= kMaxPieceBlocks);  // two pieces at least
constexpr int kPieceBlockBytes = 2 * 16 * (16 + 1) * static_cast<int>(sizeof(float));  // of a block's two warps

// Cycles that a token takes w warps of one scheduler: alone, or base + w each; and how many blocks a multiprocessor holds.
// Fitted to an H200's times of 2 to 57 pieces of 577 to 4,097 tokens: at batch 1 the pieces that the model takes are within
// 1 % of the best; at batch 4 and 4,097 tokens it takes 4, 317 us, where 12 took 299 with version 4's walk.
struct WalkCost {
  double alone, base, each;
  int resident;
};
constexpr WalkCost kWide = {227, 45, 152, WalkTraits<__half, 1, 2, Passes::kWalk>::kBlocksPerSM};
constexpr WalkCost kNarrow = {136, 34, 82, WalkTraits<__half, 1, 1, Passes::kWalk>::kBlocksPerSM};
constexpr WalkCost kNarrowEnd = {100, 44, 60, WalkTraits<__half, 1, 1, Passes::kEnds>::kBlocksPerSM};
constexpr double kRoundCycles = 4800, kChainCycles = 290;  // start, prologue and end of a round; one piece added up

// Rounds of resident blocks. The multiprocessor with the most blocks, and on it the scheduler with the most warps, is the
// last to end.
double walk_cycles(WalkCost cost, int64_t blocks, int tokens, int processors) {
  const int64_t most = (blocks + processors - 1) / processors;
  auto round = [&](int64_t there) {
    return kRoundCycles + tokens * std::max(cost.alone, cost.base + static_cast<double>((there + 1) / 2) * cost.each);
  };
  const int64_t last = most % cost.resident;
  return static_cast<double>(most / cost.resident) * round(cost.resident) + (last ? round(last) : 0.);
}

struct WalkPlan {
  int tiles;          // m-tiles of a warp
  int count, chunks;  // pieces, chunks of one
  bool together;      // both passes in one kernel
  double cycles;      // predicted
};

WalkPlan plan_one_pass(const MambaScanParams& p, int processors) {
  const int tokens = p.cls_index < 0 ? p.seqlen : std::max(p.cls_index + 1, p.seqlen - p.cls_index);
  const int64_t narrow = static_cast<int64_t>(p.batch) * (p.d_inner / 16);
  WalkPlan plan = {1, 1, (p.seqlen + 7) / 8, false, walk_cycles(kNarrow, narrow, tokens, processors)};
  if (p.d_inner % 32 == 0) {
    const double wide = walk_cycles(kWide, narrow / 2, tokens, processors);
    if (wide < plan.cycles) plan.tiles = 2, plan.cycles = wide;
  }
  return plan;
}

// Shared memory of a block of a kernel of both passes: its own, and what so many chunks a piece need.
template <typename Traits>
constexpr size_t kOwnBytes = 2 * sizeof(WarpShared<Traits>) + sizeof(MeetShared<Traits>);
template <typename Traits>
size_t made_bytes(int chunks) { return 2 * (static_cast<size_t>(chunks) + 1) * sizeof(typename WarpShared<Traits>::Made); }

// Blocks that walk, of `tiles` in all images and `count` pieces of so many chunks: in a first pass that is a kernel of its own,
// and in the last.
int64_t blocks_of_ends(const MambaScanParams& p, int64_t tiles, int count, int chunks) {
  if (p.cls_index < 0) return tiles * (count - 1);
  const int piece = p.cls_index / 8 / chunks;
  return tiles * std::max(piece, count - 1 - piece);
}
int64_t blocks_of_walks(const MambaScanParams& p, int64_t tiles, int count) { return p.cls_index < 0 ? tiles * count : tiles; }

int64_t groups_of_weights(const MambaScanParams& p) { return static_cast<int64_t>(p.batch) * merge_groups(p); }

WalkPlan plan_two_passes(const MambaScanParams& p, int processors) {
  const int chunks = (p.seqlen + 7) / 8;
  const int64_t blocks = static_cast<int64_t>(p.batch) * (p.d_inner / 16);
  WalkPlan best = {1, 1, chunks, false, DBL_MAX};
  using Largest = WalkTraits<__half, 4, 1, Passes::kBoth>;  // the one with the most shared memory
  const bool may_meet = p.meetings && blocks <= kMeetings;
  const Residency resident = may_meet ? residency<walk_kernel<Largest>>(Largest::kThreads) : Residency{};
  for (int pieces = 2; pieces <= std::min(kMaxPieces, chunks / 2) && blocks * pieces <= kMaxPieceBlocks; pieces++) {
    const int length = (chunks + pieces - 1) / pieces, count = (chunks + length - 1) / length;
    const int64_t ends = blocks_of_ends(p, blocks, count, length), walks = blocks_of_walks(p, blocks, count);
    const double apart = walk_cycles(kNarrowEnd, ends, 8 * length, processors) +
                         walk_cycles(kNarrow, walks, 8 * length, processors) + kChainCycles * count;
    if (apart < best.cycles) best = {1, count, length, false, apart};
    const int64_t all = blocks * count + groups_of_weights(p);  // merge weights take at least a block a group
    if (all > resident.with_shared(kOwnBytes<Largest> + made_bytes<Largest>(length))) continue;
    // To meet costs what the second pass need not make again.
    const double together = walk_cycles(kNarrowEnd, all, 8 * length, processors) - kRoundCycles +
                            walk_cycles(kNarrow, p.cls_index < 0 ? all : walks, 8 * length, processors) + kChainCycles * count;
    if (together < best.cycles) best = {1, count, length, true, together};
  }
  return best;
}

// Slices of each of `groups` groups of merge weights, beside `walks` blocks that walk, of which `slots` are resident.
// One round: what is left when the walks end should be short, at most eight turns; beyond that no more blocks than two a
// multiprocessor, each of which costs its start. More rounds: they queue for the slots that the last one leaves free; a
// block takes about 5 us and 1.4 us for each of its turns of channels, beside walks.
int slices_of_a_group(int d_inner, int64_t groups, int64_t walks, int64_t slots, int processors) {
  constexpr int kTurn = 2 * 32;  // channels that a block's two warps take at a time
  const int turns = (d_inner + kTurn - 1) / kTurn;
  const int most = static_cast<int>(std::min<int64_t>(turns, kMergeBlocks / groups));
  if (most <= 1) return 1;
  if (walks <= slots) return std::min(most, std::max((turns + 7) / 8, static_cast<int>(2 * processors / groups)));
  const int64_t gap = slots - walks % slots;
  int best = 1;
  double least = DBL_MAX;
  for (int count = 1; count <= most; count++) {
    const double us = static_cast<double>((groups * count + gap - 1) / gap) * (5. + 1.4 * ((turns + count - 1) / count));
    if (us < least) least = us, best = count;
  }
  return best;
}

// Started early, the blocks of a grid that does not fill the card pile up on the multiprocessors that the kernel before
// has left, and the fullest one is the last to end. Not where the fullest is full anyway: of the blocks that walk; those
// of the merge weights are short.
template <typename Traits>
cudaError_t launch_walk(int64_t walks, int64_t weights, cudaStream_t stream, const MambaScanParams& p,
                        const Pieces& pieces) {
  constexpr auto kKernel = walk_kernel<Traits>;
  if (walks + weights > INT_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(walks + weights));
  if (walks > int64_t{Traits::kBlocksPerSM - 1} * processors_of_device())
    return launch_dependent<kKernel>(grid, 64, 0, stream, p, pieces);
  kKernel<<<grid, 64, 0, stream>>>(p, pieces);
  return cudaGetLastError();
}

template <typename T, int kSteps>
cudaError_t launch(const MambaScanParams& p, const WalkPlan& plan, cudaStream_t stream) {
  if (p.row > WalkTraits<T, kSteps, 1, Passes::kWalk>::kMaxRow) return cudaErrorInvalidValue;
  const int64_t tiles = static_cast<int64_t>(p.batch) * (p.d_inner / (16 * plan.tiles)), all = tiles * plan.count;
  if (all > INT_MAX || (plan.count > 1 && !p.workspace)) return cudaErrorInvalidValue;
  Pieces pieces = {plan.count, plan.chunks, 0, 1, nullptr, nullptr, static_cast<uint32_t*>(p.meetings)};
  if (plan.count > 1) {
    pieces.ends = static_cast<float*>(p.workspace);
    pieces.sums = pieces.ends + 2 * static_cast<int64_t>(p.batch) * plan.count * p.d_inner * 16;
  }
  // blocks of the merge weights, beside `walks` that walk, at most so many
  const int processors = processors_of_device();
  const int64_t groups = groups_of_weights(p);
  auto weights = [&](int64_t walks, int64_t most) {
    pieces.walks = static_cast<int>(walks), pieces.slices = 1;
    if (p.merge_scratch && groups > 0 && p.weight_mode != WeightMode::kHspLiteral) {  // that one has no slices
      const int64_t slots = int64_t{(plan.tiles == 2 ? kWide : kNarrow).resident} * processors;
      pieces.slices = std::min<int>(slices_of_a_group(p.d_inner, groups, walks, slots, processors), most / groups);
    }
    return groups * pieces.slices;
  };
  if (plan.together) {
    using Traits = WalkTraits<T, kSteps, 1, Passes::kBoth>;
    constexpr auto kKernel = walk_kernel<Traits>;
    const size_t bytes = made_bytes<Traits>(plan.chunks);
    if (all + groups <= residency<kKernel>(Traits::kThreads).with_shared(kOwnBytes<Traits> + bytes)) {
      // A cooperative grid fills one multiprocessor after the other, each with as many blocks as the fullest needs; so not a
      // block more for the merge weights than that leaves room for.
      const int64_t room = (all + groups + processors - 1) / processors * processors;
      const auto blocks = static_cast<unsigned>(all + weights(all, room - all));
      cudaError_t status = allow_shared<kKernel>(bytes, kOwnBytes<Traits>);
      if (status != cudaSuccess) return status;
      status = launch_resident<kKernel>(dim3(blocks), dim3(Traits::kThreads), bytes, stream, p, pieces);
      if (status != cudaErrorCooperativeLaunchTooLarge) return status;
      cudaGetLastError();  // this process may use a part of the card only
    }
  }
  if (plan.count > 1) {
    const int64_t ends = blocks_of_ends(p, tiles, plan.count, plan.chunks);
    const cudaError_t status = launch_walk<WalkTraits<T, kSteps, 1, Passes::kEnds>>(ends, 0, stream, p, pieces);
    if (status != cudaSuccess) return status;
  }
  const int64_t walks = blocks_of_walks(p, tiles, plan.count), with = weights(walks, INT_MAX);
  return plan.tiles == 2 ? launch_walk<WalkTraits<T, kSteps, 2, Passes::kWalk>>(walks, with, stream, p, pieces)
                         : launch_walk<WalkTraits<T, kSteps, 1, Passes::kWalk>>(walks, with, stream, p, pieces);
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, const WalkPlan& plan, cudaStream_t stream) {
  switch ((p.dt_rank + 15) / 16) {
    case 1: return launch<T, 1>(p, plan, stream);
    case 2: return launch<T, 2>(p, plan, stream);
    case 3: return launch<T, 3>(p, plan, stream);
    case 4: return launch<T, 4>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool mamba_scan_walk_supported(int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type) {
  const int32_t max_row = dt_rank <= 32 ? 64 : dt_rank <= 48 ? 80 : 96;
  return type != DataType::kFloat32 && d_state == 16 && d_inner % 16 == 0 && dt_rank % 4 == 0 && dt_rank <= 64 &&
         row <= max_row;
}

bool mamba_scan_walk_two_pass_supported(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row,
                                        DataType type) {
  return seqlen > kLongSeqlen && mamba_scan_walk_supported(d_inner, d_state, dt_rank, row, type);
}

size_t mamba_scan_walk_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner) {
  if (seqlen <= kLongSeqlen) return 0;
  // not the plan's own need: this one grows with the batch, so that a profile's largest batch is enough for all
  const int64_t pieces = std::min<int64_t>(kMaxPieces, (seqlen + 7) / 8 / 2);
  return static_cast<size_t>(std::min<int64_t>(kMaxPieceBlocks, batch * (d_inner / 16) * pieces)) * kPieceBlockBytes;
}

cudaError_t mamba_scan_walk(const MambaScanParams& p, int32_t processors, WalkPasses passes, cudaStream_t stream) {
  WalkPlan plan = plan_one_pass(p, processors);
  if (passes == WalkPasses::kTwo || (passes == WalkPasses::kFaster && p.seqlen > kLongSeqlen)) {
    const WalkPlan two = plan_two_passes(p, processors);
    // one piece: the batch alone is more than the workspace was made for
    if (two.count > 1 && (passes == WalkPasses::kTwo || two.cycles < plan.cycles)) plan = two;
  }
  return with_half_type(p.type, [&](auto zero) { return dispatch<decltype(zero)>(p, plan, stream); });
}

}  // namespace stm
