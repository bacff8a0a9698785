// lifecycle.cpp: drives the plugin libraries through registration, creation, shapes, types, tactics, serialisation and copies
// with no GPU, as CI can. Works with the full and the lean runtime of the major version that the headers belong to.
//   usage: lifecycle RUNTIME.so libstm_trt<MAJOR>.so libstm_trt<MAJOR>_static.so [libstm_trt<OTHER MAJOR>.so]
//          lifecycle RUNTIME.so libstm_trt<MAJOR>_static.so
#include "stm_plugins.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

using namespace nvinfer1;

namespace {

std::atomic<int> g_checks{0};
#define CHECK(condition)                                                                       \
  do {                                                                                         \
    ++g_checks;                                                                                \
    if (!(condition)) {                                                                        \
      std::printf("FAILED %s:%d: %s\nlast error: %s\n", __FILE__, __LINE__, #condition, g_log.last.c_str()); \
      std::exit(1);                                                                            \
    }                                                                                          \
  } while (false)

// --- a logger that keeps the last error
struct Log final : ILogger {
  std::string last;
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) last = text;
  }
} g_log;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &g_log; }
} g_finder;

// The last error must hold each of these words; it is then forgotten.
bool said(std::initializer_list<const char*> words) {
  for (const char* word : words) {
    if (g_log.last.find(word) == std::string::npos) {
      std::printf("  '%s' is not in: %s\n", word, g_log.last.c_str());
      return false;
    }
  }
  g_log.last.clear();
  return true;
}

// --- stand-ins for TensorRT's shape expressions: a constant, or an unknown that carries its name
struct Expr final : IDimensionExpr {
  struct Impl final : apiv::VDimensionExpr {
    bool constant = true;
    int64_t value = 0;
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : INT64_MIN; }
    bool isSizeTensor() const override { return false; }
  } impl;
  std::string name;
  explicit Expr(int64_t value) {
    impl.value = value;
    impl.constant = value >= 0;
    mImpl = &impl;
  }
};

struct Builder final : IExprBuilder {
  struct Impl final : apiv::VExprBuilder {
    std::vector<std::unique_ptr<Expr>> pool;
    Expr* make(int64_t value, const std::string& name) {
      pool.push_back(std::make_unique<Expr>(value));
      pool.back()->name = name;
      return pool.back().get();
    }
    const IDimensionExpr* constant(int64_t value) override { return make(value, std::to_string(value)); }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
      const char* sign = op == DimensionOperation::kSUB   ? "-"
                         : op == DimensionOperation::kSUM  ? "+"
                         : op == DimensionOperation::kPROD ? "*"
                         : op == DimensionOperation::kFLOOR_DIV ? "/" : "?";
      const auto side = [sign](const IDimensionExpr& e) {  // what a product or a quotient takes is a term of its own
        const std::string& name = static_cast<const Expr&>(e).name;
        const bool sum = name.find_first_of("+-") != std::string::npos;
        return sum && (*sign == '*' || *sign == '/') ? "(" + name + ")" : name;
      };
      return make(-1, side(a) + sign + side(b));
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
  } impl;
  Builder() { mImpl = &impl; }
};

using Shape = std::vector<int64_t>;  // negative: unknown

Dims dims_of(const Shape& shape) {
  Dims dims{};
  dims.nbDims = int32_t(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

struct Tensor {
  Shape shape;
  DataType type;
};
using Tensors = std::vector<Tensor>;

PluginTensorDesc desc_of(const Tensor& tensor, TensorFormat format = TensorFormat::kLINEAR) {
  PluginTensorDesc desc{};
  desc.dims = dims_of(tensor.shape);
  desc.type = tensor.type;
  desc.format = format;
  return desc;
}

// Unknown extents take `unknown` as min, opt and max.
DynamicPluginTensorDesc dynamic_of(const Tensor& tensor, int64_t unknown) {
  DynamicPluginTensorDesc d{};
  d.desc = desc_of(tensor);
  Shape shape = tensor.shape;
  for (int64_t& e : shape) e = e < 0 ? unknown : e;
  d.min = d.opt = d.max = dims_of(shape);
  return d;
}

// --- attributes
struct Attribute {
  PluginFieldType type;
  int32_t i = 0;
  float f = 0;
  std::string s;
  Attribute(int value) : type(PluginFieldType::kINT32), i(value) {}
  Attribute(float value) : type(PluginFieldType::kFLOAT32), f(value) {}
  Attribute(const char* value) : type(PluginFieldType::kCHAR), s(value) {}
};
using Attributes = std::map<std::string, Attribute>;

struct Fields {
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};
  explicit Fields(const Attributes& attributes) {
    for (const auto& [name, a] : attributes) {
      const void* data = a.type == PluginFieldType::kINT32 ? static_cast<const void*>(&a.i)
                         : a.type == PluginFieldType::kFLOAT32 ? static_cast<const void*>(&a.f) : a.s.c_str();
      fields.push_back({name.c_str(), data, a.type, a.type == PluginFieldType::kCHAR ? int32_t(a.s.size()) + 1 : 1});
    }
    collection = {int32_t(fields.size()), fields.data()};
  }
};

IPluginRegistry* g_registry = nullptr;

IPluginCreatorV3One* creator_of(const char* op) {
  auto* creator = g_registry->getCreator(op, "1", "");
  CHECK(creator);
  return static_cast<IPluginCreatorV3One*>(creator);
}

IPluginV3* create(const char* op, const Attributes& attributes, TensorRTPhase phase = TensorRTPhase::kBUILD) {
  const Fields fields(attributes);
  return creator_of(op)->createPlugin("node_7", &fields.collection, phase);
}

// A plugin and its three faces.
struct Handle {
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* runtime;
  IPluginV3OneCore* core;
  explicit Handle(IPluginV3* p) : plugin(p) {
    CHECK(p);
    build = static_cast<IPluginV3OneBuild*>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime = static_cast<IPluginV3OneRuntime*>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    core = static_cast<IPluginV3OneCore*>(p->getCapabilityInterface(PluginCapabilityType::kCORE));
    CHECK(build && runtime && core);
  }
};

struct Field {
  PluginFieldType type;
  std::vector<char> bytes;
  bool operator==(const Field& other) const { return type == other.type && bytes == other.bytes; }
};

// By name, so that order does not matter.
std::map<std::string, Field> values_of(const PluginFieldCollection& collection) {
  std::map<std::string, Field> out;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const PluginField& f = collection.fields[i];
    const size_t size = f.type == PluginFieldType::kCHAR ? 1 : 4;
    const char* data = static_cast<const char*>(f.data);
    out[f.name] = {f.type, {data, data + size * f.length}};
  }
  return out;
}

