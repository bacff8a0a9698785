// add_merge_norm.cu: residual add, merge, RMSNorm. Each output token gathers its own members in a fixed order, so
// nothing is scattered and results repeat bit for bit.
#include "add_merge_norm.h"

#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

// Calls add(residual position, hidden position, weight) for each member of output token t: for kEdge the target first
// and then its sources in ascending order, for kTable in the table's order. kAhead members' loads are in flight together:
// at 1024 px a target has 41 sources a side, and one after the other they would cost 41 times the latency of memory.
// kParts > 1, for kEdge: only those of the part, the target being part 0's.
template <int kAhead, int kParts = 1, typename Add>
__device__ __forceinline__ void for_each_member(const AddMergeNormParams& p, int b, int t, Add add, int part = 0) {
  if (kParts == 1 && p.cls_index >= 0) return add(p.cls_index, 0, 1.f);
  const float* weights = p.merge_weights + (p.weights_per_image ? static_cast<int64_t>(b) * p.nb_weights : 0);
  if (kParts == 1 && p.rule == MergeRule::kTable) {
    const int end = p.begin[t + 1];
#pragma unroll kAhead
    for (int m = p.begin[t]; m < end; m++) {
      const int position = p.members[m], column = p.member_weight[m];
      if (position >= 0 && position < p.seqlen_in) add(position, position, column < 0 ? 1.f : weights[column]);
    }
    return;
  }
  const int left = p.rule == MergeRule::kEdge ? p.left : 0, right = p.rule == MergeRule::kEdge ? p.right : 0;
  const int first = (part + kParts - 1) % kParts;
  if (part == 0) add(t + left, t + left, 1.f);
  if (t == 0) {
#pragma unroll kAhead
    for (int i = first; i < left; i += kParts) add(i, i, weights[i]);
  }
  if (t == p.seqlen_out - 1) {
#pragma unroll kAhead
    for (int i = first; i < right; i += kParts)
      add(p.seqlen_in - right + i, p.seqlen_in - right + i, weights[left + i]);
  }
}

// With many sources an end of the image, first or last output token, is a block's and not a warp's, and such blocks are the
// first of the grid: else they would be what it waits for at last.
constexpr int kManySources = 6;
__host__ __device__ inline bool first_has_many(const AddMergeNormParams& p) {
  return p.rule == MergeRule::kEdge && (p.left >= kManySources || (p.seqlen_out == 1 && p.right >= kManySources));
}
__host__ __device__ inline bool last_has_many(const AddMergeNormParams& p) {
  return p.rule == MergeRule::kEdge && p.right >= kManySources && p.seqlen_out > 1;
}

// The first token of image b in the residual stream.
__device__ __forceinline__ const float* residual_of(const AddMergeNormParams& p, int b) {
  return p.residual + (p.residual_per_image ? static_cast<int64_t>(b) * p.seqlen_in * p.d_model : 0);
}

template <typename T_, int kVectors_>
struct WarpNormTraits {
  using T = T_;
  static constexpr int kVectors = kVectors_;  // groups of 4 columns a lane holds: d_model <= 128 kVectors
  static constexpr int kAhead = kVectors <= 3 ? 4 : kVectors <= 6 ? 2 : 1;  // members in flight; more spill
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
};

