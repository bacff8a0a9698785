// merge_weight.cuh: how much of a merged token's contribution is left at its target (STM, arXiv 2509.22691), by blocks of a
// group of pairs or of a slice of its channels, so that they can ride in the grid of a scan instead of taking a launch of
// their own.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.cuh"
#include "dt_proj.cuh"
#include "launch.cuh"
#include "mamba_scan.h"

namespace stm {

constexpr int kMergeGroup = 8;  // pairs of a block, at most

// Pairs of a group: half of an image's few pairs, which with the edge rule is one side's.
__host__ __device__ inline int merge_group_size(int nb_pairs) {
  const int half = (nb_pairs + 1) / 2;
  return half < kMergeGroup ? half : kMergeGroup;
}
// Groups an image; 0 if there are no weights to compute.
__host__ __device__ inline int merge_groups(const MambaScanParams& p) {
  if (p.weight_mode == WeightMode::kNone || p.nb_pairs == 0) return 0;
  const int size = merge_group_size(p.nb_pairs);
  return (p.nb_pairs + size - 1) / size;
}

// A group's channels may be dealt to several blocks, so that none takes longer than what runs beside it. Each leaves its
// sums (of a pair: the weight's numerator and denominator), and the last one to arrive adds them up, in the order of slices.
struct MergeSlice {
  int index, count;
  float2* sums;     // of all slices of the group, (count, kMergeGroup); null if there is one
  int32_t* ticket;  // of the group: slices that have arrived; zero before and after
};
struct MergeWhole {  // no slices, and no registers for them
  static constexpr int index = 0, count = 1;
  static constexpr float2* sums = nullptr;
};
static_assert(kMergeScratchBytes == kMergeBlocks * (sizeof(int32_t) + kMergeGroup * sizeof(float2)));
// Slice `which` of p.batch x merge_groups groups of `count` slices.
__device__ __forceinline__ MergeSlice merge_slice(const MambaScanParams& p, int which, int count) {
  const int group = which / count;
  if (count == 1) return {0, 1, nullptr, nullptr};
  const auto tickets = static_cast<int32_t*>(p.merge_scratch);
  const auto sums = reinterpret_cast<float2*>(tickets + kMergeBlocks);
  return {which - group * count, count, sums + group * count * kMergeGroup, tickets + group};
}

// NaN stays, of a broken plan or of what comes in: fmaxf would make it 0.
__device__ __forceinline__ float merge_weight_of(WeightMode mode, float sum, float whole) {
  if (mode != WeightMode::kHsp) return sum / whole;
  const float weight = sum / (whole + 1e-12f);
  return isnan(weight) ? weight : fminf(fmaxf(weight, 0.f), 1.f);
}

// Of a block of kThreads.
template <int kThreads>
struct MergeWeightShared {
  static constexpr int kWarps = kThreads / 32;
  struct General {
    static constexpr int kMaxStates = 64;
    static constexpr int kMaxRows = 48, kRow = 64;  // tokens of a run whose x_dbl is brought here; dt of one
    alignas(16) float B[kMergeGroup][kMaxStates];   // of the sources of a run
    alignas(16) float target_B[kMaxStates];
    alignas(16) uint16_t rows[kMaxRows][kRow];      // halves, from the target outward
    float partial[kMergeGroup + 1][kWarps];
    int pairs[2 * kMergeGroup];
    int distance[kMergeGroup];  // of a source from the target
    int end, farthest;          // the run: pairs with one target, on one side of it
  };
  struct Sixteen {                     // 16 states, T of 16 bits
    static constexpr int kMaxTokens = 64;            // of a run
    static constexpr int kRow = 160;                 // bytes; rows of four tokens lie in different banks
    static constexpr int kChannel = 3;               // float4s of a channel; one is padding against bank conflicts
    alignas(16) char rows[kMaxTokens][kRow];         // dt, from the target outward
    float4 decayed[kWarps][32 * kChannel];           // by channel: log2(e) sigma and delta_s delta_t of four tokens
    float2 scale[kMaxTokens / 2];                    // log2(e) s
    uint2 B[kMergeGroup + 1][4];                     // T, of the sources, last the target
    float partial[kMergeGroup + 1][kWarps];
  };
  union {
    General general;
    Sixteen sixteen;
  };
};

// A state's share of a weight in one channel: exp(A sigma) is what is left of the source.
__device__ __forceinline__ float merge_term(WeightMode mode, float A, float sigma, float delta_source, float source_B,
                                            float delta_target, float target_B) {
  const float decay = ex2(A * sigma), from = delta_source * source_B, to = delta_target * target_B;
  if (mode == WeightMode::kHsp) return decay * from * to;
  if (mode == WeightMode::kDecay) return decay;
  return decay * from / (to + (to < 0.f ? -1e-6f : 1e-6f));
}
__device__ __forceinline__ float merge_terms(WeightMode mode, float4 A, float sigma, float delta_source,
                                             const float* source_B, float delta_target, const float* target_B) {
  const float4 s = load4(source_B), t = load4(target_B);
  return merge_term(mode, A.x, sigma, delta_source, s.x, delta_target, t.x) +
         merge_term(mode, A.y, sigma, delta_source, s.y, delta_target, t.y) +
         merge_term(mode, A.z, sigma, delta_source, s.z, delta_target, t.z) +
         merge_term(mode, A.w, sigma, delta_source, s.w, delta_target, t.w);
}

// Every type, extent and mode. A run of pairs with one target (with the edge rule: all of a side) shares its walk
// outward from there: delta of each token on the way is projected on the spot, once, and what decays a source is the
// sum of s delta so far. A thread takes kChannels channels at a time, so that their loads are in flight together;
// channels come in a fixed order and the partial sums are added in a fixed tree, so results repeat bit for bit.
// kSixteen: d_state is 16.
template <typename T, int kThreads, bool kSixteen>
__device__ __noinline__ void merge_weights_general(const MambaScanParams& p, int group, int b,
                                                   typename MergeWeightShared<kThreads>::General& shared) {
  using Shared = typename MergeWeightShared<kThreads>::General;
  constexpr int kWarps = kThreads / 32, kTokens = 4, kChannels = kSixteen ? 2 : 1;
  const int L = p.seqlen, E = p.d_inner, N = kSixteen ? 16 : p.d_state, R = p.dt_rank, tid = threadIdx.x;
  const int size = merge_group_size(p.nb_pairs), first = group * size, count = min(p.nb_pairs - first, size);
  float* weights = p.merge_weights + static_cast<int64_t>(b) * p.nb_pairs + first;
  wait_for_previous();
  let_next_start();
  if (tid < 2 * count) shared.pairs[tid] = p.merge_pairs[2 * first + tid];
  __syncthreads();
  int begin = 0;
  while (begin < count) {
    const int target = shared.pairs[2 * begin + 1];
    const bool forward = shared.pairs[2 * begin] < target;
    if (tid == 0) {  // where the run ends
      int end = begin, farthest = 0;
      for (; end < count; end++) {
        const int source = shared.pairs[2 * end], q = shared.pairs[2 * end + 1];
        const bool broken = source < 0 || q < 0 || source >= L || q >= L;
        if (end > begin && (broken || q != target || (source < q) != forward)) break;
        shared.distance[end - begin] = forward ? q - source : source - q;
        farthest = max(farthest, shared.distance[end - begin]);
        if (broken) {  // a broken plan shows as NaN, not as a wild read
          weights[end] = nanf("");
          farthest = -1, end++;
          break;
        }
      }
      shared.end = end, shared.farthest = farthest;
    }
    __syncthreads();
    const int pairs = shared.end - begin, farthest = shared.farthest;
    if (farthest >= 0) {
      const int dir = forward ? 0 : 1, outward = dir ? 1 : -1;
      const T* rows = static_cast<const T*>(p.x_dbl) + (static_cast<int64_t>(dir) * p.batch + b) * L * p.row;
      for (int i = tid; i < (pairs + 1) * N; i += kThreads) {
        const int j = i / N, n = i - j * N;
        const int t = j < pairs ? shared.pairs[2 * (begin + j)] : target;
        (j < pairs ? shared.B[j] : shared.target_B)[n] = to_float(rows[static_cast<int64_t>(t) * p.row + R + n]);
      }
      // dt of the run's tokens, if they are halves and fit; else each channel reads them where they are.
      const bool staged = sizeof(T) == 2 && farthest < Shared::kMaxRows && R <= Shared::kRow;
      if (staged)
        for (int i = tid; i < (farthest + 1) * R; i += kThreads) {
          const int d = i / R, r = i - d * R;
          shared.rows[d][r] =
              reinterpret_cast<const uint16_t*>(rows)[static_cast<int64_t>(target + outward * d) * p.row + r];
        }
      __syncthreads();
      const T* dt = staged ? reinterpret_cast<const T*>(shared.rows[0]) : rows + static_cast<int64_t>(target) * p.row;
      const int64_t step = staged ? Shared::kRow : outward * static_cast<int64_t>(p.row);

      float sum[kMergeGroup], square = 0.f, norm = 0.f;
#pragma unroll
      for (int j = 0; j < kMergeGroup; j++) sum[j] = 0.f;
      for (int n = 0; n < N; n++) norm = fmaf(shared.target_B[n], shared.target_B[n], norm);
      for (int e0 = tid; e0 < E; e0 += kThreads * kChannels) {
        const T* weight[kChannels];
        const float* A[kChannels];
        float bias[kChannels], sigma[kChannels], delta_target[kChannels];
        bool exists[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; c++) {
          const int e = e0 + c * kThreads;
          exists[c] = e < E;
          const int64_t channel = static_cast<int64_t>(dir) * E + (exists[c] ? e : e0);
          weight[c] = static_cast<const T*>(p.dt_weight) + channel * R;
          A[c] = p.A + channel * N;
          bias[c] = p.dt_bias[channel];
          sigma[c] = delta_target[c] = 0.f;
          if (kSixteen) asm volatile("prefetch.global.L1 [%0];" ::"l"(A[c]));  // a line holds two channels' or more
        }
        for (int d0 = 0; d0 <= farthest; d0 += kTokens) {
          float delta[kChannels][kTokens], before[kChannels][kTokens];  // before: sigma
          int64_t offset[kTokens];
#pragma unroll
          for (int k = 0; k < kTokens; k++) offset[k] = min(d0 + k, farthest) * step;
#pragma unroll
          for (int c = 0; c < kChannels; c++) {
#pragma unroll
            for (int k = 0; k < kTokens; k++) delta[c][k] = bias[c];
          }
          dt_proj_channels(weight, dt, offset, R, delta);
#pragma unroll
          for (int k = 0; k < kTokens; k++) {
            const float scale = p.decay_scale ? p.decay_scale[target + outward * min(d0 + k, farthest)] : 1.f;
#pragma unroll
            for (int c = 0; c < kChannels; c++) {
              delta[c][k] = softplus_exact(delta[c][k]);
              before[c][k] = sigma[c];
              sigma[c] = fmaf(delta[c][k], scale, sigma[c]);
              if (d0 + k == 0) delta_target[c] = delta[c][k];
            }
          }
#pragma unroll
          for (int j = 0; j < kMergeGroup; j++) {
            if (j >= pairs) break;
            const int k = shared.distance[j] - d0;
            if (k < 0 || k >= kTokens) continue;
#pragma unroll
            for (int c = 0; c < kChannels; c++) {
              const float here = k == 0 ? delta[c][0] : k == 1 ? delta[c][1] : k == 2 ? delta[c][2] : delta[c][3];
              const float decayed =
                  kLog2e * (k == 0 ? before[c][0] : k == 1 ? before[c][1] : k == 2 ? before[c][2] : before[c][3]);
              float total = 0.f;
              if (kSixteen) {
#pragma unroll 2
                for (int n = 0; n < 4; n++)
                  total += merge_terms(p.weight_mode, load4(A[c] + 4 * n), decayed, here, shared.B[j] + 4 * n,
                                       delta_target[c], shared.target_B + 4 * n);
              } else {
                for (int n = 0; n < N; n++)
                  total += merge_term(p.weight_mode, A[c][n], decayed, here, shared.B[j][n], delta_target[c],
                                      shared.target_B[n]);
              }
              if (exists[c]) sum[j] += total;
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kChannels; c++)
          if (exists[c]) square = fmaf(delta_target[c] * delta_target[c], norm, square);
      }
#pragma unroll
      for (int j = 0; j <= kMergeGroup; j++) {
        if (j < kMergeGroup && j >= pairs) continue;
        float v = j < kMergeGroup ? sum[j < kMergeGroup ? j : 0] : square;
#pragma unroll
        for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
        if (tid % 32 == 0) shared.partial[j][tid / 32] = v;
      }
      __syncthreads();
      if (tid < pairs) {
        float total = 0.f, whole = 0.f;
        for (int w = 0; w < kWarps; w++) {
          total += shared.partial[tid][w];
          whole += shared.partial[kMergeGroup][w];
        }
        if (p.weight_mode != WeightMode::kHsp) whole = static_cast<float>(E) * static_cast<float>(N);
        weights[begin + tid] = merge_weight_of(p.weight_mode, total, whole);
      }
    }
    begin += pairs;
    __syncthreads();  // shared is free again
  }
}

// Relative error 7e-7 for x > -8 and no branch; softplus_fast's is absolute, and exp(A sigma) of a steep A feels it.
// log1p(t) = 2 artanh(v), v = t / (2 + t).
__device__ __forceinline__ float softplus_close(float x) {
  const float t = ex2(-kLog2e * fabsf(x));
  float v;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(2.f + t));
  v *= t;
  const float z = v * v;
  return fmaf(v, fmaf(fmaf(fmaf(0.3422605f, z, 0.3958946f), z, 0.66676003f), z, 1.9999997f), fmaxf(x, 0.f));
}

// HSP and decay of 16 states, T of 16 bits, dt_rank a multiple of 4 and at most 64: the run of pairs that begins at pair
// `begin` of the group, of the slice's channels. Returns where the next begins, 0 if there is none, -1 if this one is too
// long (and not done).
// The weight separates:
//   sum over channels e and states n of exp(A sigma) delta_s B_s delta_t B_t
//     = sum_n B_s[n] B_t[n] sum_e (delta_s delta_t)[e] exp(A[e,n] sigma[e]),
// so that a channel and state of a pair cost an exponential, a multiplication and an addition. A warp takes 32 channels
// at a time and walks outward by four tokens: two mma tiles, m = 16 channels, n = the four tokens twice, of which lane
// (g, q) = (lane / 4, lane % 4) uses those of tile q / 2: channels 16 (q / 2) + g and + 8, tokens 2 (q % 2) and the
// next. Then it takes states 4q..4q+3 of channels g, g + 8, g + 16, g + 24; what it needs of these goes through shared
// memory. All sums are taken in a fixed order.
template <typename T, int kThreads, typename Slice>
__device__ __noinline__ int merge_weights_of_run(const MambaScanParams& p, int group, int b, int begin, Slice slice,
                                                 typename MergeWeightShared<kThreads>::Sixteen& shared) {
  using Shared = typename MergeWeightShared<kThreads>::Sixteen;
  constexpr int kWarps = kThreads / 32, kTokens = 4, kChannels = 32, kLine = 128;
  constexpr bool kAhead = kWarps <= 2;  // few warps have many channels each, and registers for the next ones' weights
  constexpr int kRounds = 4;  // of channels on their way to L1
  constexpr unsigned kAll = ~0u;
  const int tid = threadIdx.x, lane = tid % 32, g = lane >> 2, q = lane & 3;
  const int warp = __shfl_sync(kAll, tid / 32, 0);  // uniform, for the compiler too
  const int L = p.seqlen, E = p.d_inner, R = p.dt_rank, units = (E + kChannels - 1) / kChannels;
  const bool decay = p.weight_mode == WeightMode::kDecay;
  const int size = merge_group_size(p.nb_pairs), first = group * size, count = min(p.nb_pairs - first, size);

  // ---- the run: pairs with one target, on one side of it. Every warp finds it by itself; lane i has pair i.
  int source = -1, target = -1;
  if (lane < count) {
    source = p.merge_pairs[2 * (first + lane)];
    target = p.merge_pairs[2 * (first + lane) + 1];
  }
  const bool broken = source < 0 || target < 0 || source >= L || target >= L;
  const unsigned before = __ballot_sync(kAll, source < target);
  const unsigned leader = lane == begin && !broken ? static_cast<unsigned>(target) : 0u;
  const int to = static_cast<int>(__reduce_or_sync(kAll, leader));
  const bool forward = before >> begin & 1;
  const bool other = broken || target != to || (source < target) != forward;  // lanes from count on are broken
  const int end = __ffs(static_cast<int>(__ballot_sync(kAll, lane >= begin && other))) - 1, pairs = end - begin;
  auto write = [&](int pair, float sum, float whole) {
    if (slice.sums)
      slice.sums[slice.index * kMergeGroup + pair] = make_float2(sum, whole);
    else
      p.merge_weights[static_cast<int64_t>(b) * p.nb_pairs + first + pair] = merge_weight_of(p.weight_mode, sum, whole);
  };
  if (pairs == 0) {  // a broken plan shows as NaN, not as a wild read
    wait_for_previous();
    let_next_start();
    if (tid == 0) write(begin, nanf(""), 1.f);
    return begin + 1 < count ? begin + 1 : 0;
  }
  const int distance = lane >= begin && lane < end ? abs(source - to) : -kTokens;
  const int farthest = __reduce_max_sync(kAll, distance);
  const int dir = forward ? 0 : 1, outward = dir ? 1 : -1;
  if (farthest >= Shared::kMaxTokens) return -1;

  // ---- constants, on their way before the wait
  const char* dt_weight =
      static_cast<const char*>(p.dt_weight) + static_cast<int64_t>(dir) * E * R * static_cast<int>(sizeof(T));
  const float* dt_bias = p.dt_bias + static_cast<int64_t>(dir) * E;
  const float* A = p.A + static_cast<int64_t>(dir) * E * 16;
  const int weight_row = R * static_cast<int>(sizeof(T));
  auto prefetch = [&](int unit) {
    const int e = unit * kChannels, channels = min(kChannels, E - e);
    if (kLine * lane < 64 * channels)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(reinterpret_cast<const char*>(A) + 64 * e + kLine * lane));
    if (kAhead) return;
    if (kLine * lane < weight_row * channels)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(dt_weight + e * weight_row + kLine * lane));
    if (lane == 0) asm volatile("prefetch.global.L1 [%0];" ::"l"(dt_bias + e));
  };
  auto load_dt = [&](int e0, int k0, uint4 (&weight)[2][2]) {  // two steps of 16 columns
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const char* low = dt_weight + min(e0 + 16 * i, E - 1) * weight_row + 32 * k0 + 8 * q;
      const char* high = dt_weight + min(e0 + 16 * i + 8, E - 1) * weight_row + 32 * k0 + 8 * q;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint2 r0 = make_uint2(0, 0), r1 = r0;  // beyond dt_rank the rows hold B: weight zero
        if (16 * (k0 + k) + 4 * q < R) {
          r0 = *reinterpret_cast<const uint2*>(low + 32 * k);
          r1 = *reinterpret_cast<const uint2*>(high + 32 * k);
        }
        weight[i][k] = make_uint4(r0.x, r1.x, r0.y, r1.y);
      }
    }
  };
  auto load_bias = [&](int e0, int r) {
    const int e = e0 + 16 * (q >> 1) + 8 * r;
    return e < E ? dt_bias[e] : -1e30f;  // no such channel: delta is zero
  };
  uint4 weight_ahead[2][2][2];
  float bias_ahead[2];
  auto load_ahead = [&](int e0) {
    load_dt(e0, 0, weight_ahead[0]);
    if (R > 32) load_dt(e0, 2, weight_ahead[1]);
    bias_ahead[0] = load_bias(e0, 0), bias_ahead[1] = load_bias(e0, 1);
  };
  const int first_unit = slice.index * kWarps + warp, unit_step = slice.count * kWarps;