// --- one op with attributes and the tensors that fit them; extents of -1 are the dynamic batch
struct Case {
  const char* op;
  Attributes attributes;
  Tensors inputs, outputs;
  std::vector<std::string> output_shapes;  // as expressions, batch being "B"
};

constexpr int64_t kBatch = -1, kSeqlen = 197, kModel = 192, kInner = 384, kState = 16, kRank = 12, kRow = 48;
const DataType F = DataType::kFLOAT, I = DataType::kINT32;

// Images of 224 x 224 pixels in patches of 16, as vim-t reads them.
Case patch_case(DataType T, int cls, int64_t height = 224, int64_t width = 224, int patch = 16, int stride = 16) {
  const char* precision = T == DataType::kFLOAT ? "fp32" : T == DataType::kHALF ? "fp16" : "bf16";
  const int64_t seqlen = ((height - patch) / stride + 1) * ((width - patch) / stride + 1) + (cls >= 0), row = 3 * patch * patch;
  return {"StmPatchRows", {{"patch_size", patch}, {"stride", stride}, {"cls_index", cls}, {"precision", precision}},
          {{{kBatch, 3, height, width}, F}}, {{{kBatch, seqlen, row}, T}}, {"B," + std::to_string(seqlen) + "," + std::to_string(row)}};
}

Case conv_case(DataType T) {
  return {"StmConvXProj", {},
          {{{kBatch, kSeqlen, 2 * kInner}, T}, {{2, kInner, 4}, F}, {{2, kInner}, F}, {{2, kRow, kInner}, T}},
          {{{2, kBatch, kSeqlen, kRow}, T}}, {"2,B,197,48"}};
}

// adds: 0, 1, or 2: and merges tokens.
Case linear_case(DataType T, int normed, int adds) {
  const int left = adds == 2 ? 3 : 0, right = adds == 2 ? 1 : 0, kept = kSeqlen - left - right;
  const std::string tokens = std::to_string(kept);
  Case c{"StmLinear", {{"normed", normed}, {"adds", adds > 0}, {"epsilon", 1e-5F}, {"left", left}, {"right", right}},
         {{{kBatch, kSeqlen, kModel}, T}, {{2 * kInner, kModel}, T}}, {{{kBatch, kept, 2 * kInner}, T}}, {"B," + tokens + ",768"}};
  if (normed) c.inputs.push_back({{kBatch, kSeqlen, kModel / 16}, F});
  if (adds) {
    c.inputs.push_back({{kBatch, kSeqlen, 2 * kInner}, F});
    c.outputs.push_back({{kBatch, kept, 2 * kInner}, F}), c.outputs.push_back({{kBatch, kept, 2 * kInner / 16}, F});
    c.output_shapes.push_back("B," + tokens + ",768"), c.output_shapes.push_back("B," + tokens + ",48");
  }
  if (adds == 2) c.inputs.push_back({{kBatch, left + right}, F});
  return c;
}

Case scan_case(DataType T, int cls, int mode, int scaled) {
  Case c{"StmMambaScan", {{"cls_index", cls}, {"weight_mode", mode}, {"scaled_decay", scaled}},
         {{{kBatch, kSeqlen, 2 * kInner}, T}, {{2, kBatch, kSeqlen, kRow}, T}, {{2, kInner, 4}, F}, {{2, kInner}, F}, {{2, kInner, kRank}, T},
          {{2, kInner}, F}, {{2, kInner, kState}, F}, {{2, kInner}, F}},
         {{{kBatch, cls < 0 ? kSeqlen : 1, kInner}, T}}, {cls < 0 ? "B,197,384" : "B,1,384"}};
  if (mode) {
    c.inputs.push_back({{4, 2}, I});
    c.outputs.push_back({{kBatch, 4}, F});
    c.output_shapes.push_back("B,4");
  }
  if (scaled) c.inputs.push_back({{kSeqlen}, F});
  return c;
}

// One residual for all images, as the first norm's table of position embeddings.
Case shared_residual(Case c) {
  c.inputs[0].shape[0] = 1;
  return c;
}

Case norm_case(DataType T, const char* merge, int cls = -1) {
  const bool edge = !std::strcmp(merge, "edge"), table = !std::strcmp(merge, "table");
  const int64_t out = cls >= 0 ? 1 : edge ? kSeqlen - 3 : table ? 190 : kSeqlen;
  Case c{"StmAddMergeNorm", {{"merge", merge}, {"left", edge ? 2 : 0}, {"right", edge ? 1 : 0}, {"out_len", table ? 190 : 0}, {"cls_index", cls},
                             {"epsilon", 1e-5F}},
         {{{kBatch, kSeqlen, kModel}, F}, {{kBatch, cls < 0 ? kSeqlen : 1, kModel}, T}, {{kModel}, F}},
         {{{kBatch, out, kModel}, F}, {{kBatch, out, kModel}, T}}, {}};
  if (edge) c.inputs.push_back({{kBatch, 3}, F});
  if (table) for (const Tensor& t : Tensors{{{1, 5}, F}, {{191}, I}, {{kSeqlen}, I}, {{kSeqlen}, I}}) c.inputs.push_back(t);
  const std::string shape = "B," + std::to_string(out) + ",192";
  c.output_shapes = {shape, shape};
  return c;
}

