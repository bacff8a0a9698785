#include "tensors.h"

namespace stm::trt {
namespace {
using nvinfer1::Dims;

// The op's inputs as a list, for the message about their number.
void print_names(const Signature& signature, Text& text) noexcept {
  for (int32_t i = 0; i < signature.nb_inputs; ++i) text.add("%s%s", i ? ", " : "", signature.inputs[i].name);
}

void print_extent(const Signature& signature, const Extent& e, Text& text) noexcept {
  if (e.symbol < 0) return text.add("%lld", static_cast<long long>(e.offset));
  if (e.factor != 1) text.add("%lld ", static_cast<long long>(e.factor));
  text.add("%s", signature.symbols[e.symbol]);
  if (e.offset) text.add(" %c %lld", e.offset < 0 ? '-' : '+', static_cast<long long>(e.offset < 0 ? -e.offset : e.offset));
}

bool refuse_dims(const Signature& signature, int32_t i, const Dims& dims, const Where& where, const char* reason) noexcept {
  char got_buffer[128], want_buffer[160];
  Text got(got_buffer, sizeof got_buffer), want(want_buffer, sizeof want_buffer);
  print_dims(dims, got);
  print_spec(signature, signature.inputs[i], want);
  return where.fail("input %d '%s' is %s, needs %s%s%s", i, signature.inputs[i].name, got_buffer, want_buffer, *reason ? ": " : "", reason);
}
}  // namespace

int32_t Signature::activation_input() const noexcept {
  for (int32_t i = 0; i < nb_inputs; ++i) {
    if (inputs[i].element == Element::kActivation) return i;
  }
  return 0;
}

bool bind(const Signature& signature, const Dims* inputs, const Where& where, Bindings& bindings) noexcept {
  for (int32_t s = 0; s < kMaxSymbols; ++s) bindings.value[s] = kUnknown, bindings.input[s] = bindings.axis[s] = -1;
  char reason[256];
  for (int32_t i = 0; i < signature.nb_inputs; ++i) {
    const TensorSpec& spec = signature.inputs[i];
    const Dims& dims = inputs[i];
    if (dims.nbDims != spec.rank) return refuse_dims(signature, i, dims, where, "another rank");
    for (int32_t a = 0; a < spec.rank; ++a) {
      const Extent& e = spec.extents[a];
      const int64_t got = dims.d[a];
      if (e.symbol < 0) {
        if (got >= 0 && got != e.offset) return refuse_dims(signature, i, dims, where, "");
        continue;
      }
      // An extent that is the symbol itself can stand for it in output shapes, even while it is unknown.
      if (bindings.input[e.symbol] < 0 && e.factor == 1 && e.offset == 0) bindings.input[e.symbol] = i, bindings.axis[e.symbol] = a;
      if (got < 0) continue;
      Text text(reason, sizeof reason);
      if ((got - e.offset) % e.factor != 0 || got < e.offset) {
        text.add("%lld is no ", static_cast<long long>(got));
        print_extent(signature, e, text);
        return refuse_dims(signature, i, dims, where, reason);
      }
      const int64_t value = (got - e.offset) / e.factor;
      if (bindings.known(e.symbol) && bindings[e.symbol] != value) {
        text.add("%s is %lld here and %lld in the inputs before", signature.symbols[e.symbol], static_cast<long long>(value),
                 static_cast<long long>(bindings[e.symbol]));
        return refuse_dims(signature, i, dims, where, reason);
      }
      bindings.value[e.symbol] = value;
    }
  }
  return true;
}

int64_t evaluate(const Extent& e, const Bindings& bindings) noexcept {
  if (e.symbol < 0) return e.offset;
  return bindings.known(e.symbol) ? e.factor * bindings[e.symbol] + e.offset : kUnknown;
}

bool check_outputs(const Signature& signature, const Bindings& bindings, const Dims* outputs, const Where& where) noexcept {
  for (int32_t o = 0; o < signature.nb_outputs; ++o) {
    const TensorSpec& spec = signature.outputs[o];
    bool same = outputs[o].nbDims == spec.rank;
    for (int32_t a = 0; same && a < spec.rank; ++a) same = outputs[o].d[a] == evaluate(spec.extents[a], bindings);
    if (same) continue;
    char got_buffer[128], want_buffer[160];
    Text got(got_buffer, sizeof got_buffer), want(want_buffer, sizeof want_buffer);
    print_dims(outputs[o], got);
    print_spec(signature, spec, want);
    return where.fail("output %d '%s' is %s, needs %s", o, spec.name, got_buffer, want_buffer);
  }
  return true;
}

bool check_counts(const Signature& signature, int32_t nb_inputs, int32_t nb_outputs, const Where& where) noexcept {
  if (nb_inputs != signature.nb_inputs) {
    char buffer[256];
    Text names(buffer, sizeof buffer);
    print_names(signature, names);
    return where.fail("has %d inputs, needs %d with these attributes: %s", nb_inputs, signature.nb_inputs, buffer);
  }
  if (nb_outputs != signature.nb_outputs) {
    return where.fail("has %d outputs, needs %d with these attributes", nb_outputs, signature.nb_outputs);
  }
  return true;
}

bool check_types(const Signature& signature, const nvinfer1::DataType* inputs, const Where& where) noexcept {
  const int32_t t = signature.activation_input();
  DataType ignored;
  if (signature.inputs[t].element == Element::kActivation && !activation_type(inputs[t], ignored)) {
    return where.fail("input %d '%s' is %s; activations must be float32, float16 or bfloat16", t, signature.inputs[t].name, name_of(inputs[t]));
  }
  for (int32_t i = 0; i < signature.nb_inputs; ++i) {
    const TensorSpec& spec = signature.inputs[i];
    const nvinfer1::DataType want = tensorrt_type(spec.element, inputs[t]);
    if (inputs[i] == want) continue;
    return where.fail("input %d '%s' is %s, needs %s%s%s; cast it in the ONNX graph (networks are strongly typed)", i, spec.name, name_of(inputs[i]),
                      name_of(want), spec.element == Element::kActivation ? ", the type of " : "",
                      spec.element == Element::kActivation ? signature.inputs[t].name : "");
  }
  return true;
}

Element element_of(DataType type) noexcept {
  switch (type) {
    case DataType::kFloat32: return Element::kFloat32;
    case DataType::kFloat16: return Element::kFloat16;
    case DataType::kBFloat16: break;
  }
  return Element::kBFloat16;
}

bool activation_type(nvinfer1::DataType type, DataType& out) noexcept {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return out = DataType::kFloat32, true;
    case nvinfer1::DataType::kHALF: return out = DataType::kFloat16, true;
    case nvinfer1::DataType::kBF16: return out = DataType::kBFloat16, true;
    default: return false;
  }
}

