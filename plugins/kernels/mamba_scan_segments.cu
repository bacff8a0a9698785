// mamba_scan_segments.cu: the scan for small batches, where a walk of L steps would leave the card idle: L is cut into
// segments walked side by side, with one pass of exponentials (d_state 16).
#include "device.cuh"
#include "mamba_scan_impl.h"

namespace stm {
namespace {

constexpr int kStates = 16, kSegments = 16, kChannels = 4, kMaxRank = 64;
constexpr int kShortTokens = 7, kLongTokens = 13;  // of a segment; odd: the two segments of a warp use different banks
constexpr int kMaxPart = kSegments * kLongTokens;  // beyond it L is cut into parts, a block each

template <typename T_, int kTokens_, bool kEndOnly_>
struct SegmentsTraits {
  using T = T_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kPart = kSegments * kTokens;
  static constexpr bool kEndOnly = kEndOnly_;  // first of two launches: only what a part does to the state
  static constexpr int kThreads = 2 * kSegments * kChannels * 4;  // direction, segment, channel, 4 of 16 states
  static constexpr int kBlocksPerSM = 2;                          // 64 registers
};

template <int kPart>
struct SegmentsShared {  // 48 KB at most; rows in scan order, so backward ones are reversed
  float2 delta[2][kPart][kChannels];  // s delta, delta u
  union {
    uint2 bc[2][kPart][8];  // B and C of a token
    struct {
      float4 end[2][kSegments][16], decay[2][kSegments][16];  // state at the end of a segment from zero, its decay
    } carry;
  };
  float y[2][kPart][kChannels];
  float4 incoming[2][16];  // state before the part
  union {
    float4 dt_weight[2][kMaxRank];  // of the four channels
    uint2 z[kPart];
  };
};

__host__ __device__ inline int parts_of(int seqlen) { return (seqlen + kMaxPart - 1) / kMaxPart; }

// h = decay h + end, for four states
__device__ __forceinline__ void carry_on(float4& h, float4 decay, float4 end) {
  h.x = fmaf(decay.x, h.x, end.x), h.y = fmaf(decay.y, h.y, end.y);
  h.z = fmaf(decay.z, h.z, end.z), h.w = fmaf(decay.w, h.w, end.w);
}

// Grid (channels / 4, batch, parts). A thread walks its segment from a zero state and keeps C x (decay since the
// segment's start) in half precision, so that the incoming state is added to y afterwards without a second pass of
// exponentials.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) void segments_kernel(
    const __grid_constant__ MambaScanParams p) {
  using T = typename Traits::T;
  constexpr int kTokens = Traits::kTokens, kThreads = Traits::kThreads;
  __shared__ __align__(16) SegmentsShared<Traits::kPart> shared;

  const int tid = threadIdx.x, L = p.seqlen, E = p.d_inner, R = p.dt_rank, b = blockIdx.y, cls = p.cls_index;
  const int parts = gridDim.z, part = blockIdx.z, part_len = (L + parts - 1) / parts;
  const int base = part * part_len, len = min(part_len, L - base), c0 = blockIdx.x * kChannels;
  if (!Traits::kEndOnly && cls >= 0 && (cls < base || cls >= base + len)) return;  // nothing to write
  const T* xz = static_cast<const T*>(p.xz) + static_cast<int64_t>(b) * L * 2 * E + c0;
  const T* x_dbl = static_cast<const T*>(p.x_dbl);
  auto rows = [&](int d) { return x_dbl + ((static_cast<int64_t>(d) * p.batch + b) * L + base) * p.row; };

  // ---- B, C and weights to shared memory
  for (int d = 0; d < 2; d++) {
    const T* source = rows(d) + R;
    for (int i = tid; i < Traits::kPart * 8; i += kThreads) {
      const int position = i >> 3, t = d ? len - 1 - position : position;
      copy_async8(&shared.bc[d][position][i & 7], source + static_cast<int64_t>(t) * p.row + 4 * (i & 7),
                  position < len);
    }
  }
  for (int i = tid; i < 2 * R; i += kThreads) {
    const int d = i >= R, r = d ? i - R : i;
    const T* w = static_cast<const T*>(p.dt_weight) + (static_cast<int64_t>(d) * E + c0) * R + r;
    shared.dt_weight[d][r] = make_float4(to_float(w[0]), to_float(w[R]), to_float(w[2 * R]), to_float(w[3 * R]));
  }
  const int dir = tid / (kThreads / 2), seg = tid / 16 % kSegments, ch = tid >> 2 & 3, q = tid & 3, slot = ch * 4 + q;
  // what a part does to four states: end, decay
  float4* workspace = static_cast<float4*>(p.workspace);
  auto part_state = [&](int which) {
    const int64_t image = (static_cast<int64_t>(dir) * p.batch + b) * parts + which;
    return workspace + ((image * gridDim.x + blockIdx.x) * 16 + slot) * 2;
  };
  if (!Traits::kEndOnly && seg == 0) {
    float4 h = make_float4(0.f, 0.f, 0.f, 0.f);
    if (parts > 1) {
      const int before = dir ? parts - 1 - part : part;
      for (int i = 0; i < before; i++) {
        const float4* s = part_state(dir ? parts - 1 - i : i);
        carry_on(h, s[1], s[0]);
      }
    }
    shared.incoming[dir][slot] = h;
  }
  __syncthreads();

  // ---- delta, u, D u: a thread a token and direction, four channels. Past the end delta is 0 and the state stays.
  for (int i = tid; i < 2 * (Traits::kPart - len) * kChannels; i += kThreads) {
    const int d = i & 1, k = i >> 1;
    shared.delta[d][len + k / kChannels][k % kChannels] = make_float2(0.f, 0.f);
  }
  for (int i = tid; i < 2 * len; i += kThreads) {
    const int d = i >= len, t = d ? i - len : i, position = d ? len - 1 - t : t, token = base + t, e = d * E + c0;
    float4 u = load4(p.conv_bias + e);
    const float4 w0 = load4(p.conv_weight + 4 * e), w1 = load4(p.conv_weight + 4 * e + 4);
    const float4 w2 = load4(p.conv_weight + 4 * e + 8), w3 = load4(p.conv_weight + 4 * e + 12);
    auto tap = [&](int back, float a0, float a1, float a2, float a3) {  // `back` tokens earlier in scan order
      const int from = d ? token + back : token - back;
      if (from < 0 || from >= L) return;
      const float4 v = load4(xz + static_cast<int64_t>(from) * 2 * E);
      u.x = fmaf(a0, v.x, u.x), u.y = fmaf(a1, v.y, u.y), u.z = fmaf(a2, v.z, u.z), u.w = fmaf(a3, v.w, u.w);
    };
    tap(3, w0.x, w1.x, w2.x, w3.x);
    tap(2, w0.y, w1.y, w2.y, w3.y);
    tap(1, w0.z, w1.z, w2.z, w3.z);
    tap(0, w0.w, w1.w, w2.w, w3.w);
    const T* row = rows(d) + static_cast<int64_t>(t) * p.row;
    float4 delta = load4(p.dt_bias + e);
    auto add = [&](float4 w, float v) {
      delta.x = fmaf(w.x, v, delta.x), delta.y = fmaf(w.y, v, delta.y);
      delta.z = fmaf(w.z, v, delta.z), delta.w = fmaf(w.w, v, delta.w);
    };
#pragma unroll 3
    for (int r = 0; r < R; r += 4) {
      const float4 v = load4(row + r);
      add(shared.dt_weight[d][r], v.x);
      add(shared.dt_weight[d][r + 1], v.y);
      add(shared.dt_weight[d][r + 2], v.z);
      add(shared.dt_weight[d][r + 3], v.w);
    }
    const float scale = p.decay_scale ? p.decay_scale[token] : 1.f;
    const float us[4] = {u.x, u.y, u.z, u.w}, deltas[4] = {delta.x, delta.y, delta.z, delta.w};
    const float4 skip = load4(p.D + e);
    const float skips[4] = {skip.x, skip.y, skip.z, skip.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float silu = silu_of_half(.5f * us[k]), v = softplus_fast(deltas[k]);
      shared.delta[d][position][k] = make_float2(scale * v, v * silu);
      shared.y[d][position][k] = skips[k] * silu;
    }
  }
  copy_async_wait_all();
  __syncthreads();
  if (!Traits::kEndOnly)  // needed last; the weights' place is free
    for (int t = tid; t < len; t += kThreads)
      copy_async8(&shared.z[t], xz + E + static_cast<int64_t>(base + t) * 2 * E, true);

  // ---- local walk
  const float4 a4 = load4(p.A + (static_cast<int64_t>(dir) * E + c0 + ch) * kStates + 4 * q);
  const float a[4] = {a4.x * kLog2e, a4.y * kLog2e, a4.z * kLog2e, a4.w * kLog2e};
  const int begin = seg * kTokens;
  float h[4] = {0.f, 0.f, 0.f, 0.f}, decay[4] = {1.f, 1.f, 1.f, 1.f}, sum[kTokens];
  uint32_t gain[kTokens][2];  // C x decay
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    sum[i] = 0.f;
    const float2 d = shared.delta[dir][begin + i][ch];
    const float4 B4 = unpack4<T>(shared.bc[dir][begin + i][q]), C4 = unpack4<T>(shared.bc[dir][begin + i][4 + q]);
    const float B[4] = {B4.x, B4.y, B4.z, B4.w};
    float C[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float step = ex2(d.x * a[k]);
      h[k] = fmaf(step, h[k], d.y * B[k]);
      decay[k] *= step;
      sum[i] = fmaf(h[k], C[k], sum[i]);
      C[k] *= decay[k];
    }
    gain[i][0] = Pair<__half>::pack(C[0], C[1]), gain[i][1] = Pair<__half>::pack(C[2], C[3]);
  }
  __syncthreads();  // everyone is done with B and C
  shared.carry.end[dir][seg][slot] = make_float4(h[0], h[1], h[2], h[3]);
  shared.carry.decay[dir][seg][slot] = make_float4(decay[0], decay[1], decay[2], decay[3]);
  __syncthreads();