// A mean of two groups: their first tokens stand twice.
Case mean(Case c) {
  for (int i : {5, 6}) c.inputs[i].shape[0] = kSeqlen + 2;
  return c;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (DataType T : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    cases.push_back(patch_case(T, 98));
    cases.push_back(patch_case(T, -1));
    cases.push_back(patch_case(T, 0, 233, 517, 14, 8));
    cases.push_back(conv_case(T));
    if (T != DataType::kFLOAT) for (int normed : {0, 1}) for (int adds : {0, 1, 2}) cases.push_back(linear_case(T, normed, adds));
    for (int mode : {0, 1, 2, 3}) for (int scaled : {0, 1}) cases.push_back(scan_case(T, -1, mode, scaled));
    cases.push_back(scan_case(T, 98, 0, 1));
    for (const char* merge : {"none", "edge", "table"}) cases.push_back(norm_case(T, merge));
    cases.push_back(norm_case(T, "none", 98));
    cases.push_back(shared_residual(norm_case(T, "none")));
    cases.push_back(shared_residual(norm_case(T, "table")));
    cases.push_back(mean(norm_case(T, "table")));
  }
  return cases;
}

int32_t data_types(const Handle& h, const Tensors& inputs, int32_t nb_out, std::vector<DataType>& out) {
  std::vector<DataType> in;
  for (const Tensor& t : inputs) in.push_back(t.type);
  out.assign(size_t(nb_out), DataType::kINT8);
  return h.build->getOutputDataTypes(out.data(), nb_out, in.data(), int32_t(in.size()));
}

// Output shapes as text; empty if refused. An unknown extent reads "B" if it is -1 (the batch), "L" if it is -2, "W" else.
std::vector<std::string> shapes(const Handle& h, const Tensors& inputs, size_t nb_out) {
  Builder builder;
  std::vector<DimsExprs> in(inputs.size()), out(nb_out);
  for (size_t i = 0; i < inputs.size(); ++i) {
    in[i].nbDims = int32_t(inputs[i].shape.size());
    for (int32_t a = 0; a < in[i].nbDims; ++a) {
      const int64_t e = inputs[i].shape[size_t(a)];
      in[i].d[a] = builder.impl.make(e, e >= 0 ? std::to_string(e) : e == -1 ? "B" : e == -2 ? "L" : "W");
    }
  }
  if (h.build->getOutputShapes(in.data(), int32_t(in.size()), nullptr, 0, out.data(), int32_t(nb_out), builder) != 0) return {};
  std::vector<std::string> texts;
  for (const DimsExprs& d : out) {
    std::string text;
    for (int32_t a = 0; a < d.nbDims; ++a) text += (a ? "," : "") + static_cast<const Expr*>(d.d[a])->name;
    texts.push_back(text);
  }
  return texts;
}

int32_t shape_change(const Handle& h, const Case& c, int64_t batch) {
  std::vector<PluginTensorDesc> in, out;
  for (const Tensor& t : c.inputs) in.push_back(dynamic_of(t, batch).desc), in.back().dims = dynamic_of(t, batch).max;
  for (const Tensor& t : c.outputs) out.push_back(dynamic_of(t, batch).desc), out.back().dims = dynamic_of(t, batch).max;
  return h.runtime->onShapeChange(in.data(), int32_t(in.size()), out.data(), int32_t(out.size()));
}

// --- the life of a good node
void check_serialisation(const Case& c, const Handle& h, const PluginFieldCollection& given) {
  const auto wanted = values_of(given);
  const PluginFieldCollection* out = h.runtime->getFieldsToSerialize();
  CHECK(out && values_of(*out) == wanted);
  std::vector<std::unique_ptr<IPluginV3>> others;
  others.emplace_back(creator_of(c.op)->createPlugin("node_7", out, TensorRTPhase::kRUNTIME));  // what loading an engine does
  others.emplace_back(h.plugin->clone());
  others.emplace_back(h.runtime->attachToContext(nullptr));
  auto short_lived = std::unique_ptr<IPluginV3>(h.plugin->clone());
  others.emplace_back(short_lived->clone());
  short_lived.reset();  // copies outlive their originals
  for (auto& other : others) {
    CHECK(other);
    auto* runtime = static_cast<IPluginV3OneRuntime*>(other->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    CHECK(fields != out && values_of(*fields) == wanted);
  }
}

void check_types(const Case& c, const Handle& h) {
  std::vector<DataType> out;
  CHECK(data_types(h, c.inputs, int32_t(c.outputs.size()), out) == 0);
  for (size_t o = 0; o < out.size(); ++o) CHECK(out[o] == c.outputs[o].type);
  // Every position with every type: only the graph's own is taken, in LINEAR only.
  std::vector<DynamicPluginTensorDesc> all;
  for (const Tensor& t : c.inputs) all.push_back(dynamic_of(t, 8));
  for (const Tensor& t : c.outputs) all.push_back(dynamic_of(t, 8));
  const int32_t nb_in = int32_t(c.inputs.size()), nb_out = int32_t(c.outputs.size());
  // The input that may have any activation type, as it decides on T.
  const int32_t t_input = std::strcmp(c.op, "StmAddMergeNorm") == 0 ? 1 : std::strcmp(c.op, "StmPatchRows") == 0 ? -1 : 0;
  for (int32_t position = 0; position < nb_in + nb_out; ++position) {
    const PluginTensorDesc good = all[size_t(position)].desc;
    CHECK(h.build->supportsFormatCombination(position, all.data(), nb_in, nb_out));
    for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32, DataType::kINT64, DataType::kINT8, DataType::kBOOL}) {
      all[size_t(position)].desc.type = type;
      const bool activation = type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
      const bool want = position == t_input ? activation : type == good.type;
      CHECK(h.build->supportsFormatCombination(position, all.data(), nb_in, nb_out) == want);
    }
    all[size_t(position)].desc = good;
    for (TensorFormat format : {TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32}) {
      all[size_t(position)].desc.format = format;
      CHECK(!h.build->supportsFormatCombination(position, all.data(), nb_in, nb_out));
    }
    all[size_t(position)].desc = good;
  }
  CHECK(!h.build->supportsFormatCombination(nb_in + nb_out, all.data(), nb_in, nb_out));
  CHECK(!h.build->supportsFormatCombination(-1, all.data(), nb_in, nb_out));
  CHECK(!h.build->supportsFormatCombination(0, all.data(), nb_in - 1, nb_out));
}

