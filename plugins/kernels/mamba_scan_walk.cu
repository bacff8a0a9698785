// mamba_scan_walk.cu: the scan for large batches: conv + SiLU, dt_proj, both scans, D, sum and gate in one kernel on
// tensor cores (d_state 16). Bound by instruction issue and exponentials, not by bytes: see walk_chunk.
#include <climits>

#include "device.cuh"
#include "mamba_scan_impl.h"

namespace stm {
namespace {

template <typename T_, int kSteps_>
struct WalkTraits {
  using T = T_;
  static constexpr int kSteps = kSteps_;      // of 16 columns of dt_proj's sum: dt_rank <= 16 kSteps
  static constexpr int kStates = 16;
  static constexpr int kChannels = 32;        // of a warp
  static constexpr int kThreads = 64;         // one warp forward, one backward, over the same channels
  static constexpr int kBlocksPerSM = 6;      // 168 registers: the walk unrolls without spills
  static constexpr int kTile = 80;            // bytes of a staged token of x, z, y: 32 channels and a pad
  static constexpr int kRow = kSteps > 3 ? 224 : 160;  // bytes of a staged x_dbl row, so that 8 rows miss each other
  static constexpr int kMaxRow = kSteps > 3 ? 96 : kSteps > 2 ? 80 : 64;  // elements
  static constexpr int kPieces = kSteps > 2 ? 3 : 2;   // 16-byte pieces of 8 rows, a lane
};

// One warp's share. A chunk is 8 tokens in scan order; lane (g, q) = (lane / 4, lane % 4) owns channels 4g..4g+3 and
// states 4q..4q+3 of the walk, and tokens 2q, 2q+1 of what is computed a chunk at a time.
template <typename Traits>
struct WarpShared {
  float4 delta[72];    // s delta of 8 tokens x 32 channels; token pairs lie 288 bytes apart: no bank conflicts
  float4 clamped[72];  // the same, clamped to the polynomial's range
  uint4 dt_weight[2][Traits::kSteps][32];      // fragments
  float4 bias[8], skip[8], conv_bias[8], taps[4][8];  // conv's halved, for silu_of_half
  char x[3][8 * Traits::kTile];                // previous, this and next chunk
  char rows[2][8 * Traits::kRow];              // dt, B, C
  char z[8 * Traits::kTile], y[8 * Traits::kTile];  // z, and the other direction's sum
  uint4 pieces[Traits::kPieces][32];           // a lane's pieces of rows: source, target, limit; would cost registers
};

__device__ __forceinline__ uint32_t to_half2(uint32_t v, __half) { return v; }
__device__ __forceinline__ uint32_t to_half2(uint32_t v, __nv_bfloat16) {
  const float2 f = Pair<__nv_bfloat16>::unpack(v);
  return Pair<__half>::pack(f.x, f.y);
}

// The forward and the backward warp meet. An immediate barrier number, else the compiler books all 16.
__device__ __forceinline__ void pair_barrier() { asm volatile("bar.sync 1, 64;" ::: "memory"); }

// Eight tokens of the recurrence. A token and 16 channels: decayed state by 8 exponentials a lane, + u delta B by two
// mma m16n8k8 (the decayed state is the accumulator; u delta lies in its token's column, B is masked to that token),
// C h by one mma m16n8k16 on the state rounded to fp16, whose result lies with the lanes that own the token.
// h, a: [m-tile i][n-tile j][r]: channel 4g + 2i + (r >> 1), state 4q + j + 2 (r & 1).
// kPolynomial moves 4 of a lane's 16 exponentials to the FMA pipe: 4 % faster, more is slower.
template <bool kPolynomial, int kUnroll, typename Shared>
__device__ __forceinline__ void walk_chunk(const Shared& shared, int g, int q, const float (&a)[2][2][4],
                                           float (&h)[2][2][4], const uint32_t (&u_delta)[2][2],
                                           const uint32_t (&B)[2][2], uint32_t C0, uint32_t C1, float (&y)[2][4]) {
#pragma unroll kUnroll
  for (int j = 0; j < 4; j++) {
    const bool mine = q == j;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const float4 v = shared.delta[18 * j + 8 * s + g];
      const float delta[4] = {v.x, v.y, v.z, v.w};
      float clamped[4];
      if (kPolynomial) {
        const float4 c = shared.clamped[18 * j + 8 * s + g];
        clamped[0] = c.x, clamped[1] = c.y, clamped[2] = c.z, clamped[3] = c.w;
      }
      const uint32_t b0 = mine ? B[s][0] : 0, b1 = mine ? B[s][1] : 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float decayed0[4], decayed1[4], sums[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int k = 2 * i + (r >> 1);
          decayed0[r] = ex2(delta[k] * a[i][0][r]) * h[i][0][r];
          const float decay =
              kPolynomial && (r & 1) ? ex2_polynomial(clamped[k], a[i][1][r]) : ex2(delta[k] * a[i][1][r]);
          decayed1[r] = decay * h[i][1][r];
        }
        mma_k8(h[i][0], u_delta[i][0], u_delta[i][1], b0, decayed0);
        mma_k8(h[i][1], u_delta[i][0], u_delta[i][1], b1, decayed1);
        mma_k16_zero(sums, Pair<__half>::pack(h[i][0][0], h[i][0][1]), Pair<__half>::pack(h[i][0][2], h[i][0][3]),
                     Pair<__half>::pack(h[i][1][0], h[i][1][1]), Pair<__half>::pack(h[i][1][2], h[i][1][3]), C0, C1);
        if (mine) {
          y[s][2 * i] += sums[s];
          y[s][2 * i + 1] += sums[2 + s];
        }
      }
    }
  }
}

