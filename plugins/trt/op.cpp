#include "op.h"

namespace stm::trt {
namespace {

const char* name_of(Element element) noexcept {
  switch (element) {
    case Element::kActivation: return "T";
    case Element::kFloat32: return "float";
    case Element::kFloat16: return "float16";
    case Element::kBFloat16: return "bfloat16";
    case Element::kInt32: return "int32";
  }
  return "?";
}

void print_tensors(const char* key, const TensorSpec* specs, int32_t count, Text& text) noexcept {
  text.add(", \"%s\": [", key);
  for (int32_t i = 0; i < count; ++i) {
    text.add("%s{\"name\": \"%s\", \"type\": \"%s\", \"rank\": %d, \"when\": \"%s\"}", i ? ", " : "", specs[i].name,
             name_of(specs[i].element), specs[i].rank, specs[i].when);
  }
  text.add("]");
}

void print_attribute(const AttributeSpec& spec, Text& text) noexcept {
  text.add("{\"name\": \"%s\", \"required\": %s", spec.name, spec.required ? "true" : "false");
  if (spec.type == AttributeType::kChoice) {
    text.add(", \"type\": \"STRING\", \"choices\": [");
    for (const char* const* c = spec.choices; *c; ++c) text.add("%s\"%s\"", c == spec.choices ? "" : ", ", *c);
    text.add("]");
    if (!spec.required) text.add(", \"default\": \"%s\"", spec.choices[int(spec.fallback)]);
  } else {
    text.add(", \"type\": \"%s\", \"min\": %g, \"max\": %g", spec.type == AttributeType::kInt ? "INT" : "FLOAT", spec.min, spec.max);
    if (!spec.required) text.add(", \"default\": %g", spec.fallback);
  }
  text.add("}");
}
}  // namespace

void print_op(const OpEntry& op, Text& text) noexcept {
  text.add("{\"op\": \"%s\"", op.name);
  print_tensors("inputs", op.signature.inputs, op.signature.nb_inputs, text);
  print_tensors("outputs", op.signature.outputs, op.signature.nb_outputs, text);
  text.add(", \"attributes\": [");
  for (int32_t i = 0; i < op.attributes.count; ++i) {
    if (i) text.add(", ");
    print_attribute(op.attributes.specs[i], text);
  }
  text.add("]}");
}

}  // namespace stm::trt
