// mamba_scan_plugin.h: the creator of StmMambaScan.
#pragma once
#include "op.h"

namespace stm::trt {
OpEntry mamba_scan_op() noexcept;
}  // namespace stm::trt
