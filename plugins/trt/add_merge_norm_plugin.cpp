#include "add_merge_norm_plugin.h"

#include "../kernels/add_merge_norm.h"
#include "plugin.h"

namespace stm::trt {
namespace {

struct AddMergeNormOp : OpDefaults {
  static constexpr char kName[] = "StmAddMergeNorm";
  static constexpr bool kHasTactics = false;

  // merge_weights follows for "edge" and "table", the index tables for "table".
  enum Input : int32_t { kResidual, kHidden, kNormWeight, kMergeWeights, kBegin, kMembers, kMemberWeight };
  enum Output : int32_t { kResidualOut, kNormed };
  enum Symbol : int32_t { kBatch, kSeqlen, kModel, kResidualBatch, kWeightRows, kWeights, kMemberCount, kNbSymbols };
  static constexpr const char* kSymbols[] = {"batch", "seqlen", "d_model", "batch or 1", "batch or 1", "weights", "members"};

  enum Attribute : int32_t { kMerge, kLeft, kRight, kOutLen, kClsIndex, kEpsilon };
  static constexpr const char* kRules[] = {"none", "edge", "table", nullptr};  // in the order of MergeRule
  // out_len may be -1 as well as 0 where no table needs it.
  static constexpr AttributeSpec kAttributes[] = {
      {"merge", AttributeType::kChoice, true, 0, 0, 0, "how tokens merge", kRules},
      {"left", AttributeType::kInt, false, 0, 0, kMaxSeqlen, "edge: tokens merged on the left", nullptr},
      {"right", AttributeType::kInt, false, 0, 0, kMaxSeqlen, "edge: tokens merged on the right", nullptr},
      {"out_len", AttributeType::kInt, false, 0, -1, kMaxSeqlen, "table: tokens left", nullptr},
      {"cls_index", AttributeType::kInt, false, -1, -1, kMaxSeqlen - 1, "the one token to keep, -1 for all", nullptr},
      {"epsilon", AttributeType::kFloat, false, 1e-5, 1e-20, 1, "added to the mean square", nullptr},
  };
  static AttributeTable attributes() noexcept { return table_of(kAttributes); }

  static MergeRule rule(const AttributeValues& v) noexcept { return MergeRule(v.i(kMerge)); }
  static bool cls_only(const AttributeValues& v) noexcept { return v.i(kClsIndex) >= 0; }

  static bool check_attributes(const AttributeValues& v, const Where& where) noexcept {
    const MergeRule merge = rule(v);
    const char* name = kRules[v.i(kMerge)];
    if (merge != MergeRule::kEdge && (v.i(kLeft) || v.i(kRight))) {
      return where.fail("attributes 'left' and 'right' are %d and %d, but 'merge' is '%s': they belong to 'edge'", v.i(kLeft), v.i(kRight), name);
    }
    if (merge == MergeRule::kEdge && v.i(kLeft) + v.i(kRight) == 0) {
      return where.fail("attribute 'merge' is 'edge', but 'left' and 'right' are missing or 0; set one, or 'merge' to 'none'");
    }
    if (merge == MergeRule::kTable && v.i(kOutLen) < 1) {
      return where.fail("attribute 'merge' is 'table', but 'out_len' is missing or %d; it must be at least 1", v.i(kOutLen));
    }
    if (merge != MergeRule::kTable && v.i(kOutLen) > 0) {
      return where.fail("attribute 'out_len' is %d, but 'merge' is '%s': it belongs to 'table'", v.i(kOutLen), name);
    }
    if (cls_only(v) && merge != MergeRule::kNone) {
      return where.fail("attribute 'cls_index' is %d and 'merge' is '%s': one token leaves nothing to merge; set 'merge' to 'none'",
                        v.i(kClsIndex), name);
    }
    return true;
  }

  static Signature signature(const AttributeValues& v, bool every = false) noexcept {
    const Extent batch = extent(kBatch), seqlen = extent(kSeqlen), model = extent(kModel);
    const bool edge = rule(v) == MergeRule::kEdge, table = rule(v) == MergeRule::kTable;
    Extent out_len = seqlen;
    if (cls_only(v)) out_len = constant(1);
    if (edge) out_len = extent(kSeqlen, 1, -int64_t(v.i(kLeft)) - v.i(kRight));
    if (table) out_len = constant(v.i(kOutLen));
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"residual", Element::kFloat32, 3, {extent(kResidualBatch), seqlen, model}});
    s.input({"hidden", Element::kActivation, 3, {batch, cls_only(v) ? constant(1) : seqlen, model}});
    s.input({"norm_weight", Element::kFloat32, 1, {model}});
    if (edge || table || every) {
      const Extent weights = edge ? constant(v.i(kLeft) + v.i(kRight)) : extent(kWeights);
      s.input({"merge_weights", Element::kFloat32, 2, {extent(kWeightRows), weights}, "merge = edge or table"});
    }
    if (table || every) {
      s.input({"begin", Element::kInt32, 1, {constant(int64_t(v.i(kOutLen)) + 1)}, "merge = table"});
      s.input({"members", Element::kInt32, 1, {extent(kMemberCount)}, "merge = table"});
      s.input({"member_weight", Element::kInt32, 1, {extent(kMemberCount)}, "merge = table"});
    }
    s.output({"residual_out", Element::kFloat32, 3, {batch, out_len, model}});
    s.output({"normed", Element::kActivation, 3, {batch, out_len, model}});
    return s;
  }

