// mamba_scan.cu: checks the extents, chooses the kernel, adds the merge weights.
#include "mamba_scan.h"

#include "launch.cuh"
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

// Where segments go, they are the fastest while there are at most so many channels (of all images) for each multiprocessor.
// Measured on an H100 at 197 tokens: 7 us from 3 to 6 of them, 10.5 at 12, 20 at 23, where the walk takes 20 whatever their
// number up to 24.
constexpr int32_t kSegmentsChannels = 21;

bool segments_are_fastest(const MambaScanParams& p, int32_t processors) {
  return mamba_scan_segments_supported(p.seqlen, p.d_inner, p.d_state, p.dt_rank, p.type) &&
         static_cast<int64_t>(p.batch) * p.d_inner <= static_cast<int64_t>(processors) * kSegmentsChannels;
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
  if (mamba_scan_walk_supported(d_inner, d_state, dt_rank, row, type)) add(MambaScanTactic::kAdaptive);
  if (every && mamba_scan_walk_supported(d_inner, d_state, dt_rank, row, type)) add(MambaScanTactic::kWalkMma);
  if (every && mamba_scan_walk_two_pass_supported(seqlen, d_inner, d_state, dt_rank, row, type))
    add(MambaScanTactic::kWalkMmaTwoPass);
  if (every && mamba_scan_segments_supported(seqlen, d_inner, d_state, dt_rank, type)) add(MambaScanTactic::kSegments);
  if (every || count == 0) add(MambaScanTactic::kSimple);
  return count;
}

size_t mamba_scan_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner, int64_t d_state, int64_t,
                                  DataType type) {
  // Wrappers ask before the tactic is known: the need of the only one that has any.
  return type == DataType::kFloat32 || d_state != 16 ? 0 : mamba_scan_walk_workspace_bytes(batch, seqlen, d_inner);
}

cudaError_t mamba_scan(const MambaScanParams& p, MambaScanTactic tactic, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  const int32_t processors = processors_of_device();
  switch (tactic) {
    case MambaScanTactic::kSimple: status = mamba_scan_simple(p, stream); break;
    case MambaScanTactic::kWalkMma:
      if (mamba_scan_walk_supported(p.d_inner, p.d_state, p.dt_rank, p.row, p.type))
        status = mamba_scan_walk(p, processors, WalkPasses::kOne, stream);
      break;
    case MambaScanTactic::kWalkMmaTwoPass:
      if (mamba_scan_walk_two_pass_supported(p.seqlen, p.d_inner, p.d_state, p.dt_rank, p.row, p.type))
        status = mamba_scan_walk(p, processors, WalkPasses::kTwo, stream);
      break;
    case MambaScanTactic::kSegments:
      if (mamba_scan_segments_supported(p.seqlen, p.d_inner, p.d_state, p.dt_rank, p.type))
        status = mamba_scan_segments(p, processors, stream);
      break;
    case MambaScanTactic::kAdaptive:
      if (segments_are_fastest(p, processors)) status = mamba_scan_segments(p, processors, stream);
      else if (mamba_scan_walk_supported(p.d_inner, p.d_state, p.dt_rank, p.row, p.type))
        status = mamba_scan_walk(p, processors, WalkPasses::kFaster, stream);
      break;
  }
  // The other kernels carry the merge weights in their own grid.
  return status == cudaSuccess && tactic == MambaScanTactic::kSimple ? merge_weights(p, stream) : status;
}

}  // namespace stm