#pragma unroll 1
  for (int unit = first_unit; unit < min(units, first_unit + kRounds * unit_step); unit += unit_step) prefetch(unit);
  if (kAhead && first_unit < units) load_ahead(first_unit * kChannels + g);
  wait_for_previous();
  let_next_start();

  // ---- x_dbl, from the target outward
  const int step = outward * p.row * static_cast<int>(sizeof(T)), tokens = farthest / kTokens * kTokens + kTokens;
  const int log2_pieces = R <= 32 ? 2 : 3;  // of 16 bytes, of a token: no more than dt, B and C
  const char* rows =
      static_cast<const char*>(p.x_dbl) + ((static_cast<int64_t>(dir) * p.batch + b) * L + to) * p.row * sizeof(T);
#pragma unroll 1
  for (int i = tid; i < tokens << log2_pieces; i += kThreads) {  // the last token repeats
    const int d = i >> log2_pieces, piece = i - (d << log2_pieces);
    copy_async16(&shared.rows[d][16 * piece], rows + min(d, farthest) * step + 16 * piece, true);
  }
  float* scale = &shared.scale[0].x;
#pragma unroll 1
  for (int d = tid; d < tokens; d += kThreads)
    scale[d] = p.decay_scale ? kLog2e * p.decay_scale[to + outward * min(d, farthest)] : kLog2e;
  if (warp == kWarps - 1) {
    const char* B = rows + weight_row + 8 * q;
    const int from = __shfl_sync(kAll, distance, (begin + g) % 32);
    if (g < pairs) copy_async8(&shared.B[g][q], B + from * step, true);
    if (g == 0) copy_async8(&shared.B[kMergeGroup][q], B, true);
  }
  copy_async_wait_all();
  __syncthreads();

  float sum[kMergeGroup][4], square = 0.f;  // of states 4q..4q+3; of delta_t^2
