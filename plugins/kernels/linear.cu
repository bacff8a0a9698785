// linear.cu: y = x weight^T for few rows, on tensor cores. What counts is latency: all of a block's weights come while the
// kernel before still runs, its rows of x in one go after that; one round of blocks covers the card.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "linear_epilogue.cuh"
#include "linear_impl.h"

namespace stm {
namespace {

template <typename T_, int kShape>
struct LinearTraits {
  using T = T_;
  static constexpr LinearShape kCut = kLinearShapes[kShape];
  static constexpr int kRows = kCut.rows, kColumns = kCut.columns, kAcross = kCut.across, kAlong = kCut.along;
  static constexpr int kThreads = 32 * kAcross * kAlong;
  static constexpr int kRowTiles = kRows / 8;                     // n-tiles of an mma
  static constexpr int kColumnTiles = kColumns / (16 * kAcross);  // m-tiles of a warp
  static constexpr int kChunk = 32 * kAlong;                      // of in_features: two k-steps a warp
  static constexpr int kChunkBytes = 2 * kChunk, kPieces = kChunkBytes / 16;
  static constexpr int kStage = 3;                                // chunks that come and are multiplied together
  static constexpr int kRoom = 2 * kStage;                        // chunks of x under way
  static_assert(kColumnTiles * kAcross * 16 == kColumns && kRowTiles * 8 == kRows && kAlong >= 2);
};

template <typename Traits>
size_t shared_bytes(int in_features) {
  const size_t weights = size_t{Traits::kColumns} * 2 * in_features;
  const int chunks = in_features / Traits::kChunk;
  const size_t x = size_t{Traits::kRows} * Traits::kChunkBytes * std::min(chunks, Traits::kRoom);
  const size_t sums = size_t{Traits::kAlong} * Traits::kRows * kSumRow<Traits::kColumns> * sizeof(float);
  return std::max(weights + x, sums);
}

// Beside those: the residual's tile and the norm's factor of each row.
template <typename Traits>
constexpr size_t kAddedBytes = (size_t{Traits::kRows} * kSumRow<Traits::kColumns> + Traits::kRows) * sizeof(float);

// Rows of 2 kChunk bytes, their pieces of 16 bytes in an order by which eight rows' pieces of one column lie in different banks.
template <typename Traits>
__device__ __forceinline__ int place_of(int row, int piece) {
  return row * Traits::kChunkBytes + ((piece ^ (row & 7)) << 4);
}

// Grid: tiles of rows (fastest) x tiles of columns. weight is the mma's left operand, so that rows come in eights.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void linear_kernel(const __grid_constant__ LinearParams p, int added_at) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kPieces = Traits::kPieces, kStage = Traits::kStage;
  constexpr int kRowTiles = Traits::kRowTiles, kColumnTiles = Traits::kColumnTiles, kThreads = Traits::kThreads;
  extern __shared__ __align__(128) unsigned char shared[];
  const int chunks = p.in_features / Traits::kChunk, thread = threadIdx.x;
  const RowTile tile = row_tile<kRows>(p, blockIdx.x);
  const int64_t first_row = tile.first;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns, rows = tile.rows;
  unsigned char* const x_shared = shared + chunks * (kColumns * Traits::kChunkBytes);
  auto* const added = reinterpret_cast<float*>(shared + added_at);  // the residual's tile, as the sums lie
  float* const factors = added + kRows * kSumRow<kColumns>;

  const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column) * p.in_features;
  for (int chunk = 0; chunk < chunks; chunk++)
    for (int i = thread; i < kColumns * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      copy_async_line16(shared + chunk * (kColumns * Traits::kChunkBytes) + place_of<Traits>(row, piece),
                        weight + static_cast<int64_t>(row) * p.in_features + chunk * Traits::kChunk + 8 * piece);
    }
  copy_async_commit();
  wait_for_previous();
  let_next_start();

