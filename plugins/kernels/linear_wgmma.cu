// linear_wgmma.cu: y = x weight^T on Hopper's wgmma, for all but the smallest products of few rows. Weights are the left operand,
// 64 columns of y a warpgroup, so that rows come in eights. Four warps bring both operands, 64 in_features at a time, the first
// weights while the kernel before still runs. Its code is for sm_90a only; everywhere else the kernel is empty and
// linear_wgmma_supported says no.
#include <algorithm>
#include <cstdint>

#include "launch.cuh"
#include "linear_epilogue.cuh"
#include "linear_impl.h"
#include "wgmma.cuh"

namespace stm {
namespace {

template <typename T_, int kShape>
struct LinearWgmmaTraits {
  using T = T_;
  static constexpr LinearShape kCut = kLinearShapes[kShape];
  static constexpr int kRows = kCut.rows, kColumns = kCut.columns, kTiles = kRows / 8;
  static constexpr int kConsumers = 128 * kCut.across, kBringers = 128, kThreads = kConsumers + kBringers;
  static constexpr int kLine = 128;                                   // bytes of a row in a stage: 64 in_features
  static constexpr int kStage = (kColumns + kRows) * kLine;           // weights, then x
  static constexpr int kStages = kCut.wgmma > 1 ? 3 : std::clamp(112 * 1024 / kStage, 4, 8);
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kFactors = kBarriers + 16 * kStages;           // of the norm, a float a row
  static constexpr int kResidual = kFactors + (4 * kRows + 15) / 16 * 16;
  static constexpr size_t kBytes = kResidual, kBytesWithResidual = kResidual + kRows * kSumRow<kColumns> * sizeof(float);
  static_assert(kColumns == 64 * kCut.across && kCut.along == 1 && kRows == 8 * kTiles && kBytes % 16 == 0);
  static_assert(kRows * kSumRow<kColumns> * 4 <= kBarriers && kBytesWithResidual <= 227 * 1024);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The squares of a row, every kLanes-th four of them from `lane` on, all loads under way together.
template <int kLanes>
__device__ __forceinline__ float sum_of_squares(const float* of_row, int squares, int lane) {
  constexpr int kHeld = 6;
  float total = 0.f;
  for (int first = 4 * lane; first < squares; first += 4 * kLanes * kHeld) {
    float4 v[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      v[i] = first + 4 * kLanes * i < squares ? load4(of_row + first + 4 * kLanes * i) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kHeld; i++) total += (v[i].x + v[i].y) + (v[i].z + v[i].w);
  }
  return total;
}

// Grid: tiles of rows (fastest) x tiles of columns.
template <typename Traits>
__device__ __forceinline__ void linear_tile(const LinearParams& p) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kLine = Traits::kLine, kStages = Traits::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(~0u, tid >> 5, 0), chunks = p.in_features / 64;
  const RowTile tile = row_tile<kRows>(p, blockIdx.x);
  const int64_t first_row = tile.first;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns, rows = tile.rows;
  const uint32_t shared_at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t full = shared_at + Traits::kBarriers, empty = full + 8 * kStages;
  auto* const factors = reinterpret_cast<float*>(shared + Traits::kFactors);
  auto* const residual = reinterpret_cast<float*>(shared + Traits::kResidual);
  if (tid == 0) {
    for (int s = 0; s < kStages; s++) barrier_init(full + 8 * s, Traits::kBringers), barrier_init(empty + 8 * s, Traits::kConsumers / 32);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const bool brings = warp >= Traits::kConsumers / 32;
  float sums[4 * Traits::kTiles];
  if (brings) {
    const int thread = tid - Traits::kConsumers, line = thread >> 3, piece = thread & 7, K = p.in_features;
    const int place = line * kLine + ((piece ^ (line & 7)) << 4);  // of this thread's first 16 bytes; the next are 16 rows on
    const T* const weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column + line) * K + 8 * piece;
    const T* const x = static_cast<const T*>(p.x) + first_row * K + 8 * piece;
    auto bring_weights = [&](int chunk, int slot) {
      unsigned char* const to = shared + slot * Traits::kStage + place;
#pragma unroll
      for (int i = 0; i < kColumns / 16; i++) copy_async_line16(to + 16 * i * kLine, weight + 16 * i * K + 64 * chunk);
    };
    auto bring_x = [&](int chunk, int slot) {
      unsigned char* const to = shared + slot * Traits::kStage + kColumns * kLine + place;
#pragma unroll
      for (int i = 0; i < (kRows + 15) / 16; i++) {
        const int row = line + 16 * i;
        if (16 * i + 16 <= kRows || row < kRows) copy_async_line16(to + 16 * i * kLine, x + min(row, rows - 1) * K + 64 * chunk, row < rows);
      }
    };
    for (int chunk = 0; chunk < min(chunks, kStages); chunk++) bring_weights(chunk, chunk);
    wait_for_previous();
    let_next_start();
    Ring<kStages> ring;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      if (chunk >= kStages) {
        barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
        bring_weights(chunk, ring.slot);
      } else if (chunk == min(chunks, kStages) - 1 && p.residual) {
        bring_residual<kRows, kColumns, Traits::kBringers>(p, tile, first_column, residual, thread);
      }
      bring_x(chunk, ring.slot);
      barrier_arrive_after_copies(full + 8 * ring.slot);
      ring.next();
    }
  } else {
    wait_for_previous();
    let_next_start();
    constexpr int kLanes = Traits::kConsumers >= 2 * kRows ? 2 : 1;
    if (p.squares) {
      const int row = min(tid / kLanes, rows - 1), squares = p.in_features / kSquaredColumns;  // a multiple of 4
      float total = sum_of_squares<kLanes>(p.squares + (first_row + row) * squares, squares, tid % kLanes);
      if (kLanes == 2) total += __shfl_xor_sync(~0u, total, 1);
      if (tid < kLanes * kRows && tid % kLanes == 0)
        factors[tid / kLanes] = norm_factor(p, total);
    }
    const int warpgroup = warp >> 2;
    Ring<kStages> ring;
    int last = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      barrier_wait(full + 8 * ring.slot, ring.phase);
      fence_for_wgmma();
      const uint32_t at = shared_at + ring.slot * Traits::kStage;
      const uint64_t a = tile_descriptor(at + warpgroup * (64 * kLine)), b = tile_descriptor(at + kColumns * kLine);
      pin(sums);
      wgmma_arrive();
#pragma unroll
      for (int k = 0; k < 4; k++) Wgmma<T, Traits::kTiles>::run(sums, a + 2 * k, b + 2 * k, chunk > 0 || k > 0);
      wgmma_commit();
      pin(sums);
      wgmma_wait<1>();
      if (chunk > 0 && lane == 0) barrier_arrive(empty + 8 * last);
      last = ring.slot;
      ring.next();
    }
    wgmma_wait<0>();
    pin(sums);
  }
  __syncthreads();  // all products are made, all copies have landed
  if (!brings) {
    auto* const buffer = reinterpret_cast<float*>(shared) + 16 * warp + (lane >> 2);
    const int q = lane & 3;
#pragma unroll
    for (int n = 0; n < Traits::kTiles; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) buffer[(8 * n + 2 * q + (r & 1)) * kSumRow<kColumns> + 8 * (r >> 1)] = sums[4 * n + r];
  }
  __syncthreads();
  put_out<T, kRows, kColumns, 1, Traits::kThreads>(p, tile, first_column, reinterpret_cast<const float*>(shared), residual, factors);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kCut.wgmma) void linear_wgmma_kernel(const __grid_constant__ LinearParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  linear_tile<Traits>(p);
#endif
}