// Grid: images x tiles of 32 channels. Until the warps meet in the middle each leaves its sums (rounded to T) in y;
// from there on each adds the other's and gates. With cls_index both stop at that token and meet in shared memory.
// Hazard: u delta and h pass through fp16, so |h| must stay below 65,504.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void walk_kernel(
    const __grid_constant__ MambaScanParams p) {
  using T = typename Traits::T;
  constexpr int kTile = Traits::kTile, kRow = Traits::kRow, kSteps = Traits::kSteps, kPieces = Traits::kPieces;
  __shared__ __align__(16) WarpShared<Traits> warp_shared[2];
  __shared__ float4 meet[2][8];

  // opaque to the compiler, which otherwise computes them anew in the loop
  int dir = threadIdx.x >> 5, lane = threadIdx.x & 31;
  asm volatile("" : "+r"(dir), "+r"(lane));
  int g = lane >> 2, q = lane & 3;
  asm volatile("" : "+r"(g), "+r"(q));
  auto& shared = warp_shared[dir];
  const int L = p.seqlen, E = p.d_inner, R = p.dt_rank, tiles = E / Traits::kChannels;
  const int b = blockIdx.x / tiles, warp_channel = (blockIdx.x % tiles) * Traits::kChannels;
  const int lane_channel = warp_channel + 4 * g;
  const int all_chunks = (L + 7) >> 3, cls = p.cls_index;

  // ---- weights to shared memory
  {
    const int e = dir * E + lane_channel;
    if (q == 0) {
      shared.bias[g] = load4(p.dt_bias + e);
      shared.skip[g] = load4(p.D + e);
      const float4 cb = load4(p.conv_bias + e);
      shared.conv_bias[g] = make_float4(.5f * cb.x, .5f * cb.y, .5f * cb.z, .5f * cb.w);
      const float4 w0 = load4(p.conv_weight + 4 * e), w1 = load4(p.conv_weight + 4 * e + 4);
      const float4 w2 = load4(p.conv_weight + 4 * e + 8), w3 = load4(p.conv_weight + 4 * e + 12);
      shared.taps[0][g] = make_float4(.5f * w0.x, .5f * w1.x, .5f * w2.x, .5f * w3.x);
      shared.taps[1][g] = make_float4(.5f * w0.y, .5f * w1.y, .5f * w2.y, .5f * w3.y);
      shared.taps[2][g] = make_float4(.5f * w0.z, .5f * w1.z, .5f * w2.z, .5f * w3.z);
      shared.taps[3][g] = make_float4(.5f * w0.w, .5f * w1.w, .5f * w2.w, .5f * w3.w);
    }
    const T* weight = static_cast<const T*>(p.dt_weight) + static_cast<int64_t>(e) * R;
#pragma unroll
    for (int i = 0; i < 2; i++)
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
    for (int i = lane; i < 8 * kTile / 16; i += 32)  // nothing comes before the first chunk
      reinterpret_cast<uint4*>(shared.x[2])[i] = make_uint4(0, 0, 0, 0);
  }
  float a[2][2][4], h[2][2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int64_t row = static_cast<int64_t>(dir) * E + lane_channel + 2 * i + (r >> 1);
      const float2 v = *reinterpret_cast<const float2*>(p.A + row * Traits::kStates + 4 * q + 2 * (r & 1));
      a[i][0][r] = v.x * kLog2e, a[i][1][r] = v.y * kLog2e;
      h[i][0][r] = h[i][1][r] = 0.f;
    }
  // The polynomial wants delta a >= -126. delta is shared by a channel's four lanes, so it is clamped for the steepest
  // of their states; the flattest has then lost only decays below 2^(-120/8). Other A take the exponential.
  float limit[4];
  bool fits = true;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    float steep = a[k >> 1][1][2 * (k & 1) + 1], flat = steep;
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      steep = fminf(steep, __shfl_xor_sync(~0u, steep, mask));
      flat = fmaxf(flat, __shfl_xor_sync(~0u, flat, mask));
    }
    limit[k] = __fdividef(120.f, -steep);
    fits = fits && flat <= 0.f && 8.f * flat <= steep && steep < -1e-3f;
  }
  const bool polynomial = __all_sync(~0u, fits);

  // ---- addresses. Scan position k of a chunk is token 8 chunk + (dir ? 7 - k : k); it exists if 8 chunk < limit.
  const int64_t direction_row = static_cast<int64_t>(dir) * p.batch + b;
  const unsigned xz_stride = 2 * sizeof(T) * E, y_stride = sizeof(T) * E, row_stride = sizeof(T) * p.row;
  const int k_lane = dir ? 7 - g : g, lane_limit = L - k_lane;
  const int first = dir ? all_chunks - 1 : 0, middle = (all_chunks + 1) >> 1;
  const int chunks = cls < 0 ? all_chunks : dir ? all_chunks - (cls >> 3) : (cls >> 3) + 1;
  const int meeting = cls >= 0 ? INT_MAX : dir ? all_chunks - middle : middle;  // from here on the other was there
  // Per image, in bytes: 32 bits are enough (checked at launch) and save registers.
  const char* xz_image =
      reinterpret_cast<const char*>(static_cast<const T*>(p.xz) + static_cast<int64_t>(b) * L * 2 * E);
  char* y_image = reinterpret_cast<char*>(static_cast<T*>(p.y) + static_cast<int64_t>(b) * (cls < 0 ? L : 1) * E);
  const char* rows_image =
      reinterpret_cast<const char*>(static_cast<const T*>(p.x_dbl) + direction_row * L * p.row);
  const unsigned x_source = warp_channel * sizeof(T) + k_lane * xz_stride + q * 16;  // z lies y_stride further
  const unsigned y_source = warp_channel * sizeof(T) + k_lane * y_stride + q * 16;
  const int k_first = dir ? 7 - 2 * q : 2 * q, k_second = dir ? k_first - 1 : k_first + 1;
  const unsigned y_target = lane_channel * sizeof(T) + k_first * y_stride;
  const int row_pieces = p.row >> 3;
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const int piece = lane + 32 * i, r = piece / row_pieces, column = (piece % row_pieces) * 16, k = dir ? 7 - r : r;
    const int limit = r < 8 ? L - k : INT_MIN;  // INT_MIN: no such piece; others are filled with zeros past the end
    shared.pieces[i][lane] = make_uint4(k * row_stride + column, r * kRow + column, limit, 0);
  }
  auto first_token = [&](int n) { return static_cast<unsigned>(8 * (dir ? first - n : n)); };
  auto stage = [&](int n, int slot) {
    const unsigned t = first_token(n);
    copy_async16(shared.x[slot] + g * kTile + q * 16, xz_image + (x_source + t * xz_stride),
                 static_cast<int>(t) < lane_limit);
    char* rows = shared.rows[n & 1];
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint4 piece = shared.pieces[i][lane];
      const int limit = static_cast<int>(piece.z);
      if (i == 0 || limit != INT_MIN)
        copy_async16(rows + piece.y, rows_image + (piece.x + t * row_stride), static_cast<int>(t) < limit);
    }
  };

  stage(0, 0);
  copy_async_wait_all();
  int current = 0, previous = 2;