// A warp owns one output token and holds it in registers: residual and hidden are read once, both outputs written once.
// kEnds: the first blocks take ends of images with many sources, which the others leave out.
template <typename Traits, bool kEnds>
__global__ __launch_bounds__(Traits::kThreads) void warp_norm_kernel(const __grid_constant__ AddMergeNormParams p) {
  using T = typename Traits::T;
  constexpr int kVectors = Traits::kVectors, kWarps = Traits::kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = p.d_model;
  float4 norm_weight[kVectors];  // read before the wait and before the stores, which the compiler must not pass
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int c = (lane + 32 * i) * 4;
    if (c < d) norm_weight[i] = *reinterpret_cast<const float4*>(p.norm_weight + c);
  }
  wait_for_previous();
  let_next_start();
  int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  bool is_end = false;
  if constexpr (kEnds) {
    const int first = first_has_many(p), ends = first + last_has_many(p), block = static_cast<int>(blockIdx.x);
    is_end = block < ends * p.batch;
    token = is_end ? static_cast<int64_t>(block / ends) * p.seqlen_out + (block % ends < first ? 0 : p.seqlen_out - 1)
                   : token - static_cast<int64_t>(ends) * p.batch * kWarps;
  }
  if (token >= static_cast<int64_t>(p.batch) * p.seqlen_out) return;
  const int b = static_cast<int>(token / p.seqlen_out), t = static_cast<int>(token % p.seqlen_out);
  if (kEnds && !is_end && ((t == 0 && first_has_many(p)) || (t == p.seqlen_out - 1 && last_has_many(p)))) return;
  const float* residual = residual_of(p, b);
  const T* hidden = static_cast<const T*>(p.hidden) + static_cast<int64_t>(b) * (p.cls_index < 0 ? p.seqlen_in : 1) * d;

  float4 x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; i++) x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  auto add = [&](int from_residual, int from_hidden, float weight) {
    const float* r = residual + static_cast<int64_t>(from_residual) * d;
    const T* h = hidden + static_cast<int64_t>(from_hidden) * d;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const int c = (lane + 32 * i) * 4;
      if (c >= d) continue;
      const float4 rv = *reinterpret_cast<const float4*>(r + c), hv = load4(h + c);
      x[i].x = fmaf(weight, rv.x + hv.x, x[i].x);
      x[i].y = fmaf(weight, rv.y + hv.y, x[i].y);
      x[i].z = fmaf(weight, rv.z + hv.z, x[i].z);
      x[i].w = fmaf(weight, rv.w + hv.w, x[i].w);
    }
  };
  if constexpr (kEnds) {
    __shared__ float4 others[kWarps - 1][32 * kVectors];
    if (is_end) {
      for_each_member<Traits::kAhead, kWarps>(p, b, t, add, warp);
      if (warp > 0) {
#pragma unroll
        for (int i = 0; i < kVectors; i++) others[warp - 1][lane + 32 * i] = x[i];
      }
      __syncthreads();
      if (warp > 0) return;
      for (int w = 0; w < kWarps - 1; w++) {
#pragma unroll
        for (int i = 0; i < kVectors; i++) {
          const float4 v = others[w][lane + 32 * i];
          x[i].x += v.x, x[i].y += v.y, x[i].z += v.z, x[i].w += v.w;
        }
      }
    }
  }
  if (!is_end) for_each_member<Traits::kAhead>(p, b, t, add);
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; i++)
    square = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, fmaf(x[i].z, x[i].z, fmaf(x[i].w, x[i].w, square))));
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) square += __shfl_xor_sync(~0u, square, mask);
  const float scale = rsqrtf(square / static_cast<float>(d) + p.epsilon);

  float* residual_out = p.residual_out + token * d;
  T* normed = static_cast<T*>(p.normed) + token * d;
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int c = (lane + 32 * i) * 4;
    if (c >= d) continue;
    const float4 w = norm_weight[i];
    *reinterpret_cast<float4*>(residual_out + c) = x[i];
    store4(normed + c, make_float4(x[i].x * scale * w.x, x[i].y * scale * w.y, x[i].z * scale * w.z,
                                   x[i].w * scale * w.w));
  }
}

template <typename T_>
struct BlockNormTraits {
  using T = T_;
  static constexpr int kThreads = 256;
};

