// plugin.h: everything that IPluginV3 asks of our ops alike. An op is a struct of static members, which derives from
// OpDefaults:
//
//   kName                                                op_type of the ONNX node
//   attributes() -> AttributeTable                       see fields.h
//   check_attributes(values, where) -> bool              combinations; each value alone is checked by the table
//   signature(values, every = false) -> Signature        see tensors.h; `every`: optional tensors too, for the op schema
//   derive(values, bindings), derived(values, ...)       see OpDefaults
//   check(values, bindings, where) -> bool               what the signature cannot say; must accept unknown symbols
//   tactics(values, bindings, type, every, out, capacity) -> n
//                                                        tactics for these extents, slowest last; 0: the op has none. Without
//                                                        `every` those that TensorRT shall time: on a busy GPU it has taken a
//                                                        twenty times slower one, so no more than may be the fastest
//   kHasTactics, knows_tactic(tactic) -> bool
//   workspace_bytes(values, bindings, type) -> size_t    of the largest extents
//   scratch_bytes(values) -> size_t                      of device memory that a context keeps for the node; see OpDefaults
//   enqueue(values, call) -> cudaError_t                 translate and launch
//
// Virtuals are the same in TensorRT 10.6 and 11.x, so one source serves both.
#pragma once
#include "op.h"

#include <cstdio>
#include <new>

namespace stm::trt {

constexpr char kPluginVersion[] = "1", kPluginNamespace[] = "";
constexpr int32_t kMaxTactics = 16;

// One enqueue: extents come from the descriptors, never from what the build saw.
struct Call {
  const nvinfer1::PluginTensorDesc* in;
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  void* scratch;  // null where there is none
  int32_t tactic;
  DataType type;  // T
  cudaStream_t stream;

  int32_t extent(int32_t input, int32_t axis) const noexcept { return int32_t(in[input].dims.d[axis]); }
  template <typename T>
  const T* input(int32_t i) const noexcept { return static_cast<const T*>(inputs[i]); }
  template <typename T>
  T* output(int32_t o) const noexcept { return static_cast<T*>(outputs[o]); }
};

// For ops whose output extents are all input extents, up to a factor and an offset.
struct OpDefaults {
  // Gives a value to the symbols that no input extent is, where those that they depend on are known.
  static void derive(const AttributeValues&, Bindings&) noexcept {}
  // Such a symbol while they are not, as an expression in the inputs' extents; null: the op has no such symbol.
  static const nvinfer1::IDimensionExpr* derived(const AttributeValues&, const nvinfer1::DimsExprs*, nvinfer1::IExprBuilder&) noexcept {
    return nullptr;
  }
  // Zero when the context is made, and the node's alone from then on. An op must do without it, too: there may be none while
  // TensorRT builds, and there is none where the allocation failed.
  static size_t scratch_bytes(const AttributeValues&) noexcept { return 0; }
};

// Memory calls of a thread that must not end another thread's capture of a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { exchange(); }
  ~RelaxedCapture() noexcept { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() noexcept {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Device memory of one plugin object; a copy of it has none. From CUDA, not from the context's allocator: a few KiB that no
// pool need plan for.
class Scratch {
 public:
  Scratch() noexcept = default;
  Scratch(const Scratch&) noexcept {}
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() noexcept {
    if (!data_) return;
    const RelaxedCapture relaxed;
    if (cudaFree(data_) != cudaSuccess) static_cast<void>(cudaGetLastError());  // not the next call's
  }
  void allocate(size_t bytes) noexcept {
    const RelaxedCapture relaxed;
    cudaStream_t stream = nullptr;
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) == cudaSuccess && cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
        cudaMemsetAsync(data, 0, bytes, stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess) {
      data_ = data;
    } else if (data) {
      static_cast<void>(cudaFree(data));
    }
    if (stream) static_cast<void>(cudaStreamDestroy(stream));
    if (!data_) static_cast<void>(cudaGetLastError());  // not the next call's
  }
  void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
};

// Copying it copies plain values only, so clone() and attachToContext() cannot throw and no two contexts share anything.
template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  using Dims = nvinfer1::Dims;
  using TensorType = nvinfer1::DataType;
  using TensorDesc = nvinfer1::PluginTensorDesc;
  using DynamicDesc = nvinfer1::DynamicPluginTensorDesc;

  Plugin(const AttributeValues& values, const char* node) noexcept : values_(values) {
    std::snprintf(node_, sizeof node_, "%s", node ? node : "");
  }

  // --- IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  Plugin* clone() noexcept override { return new (std::nothrow) Plugin(*this); }

  // --- IPluginV3OneCore
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // --- IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return Op::signature(values_).nb_outputs; }

  // The first call on a new node: a wrong number of inputs or a wrong type is refused here, with its name, while parsing.
  int32_t getOutputDataTypes(TensorType* out, int32_t nb_out, const TensorType* in, int32_t nb_in) const noexcept override {
    const Signature signature = Op::signature(values_);
    if (!check_counts(signature, nb_in, nb_out, where()) || !check_types(signature, in, where())) return -1;
    const TensorType activation = in[signature.activation_input()];
    for (int32_t o = 0; o < nb_out; ++o) out[o] = tensorrt_type(signature.outputs[o].element, activation);
    return 0;
  }

  // Refuses whatever is known to be wrong by now: an error from onShapeChange reaches the user only as "Could not find any
  // implementation for node".
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t nb_in, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t nb_out, nvinfer1::IExprBuilder& builder) noexcept override {
    const Signature signature = Op::signature(values_);
    if (!check_counts(signature, nb_in, nb_out, where())) return -1;
    Dims dims[kMaxTensors] = {};
    for (int32_t i = 0; i < nb_in; ++i) {
      dims[i].nbDims = in[i].nbDims;
      for (int32_t a = 0; a < in[i].nbDims && a < Dims::MAX_DIMS; ++a) {
        dims[i].d[a] = in[i].d[a]->isConstant() ? in[i].d[a]->getConstantValue() : kUnknown;
      }
    }
    Bindings bindings;
    if (!solve(signature, dims, bindings) || !Op::check(values_, bindings, where())) return -1;
    for (int32_t o = 0; o < nb_out; ++o) {
      const TensorSpec& spec = signature.outputs[o];
      out[o].nbDims = spec.rank;
      for (int32_t a = 0; a < spec.rank; ++a) {
        out[o].d[a] = expression(spec.extents[a], bindings, in, builder);
        if (!out[o].d[a]) return where().fail("output '%s': TensorRT gave no expression for axis %d", spec.name, a), -1;
      }
    }
    return 0;
  }

