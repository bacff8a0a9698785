#include "linear_plugin.h"

#include "../kernels/linear.h"
#include "plugin.h"

namespace stm::trt {
namespace {

struct LinearOp : OpDefaults {
  static constexpr char kName[] = "StmLinear";
  static constexpr bool kHasTactics = true;

  // Inputs of every node; squares, residual and merge_weights follow in this order, each if an attribute asks for it.
  enum Input : int32_t { kX, kWeight, kNbFixedInputs };
  enum Output : int32_t { kY, kResidualOut, kSquaresOut };
  enum Symbol : int32_t { kBatch, kSeqlen, kIn, kOut, kWeightRows, kNbSymbols };  // kIn, kOut: tiles of 16 features
  static constexpr const char* kSymbols[] = {"batch", "seqlen", "in_tiles", "out_tiles", "batch or 1"};

  enum Attribute : int32_t { kNormed, kAdds, kEpsilon, kLeft, kRight };
  static constexpr AttributeSpec kAttributes[] = {
      {"normed", AttributeType::kInt, false, 0, 0, 1, "1: squares is an input, which normalise the rows of y", nullptr},
      {"adds", AttributeType::kInt, false, 0, 0, 1, "1: residual is an input, the sum and its squares are outputs", nullptr},
      {"epsilon", AttributeType::kFloat, false, 1e-5F, 1e-30F, 1, "of the norm", nullptr},
      {"left", AttributeType::kInt, false, 0, 0, kMostMerged, "tokens of the sum merged on the left, needs adds = 1", nullptr},
      {"right", AttributeType::kInt, false, 0, 0, kMostMerged, "tokens of the sum merged on the right, needs adds = 1", nullptr},
  };
  static AttributeTable attributes() noexcept { return table_of(kAttributes); }
  static bool check_attributes(const AttributeValues& v, const Where& where) noexcept {
    if (merged(v) > 0 && !adds(v)) {
      return where.fail("attributes 'left' and 'right' are %d and %d, but 'adds' is 0: what merges is the sum with the residual", v.i(kLeft), v.i(kRight));
    }
    return true;
  }

  static bool normed(const AttributeValues& v) noexcept { return v.i(kNormed) != 0; }
  static bool adds(const AttributeValues& v) noexcept { return v.i(kAdds) != 0; }
  static int32_t merged(const AttributeValues& v) noexcept { return v.i(kLeft) + v.i(kRight); }
  static int32_t squares_input(const AttributeValues& v) noexcept { return normed(v) ? kNbFixedInputs : -1; }
  static int32_t residual_input(const AttributeValues& v) noexcept { return adds(v) ? kNbFixedInputs + normed(v) : -1; }
  static int32_t weights_input(const AttributeValues& v) noexcept { return merged(v) > 0 ? residual_input(v) + 1 : -1; }

  static Signature signature(const AttributeValues& v, bool every = false) noexcept {
    const Extent batch = extent(kBatch), seqlen = extent(kSeqlen), in = extent(kIn, kSquaredColumns), out = extent(kOut, kSquaredColumns);
    const Extent out_len = extent(kSeqlen, 1, -int64_t{merged(v)});
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"x", Element::kActivation, 3, {batch, seqlen, in}});
    s.input({"weight", Element::kActivation, 2, {out, in}});
    if (normed(v) || every) s.input({"squares", Element::kFloat32, 3, {batch, seqlen, extent(kIn)}, "normed = 1"});
    if (adds(v) || every) s.input({"residual", Element::kFloat32, 3, {batch, seqlen, out}, "adds = 1"});
    if (merged(v) > 0 || every) s.input({"merge_weights", Element::kFloat32, 2, {extent(kWeightRows), constant(merged(v))}, "left or right > 0"});
    s.output({"y", Element::kActivation, 3, {batch, out_len, out}});
    if (adds(v) || every) {
      s.output({"residual_out", Element::kFloat32, 3, {batch, out_len, out}, "adds = 1"});
      s.output({"squares_out", Element::kFloat32, 3, {batch, out_len, extent(kOut)}, "adds = 1"});
    }
    return s;
  }

  static bool supported(const Bindings& b, DataType type) noexcept {
    return linear_supported(int32_t(b[kIn] * kSquaredColumns), int32_t(b[kOut] * kSquaredColumns), type);
  }
  static bool check(const AttributeValues& v, const Bindings& b, const Where& where) noexcept {
    if (b.known(kIn) && b.known(kOut) && !supported(b, DataType::kFloat16)) {
      return where.fail("weight is (%d, %d); the kernel takes in_features in multiples of 128 and out_features of 16, or of 64 and 32, as "
                        "far as the shared memory of this GPU goes, or on Hopper both in multiples of 64; leave others a MatMul",
                        int(b[kOut] * kSquaredColumns), int(b[kIn] * kSquaredColumns));
    }
    return check_seqlen(b, kSeqlen, where) && check_merged(b, kSeqlen, v.i(kLeft), v.i(kRight), where) &&
           check_one_or_batch(b, kWeightRows, kBatch, "merge_weights", "rows", where);
  }

  // kHasTactics only because it tells what the op refuses: float32.
  static int32_t tactics(const AttributeValues&, const Bindings& b, DataType type, bool, int32_t* out, int32_t capacity) noexcept {
    if (capacity < 1 || !supported(b, type)) return 0;
    return out[0] = int32_t(LinearTactic::kTensorCore), 1;
  }
  static bool knows_tactic(int32_t tactic) noexcept { return LinearTactic(tactic) == LinearTactic::kTensorCore; }
  static size_t workspace_bytes(const AttributeValues&, const Bindings&, DataType) noexcept { return 0; }

  static cudaError_t enqueue(const AttributeValues& v, const Call& call) noexcept {
    const int32_t squares = squares_input(v), residual = residual_input(v), weights = weights_input(v);
    LinearParams p{};
    p.rows = int64_t{call.extent(kX, 0)} * call.extent(kX, 1);
    p.in_features = call.extent(kWeight, 1);
    p.out_features = call.extent(kWeight, 0);
    p.type = call.type;
    p.x = call.inputs[kX];
    p.weight = call.inputs[kWeight];
    p.y = call.outputs[kY];
    p.squares = squares < 0 ? nullptr : call.input<float>(squares);
    p.epsilon = v.f(kEpsilon);
    p.residual = residual < 0 ? nullptr : call.input<float>(residual);
    p.residual_out = residual < 0 ? nullptr : call.output<float>(kResidualOut);
    p.squares_out = residual < 0 ? nullptr : call.output<float>(kSquaresOut);
    p.seqlen = call.extent(kX, 1);
    p.left = v.i(kLeft);
    p.right = v.i(kRight);
    p.merge_weights = weights < 0 ? nullptr : call.input<float>(weights);
    p.weights_per_image = weights >= 0 && call.extent(weights, 0) != 1;
    return linear(p, call.stream);
  }
};
}  // namespace

OpEntry linear_op() noexcept { return entry_of<LinearOp>(); }

}  // namespace stm::trt