void check_tactics(const Case& c, const Handle& h) {
  std::vector<DynamicPluginTensorDesc> in, out;
  for (const Tensor& t : c.inputs) in.push_back(dynamic_of(t, 64));
  for (const Tensor& t : c.outputs) out.push_back(dynamic_of(t, 64));
  const int32_t nb_in = int32_t(in.size()), nb_out = int32_t(out.size());
  CHECK(h.build->configurePlugin(in.data(), nb_in, out.data(), nb_out) == 0);
  const size_t large = h.build->getWorkspaceSize(in.data(), nb_in, out.data(), nb_out);
  for (auto& d : in) d.desc.dims.d[0] = -1;  // .desc holds wildcards: .max decides
  CHECK(h.build->getWorkspaceSize(in.data(), nb_in, out.data(), nb_out) == large);
  const int32_t nb = h.build->getNbTactics();
  std::vector<int32_t> tactics(size_t(nb) + 1, -7);
  CHECK(h.build->getValidTactics(tactics.data(), nb) == 0 && tactics[size_t(nb)] == -7);
  CHECK((nb == 0) == (!std::strcmp(c.op, "StmAddMergeNorm") || !std::strcmp(c.op, "StmPatchRows")));
  for (int32_t i = 0; i < nb; ++i) {
    CHECK(tactics[size_t(i)] > 0);
    for (int32_t k = 0; k < i; ++k) CHECK(tactics[size_t(i)] != tactics[size_t(k)]);
    CHECK(h.runtime->setTactic(tactics[size_t(i)]) == 0);
    for (int64_t batch : {1, 7, 64}) CHECK(shape_change(h, c, batch) == 0);
  }
  // Where a fast kernel runs the simple one is not timed, but engines that took it still run.
  const bool half = c.inputs[0].type != F;
  if (half && (!std::strcmp(c.op, "StmConvXProj") || !std::strcmp(c.op, "StmMambaScan"))) {
    CHECK(nb == 1 && tactics[0] != 1);
    for (int32_t earlier : {1, 2, 3}) {  // of the scan: 2 and 3 are parts of what is chosen from now
      if (earlier > 2 && !std::strcmp(c.op, "StmConvXProj")) continue;
      CHECK(h.runtime->setTactic(earlier) == 0);
      for (int64_t batch : {1, 7, 64}) CHECK(shape_change(h, c, batch) == 0);
    }
  }
  if (nb == 0) {
    CHECK(h.runtime->setTactic(0) == 0);
    for (int64_t batch : {1, 7, 64}) CHECK(shape_change(h, c, batch) == 0);
  }
  CHECK(h.runtime->setTactic(99) != 0 && said({c.op, "tactic 99"}));
  CHECK(h.build->getNbTactics() == nb);
}

void check_good(const Case& c) {
  const Fields fields(c.attributes);
  for (TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
    const Handle h(create(c.op, c.attributes, phase));
    CHECK(std::strcmp(h.core->getPluginName(), c.op) == 0 && std::strcmp(h.core->getPluginVersion(), "1") == 0);
    CHECK(*h.core->getPluginNamespace() == 0);
    CHECK(h.build->getNbOutputs() == int32_t(c.outputs.size()));
    check_serialisation(c, h, fields.collection);
    check_types(c, h);
    CHECK(shapes(h, c.inputs, c.outputs.size()) == c.output_shapes);
    check_tactics(c, h);
    const std::string metadata = h.build->getMetadataString(), id = h.build->getTimingCacheID();
    CHECK(metadata.find(c.op) != std::string::npos && metadata.find('"') == std::string::npos);
    CHECK(id.rfind("k", 0) == 0);
    for (const auto& [name, value] : c.attributes) CHECK(metadata.find(name) != std::string::npos && id.find(name) != std::string::npos);
    CHECK(g_log.last.empty());
  }
  CHECK(creator_of(c.op)->getFieldNames()->nbFields == int32_t(c.attributes.size()));
}

// --- what is refused
void refuse(const char* op, const Attributes& attributes, std::initializer_list<const char*> words) {
  for (TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) CHECK(!create(op, attributes, phase));
  CHECK(said(words) || (std::printf("  op %s\n", op), false));
}

Attributes with(Attributes attributes, const std::string& name, const Attribute& value) {
  attributes.erase(name);
  attributes.emplace(name, value);
  return attributes;
}
Attributes without(Attributes attributes, const std::string& name) {
  attributes.erase(name);
  return attributes;
}

