// mamba_scan.cu: checks the extents, chooses the kernel, adds the merge weights.
#include "mamba_scan.h"

#include "mamba_scan_impl.h"

namespace stm {
namespace {

constexpr int32_t kMaxSeqlen = 16384, kMaxStates = 64, kMaxGridY = 65535;

bool known(DataType type) {
  return type == DataType::kFloat32 || type == DataType::kFloat16 || type == DataType::kBFloat16;
}

bool valid(const MambaScanParams& p) {
  if (!known(p.type) || p.batch < 0 || p.batch > kMaxGridY || p.seqlen < 1 || p.seqlen > kMaxSeqlen) return false;
  if (p.d_inner < 1 || p.d_state < 1 || p.d_state > kMaxStates || p.dt_rank < 1) return false;
  if (p.row % 8 != 0 || p.row < p.dt_rank + 2 * p.d_state) return false;
  if (p.cls_index < -1 || p.cls_index >= p.seqlen || p.nb_pairs < 0) return false;
  if (p.weight_mode != WeightMode::kNone && p.nb_pairs > 0 && (!p.merge_pairs || !p.merge_weights)) return false;
  return true;
}

bool adaptive_supported(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type) {
  return mamba_scan_walk_supported(d_inner, d_state, dt_rank, row, type) &&
         mamba_scan_segments_supported(seqlen, d_inner, d_state, dt_rank, row, type);
}

// Which of the two is faster turns on how many channels there are for each multiprocessor. Measured on an H100 (132 of
// them): at 197 tokens segments take 7 to 31 us from 384 to 3,072 channels, then 10 us more a thousand; the walk takes
// 35 us up to some 8,000. Beyond 208 tokens segments walk everything twice.
bool prefer_segments(const MambaScanParams& p) {
  int device = 0, processors = 132;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t channels = static_cast<int64_t>(p.batch) * p.d_inner;
  return channels <= static_cast<int64_t>(processors) * (p.seqlen <= 208 ? 23 : 12);
}

}  // namespace

int32_t mamba_scan_tactics(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type,
                           int32_t* tactics, int32_t capacity, bool every) {
  int32_t count = 0;
  auto add = [&](MambaScanTactic tactic) {
    if (count < capacity) tactics[count++] = static_cast<int32_t>(tactic);
  };
  if (!known(type) || seqlen < 1 || seqlen > kMaxSeqlen || d_inner < 1 || d_state < 1 || d_state > kMaxStates ||
      dt_rank < 1 || row % 8 != 0 || row < dt_rank + 2 * d_state)
    return 0;
  if (adaptive_supported(seqlen, d_inner, d_state, dt_rank, row, type)) add(MambaScanTactic::kAdaptive);
  if (every && mamba_scan_walk_supported(d_inner, d_state, dt_rank, row, type)) add(MambaScanTactic::kWalkMma);
  if (every && mamba_scan_segments_supported(seqlen, d_inner, d_state, dt_rank, row, type)) add(MambaScanTactic::kSegments);
  add(MambaScanTactic::kSimple);
  return count;
}

size_t mamba_scan_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner, int64_t d_state, int64_t,
                                  DataType type) {
  // Wrappers ask before the tactic is known: the largest need of any tactic, and only kSegments has one.
  if (type == DataType::kFloat32 || d_state != 16) return 0;
  return mamba_scan_segments_workspace_bytes(batch, seqlen, d_inner);
}

cudaError_t mamba_scan(const MambaScanParams& p, MambaScanTactic tactic, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  if (tactic == MambaScanTactic::kAdaptive) {
    tactic = prefer_segments(p) ? MambaScanTactic::kSegments : MambaScanTactic::kWalkMma;
  }
  switch (tactic) {
    case MambaScanTactic::kSimple: status = mamba_scan_simple(p, stream); break;
    case MambaScanTactic::kWalkMma:
      if (mamba_scan_walk_supported(p.d_inner, p.d_state, p.dt_rank, p.row, p.type))
        status = mamba_scan_walk(p, stream);
      break;
    case MambaScanTactic::kSegments:
      if (mamba_scan_segments_supported(p.seqlen, p.d_inner, p.d_state, p.dt_rank, p.row, p.type))
        status = mamba_scan_segments(p, stream);
      break;
    case MambaScanTactic::kWalkMmaTwoPass: break;  // number reserved
    case MambaScanTactic::kAdaptive: break;        // resolved above
  }
  // The other kernels carry the merge weights in their own grid.
  return status == cudaSuccess && tactic == MambaScanTactic::kSimple ? merge_weights(p, stream) : status;
}

}  // namespace stm