  const T* x = static_cast<const T*>(p.x) + first_row * p.in_features;
  auto bring = [&](int stage) {  // an empty group where there is none
    for (int chunk = stage * kStage; chunk < min((stage + 1) * kStage, chunks); chunk++)
      for (int i = thread; i < kRows * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_async_line16(x_shared + chunk % Traits::kRoom * (kRows * Traits::kChunkBytes) + place_of<Traits>(row, piece),
                          x + static_cast<int64_t>(min(row, rows - 1)) * p.in_features + chunk * Traits::kChunk + 8 * piece, row < rows);
      }
    copy_async_commit();
  };
  if (p.residual)  // in the group of the first rows
    bring_residual<kRows, kColumns, kThreads>(p, tile, first_column, added, thread);
  bring(0);
  bring(1);
  if (p.squares)
    for (int row = thread; row < kRows; row += kThreads) {
      const int squares = p.in_features / kSquaredColumns;  // a multiple of 4
      const float* of_row = p.squares + (first_row + min(row, rows - 1)) * squares;
      float total = 0.f;
#pragma unroll 4
      for (int i = 0; i < squares; i += 4) {
        const float4 v = load4(of_row + i);
        total += (v.x + v.y) + (v.z + v.w);
      }
      factors[row] = norm_factor(p, total);
    }

  const int warp = thread / 32, lane = thread % 32, across = warp % Traits::kAcross, along = warp / Traits::kAcross;
  float sums[kColumnTiles][kRowTiles][4] = {};
  const auto weights_at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto x_at = static_cast<uint32_t>(__cvta_generic_to_shared(x_shared));
  auto multiply = [&](int chunk, int place) {
    const uint32_t w = weights_at + chunk * (kColumns * Traits::kChunkBytes);
    const uint32_t rows_at = x_at + place * (kRows * Traits::kChunkBytes);
    uint4 a[kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < kColumnTiles; i++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        a[i][k] = load_matrices(w + place_of<Traits>((across * kColumnTiles + i) * 16 + (lane & 15), 4 * along + 2 * k + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < kRowTiles; n++) {
      const uint4 b = load_matrices(rows_at + place_of<Traits>(8 * n + (lane & 7), 4 * along + (lane >> 3)));
#pragma unroll
      for (int i = 0; i < kColumnTiles; i++) {
        mma_k16<T>(sums[i][n], a[i][0], make_uint2(b.x, b.y));
        mma_k16<T>(sums[i][n], a[i][1], make_uint2(b.z, b.w));
      }
    }
  };
  for (int stage = 0, first = 0; first < chunks; stage++, first += kStage) {
    copy_async_wait<1>();
    __syncthreads();
    const int place = stage % 2 * kStage;
    if (first + kStage <= chunks) {
#pragma unroll
      for (int i = 0; i < kStage; i++) multiply(first + i, place + i);
    } else {
      for (int i = 0; first + i < chunks; i++) multiply(first + i, place + i);
    }
    if (first + 2 * kStage < chunks) __syncthreads();  // all have read what the next but one overwrites
    bring(stage + 2);
  }

  // ---- the warps of one column add up, through shared memory that nobody reads any more
  copy_async_wait_all();
  __syncthreads();
  auto* const buffer = reinterpret_cast<float*>(shared);
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < kColumnTiles; i++)
#pragma unroll
    for (int n = 0; n < kRowTiles; n++)
#pragma unroll
      for (int r = 0; r < 4; r++)
        buffer[(along * kRows + 8 * n + 2 * q + (r & 1)) * kSumRow<kColumns> + (across * kColumnTiles + i) * 16 + g + 8 * (r >> 1)] = sums[i][n][r];
  __syncthreads();
  put_out<T, kRows, kColumns, Traits::kAlong, kThreads>(p, tile, first_column, buffer, added, factors);
}

bool divides(const LinearShape& shape, int32_t in_features, int32_t out_features) {
  return in_features % (shape.wgmma ? 64 : 32 * shape.along) == 0 && out_features % shape.columns == 0;
}

template <typename T, int kShape>
cudaError_t launch(const LinearParams& p, cudaStream_t stream) {
  using Traits = LinearTraits<T, kShape>;
  constexpr auto kKernel = linear_kernel<Traits>;
  const size_t own = shared_bytes<Traits>(p.in_features);
  const size_t bytes = own + (p.squares || p.residual ? kAddedBytes<Traits> : 0);
  const int64_t tiles = row_tiles(p, Traits::kRows), column_tiles = p.out_features / Traits::kColumns;
  if (!divides(Traits::kCut, p.in_features, p.out_features) || bytes > shared_bytes_of_device() || tiles > INT32_MAX || column_tiles > 65535)
    return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared<kKernel>(bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent<kKernel>(dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(column_tiles)), dim3(Traits::kThreads), bytes, stream, p,
                                   static_cast<int>(own));
}

// With fewer blocks of wgmma, other shapes are as fast: ViM-Ti's out_proj of one image.
constexpr int64_t kFewBlocks = 20;

// Shared memory of a block; of the shapes without wgmma with all that a norm may need.
size_t bytes_of(int32_t shape, int32_t in_features, bool with_residual) {
  return with_linear_shape(shape, [&](auto index) {
    if constexpr (kLinearShapes[index].wgmma) {
      return linear_wgmma_bytes(index, with_residual);
    } else {
      using Traits = LinearTraits<__half, index>;
      return shared_bytes<Traits>(in_features) + kAddedBytes<Traits>;
    }
  });
}

}  // namespace

