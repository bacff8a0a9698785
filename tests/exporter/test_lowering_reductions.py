"""Methods that look at the image on our plugin: each exported once, lowered, and run in fp32 and fp16 on the fused ops' maths."""

import json
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import stm
from exporter.errors import ExportError
from exporter.onnx_export import export_onnx
from exporter.op_schema import OPS
from exporter.passes.fuse_linear import fuse_linear
from exporter.passes.gather_rows import gather_rows
from exporter.passes.tensorrt import FUSIONS, lower_tensorrt, plugin_nodes
from exporter.runtimes.ort import onnxruntime_session
from exporter.tolerances import tolerance
from stm.reduction import create_reduction, list_reductions, with_reduction

from . import fused_ops
from .fused_ops import run_lowered

CONFIG = stm.VimConfig("tiny", d_model=32, depth=3, image_size=(64, 80), num_classes=11)  # 20 patches, class token at 10
SCHEDULE = {1: 3, 2: 4}
CASES = {name: (name, {}) for name in list_reductions()}
CASES["r-meeto by delta"] = ("r-meeto-true", {"metric": "delta", "distance": "l2"})
CASES["r-meeto by B"] = ("r-meeto", {"metric": "B"})
CASES["famba-v, published order"] = ("famba-v", {"order": "published"})
CASES["backward score, class token in the middle"] = ("token-recognition", {"branch": "backward", "cls_position": "middle"})
READ_APART = {"hsa", "token-recognition", "utr"}  # methods whose score needs a direction's output
PLUGIN_OPS = {"StmPatchRows": 1, "StmConvXProj": CONFIG.depth, "StmAddMergeNorm": CONFIG.depth + 1}
# Ops with static shapes that TensorRT's parser takes; nothing whose output's shape depends on values, no loops.
STANDARD_OPS = set(
    "Add ArgMax Cast Clip Concat Constant ConstantOfShape Div Equal Expand Gather GatherElements GatherND Gemm Greater GreaterOrEqual Less "
    "LessOrEqual MatMul Mul Neg Pad ReduceMax ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Softplus Split Sqrt Squeeze Sub TopK "
    "Transpose Unsqueeze Where Abs".split()
)


