// linear_plugin.h: the creator of StmLinear.
#pragma once
#include "op.h"

namespace stm::trt {
OpEntry linear_op() noexcept;
}  // namespace stm::trt