#pragma unroll
  for (int j = 0; j < kMergeGroup; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.f;
  float4* mine = &shared.decayed[warp][(16 * (q >> 1) + g) * Shared::kChannel + (q & 1)];
  const float2* theirs = reinterpret_cast<const float2*>(&shared.decayed[warp][g * Shared::kChannel]);
#pragma unroll 1
  for (int unit = first_unit; unit < units; unit += unit_step) {
    int e0 = unit * kChannels + g;
    if (unit + kRounds * unit_step < units) prefetch(unit + kRounds * unit_step);
    float4 a_ahead[4];
    auto load_A = [&](float4 (&a)[4]) {
#pragma unroll
      for (int c = 0; c < 4; c++) a[c] = load4(A + min(e0 + 8 * c, E - 1) * 16 + 4 * q);
    };
    if (kAhead) load_A(a_ahead);
    float sigma[2] = {0.f, 0.f}, delta_target[2] = {0.f, 0.f};  // sigma: log2(e) sum of s delta before these tokens
#pragma unroll 1
    for (int d0 = 0; d0 < tokens; d0 += kTokens) {
      const unsigned here = __ballot_sync(kAll, distance >= d0 && distance < d0 + kTokens) >> begin;
      // ---- delta
      const char* dt = &shared.rows[d0 + (g & 3)][8 * q];
      if (!kAhead) asm volatile("" : "+r"(e0));  // else the addresses of all channels stay in registers
      float x[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float bias = kAhead ? bias_ahead[r] : load_bias(e0, r);
        x[0][2 * r] = x[0][2 * r + 1] = x[1][2 * r] = x[1][2 * r + 1] = bias;
      }
#pragma unroll
      for (int k0 = 0; k0 < 4; k0 += 2) {
        if (16 * k0 >= R) break;
        uint4 weight[2][2];
        if (!kAhead) load_dt(e0, k0, weight);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          if (16 * (k0 + k) >= R) break;
          const uint2 token = *reinterpret_cast<const uint2*>(dt + 32 * (k0 + k));
#pragma unroll
          for (int i = 0; i < 2; i++) mma_k16<T>(x[i], kAhead ? weight_ahead[k0 / 2][i][k] : weight[i][k], token);
        }
        // what follows is loaded into the same registers
        if (!kAhead) asm volatile("" : "+r"(e0) : "f"(x[0][0]), "f"(x[1][0]));
      }
      float4 a[4];
      if (kAhead) {
#pragma unroll
        for (int c = 0; c < 4; c++) a[c] = a_ahead[c];
        if (d0 + kTokens >= tokens && unit + unit_step < units) load_ahead(e0 + unit_step * kChannels);
      } else {
        load_A(a);
      }
      float delta[2][2];  // [channel + 8 r][token]
#pragma unroll
      for (int r = 0; r < 4; r++) delta[r >> 1][r & 1] = softplus_close(q & 2 ? x[1][r] : x[0][r]);

      // ---- sigma before each token, delta_s delta_t
      const float2 s = shared.scale[d0 / 2 + (q & 1)];
      __syncwarp();  // the tokens before are read
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float nearest = __shfl_sync(kAll, delta[r][0], lane & ~1);
        if (d0 == 0) {
          delta_target[r] = nearest;
          if ((q & 1) == 0) square = fmaf(nearest, nearest, square);
        }
        const float own = s.x * delta[r][0], both = fmaf(s.y, delta[r][1], own);
        const float others = __shfl_xor_sync(kAll, both, 1);
        const float from = q & 1 ? sigma[r] + others : sigma[r];
        sigma[r] += both + others;
        const bool exists = e0 + 16 * (q >> 1) + 8 * r < E;
        mine[8 * r * Shared::kChannel] =
            decay ? make_float4(from, exists ? 1.f : 0.f, from + own, exists ? 1.f : 0.f)
                  : make_float4(from, delta[r][0] * delta_target[r], from + own, delta[r][1] * delta_target[r]);
      }
      __syncwarp();

      // ---- the sources among these tokens
#pragma unroll
      for (int j = 0; j < kMergeGroup; j++) {
        if (here >> j == 0) break;
        if ((here >> j & 1) == 0) continue;
        const float2* at = theirs + __shfl_sync(kAll, distance, begin + j) - d0;
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const float2 v = at[8 * c * 2 * Shared::kChannel];
          sum[j][0] = fmaf(v.y, ex2(a[c].x * v.x), sum[j][0]);
          sum[j][1] = fmaf(v.y, ex2(a[c].y * v.x), sum[j][1]);
          sum[j][2] = fmaf(v.y, ex2(a[c].z * v.x), sum[j][2]);
          sum[j][3] = fmaf(v.y, ex2(a[c].w * v.x), sum[j][3]);
        }
      }
    }
  }

  // ---- B, and the sums over states, lanes and warps, in a fixed order
  const float4 target_B = unpack4<T>(shared.B[kMergeGroup][q]);
