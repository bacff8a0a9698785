// mamba_scan.h: both directions of a ViM mixer between x_proj and out_proj in one call: conv + SiLU (recomputed),
// dt_proj, softplus, selective scan, D skip, sum of the directions, gate; and the merge weights of the next layer.
//   h_t = exp(s_t delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t   (Mamba, sec. 2; Euler step for B)
#pragma once
#include "types.h"

namespace stm {

enum class WeightMode : int32_t { kNone = 0, kHsp = 1, kDecay = 2, kHspLiteral = 3 };

struct MambaScanParams {  // contiguous; extents in elements
  int32_t batch, seqlen, d_inner, d_state, dt_rank, row;
  int32_t cls_index;          // -1: every token; else y holds this token only
  int32_t nb_pairs;           // merge pairs (0 if weight_mode is kNone)
  WeightMode weight_mode;
  DataType type;              // T
  const void* xz;             // (batch, seqlen, 2 d_inner), T
  const void* x_dbl;          // (2, batch, seqlen, row), T: dt, B, C, padding
  const float* conv_weight;   // (2, d_inner, 4)
  const float* conv_bias;     // (2, d_inner)
  const void* dt_weight;      // (2, d_inner, dt_rank), T
  const float* dt_bias;       // (2, d_inner)
  const float* A;             // (2, d_inner, d_state), negative
  const float* D;             // (2, d_inner)
  const int32_t* merge_pairs; // (nb_pairs, 2): source, target; null if none
  const float* decay_scale;   // (seqlen), or null for 1
  void* y;                    // (batch, seqlen or 1, d_inner), T
  float* merge_weights;       // (batch, nb_pairs), or null
  void* workspace;            // mamba_scan_workspace_bytes
  void* meetings;             // kMeetingBytes, as merge_scratch. Two passes over L meet there within one kernel; with null they
                              // are two
  void* merge_scratch;        // kMergeScratchBytes, zero before the first call that uses them; calls that share them must not
                              // overlap. Blocks that share the weights of a few pairs meet there; with null, one block has
                              // them, which is slower and rounds differently
};
constexpr int32_t kMeetings = 768;  // of 16 channels of an image each
constexpr size_t kMeetingBytes = 2 * kMeetings * sizeof(uint32_t);
constexpr int32_t kMergeBlocks = 1024;  // that can meet: a ticket and the sums of eight pairs for each
constexpr size_t kMergeScratchBytes = kMergeBlocks * (sizeof(int32_t) + 8 * 2 * sizeof(float));

// Stored in engines: never renumber; zero is reserved by TensorRT.
// kSimple: every type and extent. kWalkMma, for large batches: fp16, bf16; d_state 16, d_inner a multiple of 16 (of 32 for
// its full speed), dt_rank one of 4 and at most 64, row = round_up(dt_rank + 32, 8); the state goes through fp16, so |h|
// must stay below 65,504. kWalkMmaTwoPass, for long sequences in small batches: the same from 209 tokens; L is cut into
// pieces, and a first pass computes the state before each; where p.meetings is there and the whole grid fits the card, both are
// one kernel, a cooperative launch. kSegments, for small batches of at most 208 tokens: the same
// types, d_state and dt_rank, the same bound on |h|; d_inner a multiple of 4.
// kAdaptive: one of these three, chosen at each launch by batch, extents and card. TensorRT times a tactic at a profile's opt
// batch alone and runs it at every other: a profile 1:8:64 took kSegments and was 2.4 times too slow at 64.
enum class MambaScanTactic : int32_t { kSimple = 1, kWalkMma = 2, kSegments = 3, kWalkMmaTwoPass = 4, kAdaptive = 5 };

// The tactic for these extents and type; `every`: also those that kAdaptive chooses from, and kSimple, last. Returns their
// number (at most capacity).
int32_t mamba_scan_tactics(int32_t seqlen, int32_t d_inner, int32_t d_state, int32_t dt_rank, int32_t row, DataType type,
                           int32_t* tactics, int32_t capacity, bool every = false);
// What kWalkMmaTwoPass needs, and no other tactic; does not shrink with the batch. 0 up to 208 tokens: then workspace may be
// null.
size_t mamba_scan_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner, int64_t d_state, int64_t nb_pairs,
                                  DataType type);
// Enqueues only: no allocation, synchronisation or exception, so it may be captured.
cudaError_t mamba_scan(const MambaScanParams& p, MambaScanTactic tactic, cudaStream_t stream);

}  // namespace stm