void check_bad_attributes() {
  const Attributes scan = scan_case(F, -1, 0, 0).attributes, none = norm_case(F, "none").attributes, edge = norm_case(F, "edge").attributes,
                   table = norm_case(F, "table").attributes, patch = patch_case(F, 98).attributes;
  refuse("StmPatchRows", without(patch, "patch_size"), {"StmPatchRows 'node_7'", "'patch_size'", "is missing"});
  refuse("StmPatchRows", without(patch, "stride"), {"'stride'", "is missing"});
  refuse("StmPatchRows", with(patch, "patch_size", 0), {"'patch_size'", "is 0", "between 1 and 256"});
  refuse("StmPatchRows", with(patch, "patch_size", 257), {"'patch_size'", "is 257"});
  refuse("StmPatchRows", with(patch, "stride", 0), {"'stride'", "is 0"});
  refuse("StmPatchRows", with(patch, "cls_index", -2), {"'cls_index'", "is -2"});
  refuse("StmPatchRows", with(patch, "precision", "int8"), {"'precision' is 'int8'", "'fp32', 'fp16', 'bf16'"});
  refuse("StmPatchRows", with(patch, "precision", 1), {"'precision'", "must be one STRING"});
  refuse("StmConvXProj", {{"cls_index", 1}}, {"StmConvXProj 'node_7'", "'cls_index' is unknown"});
  refuse("StmMambaScan", with(scan, "weight_mode", 4), {"'weight_mode'", "is 4", "between 0 and 3"});
  refuse("StmMambaScan", with(scan, "weight_mode", -1), {"'weight_mode'", "is -1"});
  refuse("StmMambaScan", with(scan, "weight_mode", "hsp"), {"'weight_mode'", "must be one INT", "got 4 of characters"});
  refuse("StmMambaScan", with(scan, "weight_mode", 1.F), {"'weight_mode'", "must be one INT", "float32"});
  refuse("StmMambaScan", with(scan, "scaled_decay", 2), {"'scaled_decay'", "is 2"});
  refuse("StmMambaScan", with(scan, "cls_index", -2), {"'cls_index'", "is -2"});
  refuse("StmMambaScan", with(scan, "cls_index", 16384), {"'cls_index'", "is 16384"});
  refuse("StmMambaScan", without(scan, "weight_mode"), {"'weight_mode'", "is missing"});
  refuse("StmMambaScan", without(scan, "scaled_decay"), {"'scaled_decay'", "is missing"});
  refuse("StmMambaScan", with(with(scan, "cls_index", 98), "weight_mode", 1), {"weight_mode is 1", "cls_index is 98"});
  refuse("StmMambaScan", with(scan, "weight", 1), {"'weight' is unknown", "'weight_mode'"});
  const Attributes merging = linear_case(DataType::kHALF, 0, 2).attributes;
  refuse("StmLinear", with(merging, "left", 12), {"'left'", "is 12", "between 0 and 11"});
  refuse("StmLinear", with(merging, "right", -1), {"'right'", "is -1"});
  refuse("StmLinear", with(merging, "adds", 0), {"'left' and 'right' are 3 and 1", "'adds' is 0"});
  refuse("StmAddMergeNorm", without(none, "merge"), {"'merge'", "is missing"});
  refuse("StmAddMergeNorm", with(none, "merge", "frontier"), {"'merge' is 'frontier'", "'none', 'edge', 'table'"});
  refuse("StmAddMergeNorm", with(none, "merge", ""), {"'merge' is ''"});
  refuse("StmAddMergeNorm", with(none, "merge", 1), {"'merge'", "must be one STRING"});
  refuse("StmAddMergeNorm", with(none, "left", 2), {"'left'", "2 and 0", "belong to 'edge'"});
  refuse("StmAddMergeNorm", with(none, "out_len", 9), {"'out_len' is 9", "belongs to 'table'"});
  refuse("StmAddMergeNorm", with(none, "epsilon", 0.F), {"'epsilon'", "is 0"});
  refuse("StmAddMergeNorm", with(none, "epsilon", float(0.0 / 0.0 * 1)), {"'epsilon'", "nan"});
  refuse("StmAddMergeNorm", with(none, "epsilon", 1), {"'epsilon'", "must be one FLOAT"});
  refuse("StmAddMergeNorm", without(without(edge, "left"), "right"), {"'left' and 'right' are missing or 0"});
  refuse("StmAddMergeNorm", with(edge, "left", -1), {"'left'", "is -1"});
  refuse("StmAddMergeNorm", with(edge, "cls_index", 3), {"'cls_index' is 3", "'edge'"});
  refuse("StmAddMergeNorm", without(table, "out_len"), {"'out_len' is missing"});
  // Defaults, and a STRING without its NUL.
  CHECK(Handle(create("StmMambaScan", {{"weight_mode", 0}, {"scaled_decay", 0}})).plugin);
  const Case before_merges = linear_case(DataType::kHALF, 1, 1);  // as kernel version 10 wrote it into engines
  const Handle old(create("StmLinear", without(without(before_merges.attributes, "left"), "right"), TensorRTPhase::kRUNTIME));
  CHECK(old.plugin && old.build->getNbOutputs() == 3);
  const PluginField bare{"merge", "none", PluginFieldType::kCHAR, 4};
  const PluginFieldCollection one{1, &bare};
  const Handle h(creator_of("StmAddMergeNorm")->createPlugin("node_7", &one, TensorRTPhase::kBUILD));
  CHECK(std::string(h.build->getMetadataString()).find("epsilon=9.99999975e-06") != std::string::npos);

  const int64_t wide = 1;
  const int32_t two[] = {0, 0};
  const PluginField int64{"weight_mode", &wide, PluginFieldType::kINT64, 1}, pair{"weight_mode", two, PluginFieldType::kINT32, 2},
      empty{"weight_mode", nullptr, PluginFieldType::kINT32, 1}, twice[] = {{"merge", "none", PluginFieldType::kCHAR, 5}, {"merge", "none", PluginFieldType::kCHAR, 5}};
  for (const PluginField* field : {&int64, &pair, &empty}) {
    const PluginFieldCollection collection{1, field};
    CHECK(!creator_of("StmMambaScan")->createPlugin("node_7", &collection, TensorRTPhase::kBUILD) && said({"'weight_mode'", "must be one INT"}));
  }
  const PluginFieldCollection doubled{2, twice};
  CHECK(!creator_of("StmAddMergeNorm")->createPlugin("node_7", &doubled, TensorRTPhase::kBUILD) && said({"'merge' is given twice"}));
  // No collection at all: nothing is missing for an op without attributes.
  for (const char* op : {"StmMambaScan", "StmAddMergeNorm", "StmPatchRows"}) {
    for (TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) CHECK(!creator_of(op)->createPlugin(nullptr, nullptr, phase) && said({op, "is missing"}));
  }
  CHECK(Handle(creator_of("StmConvXProj")->createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME)).plugin);
}