  if (Traits::kEndOnly) {
    if (seg != 0) return;
    float4 state = make_float4(0.f, 0.f, 0.f, 0.f), total = make_float4(1.f, 1.f, 1.f, 1.f);
#pragma unroll 4
    for (int s = 0; s < kSegments; s++) {
      const float4 d = shared.carry.decay[dir][s][slot];
      carry_on(state, d, shared.carry.end[dir][s][slot]);
      total.x *= d.x, total.y *= d.y, total.z *= d.z, total.w *= d.w;
    }
    float4* out = part_state(part);
    out[0] = state, out[1] = total;
    return;
  }

  // ---- the state before the segment, and what it adds to y
  float4 state = shared.incoming[dir][slot];
#pragma unroll 4
  for (int s = 0; s < seg; s++) carry_on(state, shared.carry.decay[dir][s][slot], shared.carry.end[dir][s][slot]);
#pragma unroll
  for (int i = 0; i < kTokens; i += 4) {
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      v[k] = 0.f;
      if (i + k >= kTokens) continue;
      const float2 g0 = Pair<__half>::unpack(gain[i + k][0]), g1 = Pair<__half>::unpack(gain[i + k][1]);
      v[k] = fmaf(g0.x, state.x, fmaf(g0.y, state.y, fmaf(g1.x, state.z, fmaf(g1.y, state.w, sum[i + k]))));
    }
    // Four sums over four lanes in three exchanges: lane q ends with token i + q.
    const bool upper = q & 2, odd = q & 1;
    float k0 = upper ? v[2] : v[0], k1 = upper ? v[3] : v[1];
    k0 += __shfl_xor_sync(~0u, upper ? v[0] : v[2], 2);
    k1 += __shfl_xor_sync(~0u, upper ? v[1] : v[3], 2);
    const float mine = (odd ? k1 : k0) + __shfl_xor_sync(~0u, odd ? k0 : k1, 1);
    if (i + q < kTokens) shared.y[dir][begin + i + q][ch] += mine;
  }
  copy_async_wait_all();
  __syncthreads();

  // ---- sum of the directions, gate, store
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(b) * (cls < 0 ? L : 1) * E + c0;
  for (int t = tid; t < len; t += kThreads) {
    const int token = base + t;
    if (cls >= 0 && token != cls) continue;
    const float4 z = unpack4<T>(shared.z[t]);
    const float4 f = *reinterpret_cast<const float4*>(shared.y[0][t]);
    const float4 w = *reinterpret_cast<const float4*>(shared.y[1][len - 1 - t]);
    store4(y + static_cast<int64_t>(cls < 0 ? token : 0) * E,
           make_float4((f.x + w.x) * silu_of_half(.5f * z.x), (f.y + w.y) * silu_of_half(.5f * z.y),
                       (f.z + w.z) * silu_of_half(.5f * z.z), (f.w + w.w) * silu_of_half(.5f * z.w)));
  }
}