#pragma unroll 1
  for (int n = 0; n < chunks; n++) {
    const int next = 3 - current - previous;
    const unsigned t0 = first_token(n);
    const int t_first = static_cast<int>(t0) + k_first, t_second = static_cast<int>(t0) + k_second;
    __syncwarp();
    if (n + 1 < chunks) stage(n + 1, next);
    if (n == meeting) pair_barrier();
    if (n >= meeting) {
      const bool exists = static_cast<int>(t0) < lane_limit;
      copy_async16(shared.z + g * kTile + q * 16, xz_image + (x_source + y_stride + t0 * xz_stride), exists);
      copy_async16(shared.y + g * kTile + q * 16, y_image + (y_source + t0 * y_stride), exists);
    }
    // ---- delta, u, D u for channels 0..3 at scan positions 2q, 2q + 1
    float scale[2] = {1.f, 1.f};
    if (p.decay_scale) {
      scale[0] = p.decay_scale[min(t_first, L - 1)];
      scale[1] = p.decay_scale[min(t_second, L - 1)];
    }
    const char* rows = shared.rows[n & 1];
    uint32_t u_delta[2][2];
    float y[2][4];
    {
      float delta[2][4], u[2][4];
      const float4 bias = shared.bias[g];
      float d0[4] = {bias.x, bias.x, bias.y, bias.y}, d1[4] = {bias.z, bias.z, bias.w, bias.w};
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        const uint2 v = *reinterpret_cast<const uint2*>(rows + g * kRow + q * 8 + 32 * k);
        mma_k16<T>(d0, shared.dt_weight[0][k][lane], v);
        mma_k16<T>(d1, shared.dt_weight[1][k][lane], v);
      }
#pragma unroll
      for (int s = 0; s < 2; s++)
        delta[s][0] = d0[s], delta[s][1] = d0[2 + s], delta[s][2] = d1[s], delta[s][3] = d1[2 + s];

      const char* x1 = shared.x[current] + 2 * q * kTile + g * 8;  // positions 2q - 3 .. 2q + 1
      const char* x0 = q < 1 ? shared.x[previous] + 6 * kTile + g * 8 : x1 - 2 * kTile;
      const char* x3 = q < 2 ? shared.x[previous] + (2 * q + 5) * kTile + g * 8 : x1 - 3 * kTile;
      const uint2 window[5] = {
          *reinterpret_cast<const uint2*>(x3), *reinterpret_cast<const uint2*>(x0),
          *reinterpret_cast<const uint2*>(x0 + kTile), *reinterpret_cast<const uint2*>(x1),
          *reinterpret_cast<const uint2*>(x1 + kTile)};
      const float4 conv_bias = shared.conv_bias[g];
      float4 taps[4];
#pragma unroll
      for (int j = 0; j < 4; j++) taps[j] = shared.taps[j][g];
#pragma unroll
      for (int s = 0; s < 2; s++)
        u[s][0] = conv_bias.x, u[s][1] = conv_bias.y, u[s][2] = conv_bias.z, u[s][3] = conv_bias.w;
#pragma unroll
      for (int i = 0; i < 5; i++) {
        const float4 v = unpack4<T>(window[i]);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          if (i - s < 0 || i - s > 3) continue;
          const float4 w = taps[i - s];
          u[s][0] = fmaf(w.x, v.x, u[s][0]);
          u[s][1] = fmaf(w.y, v.y, u[s][1]);
          u[s][2] = fmaf(w.z, v.z, u[s][2]);
          u[s][3] = fmaf(w.w, v.w, u[s][3]);
        }
      }
      const float4 skip = shared.skip[g];
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          u[s][k] = silu_of_half(u[s][k]);
          delta[s][k] = softplus_fast(delta[s][k]);
        }
        if ((s ? t_second : t_first) >= L)  // no token: the state stays as it is
          delta[s][0] = delta[s][1] = delta[s][2] = delta[s][3] = 0.f;
        y[s][0] = u[s][0] * skip.x, y[s][1] = u[s][1] * skip.y, y[s][2] = u[s][2] * skip.z, y[s][3] = u[s][3] * skip.w;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          u[s][k] *= delta[s][k];
          delta[s][k] *= scale[s];
        }
        shared.delta[18 * q + 8 * s + g] = make_float4(delta[s][0], delta[s][1], delta[s][2], delta[s][3]);
        shared.clamped[18 * q + 8 * s + g] = make_float4(fminf(delta[s][0], limit[0]), fminf(delta[s][1], limit[1]),
                                                         fminf(delta[s][2], limit[2]), fminf(delta[s][3], limit[3]));
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u_delta[i][0] = Pair<__half>::pack(u[0][2 * i], u[1][2 * i]);
        u_delta[i][1] = Pair<__half>::pack(u[0][2 * i + 1], u[1][2 * i + 1]);
      }
    }
    uint32_t B[2][2];  // [token of the pair][n-tile], the other token's half zero
    {
      const char* r = rows + 2 * R + 2 * q * kRow + 4 * g;
      const uint32_t v0 = to_half2(*reinterpret_cast<const uint32_t*>(r), T());
      const uint32_t v1 = to_half2(*reinterpret_cast<const uint32_t*>(r + kRow), T());
      B[0][0] = v0 & 0xffff, B[0][1] = v0 >> 16, B[1][0] = v1 << 16, B[1][1] = v1 & 0xffff0000;
    }
    const uint2 c = *reinterpret_cast<const uint2*>(rows + 2 * R + 32 + g * kRow + q * 8);
    const uint32_t c01 = to_half2(c.x, T()), c23 = to_half2(c.y, T());
    const uint32_t C0 = __byte_perm(c01, c23, 0x5410), C1 = __byte_perm(c01, c23, 0x7632);
    __syncwarp();

    if (polynomial)
      walk_chunk<true, 4>(shared, g, q, a, h, u_delta, B, C0, C1, y);
    else
      walk_chunk<false, 2>(shared, g, q, a, h, u_delta, B, C0, C1, y);

    // ---- sum of the directions, gate, store
    copy_async_wait_all();
    __syncwarp();
    if (n >= meeting) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const float4 z = unpack4<T>(*reinterpret_cast<const uint2*>(shared.z + (2 * q + s) * kTile + g * 8));
        const float4 o = unpack4<T>(*reinterpret_cast<const uint2*>(shared.y + (2 * q + s) * kTile + g * 8));
        y[s][0] = (y[s][0] + o.x) * silu_of_half(.5f * z.x);
        y[s][1] = (y[s][1] + o.y) * silu_of_half(.5f * z.y);
        y[s][2] = (y[s][2] + o.z) * silu_of_half(.5f * z.z);
        y[s][3] = (y[s][3] + o.w) * silu_of_half(.5f * z.w);
      }
    }
    if (cls < 0) {
      const unsigned out = y_target + t0 * y_stride, out_second = dir ? out - y_stride : out + y_stride;
      if (t_first < L) *reinterpret_cast<uint2*>(y_image + out) = pack4<T>(y[0][0], y[0][1], y[0][2], y[0][3]);
      if (t_second < L) *reinterpret_cast<uint2*>(y_image + out_second) = pack4<T>(y[1][0], y[1][1], y[1][2], y[1][3]);
    } else {
      if (t_first == cls) meet[dir][g] = make_float4(y[0][0], y[0][1], y[0][2], y[0][3]);
      if (t_second == cls) meet[dir][g] = make_float4(y[1][0], y[1][1], y[1][2], y[1][3]);
    }
    previous = current, current = next;
  }
  if (meeting >= chunks) pair_barrier();
  if (cls >= 0 && dir == 0 && q == 0) {
    const T* z_row = static_cast<const T*>(p.xz) + (static_cast<int64_t>(b) * L + cls) * 2 * E + E + lane_channel;
    const float4 z = load4(z_row), f = meet[0][g], w = meet[1][g];
    store4(reinterpret_cast<T*>(y_image) + lane_channel,
           make_float4((f.x + w.x) * silu_of_half(.5f * z.x), (f.y + w.y) * silu_of_half(.5f * z.y),
                       (f.z + w.z) * silu_of_half(.5f * z.z), (f.w + w.w) * silu_of_half(.5f * z.w)));
  }
}