  static bool check(const AttributeValues& v, const Bindings& b, const Where& where) noexcept {
    if (!check_seqlen(b, kSeqlen, where)) return false;
    if (b.known(kSeqlen)) {
      const int64_t seqlen = b[kSeqlen];
      if (v.i(kClsIndex) >= seqlen) return where.fail("cls_index is %d, but residual has %d tokens", v.i(kClsIndex), int(seqlen));
      if (!check_merged(b, kSeqlen, v.i(kLeft), v.i(kRight), where)) return false;
      if (v.i(kOutLen) > seqlen) return where.fail("out_len is %d, but residual has %d tokens", v.i(kOutLen), int(seqlen));
      // A token joins one group, and each group's first may stand twice: with weight one, and with what its weight lacks of that.
      if (b.known(kMemberCount) && b[kMemberCount] > seqlen + v.i(kOutLen)) {
        return where.fail("members has %d entries, but residual has %d tokens and out_len is %d: that is more than a plan can have",
                          int(b[kMemberCount]), int(seqlen), v.i(kOutLen));
      }
    }
    if (b.known(kMemberCount) && b[kMemberCount] < v.i(kOutLen)) {
      return where.fail("members has %d entries for out_len = %d groups; each needs one at least", int(b[kMemberCount]), v.i(kOutLen));
    }
    if (b.known(kWeights) && b[kWeights] < 1) return where.fail("merge_weights has no columns; set 'merge' to 'none'");
    return check_one_or_batch(b, kResidualBatch, kBatch, "residual", "images", where) &&
           check_one_or_batch(b, kWeightRows, kBatch, "merge_weights", "rows", where);
  }

  // One kernel: nothing to choose and no scratch.
  static int32_t tactics(const AttributeValues&, const Bindings&, DataType, bool, int32_t*, int32_t) noexcept { return 0; }
  static bool knows_tactic(int32_t) noexcept { return false; }
  static size_t workspace_bytes(const AttributeValues&, const Bindings&, DataType) noexcept { return 0; }

  static cudaError_t enqueue(const AttributeValues& v, const Call& call) noexcept {
    AddMergeNormParams p{};
    p.batch = call.extent(kHidden, 0);
    p.seqlen_in = call.extent(kResidual, 1);
    p.seqlen_out = p.seqlen_in;
    p.d_model = call.extent(kResidual, 2);
    p.rule = rule(v);
    p.left = v.i(kLeft);
    p.right = v.i(kRight);
    p.cls_index = v.i(kClsIndex);
    p.epsilon = v.f(kEpsilon);
    p.type = call.type;
    p.residual_per_image = call.extent(kResidual, 0) != 1;
    p.residual = call.input<float>(kResidual);
    p.hidden = call.inputs[kHidden];
    p.norm_weight = call.input<float>(kNormWeight);
    p.residual_out = call.output<float>(kResidualOut);
    p.normed = call.outputs[kNormed];
    if (cls_only(v)) p.seqlen_out = 1;
    if (p.rule != MergeRule::kNone) {
      p.merge_weights = call.input<float>(kMergeWeights);
      p.nb_weights = call.extent(kMergeWeights, 1);
      p.weights_per_image = call.extent(kMergeWeights, 0) != 1;
    }
    if (p.rule == MergeRule::kEdge) p.seqlen_out = p.seqlen_in - p.left - p.right;
    if (p.rule == MergeRule::kTable) {
      p.seqlen_out = v.i(kOutLen);
      p.begin = call.input<int32_t>(kBegin);
      p.members = call.input<int32_t>(kMembers);
      p.member_weight = call.input<int32_t>(kMemberWeight);
    }
    return add_merge_norm(p, call.stream);
  }
};
}  // namespace

OpEntry add_merge_norm_op() noexcept { return entry_of<AddMergeNormOp>(); }

}  // namespace stm::trt