#pragma unroll
  for (int j = 0; j <= kMergeGroup; j++) {
    if (j < kMergeGroup && j >= pairs) continue;
    float v = square;
    if (j < kMergeGroup) {
      const float(&s)[4] = sum[j < kMergeGroup ? j : 0];
      const float4 B = unpack4<T>(shared.B[j][q]);
      v = decay ? (s[0] + s[1]) + (s[2] + s[3])
                : fmaf(s[0], B.x * target_B.x, s[1] * (B.y * target_B.y)) +
                      fmaf(s[2], B.z * target_B.z, s[3] * (B.w * target_B.w));
    }
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(kAll, v, mask);
    if (lane == 0) shared.partial[j][warp] = v;
  }
  __syncthreads();
  if (tid < pairs) {
    float total = 0.f, whole = 0.f, norm = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) total += shared.partial[tid][w], whole += shared.partial[kMergeGroup][w];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float4 B = unpack4<T>(shared.B[kMergeGroup][k]);
      norm = fmaf(B.x, B.x, fmaf(B.y, B.y, fmaf(B.z, B.z, fmaf(B.w, B.w, norm))));
    }
    write(begin + tid, total, !decay ? whole * norm : slice.index == 0 ? static_cast<float>(E) * 16.f : 0.f);
  }
  __syncthreads();  // shared is free again
  return end < count ? end : 0;
}