def pictures(count=3):
    return torch.randn(count, 3, *CONFIG.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported():
    cache = {}

    def get(case):
        if case not in cache:
            base = stm.VisionMamba(CONFIG).eval()
            base.init_weights(3)
            name, options = CASES[case]
            model = with_reduction(base, create_reduction(name, CONFIG, schedule=SCHEDULE, **options)).requires_grad_(False)
            with torch.no_grad():
                want = model(pictures()).numpy()
            cache[case] = (model, export_onnx(model), want)
        return cache[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_lowered_method_computes_the_same(exported, case):
    """fp32, on the maths of the plugin's ops; the selections agree, as no two scores are equal here."""
    _, proto, want = exported(case)
    before = proto.SerializeToString()
    lowered = lower_tensorrt(proto)
    assert proto.SerializeToString() == before, "the portable model was changed"
    assert np.abs(run_lowered(lowered, pictures().numpy()) - want).max() <= 2e-5 * want.std()


@pytest.mark.parametrize("case", CASES)
def test_portable_method_computes_the_same(exported, case):
    """In ONNX Runtime, at batch 1 and 3, with static shapes all through."""
    _, proto, want = exported(case)
    session = onnxruntime_session(proto.SerializeToString(), threads=1)
    for batch in (1, 3):
        (got,) = session.run(None, {"images": pictures()[:batch].numpy()})
        assert np.abs(got - want[:batch]).max() <= 2e-5 * want.std()
    for value in (*proto.graph.value_info, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") or dim.dim_param == "batch" for dim in dims), f"{value.name} has no static shape"
    assert "Scan" not in {node.op_type for node in proto.graph.node}


@pytest.mark.parametrize("case", CASES)
def test_conv_scan_and_norm_are_the_plugins(exported, case):
    """And the rest is standard ops with static shapes, each TopK's k a constant."""
    lowered = lower_tensorrt(exported(case)[1], "fp16")
    counts = Counter(node.op_type for node in lowered.graph.node)
    scans = counts["StmMambaScan"]
    assert {op: count for op, count in counts.items() if op.startswith("Stm")} == PLUGIN_OPS | {"StmMambaScan": scans}
    name = CASES[case][0]
    apart = len(SCHEDULE) if name in READ_APART else 0  # layers that run a scan a direction
    assert scans - CONFIG.depth == (CONFIG.depth if name == "hsa" else apart)
    assert len(plugin_nodes(lowered)) == sum(count for op, count in counts.items() if op.startswith("Stm"))
    assert {op for op in counts if not op.startswith("Stm")} <= STANDARD_OPS
    assert not lowered.functions
    constants = {tensor.name for tensor in lowered.graph.initializer}
    assert all(node.input[1] in constants for node in lowered.graph.node if node.op_type == "TopK")
    assert len({node.name for node in lowered.graph.node}) == len(lowered.graph.node)


def out_types(node, known):
    """Output types of a node by what its inputs are; types that differ where they must agree are an error."""
    kinds = [known[name] for name in node.input if name]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    T, F, I, B = onnx.TensorProto, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL  # noqa: E741
    if node.op_type in OPS:
        spec = OPS[node.op_type]
        half = {"fp16": T.FLOAT16, "fp32": F}.get((attributes.get("precision") or b"").decode())
        for kind, operand in zip(kinds, spec.inputs, strict=False):
            if operand.type == "T":
                half = half or kind
                assert kind == half, (node.name, operand.name)
            elif operand.type == "float":
                assert kind == F, (node.name, operand.name)
        return [half if operand.type == "T" else F for operand in spec.outputs[: len(node.output)]]
    if node.op_type == "Cast":
        return [attributes["to"]]
    if node.op_type == "TopK":
        assert kinds[0] == F, (node.name, "scores")
        return [kinds[0], I]
    if node.op_type in ("ArgMax", "Shape"):
        return [I]
    if node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        assert kinds[0] == kinds[1], node.name
        return [B]
    if node.op_type == "Where":
        assert kinds[0] == B and kinds[1] == kinds[2], node.name
        return [kinds[1]]
    if node.op_type == "Pad":
        assert len(kinds) < 3 or kinds[2] == kinds[0], node.name
    if node.op_type in ("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Concat", "Clip"):
        assert len(set(kinds)) == 1, (node.name, kinds)
    return [kinds[0]] * len(node.output)


@pytest.mark.parametrize("fp16_accumulation", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_types_agree_as_a_strongly_typed_network_wants(exported, case, fp16_accumulation):
    """Scores and averages in float32, residual in float32, hidden rows and GEMMs in half, indices int64."""
    lowered = lower_tensorrt(exported(case)[1], "fp16", fp16_accumulation)
    known = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer} | {"images": onnx.TensorProto.FLOAT}
    for node in lowered.graph.node:
        known |= dict(zip(node.output, out_types(node, known), strict=True))
        if node.op_type == "MatMul" and node.input[1] not in {t.name for t in lowered.graph.initializer}:
            assert known[node.output[0]] == onnx.TensorProto.FLOAT, f"{node.name}: a product of computed tensors"
        if node.op_type in ("Relu", "Sqrt", "ReduceMean", "Softplus"):
            assert known[node.output[0]] == onnx.TensorProto.FLOAT, f"{node.name}: part of a score"
    assert known["logits"] == onnx.TensorProto.FLOAT


def half_op(base):
    """A fused op whose T outputs are rounded to fp16, as the plugin's are."""
    spec = OPS[base.__name__]

    class Half(base):
        def _run(self, *inputs, precision=None, **attributes):
            outputs = super()._run(*inputs, precision="fp32", **attributes)
            return tuple(o.astype(np.float16) if operand.type == "T" else o for o, operand in zip(outputs, spec.outputs, strict=False))

    Half.__name__ = base.__name__
    return Half


def run_half(lowered, images):
    return ReferenceEvaluator(lowered, new_ops=[half_op(op) for op in fused_ops.OPS]).run(None, {"images": images})[0]


@pytest.mark.parametrize("case", CASES)
def test_products_of_computed_tensors_are_not_rounded(exported, case):
    """Only products with weights take half operands and give half; the others are similarities and averages."""
    lowered = lower_tensorrt(exported(case)[1], "fp16")
    nodes, weights = lowered.graph.node, {tensor.name for tensor in lowered.graph.initializer}
    made = {name: node for node in nodes for name in node.output}
    read = [(name, node) for node in nodes for name in node.input]

    def source(name):
        return made[name].input[0] if name in made and made[name].op_type == "Cast" else name

    def rounded(node):
        return any(r.op_type == "Cast" and r.attribute[0].i == onnx.TensorProto.FLOAT16 for name, r in read if name == node.output[0])

    products = [node for node in nodes if node.op_type == "MatMul"]
    with_weights = [node for node in products if any(source(name) in weights for name in node.input)]
    computed = [node for node in products if node not in with_weights]
    assert all(rounded(node) for node in with_weights)
    assert not any(rounded(node) for node in computed)
    assert computed or CASES[case][0] in ("hsa", "token-recognition", "random", "utr"), "a method that merges averages by a product"


@pytest.mark.parametrize("case", CASES)
def test_fp16_keeps_its_tolerance_where_it_selects_the_same(exported, case):
    """Rounding may turn a near tie of two scores round: so an image may choose another token, and then counts for nothing here;
    but half of the images at least keep the tolerance."""
    _, proto, want = exported(case)
    got = run_half(lower_tensorrt(proto, "fp16"), pictures().numpy())
    errors = np.abs(got - want).max(1) / want.std()
    assert np.isfinite(got).all()
    assert np.median(errors) <= tolerance("fp16").max_error, errors


@pytest.mark.parametrize("name", ["tome", "hsa", "utr"])
def test_with_few_tokens_a_method_computes_the_same(name):
    """Products and, where a method leaves them alone, norms in StmLinear; in float32, which the evaluator has and the kernel has not."""
    config = CONFIG.with_changes(d_model=64)
    base = stm.VisionMamba(config).eval()
    base.init_weights(3)
    model = with_reduction(base, create_reduction(name, config, schedule=SCHEDULE)).requires_grad_(False)
    graph = gs.import_onnx(export_onnx(model))
    for step in FUSIONS:
        graph = step(graph)
    lowered = gs.export_onnx(fuse_linear(graph, "fp16", 3))
    assert sum(node.op_type == "StmLinear" for node in lowered.graph.node) == 2 * config.depth + 1
    want = model(pictures()).numpy()
    assert np.abs(run_lowered(lowered, pictures().numpy()) - want).max() <= 2e-5 * want.std()


def test_the_file_says_which_method_it_is(exported):
    model, proto, _ = exported("r-meeto by delta")
    meta = {entry.key: entry.value for entry in lower_tensorrt(proto, "fp16").metadata_props}
    assert meta["stm.plan"] == ""
    assert json.loads(meta["stm.reduction"]) == {
        "method": "r-meeto-true",
        "schedule": {"1": 3, "2": 4},
        "options": {"metric": "delta", "distance": "l2"},
    }
    assert json.loads(meta["stm.seqlen"]) == model.reduction.lengths == [21, 18, 14]


def test_an_aligned_scan_that_means_something_else_is_refused(exported):
    broken = onnx.ModelProto()
    broken.CopyFrom(exported("hsa")[1])
    scan = next(node for node in broken.graph.node if node.op_type == "StmSelectiveScanLinearFwd")
    scan.input[3], scan.input[4] = scan.input[4], scan.input[3]
    with pytest.raises(ExportError, match="B and C, or x, are not parts"):
        lower_tensorrt(broken)


def test_only_row_gathers_become_gather_nd():
    """An index for each element, or another axis, stays as it is."""
    x, index = gs.Variable("x", np.float32, ("batch", 5, 4)), gs.Variable("index", np.int64, ("batch", 2, 4))
    rows, where, last = gs.Variable("rows", np.int64, ("batch", 2)), gs.Variable("where", np.int64), gs.Variable("last", np.int64)
    outs = [gs.Variable(f"out{i}", np.float32) for i in range(3)]
    nodes = [
        gs.Node("Unsqueeze", "unsqueeze", {}, [rows, gs.Constant("axis", np.array([2]))], [where]),
        gs.Node("Expand", "expand", {}, [where, gs.Constant("extent", np.array([1, 2, 4]))], [last]),
        *(gs.Node("GatherElements", f"g{i}", {"axis": a}, [x, j], [outs[i]]) for i, (a, j) in enumerate(((1, last), (1, index), (2, last)))),
    ]
    graph = gather_rows(gs.Graph(nodes, [x, index, rows], outs, opset=18))
    assert {node.name: node.op for node in graph.nodes if node.name.startswith("g")} == {
        "g0": "GatherND",
        "g1": "GatherElements",
        "g2": "GatherElements",
    }
    assert outs[0].inputs[0].attrs == {"batch_dims": 1}
    assert outs[0].inputs[0].inputs[1] is where


def test_a_graph_that_averages_otherwise_is_refused(exported):
    """The norm's sum has no operand that a GEMM made."""
    _, proto, _ = exported("random")
    broken = onnx.ModelProto()
    broken.CopyFrom(proto)
    norm = next(node for node in broken.graph.node if node.name.startswith("layers.1.norm"))
    add = next(node for node in broken.graph.node if node.output[0] == norm.input[0])
    add.input[1] = add.input[0]
    with pytest.raises(ExportError, match="no operand from a MatMul"):
        lower_tensorrt(broken)