template <typename T, int kShape>
cudaError_t launch(const LinearParams& p, cudaStream_t stream) {
  using Traits = LinearWgmmaTraits<T, kShape>;
  const int64_t tiles = row_tiles(p, Traits::kRows), column_tiles = p.out_features / Traits::kColumns;
  if (!linear_wgmma_supported() || tiles > INT32_MAX || column_tiles > 65535) return cudaErrorInvalidConfiguration;
  constexpr auto kKernel = linear_wgmma_kernel<Traits>;
  const size_t bytes = linear_wgmma_bytes(kShape, p.residual);
  const cudaError_t status = allow_shared<kKernel>(bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent<kKernel>(dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(column_tiles)), dim3(Traits::kThreads), bytes,
                                   stream, p);
}

}  // namespace

bool linear_wgmma_supported() {
#ifdef STM_SM90A
  return once_a_device([](int) { return device_attribute(cudaDevAttrComputeCapabilityMajor, 0) == 9 ? 1 : 0; }) == 1;
#else
  return false;
#endif
}

size_t linear_wgmma_bytes(int32_t shape, bool with_residual) {
  return with_linear_shape(shape, [&](auto index) {
    if constexpr (kLinearShapes[index].wgmma) {
      using Traits = LinearWgmmaTraits<__half, index>;
      return with_residual ? Traits::kBytesWithResidual : Traits::kBytes;
    } else {
      return size_t{0};
    }
  });
}

cudaError_t linear_wgmma(const LinearParams& p, int32_t shape, cudaStream_t stream) {
  return with_half_type(p.type, [&](auto zero) {
    return with_linear_shape(shape, [&](auto index) {
      if constexpr (kLinearShapes[index].wgmma) return launch<decltype(zero), index>(p, stream);
      return cudaErrorInvalidConfiguration;
    });
  });
}

}  // namespace stm