// Changes one extent of one input; getOutputShapes, configurePlugin and onShapeChange must all refuse it.
void refuse_shape(Case c, size_t input, Shape shape, std::initializer_list<const char*> words) {
  const Handle h(create(c.op, c.attributes));
  c.inputs[input].shape = std::move(shape);
  CHECK(shapes(h, c.inputs, c.outputs.size()).empty() && said(words));
  CHECK(shape_change(h, c, 8) != 0 && said(words));
}

void check_bad_shapes() {
  const Case linear = linear_case(DataType::kHALF, 1, 1);
  const Case wide = linear_case(F, 0, 0);
  CHECK(shape_change(Handle(create(wide.op, wide.attributes)), wide, 8) != 0 && said({"StmLinear 'node_7'", "no kernel runs these extents in"}));
  refuse_shape(linear, 0, {kBatch, kSeqlen, 2, kModel}, {"StmLinear 'node_7'", "'x'", "(batch, seqlen, 16 in_tiles)"});
  refuse_shape(linear, 0, {kBatch, kSeqlen, 190}, {"190 is no 16 in_tiles"});
  refuse_shape(linear, 0, {kBatch, kSeqlen, 208}, {"in_tiles is", "13"});
  refuse_shape(linear, 2, {kBatch, kSeqlen, 13}, {"'squares'", "13"});
  refuse_shape(linear, 3, {kBatch, 196, 2 * kInner}, {"'residual'", "196"});
  const Case merging = linear_case(DataType::kHALF, 0, 2);
  refuse_shape(merging, 3, {kBatch, 5}, {"'merge_weights'", "5"});
  const Handle merge(create(merging.op, merging.attributes));
  Case changed = merging;
  for (int64_t weight_rows : {1, 8, 5}) {
    changed.inputs[3].shape = {weight_rows, 4};
    CHECK((shape_change(merge, changed, 8) == 0) == (weight_rows != 5));
  }
  CHECK(said({"merge_weights has 5 rows, needs 1 or the batch, 8"}));
  changed = merging;
  for (Tensor* t : {&changed.inputs[0], &changed.inputs[2]}) t->shape[1] = 4;
  CHECK(shape_change(merge, changed, 8) != 0 && said({"left 3 and right 1 leave none of 4 tokens"}));
  const Case conv = conv_case(F), scan = scan_case(F, -1, 1, 1), cls = scan_case(F, 98, 0, 0);
  refuse_shape(conv, 0, {kBatch, kSeqlen}, {"StmConvXProj 'node_7'", "'xz'", "(batch, seqlen, 2 d_inner)"});
  refuse_shape(conv, 0, {kBatch, kSeqlen, 769}, {"'xz'", "769 is no 2 d_inner"});
  refuse_shape(conv, 0, {kBatch, 16385, 2 * kInner}, {"seqlen is 16385", "16384"});
  refuse_shape(conv, 0, {kBatch, 0, 2 * kInner}, {"seqlen is 0"});
  refuse_shape(conv, 1, {2, 192, 4}, {"'conv_weight' is (2, 192, 4)", "d_inner is 192 here and 384"});
  refuse_shape(conv, 1, {2, kInner, 3}, {"'conv_weight' is (2, 384, 3), needs (2, d_inner, 4)"});
  refuse_shape(conv, 3, {2, 44, kInner}, {"x_proj_weight has 44 rows"});
  refuse_shape(scan, 1, {2, kBatch, 196, kRow}, {"'x_dbl'", "seqlen is 196 here and 197"});
  refuse_shape(scan, 1, {2, kBatch, kSeqlen, 40}, {"x_dbl has 40 columns, needs 48"});
  refuse_shape(scan, 4, {2, kInner, 24}, {"needs 56", "dt_rank 24"});
  refuse_shape(scan, 6, {2, kInner, 65}, {"d_state = 65", "1 to 64"});
  CHECK(shape_change(Handle(create(scan.op, scan.attributes)), scan, 65536) != 0 && said({"batch is 65536", "65535"}));
  refuse_shape(scan, 7, {1, kInner}, {"'D' is (1, 384)", "(2, d_inner)"});
  refuse_shape(scan, 8, {4, 3}, {"'merge_pairs' is (4, 3)", "(merge pairs, 2)"});
  refuse_shape(scan, 8, {0, 2}, {"merge_pairs is empty"});
  refuse_shape(scan, 9, {196}, {"'decay_scale' is (196)", "seqlen is 196 here and 197"});
  Case short_cls = cls;
  short_cls.inputs[1].shape[2] = 98;
  refuse_shape(short_cls, 0, {kBatch, 98, 2 * kInner}, {"cls_index is 98", "98 tokens"});

  const Case none = norm_case(F, "none"), edge = norm_case(F, "edge"), table = norm_case(F, "table"), one = norm_case(F, "none", 98);
  refuse_shape(none, 1, {kBatch, 196, kModel}, {"StmAddMergeNorm 'node_7'", "'hidden'", "seqlen is 196 here and 197"});
  refuse_shape(none, 2, {384}, {"'norm_weight' is (384)", "d_model is 384 here and 192"});
  refuse_shape(one, 1, {kBatch, kSeqlen, kModel}, {"'hidden' is (", "197, 192), needs (batch, 1, d_model)"});
  refuse_shape(edge, 3, {kBatch, 4}, {"'merge_weights'", "4), needs (batch or 1, 3)"});
  Case tiny = edge;
  tiny.inputs[0].shape[1] = 3;
  refuse_shape(tiny, 1, {kBatch, 3, kModel}, {"left 2 and right 1 leave none of 3 tokens"});
  refuse_shape(table, 4, {190}, {"'begin' is (190), needs (191)"});
  refuse_shape(table, 6, {196}, {"'member_weight'", "members is 196 here and 197"});
  Case few = table;
  few.inputs[5].shape[0] = 189;
  refuse_shape(few, 6, {189}, {"members has 189 entries for out_len = 190"});
  Case many = table;
  many.inputs[5].shape[0] = kSeqlen + 191;
  refuse_shape(many, 6, {kSeqlen + 191}, {"members has 388 entries, but residual has 197 tokens and out_len is 190"});
  Case shorter = table;
  shorter.inputs[0].shape[1] = 180;
  refuse_shape(shorter, 1, {kBatch, 180, kModel}, {"out_len is 190", "180 tokens"});

  const Case patch = patch_case(F, 98);
  refuse_shape(patch, 0, {kBatch, 3, 224}, {"StmPatchRows 'node_7'", "'images'", "(batch, 3, height, width)"});
  refuse_shape(patch, 0, {kBatch, 1, 224, 224}, {"'images' is (", "1, 224, 224), needs (batch, 3, height, width)"});
  refuse_shape(patch, 0, {kBatch, 3, 224, 15}, {"images have width 15, but patch_size is 16"});
  refuse_shape(patch, 0, {kBatch, 3, 0, 224}, {"images have height 0"});
  refuse_shape(patch, 0, {kBatch, 3, 112, 208}, {"cls_index is 98, but images of 112 x 208 pixels make 91 patches"});
  refuse_shape(patch, 0, {kBatch, 3, 4096, 4096}, {"seqlen is 65537", "16384"});
  CHECK(shape_change(Handle(create(patch.op, patch_case(F, 91).attributes)), patch_case(F, 91, 112, 208), 8) == 0);  // the last place
  Case sides = patch;  // dynamic sides: the output follows them, and what is wrong shows when it runs
  sides.inputs[0].shape[2] = -2, sides.inputs[0].shape[3] = -3;
  const Handle rows_of(create(patch.op, patch.attributes));
  CHECK(shapes(rows_of, sides.inputs, 1) == std::vector<std::string>({"B,((L-16)/16+1)*((W-16)/16+1)+1,768"}));
  sides.inputs[0].shape[2] = 240;
  CHECK(shapes(rows_of, sides.inputs, 1) == std::vector<std::string>({"B,((240-16)/16+1)*((W-16)/16+1)+1,768"}));
  const Handle no_token(create(patch.op, patch_case(F, -1).attributes));
  CHECK(shapes(no_token, sides.inputs, 1) == std::vector<std::string>({"B,((240-16)/16+1)*((W-16)/16+1),768"}));
  Case other = patch;
  other.outputs[0].shape[1] = 196;
  CHECK(shape_change(rows_of, other, 8) != 0 && said({"output 0 'rows' is (8, 196, 768), needs (batch, seqlen, 768)"}));

  // Only known when it runs: the images of residual against the batch
  const Handle plain(create(none.op, none.attributes));
  Case five = none;
  five.inputs[0].shape[0] = 5;
  CHECK(!shapes(plain, five.inputs, 2).empty() && shape_change(plain, five, 5) == 0 && shape_change(plain, five, 8) != 0);
  CHECK(said({"residual has 5 images, needs 1 or the batch, 8"}));
  CHECK(shape_change(plain, shared_residual(none), 1) == 0 && shape_change(plain, shared_residual(none), 8) == 0);

  // Only known when it runs: the rows of merge_weights against the batch, and an output of another length.
  const Handle h(create(edge.op, edge.attributes));
  Case rows = edge;
  rows.inputs[3].shape[0] = 5;
  CHECK(!shapes(h, rows.inputs, 2).empty() && shape_change(h, rows, 5) == 0 && shape_change(h, rows, 8) != 0);
  CHECK(said({"merge_weights has 5 rows", "8"}));
  rows.inputs[3].shape[0] = 1;
  CHECK(shape_change(h, rows, 8) == 0);
  Case longer = edge;
  longer.outputs[1].shape[1] = kSeqlen;
  CHECK(shape_change(h, longer, 8) != 0 && said({"output 1 'normed' is (8, 197, 192), needs (batch, seqlen - 3, d_model)"}));
  // A dynamic length: the output follows it.
  Case dynamic = edge;
  dynamic.inputs[0].shape[1] = dynamic.inputs[1].shape[1] = -2;
  CHECK(shapes(h, dynamic.inputs, 2) == std::vector<std::string>({"B,L-3,192", "B,L-3,192"}));
}