bool linear_supported(int32_t in_features, int32_t out_features, DataType type) {
  if (type == DataType::kFloat32 || in_features < 1 || out_features < 1) return false;
  LinearParams p{};
  p.rows = 1, p.in_features = in_features, p.out_features = out_features, p.type = type;
  return linear_shape(p) >= 0;
}

int32_t linear_shape(const LinearParams& p) {
  const int64_t processors = processors_of_device();
  const size_t most = shared_bytes_of_device(), of_processor = shared_bytes_of_processor();
  const bool hopper = linear_wgmma_supported();
  int32_t best = -1;
  double least = 0;
  for (int32_t i = 0; i < kNbLinearShapes; i++) {
    const LinearShape& shape = kLinearShapes[i];
    const size_t bytes = bytes_of(i, p.in_features, p.residual != nullptr);
    if (!divides(shape, p.in_features, p.out_features) || bytes > most || (shape.wgmma && !hopper)) continue;
    const int64_t blocks = row_tiles(p, shape.rows) * (p.out_features / shape.columns);
    if (shape.wgmma && best >= 0 && blocks < kFewBlocks) continue;
    const int64_t a_processor = (blocks + processors - 1) / processors;
    const int64_t hold = std::max<int64_t>(1, static_cast<int64_t>(of_processor / (bytes + 1024))), resident = shape.wgmma ? std::min<int64_t>(shape.wgmma, hold) : hold;
    const auto rounds = static_cast<double>((a_processor + resident - 1) / resident);
    // us, chosen to take the shape that is measured to be the fastest on an H200: of wgmma at 158 to 3,152 rows of ViM-Ti, S and B,
    // of the others at 158 to 394.
    double us;
    if (shape.wgmma) {
      const double brought = 1.44e-3 * (p.in_features / 64) * (shape.rows + shape.columns) * static_cast<double>(a_processor);
      us = 1.8 * rounds + (shape.wgmma > 1 ? 1.15 : 1.) * brought;
    } else {
      const double chunks = p.in_features / (32. * shape.along);
      // Weights count less: they come while the kernel before still runs.
      const double megabytes = 2e-6 * static_cast<double>(blocks) * p.in_features * (shape.rows + .3 * shape.columns);
      const double products = static_cast<double>(a_processor) * chunks * shape.rows / 8 * (shape.columns / 16) * 2 * shape.along;
      us = .12 * megabytes + .12 * rounds * chunks + .002 * products;
    }
    const bool first_of_kind = best < 0 || (shape.wgmma > 0) != (kLinearShapes[best].wgmma > 0);  // wgmma comes last, and is faster
    if (first_of_kind || us < least) best = i, least = us;
  }
  return best;
}

cudaError_t linear(const LinearParams& p, int32_t shape, cudaStream_t stream) {
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || shape < 0 || shape >= kNbLinearShapes) return cudaErrorInvalidValue;
  if (p.residual && (!p.residual_out || !p.squares_out)) return cudaErrorInvalidValue;
  if (p.left < 0 || p.right < 0 || p.left > kMostMerged || p.right > kMostMerged) return cudaErrorInvalidValue;
  if (p.left + p.right > 0 && (!p.residual || !p.merge_weights || p.left + p.right >= p.seqlen || p.rows % p.seqlen != 0)) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  if (kLinearShapes[shape].wgmma)
    return divides(kLinearShapes[shape], p.in_features, p.out_features) ? linear_wgmma(p, shape, stream) : cudaErrorInvalidConfiguration;
  return with_half_type(p.type, [&](auto zero) {
    return with_linear_shape(shape, [&](auto index) {
      if constexpr (!kLinearShapes[index].wgmma) return launch<decltype(zero), index>(p, stream);
      return cudaErrorInvalidConfiguration;
    });
  });
}

cudaError_t linear(const LinearParams& p, cudaStream_t stream) { return linear(p, std::max(linear_shape(p), 0), stream); }

}  // namespace stm