template <typename T, int kSteps>
cudaError_t launch(const MambaScanParams& p, cudaStream_t stream) {
  using Traits = WalkTraits<T, kSteps>;
  const int64_t blocks = static_cast<int64_t>(p.batch) * (p.d_inner / Traits::kChannels);
  const int64_t image_bytes = static_cast<int64_t>(p.seqlen + 8) * 2 * p.d_inner * sizeof(T);
  if (blocks > INT_MAX || image_bytes > UINT32_MAX || p.row > Traits::kMaxRow) return cudaErrorInvalidValue;
  walk_kernel<Traits><<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, cudaStream_t stream) {
  switch ((p.dt_rank + 15) / 16) {
    case 1: return launch<T, 1>(p, stream);
    case 2: return launch<T, 2>(p, stream);
    case 3: return launch<T, 3>(p, stream);
    case 4: return launch<T, 4>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool mamba_scan_walk_supported(int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type) {
  const int32_t max_row = dt_rank <= 32 ? 64 : dt_rank <= 48 ? 80 : 96;
  return type != DataType::kFloat32 && d_state == 16 && d_inner % 32 == 0 && dt_rank % 4 == 0 && dt_rank <= 64 &&
         row <= max_row;
}

cudaError_t mamba_scan_walk(const MambaScanParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
    case DataType::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
