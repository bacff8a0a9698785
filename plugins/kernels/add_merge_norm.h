// add_merge_norm.h: residual add, sequential token merge (STM, arXiv 2509.22691, eq. 11) and RMSNorm in one pass.
#pragma once
#include "types.h"

namespace stm {

enum class MergeRule : int32_t { kNone = 0, kEdge = 1, kTable = 2 };

struct AddMergeNormParams {  // contiguous; extents in elements
  int32_t batch, seqlen_in, seqlen_out, d_model;
  MergeRule rule;
  int32_t left, right;            // kEdge: sources 0..left-1 -> left; the last `right` tokens -> seqlen_in - right - 1
  int32_t nb_weights;             // columns of merge_weights
  bool residual_per_image;        // residual is (batch, seqlen_in, d_model), else (1, seqlen_in, d_model)
  bool weights_per_image;         // merge_weights is (batch, nb_weights), else (1, nb_weights)
  int32_t cls_index;              // -1: every token; else residual token cls_index with hidden token 0, seqlen_out = 1
  float epsilon;
  DataType type;                  // T
  const float* residual;          // see above
  const void* hidden;             // (batch, seqlen_in, d_model), T; (batch, 1, d_model) if cls_index >= 0
  const float* norm_weight;       // (d_model)
  const float* merge_weights;     // see above; null for kNone
  const int32_t* begin;           // kTable: (seqlen_out + 1), into members
  const int32_t* members;         // kTable: input positions, ascending within a group
  const int32_t* member_weight;   // kTable: column of merge_weights, or -1 for 1
  float* residual_out;            // (batch, seqlen_out, d_model)
  void* normed;                   // (batch, seqlen_out, d_model), T
};

// Enqueues only: no allocation, synchronisation or exception, so it may be captured. Needs no workspace.
cudaError_t add_merge_norm(const AddMergeNormParams& p, cudaStream_t stream);

}  // namespace stm
