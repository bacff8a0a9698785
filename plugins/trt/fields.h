// fields.h: attributes of an op, read from and written to TensorRT's PluginFields. One table an op serves the ONNX parser
// (names it may pass), the creator (types, ranges, defaults), engines (serialisation) and the inspector (metadata).
#pragma once
#include "logging.h"

#include <cstddef>
#include <cstdint>

namespace stm::trt {

constexpr int32_t kMaxAttributes = 8;

enum class AttributeType : int32_t { kInt, kFloat, kChoice };

// A row of an op's table. A kChoice is a STRING in ONNX and an index into `choices` here.
struct AttributeSpec {
  const char* name;
  AttributeType type;
  bool required;
  double fallback;              // the value when absent and not required
  double min, max;              // allowed values, both included; kChoice derives them
  const char* meaning;          // for messages: what the value stands for
  const char* const* choices;   // kChoice: the names, ended by a null pointer
};

struct AttributeTable {
  const AttributeSpec* specs;
  int32_t count;
};

template <int32_t kCount>
constexpr AttributeTable table_of(const AttributeSpec (&specs)[kCount]) {
  static_assert(kCount <= kMaxAttributes, "raise kMaxAttributes");
  return {specs, kCount};
}

// Values in the order of the table: plain data, so that plugins copy it freely.
struct AttributeValues {
  union Value {
    int32_t i;  // kInt, and the index of a kChoice
    float f;    // kFloat
  } value[kMaxAttributes] = {};

  int32_t i(int32_t index) const noexcept { return value[index].i; }
  float f(int32_t index) const noexcept { return value[index].f; }
};

// Reads every field once. Refuses (with a message) wrong types and lengths, values out of range, names that the table
// lacks, names given twice, and required ones that are missing. A null collection counts as an empty one.
bool read_fields(const AttributeTable& table, const nvinfer1::PluginFieldCollection* fields, const Where& where,
                 AttributeValues& values) noexcept;

// Fills `fields`, which points into `values` and the table; the same names and types that read_fields takes.
int32_t write_fields(const AttributeTable& table, const AttributeValues& values, nvinfer1::PluginField* fields) noexcept;

// Names and types without data, for IPluginCreatorV3One::getFieldNames.
int32_t write_field_names(const AttributeTable& table, nvinfer1::PluginField* fields) noexcept;

// Appends `, "name": value` for each attribute. Returns the characters written, without the NUL; cuts at `capacity`.
size_t print_attributes(const AttributeTable& table, const AttributeValues& values, char* text, size_t capacity) noexcept;

}  // namespace stm::trt
