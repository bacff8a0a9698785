"""Each pass where it applies and where it declines."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporter import ExportError
from exporter.onnx_export import trace
from exporter.op_schema import DOMAIN
from exporter.passes.detach_bodies import detach_bodies
from exporter.passes.fold_weights import fold_weights
from exporter.passes.name_tensors import SCOPES, module_of, name_tensors
from exporter.passes.portable import portable
from exporter.passes.strip_metadata import strip_metadata

from .conftest import small_model, small_plan

value = helper.make_tensor_value_info


def with_scopes(node: onnx.NodeProto, *scopes: str) -> onnx.NodeProto:
    node.metadata_props.add(key=SCOPES, value=repr(["", *scopes, "operation"]))
    return node


def two_linears() -> onnx.ModelProto:
    """images -> a (MatMul, Add) -> b (MatMul) -> logits, as the exporter names things."""
    nodes = [
        with_scopes(helper.make_node("MatMul", ["images", "val_0"], ["val_1"]), "a"),
        with_scopes(helper.make_node("Add", ["val_1", "a.bias"], ["add"]), "a"),
        with_scopes(helper.make_node("MatMul", ["add", "val_2"], ["val_3"]), "b"),
        with_scopes(helper.make_node("Relu", ["val_3"], ["logits"])),
    ]
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("val_0", "val_2")]
    bias = numpy_helper.from_array(np.ones(4, np.float32), "a.bias")
    ends = [[value(name, TensorProto.FLOAT, ["s77", 4])] for name in ("images", "logits")]
    inner = [value("add", TensorProto.FLOAT, ["s77", 4]), value("val_3", TensorProto.FLOAT, ["s77", 4])]
    graph = helper.make_graph(nodes, "g", *ends, initializer=[*weights, bias], value_info=inner, doc_string="from /home/me/model.py")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)], ir_version=10)


# --- name_tensors --------------------------------------------------------------------------------------------------------


def test_name_tensors_calls_outputs_after_modules() -> None:
    model = name_tensors(two_linears())
    graph = model.graph
    assert [list(node.output) for node in graph.node] == [["val_1"], ["a"], ["b"], ["logits"]]
    assert [node.name for node in graph.node] == ["a/MatMul", "a/Add", "b/MatMul", "Relu"]
    assert [tensor.name for tensor in graph.initializer] == ["a.weight_t", "b.weight_t", "a.bias"]
    assert [list(node.input) for node in graph.node] == [["images", "a.weight_t"], ["val_1", "a.bias"], ["a", "b.weight_t"], ["b"]]
    assert [item.name for item in graph.value_info] == ["a", "b"]
    for item in (*graph.input, *graph.output, *graph.value_info):
        assert item.type.tensor_type.shape.dim[0].dim_param == "batch"
    onnx.checker.check_model(model, full_check=True)


def test_name_tensors_never_makes_two_tensors_one() -> None:
    model = two_linears()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "b"))  # a weight that has a module's name
    model.graph.node[3].CopyFrom(with_scopes(helper.make_node("Add", ["val_3", "b"], ["logits"])))
    names = name_tensors(model).graph
    assert names.node[2].output[0] == "val_3"
    onnx.checker.check_model(model, full_check=True)


def test_name_tensors_keeps_inputs_and_outputs() -> None:
    model = two_linears()
    model.graph.node[3].CopyFrom(with_scopes(helper.make_node("Relu", ["val_3"], ["logits"]), "head"))
    assert name_tensors(model).graph.output[0].name == model.graph.node[3].output[0] == "logits"


def test_name_tensors_declines_without_scopes() -> None:
    model = strip_metadata(two_linears())
    with pytest.raises(ExportError, match=r"no node says.*fresh from torch\.onnx\.export"):
        name_tensors(model)


def test_module_of() -> None:
    plain = helper.make_node("Relu", ["a"], ["b"])
    assert module_of(plain) is None
    assert module_of(with_scopes(plain, "layers.0", "layers.0.norm")) == "layers.0.norm"
    assert module_of(with_scopes(helper.make_node("Relu", ["a"], ["b"]))) == ""


@pytest.fixture(scope="module")
def traced() -> onnx.ModelProto:
    return trace(small_model(small_plan()), torch.zeros(2, 3, 48, 64))


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def test_name_tensors_on_a_traced_model(traced: onnx.ModelProto) -> None:
    model = name_tensors(copy(traced))
    outputs = [name for node in model.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))
    wanted = {
        f"layers.{i}.mixer.{m}" for i in range(3) for m in ("in_proj", "conv1d", "conv1d_b", "x_proj", "dt_proj_b", "scan", "scan_b", "out_proj")
    }
    wanted |= {"patch_embed", "norm_f", "layers.1.merge", "layers.2.merge", "layers.1.merge.left", "layers.2.merge.right"}
    assert wanted <= set(outputs)
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    assert {"layers.0.mixer.A", "layers.0.mixer.A_b", "layers.2.mixer.conv1d_b.weight"} <= {tensor.name for tensor in model.graph.initializer}


def test_names_are_those_of_real_modules(traced: onnx.ModelProto) -> None:
    model = name_tensors(copy(traced))
    assert not [node.name for node in model.graph.node if "_empty_nn_module_stack" in node.name]


# --- strip_metadata --------------------------------------------------------------------------------------------------------


def test_strip_metadata_removes_every_note(traced: onnx.ModelProto) -> None:
    before = traced.SerializeToString()
    assert b".py" in before, "the exporter does leave paths; else this pass is not needed"
    model = strip_metadata(copy(traced))
    model.graph.ClearField("initializer")
    after = model.SerializeToString()
    for note in (b".py", b"site-packages", b"pkg.torch", b"stack_trace"):
        assert note not in after


def test_strip_metadata_touches_nothing_else() -> None:
    model = two_linears()
    stripped = strip_metadata(copy(model))
    for plain in (model, stripped):
        plain.ClearField("doc_string")
        for item in (plain.graph, *plain.graph.node, *plain.graph.input, *plain.graph.output, *plain.graph.value_info, *plain.graph.initializer):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
    assert stripped == model


# --- portable -----------------------------------------------------------------------------------------------------------


def ours(op: str, inputs: int, *, version: int = 1) -> gs.Graph:
    names = [f"i{index}" for index in range(inputs)]
    node = helper.make_node(op, names, ["out"], name="mine", domain=DOMAIN)
    graph = helper.make_graph([node], "g", [value(name, TensorProto.FLOAT, None) for name in names], [value("out", TensorProto.FLOAT, None)])
    return gs.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, version)], ir_version=10))


def test_portable_attaches_one_body_an_op(traced: onnx.ModelProto) -> None:
    graph = gs.import_onnx(strip_metadata(name_tensors(copy(traced))))
    assert not graph.functions
    portable(graph)
    used = {node.op for node in graph.nodes if node.domain == DOMAIN}
    assert {function.name for function in graph.functions} == used
    assert "StmMergeWeightsHsp" in used
    count = len(graph.functions)
    portable(graph)
    assert len(graph.functions) == count, "a second time adds nothing"


def test_portable_keeps_a_body_that_is_there() -> None:
    graph = portable(ours("StmRmsNorm", 3))
    first = graph.functions[0]
    assert portable(graph).functions == [first]


def test_portable_leaves_other_graphs_alone() -> None:
    graph = gs.import_onnx(strip_metadata(two_linears()))
    before = gs.export_onnx(graph)
    assert gs.export_onnx(portable(graph)) == before
    assert not graph.functions


@pytest.mark.parametrize(
    ("op", "inputs", "version", "wanted"),
    [
        ("StmNobody", 1, 1, r"'mine' is stm::StmNobody.*no function body"),
        ("StmMambaScan", 8, 1, r"stm::StmMambaScan.*no function body"),
        ("StmRmsNorm", 2, 1, r"'mine' \(StmRmsNorm\) has 2 inputs, the op has 3"),
        ("StmRmsNorm", 3, 2, r"imports stm at version 2, the op table is 1"),
    ],
)
def test_portable_declines(op: str, inputs: int, version: int, wanted: str) -> None:
    with pytest.raises(ExportError, match=wanted):
        portable(ours(op, inputs, version=version))


def weights_graph(op: str, value: np.ndarray, **attributes: object) -> onnx.ModelProto:
    node = onnx.helper.make_node(op, ["w"], ["folded"], **attributes)
    use = onnx.helper.make_node("Mul", ["x", "folded"], ["y"])
    graph = onnx.helper.make_graph(
        [node, use],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, "w")],
    )
    return onnx.helper.make_model(graph)


FOLDS = {"Exp": np.exp, "Neg": np.negative, "Transpose": np.transpose, "Squeeze": np.squeeze}


@pytest.mark.parametrize("op", FOLDS)
def test_fold_weights_computes_what_depends_on_weights_alone(op: str) -> None:
    value = np.random.default_rng(0).standard_normal((2, 1, 20000), dtype=np.float32)
    folded = fold_weights(weights_graph(op, value))
    assert [node.op_type for node in folded.graph.node] == ["Mul"]
    (constant,) = folded.graph.initializer
    assert constant.name == "folded"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(constant), FOLDS[op](value))


def test_fold_weights_declines() -> None:
    """An op of an input, an op it does not know, and an initializer that something else reads."""
    model = weights_graph("Relu", np.ones(3, dtype=np.float32))
    assert [node.op_type for node in fold_weights(model).graph.node] == ["Relu", "Mul"]
    model = weights_graph("Exp", np.ones(3, dtype=np.float32))
    model.graph.node[0].input[0] = "x"
    assert [node.op_type for node in fold_weights(model).graph.node] == ["Exp", "Mul"]
    model = weights_graph("Exp", np.ones(3, dtype=np.float32))
    model.graph.node[1].input[0] = "w"
    assert sorted(i.name for i in fold_weights(model).graph.initializer) == ["folded", "w"]


def test_detach_bodies_drops_functions_and_nothing_else(traced: onnx.ModelProto) -> None:
    graph = portable(gs.import_onnx(strip_metadata(name_tensors(fold_weights(copy(traced))))))
    nodes = [node.name for node in graph.nodes]
    assert graph.functions
    detach_bodies(graph)
    assert not graph.functions
    assert [node.name for node in graph.nodes] == nodes
