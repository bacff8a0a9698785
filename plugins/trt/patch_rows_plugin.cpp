#include "patch_rows_plugin.h"

#include "../kernels/patch_rows.h"
#include "plugin.h"

#include <initializer_list>

namespace stm::trt {
namespace {

struct PatchRowsOp : OpDefaults {
  static constexpr char kName[] = "StmPatchRows";
  static constexpr bool kHasTactics = false;

  enum Input : int32_t { kImages };
  enum Output : int32_t { kRows };
  enum Symbol : int32_t { kBatch, kHeight, kWidth, kSeqlen, kNbSymbols };  // kSeqlen is derived
  static constexpr const char* kSymbols[] = {"batch", "height", "width", "seqlen"};

  enum Attribute : int32_t { kPatchSize, kStride, kClsIndex, kPrecision };
  static constexpr const char* kPrecisions[] = {"fp32", "fp16", "bf16", nullptr};  // in the order of DataType
  static constexpr AttributeSpec kAttributes[] = {
      {"patch_size", AttributeType::kInt, true, 0, 1, kMaxPatch, "side of a patch in pixels", nullptr},
      {"stride", AttributeType::kInt, true, 0, 1, kMaxSeqlen, "pixels from a patch to the next", nullptr},
      {"cls_index", AttributeType::kInt, false, -1, -1, kMaxSeqlen - 1, "the class token's place, -1 for none", nullptr},
      {"precision", AttributeType::kChoice, false, 0, 0, 0, "type of the rows", kPrecisions},
  };
  static AttributeTable attributes() noexcept { return table_of(kAttributes); }
  static bool check_attributes(const AttributeValues&, const Where&) noexcept { return true; }

  static DataType type(const AttributeValues& v) noexcept { return DataType(v.i(kPrecision)); }

  static Signature signature(const AttributeValues& v, bool every = false) noexcept {
    const int64_t patch = v.i(kPatchSize);
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"images", Element::kFloat32, 4, {extent(kBatch), constant(3), extent(kHeight), extent(kWidth)}});
    const Element element = every ? Element::kActivation : element_of(type(v));
    s.output({"rows", element, 3, {extent(kBatch), extent(kSeqlen), constant(3 * patch * patch)}});
    return s;
  }

  // Leaves images that are too small to check().
  static void derive(const AttributeValues& v, Bindings& b) noexcept {
    if (!b.known(kHeight) || !b.known(kWidth) || b[kHeight] < v.i(kPatchSize) || b[kWidth] < v.i(kPatchSize)) return;
    b.value[kSeqlen] = patch_rows_seqlen(b[kHeight], b[kWidth], v.i(kPatchSize), v.i(kStride), v.i(kClsIndex));
  }
  static const nvinfer1::IDimensionExpr* derived(const AttributeValues& v, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& builder) noexcept {
    using Operation = nvinfer1::DimensionOperation;
    const auto apply = [&builder](Operation operation, const nvinfer1::IDimensionExpr* a, const nvinfer1::IDimensionExpr* b) {
      return a && b ? builder.operation(operation, *a, *b) : nullptr;
    };
    const nvinfer1::IDimensionExpr *one = builder.constant(1), *patch = builder.constant(v.i(kPatchSize)), *stride = builder.constant(v.i(kStride));
    const auto patches = [&](const nvinfer1::IDimensionExpr* pixels) {
      return apply(Operation::kSUM, apply(Operation::kFLOOR_DIV, apply(Operation::kSUB, pixels, patch), stride), one);
    };
    const nvinfer1::IDimensionExpr* all = apply(Operation::kPROD, patches(in[kImages].d[2]), patches(in[kImages].d[3]));
    return v.i(kClsIndex) < 0 ? all : apply(Operation::kSUM, all, one);
  }

  static bool check(const AttributeValues& v, const Bindings& b, const Where& where) noexcept {
    for (const Symbol side : {kHeight, kWidth}) {
      if (b.known(side) && b[side] < v.i(kPatchSize)) {
        return where.fail("images have %s %lld, but patch_size is %d: there is no whole patch", kSymbols[side], static_cast<long long>(b[side]),
                          v.i(kPatchSize));
      }
    }
    if (!check_seqlen(b, kSeqlen, where)) return false;
    if (b.known(kSeqlen) && v.i(kClsIndex) >= b[kSeqlen]) {
      return where.fail("cls_index is %d, but images of %lld x %lld pixels make %lld patches", v.i(kClsIndex), static_cast<long long>(b[kHeight]),
                        static_cast<long long>(b[kWidth]), static_cast<long long>(b[kSeqlen] - 1));
    }
    return true;
  }

  // One kernel: nothing to choose and no scratch.
  static int32_t tactics(const AttributeValues&, const Bindings&, DataType, bool, int32_t*, int32_t) noexcept { return 0; }
  static bool knows_tactic(int32_t) noexcept { return false; }
  static size_t workspace_bytes(const AttributeValues&, const Bindings&, DataType) noexcept { return 0; }

  static cudaError_t enqueue(const AttributeValues& v, const Call& call) noexcept {
    PatchRowsParams p{};
    p.batch = call.extent(kImages, 0);
    p.height = call.extent(kImages, 2);
    p.width = call.extent(kImages, 3);
    p.patch = v.i(kPatchSize);
    p.stride = v.i(kStride);
    p.cls_index = v.i(kClsIndex);
    p.type = type(v);
    p.images = call.input<float>(kImages);
    p.rows = call.outputs[kRows];
    return patch_rows(p, call.stream);
  }
};
}  // namespace

OpEntry patch_rows_op() noexcept { return entry_of<PatchRowsOp>(); }

}  // namespace stm::trt
