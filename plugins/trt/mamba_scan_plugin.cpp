#include "mamba_scan_plugin.h"

#include "../kernels/mamba_scan.h"
#include "plugin.h"

namespace stm::trt {
namespace {

constexpr int64_t kMaxState = 64, kMaxBatch = 65535;  // kMaxBatch: one grid axis

struct MambaScanOp : OpDefaults {
  static constexpr char kName[] = "StmMambaScan";
  static constexpr bool kHasTactics = true;

  // Inputs of every node; merge_pairs and decay_scale follow in this order, each if its attribute asks for it.
  enum Input : int32_t { kXz, kXDbl, kConvWeight, kConvBias, kDtWeight, kDtBias, kA, kD, kNbFixedInputs };
  enum Output : int32_t { kY, kMergeWeights };
  enum Symbol : int32_t { kBatch, kSeqlen, kInner, kRow, kState, kRank, kPairs, kNbSymbols };
  static constexpr const char* kSymbols[] = {"batch", "seqlen", "d_inner", "row", "d_state", "dt_rank", "merge pairs"};

  enum Attribute : int32_t { kClsIndex, kWeightMode, kScaledDecay };
  static constexpr AttributeSpec kAttributes[] = {
      {"cls_index", AttributeType::kInt, false, -1, -1, kMaxSeqlen - 1, "the one token to compute, -1 for all", nullptr},
      {"weight_mode", AttributeType::kInt, true, 0, 0, 3, "merge weights: 0 none, 1 hsp, 2 decay, 3 hsp_literal", nullptr},
      {"scaled_decay", AttributeType::kInt, true, 0, 0, 1, "1: decay_scale is an input", nullptr},
  };
  static AttributeTable attributes() noexcept { return table_of(kAttributes); }

  static WeightMode weight_mode(const AttributeValues& v) noexcept { return WeightMode(v.i(kWeightMode)); }
  static bool weighted(const AttributeValues& v) noexcept { return weight_mode(v) != WeightMode::kNone; }
  static bool scaled(const AttributeValues& v) noexcept { return v.i(kScaledDecay) != 0; }
  static int32_t pairs_input(const AttributeValues& v) noexcept { return weighted(v) ? kNbFixedInputs : -1; }
  static int32_t scale_input(const AttributeValues& v) noexcept { return scaled(v) ? kNbFixedInputs + weighted(v) : -1; }

  static bool check_attributes(const AttributeValues& v, const Where& where) noexcept {
    if (v.i(kClsIndex) >= 0 && weighted(v)) {
      return where.fail("weight_mode is %d and cls_index is %d: one token leaves nothing to merge; set one of them to none (0 or -1)",
                        v.i(kWeightMode), v.i(kClsIndex));
    }
    return true;
  }

  static Signature signature(const AttributeValues& v, bool every = false) noexcept {
    const Extent batch = extent(kBatch), seqlen = extent(kSeqlen), inner = extent(kInner), two = constant(2);
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"xz", Element::kActivation, 3, {batch, seqlen, extent(kInner, 2)}});
    s.input({"x_dbl", Element::kActivation, 4, {two, batch, seqlen, extent(kRow)}});
    s.input({"conv_weight", Element::kFloat32, 3, {two, inner, constant(4)}});
    s.input({"conv_bias", Element::kFloat32, 2, {two, inner}});
    s.input({"dt_weight", Element::kActivation, 3, {two, inner, extent(kRank)}});
    s.input({"dt_bias", Element::kFloat32, 2, {two, inner}});
    s.input({"A", Element::kFloat32, 3, {two, inner, extent(kState)}});
    s.input({"D", Element::kFloat32, 2, {two, inner}});
    if (weighted(v) || every) s.input({"merge_pairs", Element::kInt32, 2, {extent(kPairs), two}, "weight_mode > 0"});
    if (scaled(v) || every) s.input({"decay_scale", Element::kFloat32, 1, {seqlen}, "scaled_decay = 1"});
    s.output({"y", Element::kActivation, 3, {batch, v.i(kClsIndex) < 0 ? seqlen : constant(1), inner}});
    if (weighted(v) || every) s.output({"merge_weights", Element::kFloat32, 2, {batch, extent(kPairs)}, "weight_mode > 0"});
    return s;
  }

