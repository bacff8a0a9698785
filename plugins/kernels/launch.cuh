// launch.cuh: programmatic dependent launch, so that a kernel's start and first loads hide behind the end of the one before,
// and launches whose blocks wait for each other.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <utility>

namespace stm {

// Of the current device; `otherwise` where it cannot be asked.
inline int device_attribute(cudaDeviceAttr what, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, what, device);
  return value;
}

// Multiprocessors of the current device; an H100's where it cannot be asked. So are the others.
inline int processors_of_device() { return device_attribute(cudaDevAttrMultiProcessorCount, 132); }

// Shared memory that a block may ask for, in bytes.
inline size_t shared_bytes_of_device() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * 1024));
}

// Shared memory of a multiprocessor, in bytes.
inline size_t shared_bytes_of_processor() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024));
}

// Dynamic shared memory beyond 48 KB, with what the kernel has `of_its_own`, must be asked for, once a kernel and device; never
// less than before, since another thread may be about to launch with that.
template <auto kKernel>
cudaError_t allow_shared(size_t bytes, size_t of_its_own = 0) {
  constexpr int kDevices = 64;
  static std::atomic<size_t> allowed[kDevices];
  static std::mutex asking;
  if (bytes + of_its_own <= 48 * 1024) return cudaSuccess;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device >= kDevices) return cudaErrorInvalidDevice;
  if (bytes <= allowed[device].load(std::memory_order_acquire)) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(asking);
  if (bytes <= allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) allowed[device].store(bytes, std::memory_order_release);
  return status;
}

// A kernel launched by launch_dependent may start while the one before it in the stream still runs. Before
// wait_for_previous() it may read only what no kernel writes (weights, tables), and write nothing; every block must call
// it, because later kernels count on "this one has ended" meaning "all before it have".
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once every block has said so (or ended). It sees nothing of this one until its own wait.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What ask(device) says of the current device, 0 or more, asked once a device and kind of question; 0 where there is none.
template <typename Ask>
int once_a_device(Ask ask) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // one more than the answer
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = ask(device) + 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer - 1;
}

// Whether the code that this device runs for the kernel has the wait: compiled for sm_90 or later, and the device is one.
template <auto kKernel>
bool can_overlap() {
  return once_a_device([](int device) {
    cudaFuncAttributes attributes{};
    int major = 0;
    const bool asked = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
    return asked && major >= 9 && attributes.ptxVersion >= 90 ? 1 : 0;
  });
}

// With one attribute, or with none where that is null.
template <auto kKernel, typename... Arguments>
cudaError_t launch_with(cudaLaunchAttribute* attribute, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attribute, config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, std::forward<Arguments>(arguments)...);
}

// launch_dependent<kernel>(grid, block, shared bytes, stream, arguments...)
template <auto kKernel, typename... Arguments>
cudaError_t launch_dependent(Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with<kKernel>(can_overlap<kKernel>() ? &attribute : nullptr, std::forward<Arguments>(arguments)...);
}

// What the current device runs of a kernel at once.
struct Residency {
  int processors, blocks;               // of a multiprocessor, by registers, threads and the kernel's own shared memory
  size_t of_processor, of_block;        // shared memory, in bytes
  int64_t with_shared(size_t bytes) const {  // blocks, if one has so much shared memory in all
    constexpr size_t kOfTheSystem = 1024, kGranule = 128;
    if (bytes > of_block) return 0;
    bytes = (bytes + kGranule - 1) / kGranule * kGranule + kOfTheSystem;
    return int64_t{processors} * std::min<int64_t>(blocks, static_cast<int64_t>(of_processor / bytes));
  }
};

// No blocks where it cannot promise that all of a grid run at once. Some calls of the CUDA runtime: once a launch, not in a loop.
template <auto kKernel>
Residency residency(int threads) {
  const int blocks = once_a_device([threads](int) {
    int most = 0;
    if (device_attribute(cudaDevAttrCooperativeLaunch, 0) &&
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, kKernel, threads, 0) == cudaSuccess)
      return most;
    cudaGetLastError();
    return 0;
  });
  return {processors_of_device(), blocks, shared_bytes_of_processor(), shared_bytes_of_device()};
}

// launch_resident<kernel>(the same): its blocks may wait for each other, since all run at once, or it is
// cudaErrorCooperativeLaunchTooLarge.
template <auto kKernel, typename... Arguments>
cudaError_t launch_resident(Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch_with<kKernel>(&attribute, std::forward<Arguments>(arguments)...);
}

}  // namespace stm