template <typename T, int kTokens, bool kEndOnly>
cudaError_t launch(const MambaScanParams& p, cudaStream_t stream) {
  using Traits = SegmentsTraits<T, kTokens, kEndOnly>;
  const dim3 grid(p.d_inner / kChannels, p.batch, parts_of(p.seqlen));
  segments_kernel<Traits><<<grid, Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const MambaScanParams& p, cudaStream_t stream) {
  if (p.seqlen <= kSegments * kShortTokens) return launch<T, kShortTokens, false>(p, stream);
  if (p.seqlen <= kMaxPart) return launch<T, kLongTokens, false>(p, stream);
  if (!p.workspace) return cudaErrorInvalidValue;
  const cudaError_t status = launch<T, kLongTokens, true>(p, stream);
  return status == cudaSuccess ? launch<T, kLongTokens, false>(p, stream) : status;
}

}  // namespace

bool mamba_scan_segments_supported(int32_t, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t,
                                   DataType type) {
  return type != DataType::kFloat32 && d_state == kStates && d_inner % kChannels == 0 && dt_rank % 4 == 0 &&
         dt_rank <= kMaxRank;
}

size_t mamba_scan_segments_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner) {
  if (seqlen <= kMaxPart) return 0;
  const size_t parts = static_cast<size_t>(parts_of(static_cast<int>(seqlen)));
  return 2 * static_cast<size_t>(batch) * parts * static_cast<size_t>(d_inner) * kStates * 2 * sizeof(float);
}

cudaError_t mamba_scan_segments(const MambaScanParams& p, cudaStream_t stream) {
  switch (p.type) {
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
    case DataType::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