  // May look at in_out[0..position] only. In a strongly typed network the types are given: this accepts or refuses them.
  bool supportsFormatCombination(int32_t position, const DynamicDesc* in_out, int32_t nb_in, int32_t nb_out) noexcept override {
    const Signature signature = Op::signature(values_);
    if (nb_in != signature.nb_inputs || nb_out != signature.nb_outputs || position < 0 || position >= nb_in + nb_out) return false;
    const TensorDesc& desc = in_out[position].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const Element element = signature.at(position).element;
    const int32_t t = signature.activation_input();
    DataType ignored;
    if (element == Element::kActivation && position <= t) return activation_type(desc.type, ignored);
    return desc.type == tensorrt_type(element, element == Element::kActivation ? in_out[t].desc.type : desc.type);
  }

  // Tactics depend on extents, and TensorRT asks for them right after this call, for the formats seen here.
  int32_t configurePlugin(const DynamicDesc* in, int32_t nb_in, const DynamicDesc*, int32_t nb_out) noexcept override {
    const Signature signature = Op::signature(values_);
    if (!check_counts(signature, nb_in, nb_out, where())) return -1;
    Dims least[kMaxTensors], most[kMaxTensors];
    for (int32_t i = 0; i < nb_in; ++i) least[i] = in[i].min, most[i] = in[i].max;
    Bindings min, max;
    if (!solve(signature, least, min) || !solve(signature, most, max)) return -1;
    DataType type;
    if (!activation_type(in[signature.activation_input()].desc.type, type)) return -1;
    // A tactic must run over the whole profile: it must serve both ends.
    int32_t large[kMaxTactics], small[kMaxTactics];
    const int32_t nb_large = clip(Op::tactics(values_, max, type, false, large, kMaxTactics));
    const int32_t nb_small = clip(Op::tactics(values_, min, type, false, small, kMaxTactics));
    nb_tactics_ = 0;
    for (int32_t i = 0; i < nb_large; ++i) {
      if (contains(small, nb_small, large[i])) tactics_[nb_tactics_++] = large[i];
    }
    if (Op::kHasTactics && nb_tactics_ == 0) {
      return where().fail("no kernel runs these extents in %s", name_of(in[signature.activation_input()].desc.type)), -1;
    }
    return 0;
  }

  size_t getWorkspaceSize(const DynamicDesc* in, int32_t nb_in, const DynamicDesc*, int32_t) const noexcept override {
    const Signature signature = Op::signature(values_);
    Dims dims[kMaxTensors];  // .max, as .desc holds -1 for dynamic extents
    for (int32_t i = 0; i < nb_in && i < kMaxTensors; ++i) dims[i] = in[i].max;
    Bindings max;
    DataType type;
    if (nb_in != signature.nb_inputs || !solve(signature, dims, max)) return 0;  // refused by configurePlugin
    if (!activation_type(in[signature.activation_input()].desc.type, type)) return 0;
    return Op::workspace_bytes(values_, max, type);
  }

