"""The portable file: structure, promises, metadata, and that any batch runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporter import ExportError
from exporter.images import imagenet_classes
from exporter.onnx_export import check_portable, export_onnx, lower_portable, metadata, trace
from exporter.op_schema import DOMAIN
from stm import MergePlan, make_plan, state_dict_sha256

from .conftest import Exported, run_onnx, small_model, small_plan


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def all_nodes(holder: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.NodeProto]:
    found = list(holder.node)
    for node in holder.node:
        for attribute in node.attribute:
            found += all_nodes(attribute.g) if attribute.HasField("g") else []
    return found


# --- vim-t, stm-20 ------------------------------------------------------------------------------------------------------


def test_full_check_and_versions(exported: Exported) -> None:
    onnx.checker.check_model(exported.proto, full_check=True)
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert exported.proto.ir_version <= 10
    assert {entry.domain: entry.version for entry in exported.proto.opset_import} == {"": 18, "stm": 1}
    assert exported.proto.producer_name == "stm-export"


def test_inputs_and_outputs(exported: Exported) -> None:
    graph = exported.proto.graph
    assert [(value.name, shape(value)) for value in graph.input] == [("images", ["batch", 3, 224, 224])]
    assert [(value.name, shape(value)) for value in graph.output] == [("logits", ["batch", 1000])]


def test_no_literal_batch(exported: Exported) -> None:
    """The exporter's example has batch 2; no activation may remember it."""
    graph = exported.proto.graph
    made = {name for node in graph.node for name in node.output}
    lead = {value.name: shape(value)[0] for value in graph.value_info if value.name in made and len(shape(value)) > 1}
    assert len(lead) > 300
    assert set(lead.values()) == {"batch"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Reshape", "Expand") and node.input[1] in constants:
            assert constants[node.input[1]][0] in (-1, 0, 1), node.name


def test_one_node_an_operation(exported: Exported) -> None:
    assert ops(exported.proto) == {
        "StmCausalConvSiluFwd": 24,
        "StmCausalConvSiluBwd": 24,
        "StmSelectiveScanFwd": 24,
        "StmSelectiveScanBwd": 24,
        "StmRmsNorm": 25,
        "StmMergeWeightsHsp": 22,
        "StmMergeTokens": 11,
    }
    assert {function.name for function in exported.proto.functions} == ops(exported.proto).keys()
    counts = Counter(node.op_type for node in exported.proto.graph.node)
    assert counts["MatMul"] == 24 * 6, "in, out, and x and dt for each direction"
    assert (counts["Conv"], counts["Gemm"]) == (1, 1)
    assert not counts.keys() & {"Loop", "If", "Scan", "Flip", "ScatterND", "GatherND", "Sequence"}
    assert counts["Transpose"] == 1, "token-major: the patches alone are turned"
    everything = [node for function in exported.proto.functions for node in all_nodes(function)] + all_nodes(exported.proto.graph)
    assert not {node.op_type for node in everything} & {"Loop", "If"}
    assert all(not attribute.ref_attr_name for node in everything for attribute in node.attribute)


def test_tokens_a_layer_are_in_the_shapes(exported: Exported) -> None:
    assert exported.model.plan is not None
    lengths = {value.name: shape(value) for value in exported.proto.graph.value_info}
    for layer, length in enumerate(exported.model.plan.lengths):
        assert lengths[f"layers.{layer}.norm"] == ["batch", length, 192]
    assert lengths["layers.23.mixer.out_proj"] == ["batch", 1, 192], "the last layer computes the class token alone"


def test_parameters_keep_their_names_and_values(exported: Exported) -> None:
    tensors = {tensor.name: tensor for tensor in exported.proto.graph.initializer}
    state = exported.model.state_dict()
    for name, value in state.items():
        want = value.numpy()
        if name.endswith("A_log"):
            name, want = name.removesuffix("_log"), -np.exp(want)
        elif name.endswith("A_b_log"):
            name, want = name.replace("A_b_log", "A_b"), -np.exp(want)
        elif f"{name}_t" in tensors:
            name, want = f"{name}_t", want.T
        elif "conv1d" in name and want.ndim == 3:
            want = want[:, 0]
        np.testing.assert_allclose(numpy_helper.to_array(tensors[name]), want, rtol=1e-6, err_msg=name)
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("layers.") and ".merge." in name} == {"span", "sources", "targets", "keep"}


