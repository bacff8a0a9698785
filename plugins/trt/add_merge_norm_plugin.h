// add_merge_norm_plugin.h: the creator of StmAddMergeNorm.
#pragma once
#include "op.h"

namespace stm::trt {
OpEntry add_merge_norm_op() noexcept;
}  // namespace stm::trt