// Adds up a group's slices, if this is the last one to arrive. By the warp that has written this one's sums.
__device__ __forceinline__ void merge_weights_of_slices(const MambaScanParams& p, int group, int b, MergeSlice slice) {
  const int lane = threadIdx.x, size = merge_group_size(p.nb_pairs), pair = group * size + lane;
  int before = 0;
  __threadfence();
  __syncwarp();
  if (lane == 0) before = atomicAdd(slice.ticket, 1);
  if (__shfl_sync(~0u, before, 0) != slice.count - 1) return;
  __threadfence();
  __syncwarp();
  if (lane == 0) *slice.ticket = 0;  // for the next call
  if (lane >= size || pair >= p.nb_pairs) return;
  float sum = 0.f, whole = 0.f;
  for (int i = 0; i < slice.count; i++) {
    const float2 v = __ldcg(slice.sums + i * kMergeGroup + lane);
    sum += v.x, whole += v.y;
  }
  p.merge_weights[static_cast<int64_t>(b) * p.nb_pairs + pair] = merge_weight_of(p.weight_mode, sum, whole);
}

// The weights of a group in image b, or a slice's part in them, by a whole block of kThreads. Waits for the kernel before,
// after it has asked for constants. kSixteen: d_state is 16.
template <typename T, int kThreads, bool kSixteen, typename Slice = MergeWhole>
__device__ __forceinline__ void merge_weights_of_group(const MambaScanParams& p, int group, int b,
                                                       MergeWeightShared<kThreads>& shared, Slice slice = {}) {
  if constexpr (sizeof(T) == 2) {
    if (p.weight_mode != WeightMode::kHspLiteral && (kSixteen || p.d_state == 16) && p.dt_rank % 4 == 0 &&
        p.dt_rank <= 64) {
      int begin = 0;
      do
        begin = merge_weights_of_run<T, kThreads>(p, group, b, begin, slice, shared.sixteen);
      while (begin > 0);
      if (begin == 0) {
        if constexpr (std::is_same_v<Slice, MergeSlice>) {
          if (slice.sums && threadIdx.x < 32) merge_weights_of_slices(p, group, b, slice);
        }
        return;
      }
    }
  }
  if (slice.index == 0) return merge_weights_general<T, kThreads, kSixteen>(p, group, b, shared.general);
  wait_for_previous();
  let_next_start();
}

}  // namespace stm