void check_bad_types_and_counts() {
  for (Case c : {scan_case(DataType::kHALF, -1, 1, 0), conv_case(DataType::kHALF), norm_case(DataType::kHALF, "table"), patch_case(DataType::kHALF, 98)}) {
    const Handle h(create(c.op, c.attributes));
    std::vector<DataType> out;
    const int32_t nb_out = int32_t(c.outputs.size());
    for (size_t i = 0; i < c.inputs.size(); ++i) {
      Tensors wrong = c.inputs;
      wrong[i].type = c.inputs[i].type == I ? DataType::kINT64 : c.inputs[i].type == F ? DataType::kHALF : DataType::kINT8;
      CHECK(data_types(h, wrong, nb_out, out) != 0 && said({c.op, ("input " + std::to_string(i)).c_str()}));
    }
    Tensors fewer(c.inputs.begin(), c.inputs.end() - 1);
    const std::string count = "has " + std::to_string(fewer.size()) + " inputs, needs " + std::to_string(c.inputs.size());
    const char* names = !std::strcmp(c.op, "StmAddMergeNorm") ? "residual, hidden, " : !std::strcmp(c.op, "StmPatchRows") ? "images" : "xz, ";
    CHECK(data_types(h, fewer, nb_out, out) != 0 && said({count.c_str(), names}));
    CHECK(data_types(h, c.inputs, nb_out + 1, out) != 0 && said({"outputs, needs"}));
    CHECK(shapes(h, fewer, c.outputs.size()).empty() && said({count.c_str()}));
  }
}

