// wgmma.cuh: Hopper's products of a warpgroup, and barriers in shared memory, for kernels whose warps have different work. Only
// in code for sm_90a.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace stm {

// A tile of 16-bit elements in shared memory, rows of 128 bytes, 8 rows a swizzled atom. `address` is a multiple of 1,024.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
__device__ __forceinline__ void wgmma_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Makes shared memory visible to wgmma: what this thread wrote, for those who pass the next barrier, or what others wrote before a
// barrier that this thread has passed, for its own products.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The compiler must not move its uses of the sums across this.
template <int kCount>
__device__ __forceinline__ void pin(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(v[i])::"memory");
}

// d (+)= a b, m64 n(8 kTiles) k16, both from shared memory, sums in float32; d is begun anew if not `add`.
template <typename T, int kTiles>
struct Wgmma;
#define STM_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STM_WGMMA(TYPE, NAME, TILES, N, REGISTERS, A, B, ADD, ...)                                                   \
  template <>                                                                                                        \
  struct Wgmma<TYPE, TILES> {                                                                                        \
    static __device__ __forceinline__ void run(float (&d)[4 * TILES], uint64_t a, uint64_t b, int add) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" REGISTERS "}, " A ", " B      \
                   ", p, 1, 1, 0, 0;\n}\n"                                                                           \
                   : __VA_ARGS__                                                                                     \
                   : "l"(a), "l"(b), "r"(add));                                                                      \
    }                                                                                                                \
  };
#define STM_R20 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19"
#define STM_R24 STM_R20 ",%20,%21,%22,%23"
#define STM_R28 STM_R24 ",%24,%25,%26,%27"
#define STM_R40 STM_R28 ",%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define STM_D20(d) STM_D4(d, 0), STM_D4(d, 4), STM_D4(d, 8), STM_D4(d, 12), STM_D4(d, 16)
#define STM_D24(d) STM_D20(d), STM_D4(d, 20)
#define STM_D28(d) STM_D24(d), STM_D4(d, 24)
#define STM_D40(d) STM_D28(d), STM_D4(d, 28), STM_D4(d, 32), STM_D4(d, 36)
STM_WGMMA(__half, "f16", 5, "40", STM_R20, "%20", "%21", "%22", STM_D20(d))
STM_WGMMA(__half, "f16", 6, "48", STM_R24, "%24", "%25", "%26", STM_D24(d))
STM_WGMMA(__half, "f16", 7, "56", STM_R28, "%28", "%29", "%30", STM_D28(d))
STM_WGMMA(__half, "f16", 10, "80", STM_R40, "%40", "%41", "%42", STM_D40(d))
STM_WGMMA(__nv_bfloat16, "bf16", 5, "40", STM_R20, "%20", "%21", "%22", STM_D20(d))
STM_WGMMA(__nv_bfloat16, "bf16", 6, "48", STM_R24, "%24", "%25", "%26", STM_D24(d))
STM_WGMMA(__nv_bfloat16, "bf16", 7, "56", STM_R28, "%28", "%29", "%30", STM_D28(d))
STM_WGMMA(__nv_bfloat16, "bf16", 10, "80", STM_R40, "%40", "%41", "%42", STM_D40(d))
#undef STM_WGMMA
#undef STM_D40
#undef STM_D28
#undef STM_D24
#undef STM_D20
#undef STM_R40
#undef STM_R28
#undef STM_R24
#undef STM_R20
#undef STM_D4

// ---- barriers in shared memory that count arrivals: a waiter names the phase (0, 1, 0, ...) whose end it waits for
__device__ __forceinline__ void barrier_init(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(at) : "memory");
}
// Arrives when all copies that this thread has issued so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t at, int phase) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}\n" ::"r"(at), "r"(phase)
      : "memory");
}

// A ring of slots and the phase of its round.
template <int kSlots>
struct Ring {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
};

}  // namespace stm
#endif
