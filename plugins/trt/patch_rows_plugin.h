// patch_rows_plugin.h: the creator of StmPatchRows.
#pragma once
#include "op.h"

namespace stm::trt {
OpEntry patch_rows_op() noexcept;
}  // namespace stm::trt
