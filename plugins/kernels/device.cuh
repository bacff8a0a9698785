// device.cuh: what several kernels share: element types, fast functions, tensor-core and cp.async wrappers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "types.h"

namespace stm {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

// ---- element types ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) { return *reinterpret_cast<uint32_t*>(&v); }

// Two elements in one register, the first in the low half.
template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return __half22float2(*reinterpret_cast<__half2*>(&v));
  }
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return bits(__floats2half2_rn(a, b)); }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return bits(__floats2bfloat162_rn(a, b)); }
};

template <typename T>
__device__ __forceinline__ float4 unpack4(uint2 v) {
  const float2 a = Pair<T>::unpack(v.x), b = Pair<T>::unpack(v.y);
  return make_float4(a.x, a.y, b.x, b.y);
}
template <typename T>
__device__ __forceinline__ uint2 pack4(float a, float b, float c, float d) {
  return make_uint2(Pair<T>::pack(a, b), Pair<T>::pack(c, d));
}

// Four consecutive elements; the address is a multiple of their size.
template <typename T>
__device__ __forceinline__ float4 load4(const T* p) {
  return unpack4<T>(*reinterpret_cast<const uint2*>(p));
}
template <>
__device__ __forceinline__ float4 load4<float>(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}
template <typename T>
__device__ __forceinline__ void store4(T* p, float4 v) {
  *reinterpret_cast<uint2*>(p) = pack4<T>(v.x, v.y, v.z, v.w);
}
template <>
__device__ __forceinline__ void store4<float>(float* p, float4 v) {
  *reinterpret_cast<float4*>(p) = v;
}

// run(T()) for the type of 16 bits; the kernels that call it have no other.
template <typename Run>
cudaError_t with_half_type(DataType type, Run run) {
  switch (type) {
    case DataType::kFloat16: return run(__half());
    case DataType::kBFloat16: return run(__nv_bfloat16());
    case DataType::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

// ---- registers ------------------------------------------------------------------------------------------------------

// The same value or address, kept in a register: the compiler would compute it anew in every turn of a loop.
__device__ __forceinline__ int kept(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
template <typename P>
__device__ __forceinline__ P* kept(P* shared) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<P*>(__cvta_shared_to_generic(address));
}

// ---- fast functions ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Right to a few units in the last place. The threshold of 20 in the definition changes nothing in float32.
__device__ __forceinline__ float softplus_exact(float x) { return fmaxf(x, 0.f) + log1pf(__expf(-fabsf(x))); }
__device__ __forceinline__ float silu_exact(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Absolute error 2e-7 and no branch: for 16-bit types.
__device__ __forceinline__ float softplus_fast(float x) {
  return fmaf(kLn2, lg2(1.f + ex2(-kLog2e * fabsf(x))), fmaxf(x, 0.f));
}
// x sigmoid(x) = h + h tanh(h), h = x / 2: one special-function operation instead of two. `half_x` is h.
__device__ __forceinline__ float silu_of_half(float half_x) { return fmaf(half_x, tanh_fast(half_x), half_x); }

// 2^(d a) on the FMA pipe, for d a in [-126, 0.5]: value and slope are exact at 0.
__device__ __forceinline__ float ex2_polynomial(float d, float a) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float t = fmaf(d, a, kMagic), f = fmaf(d, a, -(t - kMagic));
  const float p = fmaf(fmaf(fmaf(0.0558f, f, 0.24012f), f, kLn2), f, 1.f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(t) << 23));
}

// ---- tensor cores, sm_80 and later ------------------------------------------------------------------------------

// d += a b, m16n8k16, sums in float32.
template <typename T>
__device__ __forceinline__ void mma_k16(float* d, uint4 a, uint2 b);
template <>
__device__ __forceinline__ void mma_k16<__half>(float* d, uint4 a, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
template <>
__device__ __forceinline__ void mma_k16<__nv_bfloat16>(float* d, uint4 a, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
// d = a b + c, m16n8k8.
__device__ __forceinline__ void mma_k8(float* d, uint32_t a0, uint32_t a1, uint32_t b, const float* c) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------

// 16 bytes; zeros if not `valid` (the source is not read then).
__device__ __forceinline__ void copy_async16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
// 8 bytes, through L1; zeros if not `valid`.
__device__ __forceinline__ void copy_async8(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)), "l"(src),
               "r"(valid ? 8 : 0)
               : "memory");
}
// 16 bytes to shared memory, and all 128 around them to L2.
__device__ __forceinline__ void copy_async_line16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)),
               "l"(src)
               : "memory");
}
// The same; zeros if not `valid` (the source is not read then).
__device__ __forceinline__ void copy_async_line16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)),
               "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- matrices in registers, sm_80 and later ---------------------------------------------------------------------

// d = a b + c, m16n8k16, sums in float32.
template <typename T>
__device__ __forceinline__ void mma_k16_onto(float* d, uint4 a, uint2 b, const float* c);
template <>
__device__ __forceinline__ void mma_k16_onto<__half>(float* d, uint4 a, uint2 b, const float* c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void mma_k16_onto<__nv_bfloat16>(float* d, uint4 a, uint2 b, const float* c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// Four 8 x 8 matrices of 16-bit elements: lane l gives the shared-memory address of row l % 8 of matrix l / 8 and gets
// elements (l / 4, 2 (l % 4)) and the one after it of each.
__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
// Two of them: lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_two_matrices(uint32_t address, uint32_t& first, uint32_t& second) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(first), "=r"(second) : "r"(address));
}

}  // namespace stm
