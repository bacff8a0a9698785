#include "linear_plugin.h"

#include "../kernels/linear.h"
#include "plugin.h"

namespace stm::trt {
namespace {

struct LinearOp : OpDefaults {
  static constexpr char kName[] = "StmLinear";
  static constexpr bool kHasTactics = true;

  enum Input : int32_t { kX, kWeight };
  enum Output : int32_t { kY };
  enum Symbol : int32_t { kBatch, kSeqlen, kIn, kOut, kNbSymbols };
  static constexpr const char* kSymbols[] = {"batch", "seqlen", "in_features", "out_features"};

  static AttributeTable attributes() noexcept { return {nullptr, 0}; }
  static bool check_attributes(const AttributeValues&, const Where&) noexcept { return true; }

  static Signature signature(const AttributeValues&, bool = false) noexcept {
    Signature s;
    s.symbols = kSymbols, s.nb_symbols = kNbSymbols;
    s.input({"x", Element::kActivation, 3, {extent(kBatch), extent(kSeqlen), extent(kIn)}});
    s.input({"weight", Element::kActivation, 2, {extent(kOut), extent(kIn)}});
    s.output({"y", Element::kActivation, 3, {extent(kBatch), extent(kSeqlen), extent(kOut)}});
    return s;
  }

  static bool check(const AttributeValues&, const Bindings& b, const Where& where) noexcept {
    if (b.known(kIn) && b.known(kOut) && !linear_supported(int32_t(b[kIn]), int32_t(b[kOut]), DataType::kFloat16)) {
      return where.fail("weight is (%d, %d); the kernel takes in_features in multiples of 64 and out_features of 16, as far as the "
                        "shared memory of this GPU goes; leave others a MatMul",
                        int(b[kOut]), int(b[kIn]));
    }
    return check_seqlen(b, kSeqlen, where);
  }

  // kHasTactics only because it tells what the op refuses: float32.
  static int32_t tactics(const AttributeValues&, const Bindings& b, DataType type, int32_t* out, int32_t capacity) noexcept {
    if (capacity < 1 || !linear_supported(int32_t(b[kIn]), int32_t(b[kOut]), type)) return 0;
    return out[0] = int32_t(LinearTactic::kTensorCore), 1;
  }
  static bool knows_tactic(int32_t tactic) noexcept { return LinearTactic(tactic) == LinearTactic::kTensorCore; }
  static size_t workspace_bytes(const AttributeValues&, const Bindings&, DataType) noexcept { return 0; }

  static cudaError_t enqueue(const AttributeValues&, const Call& call) noexcept {
    LinearParams p{};
    p.rows = int64_t{call.extent(kX, 0)} * call.extent(kX, 1);
    p.in_features = call.extent(kWeight, 1);
    p.out_features = call.extent(kWeight, 0);
    p.type = call.type;
    p.x = call.inputs[kX];
    p.weight = call.inputs[kWeight];
    p.y = call.outputs[kY];
    return linear(p, call.stream);
  }
};
}  // namespace

OpEntry linear_op() noexcept { return entry_of<LinearOp>(); }

}  // namespace stm::trt
