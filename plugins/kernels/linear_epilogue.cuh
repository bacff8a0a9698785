// linear_epilogue.cuh: what becomes of a tile of sums in shared memory, whichever kernel of linear.h has made them.
#pragma once
#include "device.cuh"
#include "linear.h"

namespace stm {

template <int kColumns>
constexpr int kSumRow = kColumns + 4;  // floats of a row; no bank conflicts where rows are written two apart

// Rows of x that a block takes. Where tokens merge, an image has tiles of its own, as equal as can be.
struct RowTile {
  int64_t first;
  int rows, image, token;  // token of the image that the first row is; 0 where nothing merges
};

template <int kRows>
__device__ __forceinline__ RowTile row_tile(const LinearParams& p, int64_t index) {
  if (p.left + p.right == 0) return {index * kRows, static_cast<int>(min(p.rows - index * kRows, static_cast<int64_t>(kRows))), 0, 0};
  const int tiles = (p.seqlen + kRows - 1) / kRows, image = static_cast<int>(index / tiles), tile = static_cast<int>(index % tiles);
  const auto begin_of = [&](int i) { return static_cast<int>(static_cast<int64_t>(i) * p.seqlen / tiles); };
  const int begin = begin_of(tile);
  return {static_cast<int64_t>(image) * p.seqlen + begin, begin_of(tile + 1) - begin, image, begin};
}

// What the norm multiplies a row by that holds a sixteenth of the stream, whose squares add up to `total`.
__device__ __forceinline__ float norm_factor(const LinearParams& p, float total) {
  return rsqrtf(total / static_cast<float>(p.in_features) + p.epsilon) * (1.f / kStreamScale);
}

// Starts copying the residual's tile, zeros where it has no row; by kThreads threads.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void bring_residual(const LinearParams& p, const RowTile& tile, int first_column, float* to, int thread) {
  for (int i = thread; i < kRows * (kColumns / 4); i += kThreads) {
    const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
    copy_async_line16(to + row * kSumRow<kColumns> + column,
                      p.residual + (tile.first + min(row, tile.rows - 1)) * p.out_features + first_column + column, row < tile.rows);
  }
}

// Adds up kParts tiles, multiplies rows by the norm's factors if p.squares, adds the residual's tile if p.residual, which lies as
// the sums do, merges the tokens of an image's ends, and stores. All threads of the block.
template <typename T, int kRows, int kColumns, int kParts, int kThreads>
__device__ __forceinline__ void put_out(const LinearParams& p, const RowTile& tile, int first_column, const float* sums, const float* added,
                                        const float* factors) {
  constexpr int kItems = kRows * (kColumns / 8);  // eight columns of a row
  auto add = [&](float (&v)[8], int row, int column, float weight) {
    float u[8] = {};
#pragma unroll
    for (int k = 0; k < kParts; k++)
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 part = load4(sums + (k * kRows + row) * kSumRow<kColumns> + column + j);
        u[j] += part.x, u[j + 1] += part.y, u[j + 2] += part.z, u[j + 3] += part.w;
      }
    if (p.squares) {
#pragma unroll
      for (int j = 0; j < 8; j++) u[j] *= factors[row];
    }
    if (p.residual) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 r = load4(added + row * kSumRow<kColumns> + column + j);
        u[j] += r.x, u[j + 1] += r.y, u[j + 2] += r.z, u[j + 3] += r.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = fmaf(weight, u[j], v[j]);
  };
  const int merged = p.left + p.right, last = p.seqlen - p.right - 1;  // last: the target of the right end
#pragma unroll 1
  for (int begin = 0; begin < kItems; begin += kThreads) {  // all threads, for the shuffle
    const int i = begin + static_cast<int>(threadIdx.x), row = min(i, kItems - 1) / (kColumns / 8), column = i % (kColumns / 8) * 8;
    float v[8] = {};
    add(v, row, column, 1.f);
    bool exists = i < kItems && row < tile.rows;
    int64_t to = tile.first + row;
    if (merged > 0) {
      const int token = tile.token + row;
      exists = exists && token >= p.left && token <= last;
      to = static_cast<int64_t>(tile.image) * (p.seqlen - merged) + token - p.left;
      if (exists && (token == p.left || token == last)) {
        const float* weights = p.merge_weights + (p.weights_per_image ? static_cast<int64_t>(tile.image) * merged : 0);
#pragma unroll 1
        for (int s = 0; s < merged; s++) {
          const bool is_left = s < p.left;
          if (token == (is_left ? p.left : last)) add(v, (is_left ? s : last + 1 + s - p.left) - tile.token, column, weights[s]);
        }
      }
    }
    const int64_t place = to * p.out_features + first_column + column;
    if (p.residual) {
      float square = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) square = fmaf(v[j], v[j], square);
      square += __shfl_xor_sync(~0u, square, 1);
      if (exists) {
        store4(p.residual_out + place, make_float4(v[0], v[1], v[2], v[3]));
        store4(p.residual_out + place + 4, make_float4(v[4], v[5], v[6], v[7]));
        if (i % 2 == 0) p.squares_out[place / kSquaredColumns] = square;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] *= kStreamScale;
    }
    if (!exists) continue;
    const uint2 low = pack4<T>(v[0], v[1], v[2], v[3]), high = pack4<T>(v[4], v[5], v[6], v[7]);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + place) = make_uint4(low.x, low.y, high.x, high.y);
  }
}

}  // namespace stm