  int32_t getNbTactics() noexcept override { return nb_tactics_; }
  int32_t getValidTactics(int32_t* tactics, int32_t nb) noexcept override {
    if (nb != nb_tactics_) return where().fail("%d tactics asked for, has %d", nb, nb_tactics_), -1;
    for (int32_t i = 0; i < nb; ++i) tactics[i] = tactics_[i];
    return 0;
  }

  // TensorRT prefixes shapes and formats. What else decides the winner is here: attributes and the kernels' version.
  const char* getTimingCacheID() noexcept override {
    Text text(cache_id_, sizeof cache_id_);
    text.add("k%d", kKernelVersion);
    print_attributes(Op::attributes(), values_, cache_id_ + text.length(), sizeof cache_id_ - text.length());
    return cache_id_;
  }

  // Shown by the engine inspector, which pastes it into its JSON unescaped (10.6): no quotes, no braces.
  const char* getMetadataString() noexcept override {
    Text text(metadata_, sizeof metadata_);
    text.add("%s kernels=%d", Op::kName, kKernelVersion);
    print_attributes(Op::attributes(), values_, metadata_ + text.length(), sizeof metadata_ - text.length());
    return metadata_;
  }

  // --- IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override {
    if (Op::kHasTactics ? !Op::knows_tactic(tactic) : tactic != 0) {
      return where().fail("tactic %d is unknown to kernels version %d; build the engine again with this library", tactic, kKernelVersion), -1;
    }
    tactic_ = tactic;
    return 0;
  }

  // Every check of real extents: it runs before enqueue after each change of shapes, outside capture.
  int32_t onShapeChange(const TensorDesc* in, int32_t nb_in, const TensorDesc* out, int32_t nb_out) noexcept override {
    const Signature signature = Op::signature(values_);
    if (!check_counts(signature, nb_in, nb_out, where())) return -1;
    TensorType types[kMaxTensors];
    Dims in_dims[kMaxTensors], out_dims[kMaxTensors];
    for (int32_t i = 0; i < nb_in; ++i) types[i] = in[i].type, in_dims[i] = in[i].dims;
    for (int32_t o = 0; o < nb_out; ++o) out_dims[o] = out[o].dims;
    Bindings bindings;
    if (!check_types(signature, types, where()) || !solve(signature, in_dims, bindings)) return -1;
    for (int32_t s = 0; s < signature.nb_symbols; ++s) {
      const bool used = bindings.input[s] >= 0;  // an optional input's symbol may not occur
      if (used && !fits_int32(bindings[s])) return where().fail("%s is %lld", signature.symbols[s], static_cast<long long>(bindings[s])), -1;
    }
    if (!Op::check(values_, bindings, where()) || !check_outputs(signature, bindings, out_dims, where())) return -1;
    if (Op::kHasTactics) {
      DataType type;
      if (!activation_type(types[signature.activation_input()], type)) return -1;
      int32_t valid[kMaxTactics];
      const int32_t nb = clip(Op::tactics(values_, bindings, type, true, valid, kMaxTactics));
      if (nb == 0) return where().fail("no kernel runs these extents in %s", name_of(types[signature.activation_input()])), -1;
      // Tactic 0 means that TensorRT has not chosen yet.
      if (tactic_ != 0 && !contains(valid, nb, tactic_)) return where().fail("tactic %d does not run these extents", tactic_), -1;
      fallback_ = valid[0];
    }
    return 0;
  }

  // Capture-legal: launches only.
  int32_t enqueue(const TensorDesc* in, const TensorDesc*, const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    Call call{in, inputs, outputs, workspace, scratch_.data(), tactic_ ? tactic_ : fallback_, DataType::kFloat32, stream};
    if (!activation_type(in[activation_input_].type, call.type)) return where().fail("activations are %s", name_of(in[activation_input_].type)), -1;
    const cudaError_t status = Op::enqueue(values_, call);
    if (status == cudaSuccess) return 0;
    return where().fail("CUDA error %d: %s (tactic %d)", int(status), cudaGetErrorString(status), call.tactic), -1;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    Plugin* mine = clone();
    if (const size_t bytes = Op::scratch_bytes(values_); mine && bytes) {
      mine->scratch_.allocate(bytes);
      if (!mine->scratch_.data())
        say(Severity::kWARNING, "%s '%s': no %d bytes of GPU memory for the context; the node runs without them, slower", Op::kName, node_, int(bytes));
    }
    return mine;
  }

  // Attributes only: never shapes, types or the tactic. Filled anew at each call, so that a copy never points into its original.
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    collection_ = {write_fields(Op::attributes(), values_, fields_), fields_};
    return &collection_;
  }

 private:
  Where where() const noexcept { return {Op::kName, node_}; }

  static int32_t clip(int32_t count) noexcept { return count < 0 ? 0 : count > kMaxTactics ? kMaxTactics : count; }
  static bool contains(const int32_t* list, int32_t count, int32_t wanted) noexcept {
    for (int32_t i = 0; i < count; ++i) {
      if (list[i] == wanted) return true;
    }
    return false;
  }
  static bool fits_int32(int64_t value) noexcept { return value >= 0 && value <= INT32_MAX; }

  bool solve(const Signature& signature, const Dims* inputs, Bindings& bindings) const noexcept {
    if (!bind(signature, inputs, where(), bindings)) return false;
    Op::derive(values_, bindings);
    return true;
  }

  const nvinfer1::IDimensionExpr* expression(const Extent& e, const Bindings& bindings, const nvinfer1::DimsExprs* in,
                                             nvinfer1::IExprBuilder& builder) const noexcept {
    using Operation = nvinfer1::DimensionOperation;
    const int64_t value = evaluate(e, bindings);
    if (value != kUnknown) return builder.constant(value);
    const int32_t input = bindings.input[e.symbol];
    const nvinfer1::IDimensionExpr* expr = input < 0 ? Op::derived(values_, in, builder) : in[input].d[bindings.axis[e.symbol]];
    if (expr && e.factor != 1) {
      const nvinfer1::IDimensionExpr* factor = builder.constant(e.factor);
      expr = factor ? builder.operation(Operation::kPROD, *expr, *factor) : nullptr;
    }
    if (expr && e.offset) {
      const nvinfer1::IDimensionExpr* offset = builder.constant(e.offset < 0 ? -e.offset : e.offset);
      expr = offset ? builder.operation(e.offset < 0 ? Operation::kSUB : Operation::kSUM, *expr, *offset) : nullptr;
    }
    return expr;
  }

  AttributeValues values_;
  int32_t activation_input_ = Op::signature(values_).activation_input();
  int32_t tactic_ = 0, fallback_ = 0;
  int32_t nb_tactics_ = 0, tactics_[kMaxTactics] = {};
  Scratch scratch_;
  char node_[96] = "", cache_id_[192] = "", metadata_[256] = "";
  nvinfer1::PluginField fields_[kMaxAttributes];
  nvinfer1::PluginFieldCollection collection_{};
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() noexcept : names_{write_field_names(Op::attributes(), fields_), fields_} {}

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }

  // Null (and a message) refuses the node. Both phases get the same names and types, so one reader serves both.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    const Where where{Op::kName, name};
    AttributeValues values;
    if (!read_fields(Op::attributes(), fields, where, values) || !Op::check_attributes(values, where)) return nullptr;
    auto* plugin = new (std::nothrow) Plugin<Op>(values, name);
    if (!plugin) where.fail("out of memory");
    return plugin;
  }

 private:
  nvinfer1::PluginField fields_[kMaxAttributes];
  nvinfer1::PluginFieldCollection names_;
};

