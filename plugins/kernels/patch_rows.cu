// patch_rows.cu: im2row. It only moves values and rounds them to T, so it should run at the speed of a copy.
#include "patch_rows.h"

#include "device.cuh"
#include "launch.cuh"

namespace stm {
namespace {

constexpr int kChannels = 3;

// A block owns a strip: one channel of one row of patches of one image. Each patch of it is patch^2 values in a row of
// the output, at `to`; `from` is the strip's first pixel.
template <typename T>
struct Strip {
  const float* from;
  T* to;
  int64_t row;  // elements of a row
  int first_token, grid_w, cls_index;
  bool first_of_image;

  __device__ __forceinline__ Strip(const PatchRowsParams& p, int grid_h, int grid_w_)
      : row(static_cast<int64_t>(kChannels) * p.patch * p.patch), grid_w(grid_w_), cls_index(p.cls_index) {
    const int channel = static_cast<int>(blockIdx.x) % kChannels, rest = static_cast<int>(blockIdx.x) / kChannels;
    const int gy = rest % grid_h, b = rest / grid_h;
    const int64_t seqlen = static_cast<int64_t>(grid_h) * grid_w + (cls_index >= 0);
    const int64_t plane = static_cast<int64_t>(b) * kChannels + channel, y = static_cast<int64_t>(gy) * p.stride;
    from = p.images + (plane * p.height + y) * p.width;
    to = static_cast<T*>(p.rows) + b * seqlen * row + static_cast<int64_t>(channel) * p.patch * p.patch;
    first_token = gy * grid_w, first_of_image = gy == 0;
  }
  // Where the values of the strip's patch gx go.
  __device__ __forceinline__ T* at(int gx) const {
    const int token = first_token + gx;
    return to + (token + (cls_index >= 0 && token >= cls_index)) * row;
  }
  // Where the zeros go, for the block that writes them; else null.
  __device__ __forceinline__ T* zeros() const {
    return cls_index >= 0 && first_of_image ? to + cls_index * row : nullptr;
  }
};

template <typename T_>
struct VectorTraits {
  using T = T_;
  static constexpr int kWidth = 4, kInFlight = 4;  // pixels a load, loads a thread
  static constexpr int kThreads = 256, kMaxThreads = 1024;
};

// Thread (x, y) copies the x-th four pixels of patches y, y + blockDim.y, ... of the strip: a warp reads runs of whole
// sectors and writes 128 consecutive elements. Needs patch, stride and width to be multiples of 4.
template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads) void vector_patch_rows_kernel(
    const __grid_constant__ PatchRowsParams p, int grid_h, int grid_w) {
  using T = typename Traits::T;
  constexpr int kWidth = Traits::kWidth, kInFlight = Traits::kInFlight;
  const Strip<T> strip(p, grid_h, grid_w);
  const int quads = p.patch / kWidth, place = static_cast<int>(threadIdx.x) * kWidth;
  const int ky = static_cast<int>(threadIdx.x) / quads, kx = static_cast<int>(threadIdx.x) % quads * kWidth;
  const float* from = strip.from + static_cast<int64_t>(ky) * p.width + kx;
  const int step = static_cast<int>(blockDim.y);
  wait_for_previous();
  let_next_start();
  for (int gx = static_cast<int>(threadIdx.y); gx < grid_w; gx += kInFlight * step) {
    float4 pixels[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int mine = gx + i * step;
      // Pixels are done with; the rows, which the GEMM reads next, should stay in the L2 cache instead.
      const float* pixel = from + static_cast<int64_t>(mine) * p.stride;
      if (mine < grid_w) pixels[i] = __ldcs(reinterpret_cast<const float4*>(pixel));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int mine = gx + i * step;
      if (mine < grid_w) store4(strip.at(mine) + place, pixels[i]);
    }
  }
  T* zeros = strip.zeros();
  if (zeros && threadIdx.y == 0) store4(zeros + place, make_float4(0.f, 0.f, 0.f, 0.f));
}

template <typename T_>
struct SimpleTraits {
  using T = T_;
  static constexpr int kThreads = 256;
};

// Any sizes, an element at a time.
template <typename Traits>
__global__ __launch_bounds__(Traits::kThreads) void simple_patch_rows_kernel(const __grid_constant__ PatchRowsParams p,
                                                                             int grid_h, int grid_w) {
  using T = typename Traits::T;
  const Strip<T> strip(p, grid_h, grid_w);
  const int plane = p.patch * p.patch;
  wait_for_previous();
  let_next_start();
  for (int i = static_cast<int>(threadIdx.x); i < grid_w * plane; i += Traits::kThreads) {
    const int gx = i / plane, place = i % plane;
    const int ky = place / p.patch, kx = place % p.patch;
    const float* from = strip.from + static_cast<int64_t>(ky) * p.width + static_cast<int64_t>(gx) * p.stride + kx;
    strip.at(gx)[place] = from_float<T>(*from);
  }
  if (T* zeros = strip.zeros())
    for (int i = static_cast<int>(threadIdx.x); i < plane; i += Traits::kThreads) zeros[i] = from_float<T>(0.f);
}

template <typename T>
cudaError_t dispatch(const PatchRowsParams& p, int grid_h, int grid_w, cudaStream_t stream) {
  using Vector = VectorTraits<T>;
  using Simple = SimpleTraits<T>;
  const int64_t blocks = static_cast<int64_t>(p.batch) * grid_h * kChannels;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  const int quads = p.patch * p.patch / Vector::kWidth;  // of a patch's channel
  const bool aligned = p.patch % 4 == 0 && p.stride % 4 == 0 && p.width % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(p.images) % 16 == 0 && reinterpret_cast<uintptr_t>(p.rows) % 16 == 0;
  if (!aligned || quads > Vector::kMaxThreads)
    return launch_dependent<simple_patch_rows_kernel<Simple>>(grid, Simple::kThreads, 0, stream, p, grid_h, grid_w);
  const int patches = quads < Vector::kThreads ? Vector::kThreads / quads : 1;  // that a block copies at once
  const dim3 block(static_cast<unsigned>(quads), static_cast<unsigned>(patches < grid_w ? patches : grid_w));
  return launch_dependent<vector_patch_rows_kernel<Vector>>(grid, block, 0, stream, p, grid_h, grid_w);
}

bool valid(const PatchRowsParams& p) {
  if (p.batch < 0 || p.patch < 1 || p.patch > kMaxPatch || p.stride < 1 || p.cls_index < -1) return false;
  if (p.height < p.patch || p.width < p.patch) return false;
  const int64_t seqlen = patch_rows_seqlen(p.height, p.width, p.patch, p.stride, p.cls_index);
  const int64_t strip = (static_cast<int64_t>(p.width - p.patch) / p.stride + 1) * p.patch * p.patch;
  return p.cls_index < seqlen && seqlen <= INT32_MAX && strip <= INT32_MAX - 1024;  // 32-bit indices in a strip
}

}  // namespace

cudaError_t patch_rows(const PatchRowsParams& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  const int grid_h = (p.height - p.patch) / p.stride + 1, grid_w = (p.width - p.patch) / p.stride + 1;
  switch (p.type) {
    case DataType::kFloat32: return dispatch<float>(p, grid_h, grid_w, stream);
    case DataType::kFloat16: return dispatch<__half>(p, grid_h, grid_w, stream);
    case DataType::kBFloat16: return dispatch<__nv_bfloat16>(p, grid_h, grid_w, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
