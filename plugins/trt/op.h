// op.h: what the library shows of an op: its creator, and a description for tests and tools.
#pragma once
#include "fields.h"
#include "tensors.h"

namespace stm::trt {

struct OpEntry {
  const char* name;
  nvinfer1::IPluginCreatorInterface* creator;
  AttributeTable attributes;
  Signature signature;  // with every optional tensor
};

// Appends the op as a JSON object.
void print_op(const OpEntry& op, Text& text) noexcept;

}  // namespace stm::trt