template <typename Op>
OpEntry entry_of() noexcept {
  static Creator<Op> creator;
  return {Op::kName, &creator, Op::attributes(), Op::signature(AttributeValues{}, true)};
}

inline bool check_seqlen(const Bindings& bindings, int32_t seqlen, const Where& where) noexcept {
  if (!bindings.known(seqlen) || (bindings[seqlen] >= 1 && bindings[seqlen] <= kMaxSeqlen)) return true;
  return where.fail("seqlen is %lld; the kernels take 1 to %d tokens", static_cast<long long>(bindings[seqlen]), int(kMaxSeqlen));
}

// An extent of `name` that is 1 or that of the batch.
inline bool check_one_or_batch(const Bindings& bindings, int32_t extent, int32_t batch, const char* name, const char* unit, const Where& where) noexcept {
  if (!bindings.known(extent) || bindings[extent] == 1 || !bindings.known(batch) || bindings[extent] == bindings[batch]) return true;
  return where.fail("%s has %lld %s, needs 1 or the batch, %lld", name, static_cast<long long>(bindings[extent]), unit,
                    static_cast<long long>(bindings[batch]));
}

// Tokens merged at both ends must leave one.
inline bool check_merged(const Bindings& bindings, int32_t seqlen, int32_t left, int32_t right, const Where& where) noexcept {
  if (!bindings.known(seqlen) || int64_t{left} + right < bindings[seqlen]) return true;
  return where.fail("left %d and right %d leave none of %d tokens; was the plan made for another length?", left, right, int(bindings[seqlen]));
}

}  // namespace stm::trt
