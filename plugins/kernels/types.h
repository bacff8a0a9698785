// types.h: element types and tactic numbers shared by the kernels and their wrappers. Knows CUDA, no framework.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace stm {

// Raise when results, tactic numbers or timings change: it is part of every timing-cache key.
constexpr int32_t kKernelVersion = 11;

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace stm