nvinfer1::DataType tensorrt_type(Element element, nvinfer1::DataType activation) noexcept {
  switch (element) {
    case Element::kActivation: return activation;
    case Element::kFloat32: return nvinfer1::DataType::kFLOAT;
    case Element::kFloat16: return nvinfer1::DataType::kHALF;
    case Element::kBFloat16: return nvinfer1::DataType::kBF16;
    case Element::kInt32: break;
  }
  return nvinfer1::DataType::kINT32;
}

const char* name_of(nvinfer1::DataType type) noexcept {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return "float32";
    case nvinfer1::DataType::kHALF: return "float16";
    case nvinfer1::DataType::kBF16: return "bfloat16";
    case nvinfer1::DataType::kINT32: return "int32";
    case nvinfer1::DataType::kINT64: return "int64";
    case nvinfer1::DataType::kINT8: return "int8";
    case nvinfer1::DataType::kBOOL: return "bool";
    default: return "of another type";
  }
}

void print_dims(const Dims& dims, Text& text) noexcept {
  text.add("(");
  for (int32_t a = 0; a < dims.nbDims; ++a) {
    if (a) text.add(", ");
    if (dims.d[a] < 0) {
      text.add("?");
    } else {
      text.add("%lld", static_cast<long long>(dims.d[a]));
    }
  }
  text.add(")");
}

void print_spec(const Signature& signature, const TensorSpec& spec, Text& text) noexcept {
  text.add("(");
  for (int32_t a = 0; a < spec.rank; ++a) {
    if (a) text.add(", ");
    print_extent(signature, spec.extents[a], text);
  }
  text.add(")");
}

}  // namespace stm::trt
