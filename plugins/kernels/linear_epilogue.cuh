// linear_epilogue.cuh: what becomes of a tile of sums in shared memory, whichever kernel of linear.h has made them.
#pragma once
#include "device.cuh"
#include "linear.h"

namespace stm {

template <int kColumns>
constexpr int kSumRow = kColumns + 4;  // floats of a row; no bank conflicts where rows are written two apart

// Adds up kParts tiles, multiplies rows by the norm's factors if p.squares, adds the residual's tile if p.residual, which
// lies as the sums do, and stores. All threads of the block.
template <typename T, int kRows, int kColumns, int kParts, int kThreads>
__device__ __forceinline__ void put_out(const LinearParams& p, int64_t first_row, int first_column, int rows, const float* sums, const float* added,
                                        const float* factors) {
  T* y = static_cast<T*>(p.y) + first_row * p.out_features + first_column;
  constexpr int kItems = kRows * (kColumns / 8);  // eight columns of a row
#pragma unroll 1
  for (int begin = 0; begin < kItems; begin += kThreads) {  // all threads, for the shuffle
    const int i = begin + static_cast<int>(threadIdx.x), row = min(i, kItems - 1) / (kColumns / 8), column = i % (kColumns / 8) * 8;
    float v[8] = {};
#pragma unroll
    for (int k = 0; k < kParts; k++)
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 part = load4(sums + (k * kRows + row) * kSumRow<kColumns> + column + j);
        v[j] += part.x, v[j + 1] += part.y, v[j + 2] += part.z, v[j + 3] += part.w;
      }
    if (p.squares) {
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] *= factors[row];
    }
    const bool exists = i < kItems && row < rows;
    if (p.residual) {
      float square = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 r = load4(added + row * kSumRow<kColumns> + column + j);
        v[j] += r.x, v[j + 1] += r.y, v[j + 2] += r.z, v[j + 3] += r.w;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) square = fmaf(v[j], v[j], square);
      square += __shfl_xor_sync(~0u, square, 1);
      if (exists) {
        float* out = p.residual_out + (first_row + row) * p.out_features + first_column + column;
        store4(out, make_float4(v[0], v[1], v[2], v[3]));
        store4(out + 4, make_float4(v[4], v[5], v[6], v[7]));
        if (i % 2 == 0) p.squares_out[((first_row + row) * p.out_features + first_column + column) / kSquaredColumns] = square;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] *= kStreamScale;
    }
    if (!exists) continue;
    const uint2 low = pack4<T>(v[0], v[1], v[2], v[3]), high = pack4<T>(v[4], v[5], v[6], v[7]);
    *reinterpret_cast<uint4*>(y + static_cast<int64_t>(row) * p.out_features + column) = make_uint4(low.x, low.y, high.x, high.y);
  }
}

}  // namespace stm