  static bool check(const AttributeValues& v, const Bindings& b, const Where& where) noexcept {
    if (!check_seqlen(b, kSeqlen, where)) return false;
    if (b.known(kBatch) && b[kBatch] > kMaxBatch) {
      return where.fail("batch is %lld; the kernels take %d images", static_cast<long long>(b[kBatch]), int(kMaxBatch));
    }
    if (b.known(kState) && (b[kState] < 1 || b[kState] > kMaxState)) {
      return where.fail("A has d_state = %d; the kernels take 1 to %d", int(b[kState]), int(kMaxState));
    }
    if (b.known(kRank) && b[kRank] < 1) return where.fail("dt_weight has dt_rank = 0");
    if (b.known(kRow) && b.known(kState) && b.known(kRank)) {
      const int64_t row = (b[kRank] + 2 * b[kState] + 7) / 8 * 8;
      if (b[kRow] != row) {
        return where.fail("x_dbl has %d columns, needs %d = round_up(dt_rank %d + 2 * d_state %d, 8): take it from StmConvXProj",
                          int(b[kRow]), int(row), int(b[kRank]), int(b[kState]));
      }
    }
    if (b.known(kSeqlen) && v.i(kClsIndex) >= b[kSeqlen]) {
      return where.fail("cls_index is %d, but xz has %d tokens", v.i(kClsIndex), int(b[kSeqlen]));
    }
    if (weighted(v) && b.known(kPairs) && b[kPairs] < 1) return where.fail("merge_pairs is empty; set weight_mode to 0 and leave it out");
    return true;
  }

  static int32_t tactics(const AttributeValues&, const Bindings& b, DataType type, bool every, int32_t* out,
                         int32_t capacity) noexcept {
    return mamba_scan_tactics(int32_t(b[kSeqlen]), int32_t(b[kInner]), int32_t(b[kState]), int32_t(b[kRank]), int32_t(b[kRow]), type,
                              out, capacity, every);
  }
  static bool knows_tactic(int32_t tactic) noexcept {
    switch (MambaScanTactic(tactic)) {
      case MambaScanTactic::kSimple:
      case MambaScanTactic::kWalkMma:
      case MambaScanTactic::kSegments:
      case MambaScanTactic::kAdaptive:
      case MambaScanTactic::kWalkMmaTwoPass: return true;
    }
    return false;
  }
  static size_t workspace_bytes(const AttributeValues& v, const Bindings& b, DataType type) noexcept {
    return mamba_scan_workspace_bytes(b[kBatch], b[kSeqlen], b[kInner], b[kState], weighted(v) ? b[kPairs] : 0, type);
  }

  static size_t scratch_bytes(const AttributeValues& v) noexcept { return kMeetingBytes + (weighted(v) ? kMergeScratchBytes : 0); }

  static cudaError_t enqueue(const AttributeValues& v, const Call& call) noexcept {
    const int32_t pairs = pairs_input(v), scale = scale_input(v);
    MambaScanParams p{};
    p.batch = call.extent(kXz, 0);
    p.seqlen = call.extent(kXz, 1);
    p.d_inner = call.extent(kA, 1);
    p.d_state = call.extent(kA, 2);
    p.dt_rank = call.extent(kDtWeight, 2);
    p.row = call.extent(kXDbl, 3);
    p.cls_index = v.i(kClsIndex);
    p.nb_pairs = pairs < 0 ? 0 : call.extent(pairs, 0);
    p.weight_mode = weight_mode(v);
    p.type = call.type;
    p.xz = call.inputs[kXz];
    p.x_dbl = call.inputs[kXDbl];
    p.conv_weight = call.input<float>(kConvWeight);
    p.conv_bias = call.input<float>(kConvBias);
    p.dt_weight = call.inputs[kDtWeight];
    p.dt_bias = call.input<float>(kDtBias);
    p.A = call.input<float>(kA);
    p.D = call.input<float>(kD);
    p.merge_pairs = pairs < 0 ? nullptr : call.input<int32_t>(pairs);
    p.decay_scale = scale < 0 ? nullptr : call.input<float>(scale);
    p.y = call.outputs[kY];
    p.merge_weights = pairs < 0 ? nullptr : call.output<float>(kMergeWeights);
    p.workspace = call.workspace;
    p.meetings = call.scratch;
    p.merge_scratch = call.scratch && weighted(v) ? static_cast<char*>(call.scratch) + kMeetingBytes : nullptr;
    return mamba_scan(p, MambaScanTactic(call.tactic), call.stream);
  }
};
}  // namespace

OpEntry mamba_scan_op() noexcept { return entry_of<MambaScanOp>(); }

}  // namespace stm::trt