void check_threads() {
  const Handle h(create("StmMambaScan", scan_case(F, -1, 1, 1).attributes));
  const Case c = scan_case(DataType::kHALF, -1, 1, 1);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&h, &c] {
      for (int i = 0; i < 200; ++i) {
        const std::unique_ptr<IPluginV3> copy(h.plugin->clone());
        const Handle mine(copy->clone());
        CHECK(shape_change(mine, c, 1 + i % 64) == 0);
        CHECK(mine.runtime->getFieldsToSerialize()->nbFields == 3);
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

template <typename F>
F symbol(void* library, const char* name) {
  auto f = reinterpret_cast<F>(dlsym(library, name));
  CHECK(f);
  return f;
}
}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) return std::printf("usage: %s RUNTIME.so [CORE.so] SHIM.so [OTHER_MAJOR_CORE.so]\n", argv[0]), 2;
  void* runtime = dlopen(argv[1], RTLD_LAZY);
  if (!runtime) return std::printf("%s\n", dlerror()), 1;
  g_registry = symbol<IPluginRegistry* (*)()>(runtime, "getPluginRegistry")();

  if (argc == 3) {  // the shim alone, as Polygraphy --plugins and trtexec --staticPlugins open it
    CHECK(g_registry->getCreator("StmMambaScan", "1", "") == nullptr);
    void* shim = dlopen(argv[2], RTLD_LAZY);
    if (!shim) return std::printf("%s\n", dlerror()), 1;
    CHECK(symbol<int32_t (*)()>(shim, "stm_register_plugins")() == 0);
    for (const Case& c : all_cases()) CHECK(Handle(create(c.op, c.attributes)).plugin);
    std::printf("ok: %d checks, shim alone\n", g_checks.load());
    return 0;
  }

  if (argc == 5) {  // a library for another major version says so and registers nothing
    std::printf("expect a refusal:\n");
    std::fflush(stdout);
    g_registry->loadLibrary(argv[4]);
    void* other = dlopen(argv[4], RTLD_LAZY);
    int32_t count = -1;
    symbol<IPluginCreatorInterface* const* (*)(int32_t&)>(other, "getCreators")(count);
    CHECK(count == 0);
  }

  IPluginRegistry::PluginLibraryHandle handle = g_registry->loadLibrary(argv[2]);
  CHECK(handle);
  CHECK(!g_registry->loadLibrary(argv[2]));  // a second load is refused, harmlessly
  void* core = dlopen(argv[2], RTLD_LAZY);
  CHECK(symbol<int32_t (*)()>(core, "stm_plugin_abi_version")() == STM_PLUGIN_ABI_VERSION);
  CHECK(symbol<int32_t (*)()>(core, "stm_plugin_tensorrt_major")() == NV_TENSORRT_MAJOR);
  CHECK(symbol<int32_t (*)()>(core, "stm_plugin_kernel_version")() >= 1);
  std::printf("%s\n", symbol<const char* (*)()>(core, "stm_plugin_build_info")());
  const std::string schema = symbol<const char* (*)()>(core, "stm_plugin_op_schema")();
  CHECK(schema.substr(schema.size() - 3) == "}]}");
  symbol<void (*)(ILoggerFinder*)>(core, "setLoggerFinder")(&g_finder);

  for (const Case& c : all_cases()) check_good(c);
  check_bad_attributes();
  check_bad_shapes();
  check_bad_types_and_counts();
  check_threads();

  // The shim finds the creators there already; alone, it brings them. (It sets its own finder for TensorRT's logger.)
  void* shim = dlopen(argv[3], RTLD_LAZY);
  if (!shim) return std::printf("%s\n", dlerror()), 1;
  auto register_plugins = symbol<int32_t (*)()>(shim, "stm_register_plugins");
  CHECK(register_plugins() == 0 && register_plugins() == 0);
  g_registry->deregisterLibrary(handle);
  CHECK(g_registry->getCreator("StmMambaScan", "1", "") == nullptr);
  std::printf("ok: %d checks, headers %d.%d, %s\n", g_checks.load(), NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, argv[1]);
}
