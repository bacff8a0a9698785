// conv_xproj.h: causal depthwise conv + SiLU of both directions, then x_proj (Mamba, Gu & Dao 2023, algorithm 2).
//   u[dir] = silu(conv(x)), x_dbl[dir] = u[dir] x_proj_weight[dir]^T; u is never stored.
#pragma once
#include "types.h"

namespace stm {

struct ConvXProjParams {  // contiguous; extents in elements
  int32_t batch, seqlen, d_inner, row;  // row: round_up(dt_rank + 2 d_state, 8), columns of x_dbl
  DataType type;                        // T
  const void* xz;                       // (batch, seqlen, 2 d_inner), T; x is the first half of a row
  const float* conv_weight;             // (2, d_inner, 4)
  const float* conv_bias;               // (2, d_inner)
  const void* x_proj_weight;            // (2, row, d_inner), T
  void* x_dbl;                          // (2, batch, seqlen, row), T
  void* workspace;                      // conv_xproj_workspace_bytes (none today: may be null)
};

// Stored in engines: never renumber; zero is reserved by TensorRT.
// kSimple: every type and extent (row a multiple of 8). kTensorCore: fp16, bf16; d_inner a multiple of 32, row <= 96.
// kTensorCore rounds u to T, for some hundred to some thousand tokens the taps as well.
enum class ConvXProjTactic : int32_t { kSimple = 1, kTensorCore = 2 };

// The tactic for these extents and type, or every one that can run them, fastest first; returns their number (at most capacity).
int32_t conv_xproj_tactics(int32_t seqlen, int32_t d_inner, int32_t row, DataType type, int32_t* tactics,
                           int32_t capacity, bool every = false);
size_t conv_xproj_workspace_bytes(int64_t batch, int64_t seqlen, int64_t d_inner, int64_t row, DataType type);
// Enqueues only: no allocation, synchronisation or exception, so it may be captured.
cudaError_t conv_xproj(const ConvXProjParams& p, ConvXProjTactic tactic, cudaStream_t stream);

}  // namespace stm
