#include "conv_xproj_plugin.h"

#include "../kernels/conv_xproj.h"
#include "plugin.h"

namespace stm::trt {
namespace {

struct ConvXProjOp : OpDefaults {
  static constexpr char kName[] = "StmConvXProj";
  static constexpr bool kHasTactics = true;

  enum Input : int32_t { kXz, kConvWeight, kConvBias, kXProjWeight };
  enum Output : int32_t { kXDbl };
  enum Symbol : int32_t { kBatch, kSeqlen, kInner, kRow, kNbSymbols };
  static constexpr const char* kSymbols[] = {"batch", "seqlen", "d_inner", "row"};

  static AttributeTable attributes() noexcept { return {nullptr, 0}; }
  static bool check_attributes(const AttributeValues&, const Where&) noexcept { return true; }

  static Signature signature(const AttributeValues&, bool = false) noexcept {
    const Extent batch = extent(kBatch), seqlen = extent(kSeqlen), inner = extent(kInner), row = extent(kRow);
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"xz", Element::kActivation, 3, {batch, seqlen, extent(kInner, 2)}});
    s.input({"conv_weight", Element::kFloat32, 3, {constant(2), inner, constant(4)}});
    s.input({"conv_bias", Element::kFloat32, 2, {constant(2), inner}});
    s.input({"x_proj_weight", Element::kActivation, 3, {constant(2), row, inner}});
    s.output({"x_dbl", Element::kActivation, 4, {constant(2), batch, seqlen, row}});
    return s;
  }

  static bool check(const AttributeValues&, const Bindings& b, const Where& where) noexcept {
    if (b.known(kRow) && (b[kRow] < 8 || b[kRow] % 8 != 0)) {
      return where.fail("x_proj_weight has %d rows; pad them with zeros to round_up(dt_rank + 2 d_state, 8)", int(b[kRow]));
    }
    return check_seqlen(b, kSeqlen, where);
  }

  static int32_t tactics(const AttributeValues&, const Bindings& b, DataType type, bool every, int32_t* out,
                         int32_t capacity) noexcept {
    return conv_xproj_tactics(int32_t(b[kSeqlen]), int32_t(b[kInner]), int32_t(b[kRow]), type, out, capacity, every);
  }
  static bool knows_tactic(int32_t tactic) noexcept {
    switch (ConvXProjTactic(tactic)) {
      case ConvXProjTactic::kSimple:
      case ConvXProjTactic::kTensorCore: return true;
    }
    return false;
  }
  static size_t workspace_bytes(const AttributeValues&, const Bindings& b, DataType type) noexcept {
    return conv_xproj_workspace_bytes(b[kBatch], b[kSeqlen], b[kInner], b[kRow], type);
  }

  static cudaError_t enqueue(const AttributeValues&, const Call& call) noexcept {
    ConvXProjParams p{};
    p.batch = call.extent(kXz, 0);
    p.seqlen = call.extent(kXz, 1);
    p.d_inner = call.extent(kConvWeight, 1);
    p.row = call.extent(kXProjWeight, 1);
    p.type = call.type;
    p.xz = call.inputs[kXz];
    p.conv_weight = call.input<float>(kConvWeight);
    p.conv_bias = call.input<float>(kConvBias);
    p.x_proj_weight = call.inputs[kXProjWeight];
    p.x_dbl = call.outputs[kXDbl];
    p.workspace = call.workspace;
    return conv_xproj(p, ConvXProjTactic(call.tactic), call.stream);
  }
};
}  // namespace

OpEntry conv_xproj_op() noexcept { return entry_of<ConvXProjOp>(); }

}  // namespace stm::trt
