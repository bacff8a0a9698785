// conv_xproj_plugin.h: the creator of StmConvXProj.
#pragma once
#include "op.h"

namespace stm::trt {
OpEntry conv_xproj_op() noexcept;
}  // namespace stm::trt
