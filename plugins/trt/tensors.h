// tensors.h: what an op's inputs and outputs must look like, written once as a table and checked twice: against the extents
// known when the network is parsed, and against the real ones before the first enqueue.
#pragma once
#include "../kernels/types.h"
#include "logging.h"
#include "text.h"

#include <cstdint>

namespace stm::trt {

constexpr int32_t kMaxTensors = 16, kMaxRank = 4, kMaxSymbols = 8;
constexpr int64_t kUnknown = -1;
constexpr int64_t kMaxSeqlen = 16384;  // the kernels' bound

// kActivation: T, one of float32, float16, bfloat16, as the first input of it says. The halves: T of an op without such an
// input, whose attributes say.
enum class Element : int32_t { kActivation, kFloat32, kFloat16, kBFloat16, kInt32 };

// factor * symbol + offset, or the constant `offset` if symbol < 0.
struct Extent {
  int32_t symbol = -1;
  int64_t factor = 0, offset = 0;
};
constexpr Extent constant(int64_t value) { return {-1, 0, value}; }
constexpr Extent extent(int32_t symbol, int64_t factor = 1, int64_t offset = 0) { return {symbol, factor, offset}; }

struct TensorSpec {
  const char* name = nullptr;
  Element element = Element::kActivation;
  int32_t rank = 0;
  Extent extents[kMaxRank] = {};
  const char* when = "";  // the condition on attributes under which the node has it; "": always
};

// Inputs and outputs of one node: they depend on its attributes.
struct Signature {
  const char* const* symbols = nullptr;  // what each symbol is called in messages
  int32_t nb_symbols = 0, nb_inputs = 0, nb_outputs = 0;
  TensorSpec inputs[kMaxTensors], outputs[3];

  void input(const TensorSpec& spec) noexcept { inputs[nb_inputs++] = spec; }
  void output(const TensorSpec& spec) noexcept { outputs[nb_outputs++] = spec; }
  // The spec at a position counted as supportsFormatCombination does: inputs, then outputs.
  const TensorSpec& at(int32_t position) const noexcept {
    return position < nb_inputs ? inputs[position] : outputs[position - nb_inputs];
  }
  int32_t activation_input() const noexcept;  // the first input of type T; 0 if there is none
};

// Values of the symbols, and the input extent that gave each: kUnknown where the network leaves it open (dynamic batch).
struct Bindings {
  int64_t value[kMaxSymbols];
  int32_t input[kMaxSymbols], axis[kMaxSymbols];

  int64_t operator[](int32_t symbol) const noexcept { return value[symbol]; }
  bool known(int32_t symbol) const noexcept { return value[symbol] != kUnknown; }
};

// Solves the symbols from input dims, where negative extents are unknown. Refuses ranks and extents that contradict the
// signature or each other, naming both tensors and values.
bool bind(const Signature& signature, const nvinfer1::Dims* inputs, const Where& where, Bindings& bindings) noexcept;

// Refuses output dims that differ from the signature's.
bool check_outputs(const Signature& signature, const Bindings& bindings, const nvinfer1::Dims* outputs, const Where& where) noexcept;

// The value of an extent, kUnknown if its symbol is.
int64_t evaluate(const Extent& extent, const Bindings& bindings) noexcept;

bool check_counts(const Signature& signature, int32_t nb_inputs, int32_t nb_outputs, const Where& where) noexcept;
bool check_types(const Signature& signature, const nvinfer1::DataType* inputs, const Where& where) noexcept;

// The element for a type that an attribute chose.
Element element_of(DataType type) noexcept;
// The kernels' type for a TensorRT type; false if they take no such activations.
bool activation_type(nvinfer1::DataType type, DataType& out) noexcept;
// The TensorRT type of an element, `activation` being T.
nvinfer1::DataType tensorrt_type(Element element, nvinfer1::DataType activation) noexcept;
const char* name_of(nvinfer1::DataType type) noexcept;

// "(2, 384, 4)"; "?" for unknown extents.
void print_dims(const nvinfer1::Dims& dims, Text& text) noexcept;
// "(batch, seqlen, 2 d_inner)"
void print_spec(const Signature& signature, const TensorSpec& spec, Text& text) noexcept;

}  // namespace stm::trt
