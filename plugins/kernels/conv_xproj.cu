// conv_xproj.cu: checks the extents and chooses the kernel.
#include "conv_xproj.h"

#include "conv_xproj_impl.h"

namespace stm {
namespace {

constexpr int32_t kMaxSeqlen = 16384;

bool valid(int32_t seqlen, int32_t d_inner, int32_t row, DataType type) {
  const bool known = type == DataType::kFloat32 || type == DataType::kFloat16 || type == DataType::kBFloat16;
  return known && seqlen >= 1 && seqlen <= kMaxSeqlen && d_inner >= 1 && row >= 8 && row % 8 == 0;
}

}  // namespace

int32_t conv_xproj_tactics(int32_t seqlen, int32_t d_inner, int32_t row, DataType type, int32_t* tactics,
                           int32_t capacity, bool every) {
  if (!valid(seqlen, d_inner, row, type)) return 0;
  int32_t count = 0;
  auto add = [&](ConvXProjTactic tactic) {
    if (count < capacity) tactics[count++] = static_cast<int32_t>(tactic);
  };
  if (conv_xproj_tensor_core_supported(d_inner, row, type)) add(ConvXProjTactic::kTensorCore);
  if (every || count == 0) add(ConvXProjTactic::kSimple);
  return count;
}

size_t conv_xproj_workspace_bytes(int64_t, int64_t, int64_t, int64_t, DataType) { return 0; }

cudaError_t conv_xproj(const ConvXProjParams& p, ConvXProjTactic tactic, cudaStream_t stream) {
  if (!valid(p.seqlen, p.d_inner, p.row, p.type) || p.batch < 0) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  switch (tactic) {
    case ConvXProjTactic::kSimple: return conv_xproj_simple(p, stream);
    case ConvXProjTactic::kTensorCore:
      if (conv_xproj_tensor_core_supported(p.d_inner, p.row, p.type)) return conv_xproj_tensor_core(p, stream);
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace stm