def test_the_file_is_the_weights_and_little_more(exported: Exported) -> None:
    weights = sum(value.numel() * 4 for value in exported.model.state_dict().values())
    assert weights < exported.path.stat().st_size < 1.05 * weights


def test_no_paths_and_no_stack_traces(exported: Exported) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported.proto)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
    text = proto.SerializeToString()
    for secret in (b"site-packages", b".py", b"/home/", b"/root/", b"/work", b"/tmp", b"File ", b"pkg.torch", b"stack_trace"):
        assert secret not in text, secret
    assert all(not node.metadata_props and not node.doc_string for node in proto.graph.node)


def test_polygraphy_lint_is_clean(exported: Exported, polygraphy: Callable[..., object]) -> None:
    result = polygraphy("check", "lint", exported.path)
    assert result.returncode == 0, result.stdout + result.stderr  # type: ignore[attr-defined]
    assert "LINT" not in result.stdout  # type: ignore[attr-defined]


def test_metadata(exported: Exported) -> None:
    meta = {entry.key: entry.value for entry in exported.proto.metadata_props}
    plan = exported.model.plan
    assert plan is not None
    assert meta["stm.model"] == "vim-t"
    assert meta["stm.precision"] == "fp32"
    assert meta["stm.weights_random"] == "true"
    assert "RANDOM" in meta["stm.weights"]
    assert meta["stm.checkpoint_sha256"] == ""
    assert meta["stm.weights_sha256"] == state_dict_sha256(exported.model.state_dict())
    assert MergePlan.from_json(meta["stm.plan"]) == plan
    assert json.loads(meta["stm.seqlen"]) == plan.lengths
    assert (meta["stm.tokens_left"], meta["stm.token_layers_removed"]) == ("153", "792")
    assert float(meta["stm.gflops_paper"]) == pytest.approx(1.2113, abs=1e-3)
    assert float(meta["stm.gflops_true"]) > float(meta["stm.gflops_paper"])
    assert json.loads(meta["stm.image_size"]) == [224, 224]
    normal = json.loads(meta["stm.normalization"])
    assert (normal["mean"], normal["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert json.loads(meta["stm.classes"]) == imagenet_classes()
    assert json.loads(meta["stm.config"])["d_model"] == 192


# --- small models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_any_batch_runs(small_exported: Exported, batch: int) -> None:
    images = torch.randn(batch, 3, 48, 64)
    (got,) = run_onnx(small_exported.proto, images=images.numpy())
    want = small_exported.model(images).numpy()
    assert got.shape == (batch, 10)
    assert np.abs(got - want).max() <= 2e-5 * want.std()


VARIANTS = {  # weights and rule, other plan options, opset
    "opset 19, proportional": (("hsp", "spread"), {"proportional_decay": True}, 19),
    "opset 20, literal, one side": (("hsp_literal", "one_sided"), {"rate": 0.3}, 20),
    "opset 18, mean": (("mean", "frontier"), {}, 18),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_plan_exports(name: str) -> None:
    (weights, rule), options, opset = VARIANTS[name]
    model = small_model(small_plan(weights, rule, **options))
    proto = export_onnx(model, opset=opset)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    images = torch.randn(3, 3, 48, 64)
    want = model(images).numpy()
    (got,) = run_onnx(proto, images=images.numpy())
    assert np.abs(got - want).max() <= 5e-5 * want.std()
    used = ops(proto)
    assert used["StmMergeTokens"] == 2
    if weights == "hsp":
        assert used["StmSelectiveScanScaledFwd"] == used["StmSelectiveScanScaledBwd"] == 3
        assert used["StmMergeWeightsHsp"] == 4
    else:
        assert used["StmMergeWeightsHspLiteral"] == (2 if rule == "one_sided" else 0)
        assert used["StmSelectiveScanFwd"] == 3


def test_unmerged_with_overlapping_patches() -> None:
    model = small_model(stride=8, image_size=(40, 24), depth=2)
    proto = export_onnx(model)
    assert not any("Merge" in name for name in ops(proto))
    images = torch.randn(1, 3, 40, 24)
    want = model(images).numpy()
    assert np.abs(run_onnx(proto, images=images.numpy())[0] - want).max() <= 2e-5 * want.std()
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    assert meta["stm.plan"] == ""
    assert json.loads(meta["stm.seqlen"]) == [9, 9]
    assert meta["stm.classes"] == ""


def test_class_names_must_fit() -> None:
    model = small_model()
    assert json.loads(metadata(model, "fp32", list("abcdefghij"))["stm.classes"]) == list("abcdefghij")
    with pytest.raises(ExportError, match="3 class names for 10 classes"):
        metadata(model, "fp32", ["a", "b", "c"])


def test_unknown_opset() -> None:
    with pytest.raises(ExportError, match="opset is 17; choose from 18, 19, 20"):
        trace(small_model(), torch.zeros(2, 3, 48, 64), opset=17)


def test_what_torch_cannot_export_is_our_error() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"torch\.onnx\.export failed"):
        trace(Branches(), torch.zeros(2, 3))


def test_other_conv_widths_are_refused_or_right() -> None:
    model = small_model(d_conv=3, depth=1)
    try:
        proto = export_onnx(model)
    except ExportError:
        return
    images = torch.randn(1, 3, 48, 64)
    np.testing.assert_allclose(run_onnx(proto, images=images.numpy())[0], model(images).numpy(), atol=1e-4)


# --- check_portable ------------------------------------------------------------------------------------------------------


def broken_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def broken_body(model: onnx.ModelProto) -> None:
    del model.functions[0]


def broken_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def broken_path(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = 'File "/home/me/model.py", line 3'


def broken_loop(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info
    branch = helper.make_graph(
        [helper.make_node("Identity", ["logits"], ["branch_out"])], "branch", [], [value("branch_out", TensorProto.FLOAT, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch))


def broken_graph(model: onnx.ModelProto) -> None:
    model.graph.node[5].input[0] = "nowhere"


BROKEN = {
    "literal batch": (broken_batch, "first axis of 'images' is 2"),
    "body gone": (broken_body, "no function body|refuses"),
    "newer IR": (broken_ir, "IR version is 11, promised at most 10"),
    "local path": (broken_path, "local path or stack trace"),
    "branch": (broken_loop, "is a If"),
    "dangling": (broken_graph, "refuses"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_portable_refuses(small_exported: Exported, name: str) -> None:
    damage, wanted = BROKEN[name]
    model = onnx.ModelProto()
    model.CopyFrom(small_exported.proto)
    check_portable(model, 18)
    damage(model)
    with pytest.raises(ExportError, match=wanted):
        check_portable(model, 18)


def test_check_portable_knows_the_opset(small_exported: Exported) -> None:
    with pytest.raises(ExportError, match="opset is 18, asked 20"):
        check_portable(small_exported.proto, 20)


def test_export_is_repeatable(small_exported: Exported) -> None:
    again = export_onnx(small_model(small_plan()))
    assert again.SerializeToString(deterministic=True) == small_exported.proto.SerializeToString(deterministic=True)


def test_lower_portable_needs_a_fresh_trace(small_exported: Exported) -> None:
    again = onnx.ModelProto()
    again.CopyFrom(small_exported.proto)
    with pytest.raises(ExportError, match=r"fresh from torch\.onnx\.export"):
        lower_portable(again)


def test_a_plan_that_merges_nothing_leaves_no_trace() -> None:
    model = small_model(make_plan(small_model().config))
    assert metadata(model, "fp32")["stm.plan"] == ""