// Any d_model: a block owns one output token. residual_out holds the sums between the two passes; a thread reads back
// only what it wrote itself.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void block_norm_kernel(const __grid_constant__ AddMergeNormParams p) {
  using T = typename Traits::T;
  constexpr int kWarps = Traits::kThreads / 32;
  __shared__ float partial[kWarps];
  const int64_t token = blockIdx.x;
  const int b = static_cast<int>(token / p.seqlen_out), t = static_cast<int>(token % p.seqlen_out), d = p.d_model;
  const float* residual = residual_of(p, b);
  const T* hidden = static_cast<const T*>(p.hidden) + static_cast<int64_t>(b) * (p.cls_index < 0 ? p.seqlen_in : 1) * d;
  float* residual_out = p.residual_out + token * d;
  T* normed = static_cast<T*>(p.normed) + token * d;

  float square = 0.f;
  for (int c = threadIdx.x; c < d; c += Traits::kThreads) {
    float x = 0.f;
    for_each_member<4>(p, b, t, [&](int from_residual, int from_hidden, float weight) {
      x = fmaf(weight, residual[static_cast<int64_t>(from_residual) * d + c] +
                           to_float(hidden[static_cast<int64_t>(from_hidden) * d + c]), x);
    });
    residual_out[c] = x;
    square = fmaf(x, x, square);
  }
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) square += __shfl_xor_sync(~0u, square, mask);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = square;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) total += partial[w];
  const float scale = rsqrtf(total / static_cast<float>(d) + p.epsilon);
  for (int c = threadIdx.x; c < d; c += Traits::kThreads)
    normed[c] = from_float<T>(residual_out[c] * scale * p.norm_weight[c]);
}

template <typename T, int kVectors>
cudaError_t launch_warp(const AddMergeNormParams& p, int64_t tokens, cudaStream_t stream) {
  using Traits = WarpNormTraits<T, kVectors>;
  const int64_t ends = int64_t{first_has_many(p) + last_has_many(p)} * p.batch;
  const auto blocks = static_cast<unsigned>((tokens + Traits::kWarps - 1) / Traits::kWarps + ends);
  return ends ? launch_dependent<warp_norm_kernel<Traits, true>>(blocks, Traits::kThreads, 0, stream, p)
              : launch_dependent<warp_norm_kernel<Traits, false>>(blocks, Traits::kThreads, 0, stream, p);
}

template <typename T>
cudaError_t dispatch(const AddMergeNormParams& p, cudaStream_t stream) {
  const int64_t tokens = static_cast<int64_t>(p.batch) * p.seqlen_out;
  if (tokens > INT32_MAX) return cudaErrorInvalidValue;
  if (p.d_model % 4 == 0 && p.d_model <= 1024) switch ((p.d_model + 127) / 128) {
      case 1: return launch_warp<T, 1>(p, tokens, stream);
      case 2: return launch_warp<T, 2>(p, tokens, stream);
      case 3: return launch_warp<T, 3>(p, tokens, stream);
      case 4: return launch_warp<T, 4>(p, tokens, stream);
      case 5:
      case 6: return launch_warp<T, 6>(p, tokens, stream);
      default: return launch_warp<T, 8>(p, tokens, stream);
    }
  using Traits = BlockNormTraits<T>;
  block_norm_kernel<Traits><<<static_cast<unsigned>(tokens), Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

bool valid(const AddMergeNormParams& p) {
  if (p.batch < 0 || p.seqlen_in < 1 || p.seqlen_out < 1 || p.d_model < 1) return false;
  if (p.cls_index >= 0) return p.cls_index < p.seqlen_in && p.seqlen_out == 1 && p.rule == MergeRule::kNone;
  if (p.cls_index < -1) return false;
  switch (p.rule) {
    case MergeRule::kNone: return p.seqlen_out == p.seqlen_in;
    case MergeRule::kEdge:
      if (p.left < 0 || p.right < 0 || p.seqlen_out != p.seqlen_in - p.left - p.right) return false;
      return p.left + p.right == 0 || (p.merge_weights && p.nb_weights >= p.left + p.right);
    case MergeRule::kTable: return p.seqlen_out <= p.seqlen_in && p.begin && p.members && p.member_weight;
  }
  return false;
}

}  // namespace

cudaError_t add_merge_norm(const AddMergeNormParams& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  switch (p.type) {
    case DataType::kFloat32: return dispatch<float>(p, stream);
    case DataType::kFloat16: return dispatch<__half>(p, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
