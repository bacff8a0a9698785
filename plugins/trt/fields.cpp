#include "fields.h"

#include "text.h"

#include <cmath>
#include <cstring>

namespace stm::trt {
namespace {
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

PluginFieldType field_type(AttributeType type) noexcept {
  switch (type) {
    case AttributeType::kInt: return PluginFieldType::kINT32;
    case AttributeType::kFloat: return PluginFieldType::kFLOAT32;
    case AttributeType::kChoice: return PluginFieldType::kCHAR;
  }
  return PluginFieldType::kUNKNOWN;
}

const char* onnx_name(AttributeType type) noexcept {
  switch (type) {
    case AttributeType::kInt: return "INT";
    case AttributeType::kFloat: return "FLOAT";
    case AttributeType::kChoice: return "STRING";
  }
  return "?";
}

const char* name_of(PluginFieldType type) noexcept {
  switch (type) {
    case PluginFieldType::kFLOAT16: return "float16";
    case PluginFieldType::kFLOAT32: return "float32 (FLOAT)";
    case PluginFieldType::kFLOAT64: return "float64";
    case PluginFieldType::kINT8: return "int8";
    case PluginFieldType::kINT16: return "int16";
    case PluginFieldType::kINT32: return "int32 (INT)";
    case PluginFieldType::kINT64: return "int64";
    case PluginFieldType::kCHAR: return "characters (STRING)";
    default: return "another type";
  }
}

void print_choices(const AttributeSpec& spec, Text& text) noexcept {
  for (const char* const* c = spec.choices; *c; ++c) text.add("%s'%s'", c == spec.choices ? "" : ", ", *c);
}

bool read_choice(const AttributeSpec& spec, const PluginField& field, const Where& where, int32_t& index) noexcept {
  // The parser counts the trailing NUL, other callers may not.
  const char* given = static_cast<const char*>(field.data);
  const size_t length = strnlen(given, field.length);
  for (int32_t c = 0; spec.choices[c]; ++c) {
    if (std::strlen(spec.choices[c]) == length && std::memcmp(spec.choices[c], given, length) == 0) return index = c, true;
  }
  char buffer[128];
  Text choices(buffer, sizeof buffer);
  print_choices(spec, choices);
  return where.fail("attribute '%s' is '%.*s'; choose one of %s", spec.name, int(length < 64 ? length : 64), given, buffer);
}

bool read_field(const AttributeSpec& spec, const PluginField& field, const Where& where, AttributeValues::Value& value) noexcept {
  const bool text = spec.type == AttributeType::kChoice;
  if (field.type != field_type(spec.type) || !field.data || field.length < 1 || (!text && field.length != 1)) {
    return where.fail("attribute '%s' (%s) must be one %s, got %d of %s; write it as a single %s on the ONNX node", spec.name,
                      spec.meaning, onnx_name(spec.type), field.length, name_of(field.type), onnx_name(spec.type));
  }
  if (text) return read_choice(spec, field, where, value.i);
  double number = 0;
  if (spec.type == AttributeType::kInt) {
    std::memcpy(&value.i, field.data, sizeof value.i);
    number = value.i;
  } else {
    std::memcpy(&value.f, field.data, sizeof value.f);
    number = double(value.f);
  }
  if (!(number >= spec.min && number <= spec.max)) {  // refuses a NaN too
    return where.fail("attribute '%s' (%s) is %g; it must lie between %g and %g", spec.name, spec.meaning, number, spec.min, spec.max);
  }
  return true;
}
}  // namespace

bool read_fields(const AttributeTable& table, const PluginFieldCollection* fields, const Where& where, AttributeValues& values) noexcept {
  bool seen[kMaxAttributes] = {};
  const int32_t given = fields && fields->fields ? fields->nbFields : 0;
  for (int32_t i = 0; i < given; ++i) {
    const PluginField& field = fields->fields[i];
    int32_t s = 0;
    while (s < table.count && (!field.name || std::strcmp(field.name, table.specs[s].name) != 0)) ++s;
    if (s == table.count) {
      char buffer[256];
      Text known(buffer, sizeof buffer);
      for (int32_t k = 0; k < table.count; ++k) known.add("%s'%s'", k ? ", " : "", table.specs[k].name);
      return where.fail("attribute '%s' is unknown; this library knows %s", field.name ? field.name : "",
                        table.count ? buffer : "none");
    }
    if (seen[s]) return where.fail("attribute '%s' is given twice", field.name);
    seen[s] = true;
    if (!read_field(table.specs[s], field, where, values.value[s])) return false;
  }
  for (int32_t s = 0; s < table.count; ++s) {
    const AttributeSpec& spec = table.specs[s];
    if (seen[s]) continue;
    if (spec.required) {
      return where.fail("attribute '%s' (%s, %s) is missing; write it on the ONNX node", spec.name, onnx_name(spec.type), spec.meaning);
    }
    if (spec.type == AttributeType::kFloat) {
      values.value[s].f = float(spec.fallback);
    } else {
      values.value[s].i = int32_t(spec.fallback);
    }
  }
  return true;
}

int32_t write_fields(const AttributeTable& table, const AttributeValues& values, PluginField* fields) noexcept {
  for (int32_t s = 0; s < table.count; ++s) {
    const AttributeSpec& spec = table.specs[s];
    fields[s] = {spec.name, &values.value[s], field_type(spec.type), 1};
    if (spec.type == AttributeType::kChoice) {
      fields[s].data = spec.choices[values.i(s)];
      fields[s].length = int32_t(std::strlen(spec.choices[values.i(s)])) + 1;  // with the NUL, as the ONNX parser does
    }
  }
  return table.count;
}

int32_t write_field_names(const AttributeTable& table, PluginField* fields) noexcept {
  for (int32_t s = 0; s < table.count; ++s) fields[s] = {table.specs[s].name, nullptr, field_type(table.specs[s].type), 1};
  return table.count;
}

size_t print_attributes(const AttributeTable& table, const AttributeValues& values, char* buffer, size_t capacity) noexcept {
  Text text(buffer, capacity);
  for (int32_t s = 0; s < table.count; ++s) {
    const AttributeSpec& spec = table.specs[s];
    switch (spec.type) {
      case AttributeType::kInt: text.add(" %s=%d", spec.name, values.i(s)); break;
      case AttributeType::kFloat: text.add(" %s=%.9g", spec.name, double(values.f(s))); break;
      case AttributeType::kChoice: text.add(" %s=%s", spec.name, spec.choices[values.i(s)]); break;
    }
  }
  return text.length();
}

}  // namespace stm::trt
