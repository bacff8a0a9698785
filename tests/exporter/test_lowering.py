"""The `tensorrt` lowering: the same function, on our nodes only. Numbers come from onnx's reference evaluator."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

import stm
from exporter.errors import ExportError
from exporter.onnx_export import export_onnx
from exporter.op_schema import FUSED_OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION
from exporter.passes.cast_precision import cast_precision
from exporter.passes.detach_bodies import detach_bodies
from exporter.passes.fuse_add_norm import fuse_add_norm
from exporter.passes.fuse_linear import MOST_MERGED, fuse_linear
from exporter.passes.fuse_mixer import fuse_mixer
from exporter.passes.fuse_patch_embed import fuse_patch_embed
from exporter.passes.tensorrt import FUSIONS, check_lowered, lower_tensorrt, plugin_nodes
from exporter.passes.tensorrt_common import plugin_node

from .fused_ops import run_lowered

CONFIG = stm.VimConfig("tiny", d_model=32, depth=4, image_size=(96, 80), num_classes=11)  # 30 patches, class token at 15
PLANS = {
    "none": None,
    "edge": {"rate": 0.3},
    "edge one side odd": {"schedule": {1: (2, 1), 3: (0, 3)}},
    "frontier": {"rate": 0.3, "rule": "frontier"},
    "spread": {"rate": 0.3, "rule": "spread"},
    "one_sided": {"rate": 0.3, "rule": "one_sided"},
    "decay": {"rate": 0.3, "weights": "decay"},
    "hsp_literal": {"rate": 0.3, "weights": "hsp_literal"},
    "sum": {"rate": 0.3, "weights": "sum"},
    "mean": {"rate": 0.3, "weights": "mean"},
    "proportional decay": {"rate": 0.3, "proportional_decay": True},
}


def make(plan_options=None):
    plan = stm.make_plan(CONFIG, **plan_options) if plan_options else None
    model = stm.VisionMamba(CONFIG, plan).eval()
    model.init_weights(3)
    return model


@pytest.fixture(scope="module")
def portable():
    cache = {}

    def get(name):
        if name not in cache:
            model = make(PLANS[name])
            cache[name] = (model, export_onnx(model))
        return cache[name]

    return get


@pytest.mark.parametrize("name", PLANS)
def test_lowered_graph_computes_the_same(portable, name):
    model, proto = portable(name)
    before = proto.SerializeToString()
    lowered = lower_tensorrt(proto)
    assert proto.SerializeToString() == before, "the portable model was changed"
    images = torch.randn(3, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.double()(images.double()).float().numpy()
    model.float()
    got = run_lowered(lowered, images.numpy())
    assert np.abs(got - want).max() <= 2e-5 * want.std()


EMBEDDINGS = {
    "overlapping patches": {"stride": 8, "image_size": (48, 32)},
    "odd patches, pixels left over": {"patch_size": 7, "stride": 5, "image_size": (30, 41)},
    "one patch, the class token first": {"image_size": (16, 16)},
    "one layer": {"depth": 1},
}


@pytest.mark.parametrize("changes", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_patch_embedding_of_any_shape(changes):
    config = CONFIG.with_changes(**{"depth": 2, "image_size": (32, 48)} | changes)
    model = stm.VisionMamba(config).eval()
    model.init_weights(3)
    images = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(1))
    got = run_lowered(lower_tensorrt(export_onnx(model)), images.numpy())
    with torch.no_grad():
        want = model.double()(images.double()).float().numpy()
    assert np.abs(got - want).max() <= 2e-5 * want.std()


def test_the_stream_begins_with_rows_a_gemm_and_the_first_norm(portable):
    nodes = lower_tensorrt(portable("edge")[1], "fp16", fp16_accumulation=True).graph.node
    assert [node.op_type for node in nodes[:4]] == ["StmPatchRows", "MatMul", "StmAddMergeNorm", "MatMul"]
    rows, gemm, norm, in_proj = nodes[:4]
    assert list(rows.input) == ["images"]
    assert [onnx.helper.get_node_attr_value(rows, name) for name in ("patch_size", "stride", "cls_index", "precision")] == [16, 16, 15, b"fp16"]
    assert (gemm.name, norm.name) == ("patch_embed.proj/MatMul", "layers.0.norm.add_merge_norm")
    assert list(norm.input) == ["patch_embed.table", gemm.output[0], "layers.0.norm.weight"]
    assert norm.output[1] == in_proj.input[0] == "layers.0.norm"


def test_what_is_the_same_for_all_images_is_one_float32_table(portable):
    model, proto = portable("none")
    lowered = lower_tensorrt(proto, "fp16")
    table = next(onnx.numpy_helper.to_array(i) for i in lowered.graph.initializer if i.name == "patch_embed.table")
    same = model.pos_embed.detach().numpy()[0] + model.patch_embed.proj.bias.detach().numpy()
    same[15] = (model.pos_embed[:, 15] + model.cls_token[:, 0]).detach().numpy()[0]
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[0], same, rtol=1e-6, atol=1e-6)


def test_rules_of_the_merge_become_edge_or_table(portable):
    for names, rule in ((("edge", "edge one side odd", "one_sided", "sum"), "edge"), (("frontier", "mean"), "table")):
        for name in names:
            nodes = [node for node in lower_tensorrt(portable(name)[1]).graph.node if node.op_type == "StmAddMergeNorm"]
            rules = {onnx.helper.get_node_attr_value(node, "merge").decode() for node in nodes}
            assert rules == {"none", rule}, name
            assert len(nodes) == CONFIG.depth + 1


def test_the_members_of_a_table_are_as_many_as_the_plugin_takes(portable):
    """Each token once; a mean lists the first of each group again, with what its weight lacks of one."""
    for name, twice in (("frontier", False), ("mean", True)):
        lowered = lower_tensorrt(portable(name)[1])
        values = {i.name: onnx.numpy_helper.to_array(i) for i in lowered.graph.initializer}
        length, merges = CONFIG.seqlen, 0
        for node in lowered.graph.node:
            if node.op_type != "StmAddMergeNorm" or onnx.helper.get_node_attr_value(node, "merge") != b"table":
                continue
            begin, members, columns = (values[name] for name in node.input[-3:])
            out_len = onnx.helper.get_node_attr_value(node, "out_len")
            seen = Counter(members.tolist())
            assert set(seen) == set(range(length))
            assert set(seen.values()) <= {1, 2} if twice else set(seen.values()) == {1}
            assert (max(seen.values()) == 2) == twice
            assert out_len <= len(members) == len(columns) == begin[-1] <= length + out_len
            length, merges = out_len, merges + 1
        assert merges


def test_every_node_of_ours_is_a_fused_op_with_the_plugin_key(portable):
    lowered = lower_tensorrt(portable("edge")[1], "fp16")
    fused = {op.name: op for op in FUSED_OPS}
    ours = [node for node in lowered.graph.node if node.op_type.startswith("Stm")]
    assert len(ours) == len(plugin_nodes(lowered)) == 3 * CONFIG.depth + 2
    assert not lowered.functions
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.pop("plugin_version") == PLUGIN_VERSION.encode()
        assert attributes.pop("plugin_namespace") == PLUGIN_NAMESPACE.encode()
        assert set(attributes) == {a.name for a in fused[node.op_type].attributes}
    assert len({node.name for node in ours}) == len(ours)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_lies_where_the_table_says(portable, precision):
    """Activations and GEMM weights in half; residual, norms, A, D, biases, conv weights and merge weights in float32."""
    lowered = lower_tensorrt(portable("edge")[1], precision)
    half = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    types = {i.name: i.data_type for i in lowered.graph.initializer}
    cast = {node.output[0]: node.input[0] for node in lowered.graph.node if node.op_type == "Cast"}
    specs = {op.name: op for op in FUSED_OPS}
    seen = 0
    for node in lowered.graph.node:
        if node.op_type in specs:
            for name, operand in zip(node.input, specs[node.op_type].inputs, strict=False):
                if name in types and operand.type in ("T", "float"):
                    assert types[name] == (half if operand.type == "T" else onnx.TensorProto.FLOAT), (node.name, name)
                    seen += 1
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            assert types[cast.get(node.input[1], node.input[1])] == half
    assert seen > 20
    (out,) = lowered.graph.output
    (images,) = lowered.graph.input
    assert {out.type.tensor_type.elem_type, images.type.tensor_type.elem_type} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(("precision", "wanted"), [("fp16", False), ("fp16", True), ("bf16", False)])
def test_fp16_gemms_add_up_in_float32_unless_asked_otherwise(portable, precision, wanted):
    """Half operands -> float32 -> product -> half is what TensorRT takes for such a kernel; bf16 has no other, so it needs none of that."""
    lowered = lower_tensorrt(portable("edge")[1], precision, fp16_accumulation=wanted)
    nodes = lowered.graph.node
    made = {name: node for node in nodes for name in node.output}
    read = {name: node for node in nodes for name in node.input}
    float32, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 2 * CONFIG.depth + 2

    def between_casts(node):
        before = [made[name] for name in node.input if name in made]
        after = read[node.output[0]]
        return [c.op_type for c in (*before, after)] == ["Cast"] * 3 and [c.attribute[0].i for c in (*before, after)] == [float32, float32, half]

    assert {between_casts(node) for node in products} == {precision == "fp16" and not wanted}
    assert ("Gemm" in {node.op_type for node in products}) == (precision == "bf16" or wanted)


def test_a_gemm_that_cannot_be_split_is_refused(portable):
    graph = gs.import_onnx(portable("none")[1])
    for step in (detach_bodies, fuse_patch_embed, fuse_mixer, fuse_add_norm):
        graph = step(graph)
    next(node for node in graph.nodes if node.op == "Gemm").attrs["alpha"] = 0.5
    with pytest.raises(ExportError, match="no product with constant weights plus a bias"):
        cast_precision(graph, "fp16")


def test_bf16_rounds_to_nearest_even(portable):
    lowered = lower_tensorrt(portable("none")[1], "bf16")
    model = portable("none")[0]
    found = next(i for i in lowered.graph.initializer if i.name == "layers.1.mixer.in_proj.weight_t_bf16")
    got = torch.frombuffer(bytearray(found.raw_data), dtype=torch.bfloat16).reshape(tuple(found.dims))
    torch.testing.assert_close(got, model.layers[1].mixer.in_proj.weight.detach().T.bfloat16(), rtol=0, atol=0)


def test_fp16_refuses_a_weight_beyond_its_range(portable):
    graph = gs.import_onnx(portable("none")[1])
    for step in (detach_bodies, fuse_patch_embed, fuse_mixer, fuse_add_norm):
        graph = step(graph)
    matmul = next(node for node in graph.nodes if node.op == "MatMul")
    matmul.inputs[1].values = matmul.inputs[1].values * np.float32(1e8)
    with pytest.raises(ExportError, match="beyond 65504"):
        cast_precision(graph, "fp16")


def broken(portable, edit):
    graph = gs.import_onnx(portable("edge")[1])
    edit(graph)
    return gs.export_onnx(graph)


def first(graph, op):
    return next(node for node in graph.nodes if node.op == op)


def swap_b_and_c(graph):
    scan = first(graph, "StmSelectiveScanFwd")
    scan.inputs[3], scan.inputs[4] = scan.inputs[4], scan.inputs[3]


def change_span(graph):
    node = first(graph, "StmMergeWeightsHsp")
    node.inputs[4].values = node.inputs[4].values * 2


def change_half(graph):
    for node in graph.nodes:
        for tensor in node.inputs:
            if node.op == "Mul" and isinstance(tensor, gs.Constant) and tensor.values.size == 1 and float(tensor.values) == 0.5:
                tensor.values = tensor.values * np.float32(2)


def pad_the_patches(graph):
    first(graph, "Conv").attrs["pads"] = [1, 1, 1, 1]


def transpose_otherwise(graph):
    flatten = first(graph, "Conv").outputs[0].outputs[0]
    flatten.outputs[0].outputs[0].attrs["perm"] = [1, 0, 2]


def two_convolutions(graph):
    conv = first(graph, "Conv")
    graph.nodes.append(gs.Node("Conv", "again", conv.attrs, conv.inputs, [gs.Variable("again", np.float32)]))
    graph.outputs.append(graph.nodes[-1].outputs[0])


def join_class_token(graph):
    return next(node for node in graph.nodes if node.op == "Concat" and len(node.inputs) == 3 and node.attrs["axis"] == 1)


def swap_patches(graph):
    node = join_class_token(graph)
    node.inputs = node.inputs[::-1]


def two_class_tokens(graph):
    node = join_class_token(graph)
    node.inputs = [*node.inputs, node.inputs[1]]


def lose_patches(graph):
    node = join_class_token(graph)
    node.inputs = node.inputs[:2]


def two_position_embeddings(graph):
    add = join_class_token(graph).outputs[0].outputs[0]
    twice = next(tensor for tensor in add.inputs if isinstance(tensor, gs.Constant))
    twice.values = np.concatenate([twice.values, twice.values])


def step_between_gemm_and_sum(graph):
    gemm = next(node for node in graph.nodes if node.name.startswith("layers.0.mixer.out_proj"))
    (add,) = gemm.outputs[0].outputs
    between = gs.Variable("between", np.float32)
    add.inputs = [between if tensor is gemm.outputs[0] else tensor for tensor in add.inputs]
    graph.nodes.append(gs.Node("Relu", "between", {}, [gemm.outputs[0]], [between]))
    graph.toposort()


def drop_scans(graph):
    graph.nodes = [node for node in graph.nodes if not node.op.startswith("StmSelectiveScan")]


BREAKS = {
    "padded patches": (pad_the_patches, "expected square patches of 3 channels, one stride, no padding"),
    "transposed otherwise": (transpose_otherwise, "not flattened"),
    "two convolutions": (two_convolutions, "2 convolutions read the input 'images'"),
    "patches out of order": (swap_patches, "patch 15 follows patch -1"),
    "two class tokens": (two_class_tokens, "30 of 30 patches and 2 class tokens"),
    "patches missing": (lose_patches, "15 of 30 patches and 1 class tokens"),
    "another position embedding": (two_position_embeddings, r"shape \(2, 31, 32\), expected \(1, 31, 32\)"),
    "a step between GEMM and sum": (step_between_gemm_and_sum, "no operand from a MatMul"),
    "B and C swapped": (swap_b_and_c, "not split into dt, B, C"),
    "another span": (change_span, "span of tokens"),
    "no halving": (change_half, "silu"),
    "no scan": (drop_scans, "no StmSelectiveScanFwd"),
}


@pytest.mark.parametrize(("edit", "message"), BREAKS.values(), ids=BREAKS)
def test_a_graph_that_means_something_else_is_refused(portable, edit, message):
    with pytest.raises(ExportError, match=message):
        lower_tensorrt(broken(portable, edit))


def test_a_portable_node_left_is_an_error(portable):
    graph = gs.import_onnx(portable("edge")[1])
    with pytest.raises(ExportError, match="functions"):
        check_lowered(graph)
    with pytest.raises(ExportError, match="which the plugin does not have"):
        check_lowered(detach_bodies(graph))


def test_plugin_nodes_refuse_what_the_parser_would_drop():
    with pytest.raises(ExportError, match="no attribute"):
        plugin_node("StmMambaScan", "n", [], [], typo=1)
    with pytest.raises(ExportError, match="32 bits"):
        plugin_node("StmMambaScan", "n", [], [], cls_index=1 << 40)


LINEAR = CONFIG.with_changes(d_model=64)  # in_features of 64 and 128


def linear_model(**plan_options):
    """Four layers, merges before layer 1 only, if nothing else is said: three norms lie between products."""
    model = stm.VisionMamba(LINEAR, stm.make_plan(LINEAR, **(plan_options or {"schedule": {1: (2, 1)}}))).eval()
    model.init_weights(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # else all ones, and no gain could be forgotten
            parameter.data = 1 + torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) / 4
    return model


def linear_nodes(lowered):
    return {node.name: node for node in lowered.graph.node if node.op_type == "StmLinear"}


def attribute(node, name):
    return onnx.helper.get_node_attr_value(node, name)


def test_products_of_few_tokens_become_linear_nodes():
    lowered = lower_tensorrt(export_onnx(linear_model()), "fp16", largest_batch=2)
    nodes = linear_nodes(lowered)
    in_and_out = [f"layers.{layer}.mixer.{name}/StmLinear" for layer in range(LINEAR.depth) for name in ("in_proj", "out_proj")]
    assert list(nodes) == ["patch_embed.proj/StmLinear", *in_and_out]
    assert not [node.name for node in lowered.graph.node if node.op_type == "MatMul" and "_proj" in node.name]
    types = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in lowered.graph.initializer}
    weight = nodes[in_and_out[0]].input[1]
    assert types[weight] == onnx.TensorProto.FLOAT16 and shapes[weight] == (256, 64)


def test_norms_between_linear_nodes_are_part_of_them():
    lowered = lower_tensorrt(export_onnx(linear_model()), "fp16", largest_batch=2)
    nodes = linear_nodes(lowered)
    # Before layer 0 there is the patch embedding, after layer 3 the class token alone
    assert [name for name, node in nodes.items() if attribute(node, "adds")] == [f"layers.{layer}.mixer.out_proj/StmLinear" for layer in (0, 1, 2)]
    assert [name for name, node in nodes.items() if attribute(node, "normed")] == [f"layers.{layer}.mixer.in_proj/StmLinear" for layer in (1, 2, 3)]
    assert sum(node.op_type == "StmAddMergeNorm" for node in lowered.graph.node) == LINEAR.depth + 1 - 3
    merging = {name: (attribute(node, "left"), attribute(node, "right")) for name, node in nodes.items() if len(node.input) == 4}
    assert merging == {"layers.0.mixer.out_proj/StmLinear": (2, 1)}


@pytest.mark.parametrize(
    ("plan_options", "norms"),
    [({"schedule": {1: (2, 1)}, "rule": "frontier"}, 3), ({"schedule": {1: (12, 0)}}, 3), ({"schedule": {1: (11, 11)}}, 2)],
    ids=["by a table", "more than the kernel merges", "as many as it merges"],
)
def test_other_merges_keep_their_norm(plan_options, norms):
    lowered = lower_tensorrt(export_onnx(linear_model(**plan_options)), "fp16", largest_batch=2)
    assert sum(node.op_type == "StmAddMergeNorm" for node in lowered.graph.node) == norms


@pytest.mark.parametrize(
    ("weights", "schedule", "sm"),
    [("hsp", {1: (2, 1)}, None), ("hsp", {1: (0, 3), 2: (4, 0)}, 90), ("sum", {1: (11, 11), 3: (1, 1)}, None)],
    ids=["both ends", "one end, Hopper", "most, a weight for all images"],
)
def test_linear_nodes_compute_the_same(weights, schedule, sm):
    model = linear_model(schedule=schedule, weights=weights)
    images = torch.randn(3, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    graph = gs.import_onnx(export_onnx(model))
    for step in FUSIONS:
        graph = step(graph)
    graph = fuse_linear(graph, "fp16", 3, sm)  # its kernel has no float32, the reference evaluator has
    lowered = gs.export_onnx(graph)
    nodes = linear_nodes(lowered)
    assert len(nodes) == 2 * LINEAR.depth + 1
    out_projs = [nodes[f"layers.{layer}.mixer.out_proj/StmLinear"] for layer in range(LINEAR.depth)]
    merging = {layer + 1: (attribute(node, "left"), attribute(node, "right")) for layer, node in enumerate(out_projs) if len(node.input) == 4}
    assert merging == schedule
    with torch.no_grad():
        want = model.double()(images.double()).float().numpy()
    assert np.abs(run_lowered(lowered, images.numpy()) - want).max() <= 2e-5 * want.std()


def test_other_products_stay(monkeypatch):
    portable = export_onnx(linear_model())
    assert not linear_nodes(lower_tensorrt(portable, "fp16"))  # any batch may come
    assert not linear_nodes(lower_tensorrt(portable, "fp32", largest_batch=1))
    assert list(linear_nodes(lower_tensorrt(export_onnx(make()), "bf16", largest_batch=1))) == ["patch_embed.proj/StmLinear"]  # 32 features
    # 31 tokens, then 28: an in_proj has tokens x 64 x 256 products, and the out_proj goes with it
    monkeypatch.setattr("exporter.passes.fuse_linear.MOST_PRODUCTS", 4 * 28 * 64 * 256)
    few = linear_nodes(lower_tensorrt(portable, "bf16", largest_batch=4))
    assert list(few) == [f"layers.{layer}.mixer.{name}/StmLinear" for layer in (1, 2, 3) for name in ("in_proj", "out_proj")]
    monkeypatch.setattr("exporter.passes.fuse_linear.MOST_WEIGHTS", 64 * 256 - 1)
    assert not linear_nodes(lower_tensorrt(portable, "bf16", largest_batch=4))


def test_hopper_takes_larger_products(monkeypatch):
    """By the outputs of an in_proj, whatever its weights; features in multiples of 64 there."""
    portable = export_onnx(linear_model())
    for name in ("MOST_PRODUCTS", "MOST_WEIGHTS"):
        monkeypatch.setattr(f"exporter.passes.fuse_linear.{name}", 0)
    for other in (None, 89, 100):
        assert not linear_nodes(lower_tensorrt(portable, "fp16", largest_batch=4, sm=other))
    # 31 tokens in layer 0 and the patch embedding, then 28
    monkeypatch.setattr("exporter.passes.fuse_linear.MOST_OUTPUTS_HOPPER", 4 * 28 * 256)
    few = linear_nodes(lower_tensorrt(portable, "fp16", largest_batch=4, sm=90))
    assert list(few) == [f"layers.{layer}.mixer.{name}/StmLinear" for layer in (1, 2, 3) for name in ("in_proj", "out_proj")]
    monkeypatch.setattr("exporter.passes.fuse_linear.MOST_OUTPUTS_HOPPER", 4 * 31 * 256)
    assert "patch_embed.proj/StmLinear" in linear_nodes(lower_tensorrt(portable, "fp16", largest_batch=4, sm=90))


def test_as_many_tokens_merge_as_the_kernel_takes():
    header = (Path(__file__).parents[2] / "plugins" / "kernels" / "linear.h").read_text(encoding="utf-8")
    assert int(re.search(r"kMostMerged = (\d+)", header)[1]) == MOST_MERGED


ODD = {
    "192 to 48": {"patch_size": 8, "image_size": (48, 40), "d_model": 48},
    "3072 to 192": {"patch_size": 32, "d_model": 192, "depth": 2},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_products_that_no_shape_of_the_kernel_runs_stay(changes):
    model = stm.VisionMamba(CONFIG.with_changes(**changes)).eval()
    model.init_weights(3)
    portable = export_onnx(model)
    assert "patch_embed.proj/StmLinear" not in linear_nodes(lower_tensorrt(portable, "fp16", largest_batch=1))
    on_hopper = linear_nodes(lower_tensorrt(portable, "fp16", largest_batch=1, sm=90))
    assert ("patch_embed.proj/StmLinear" in on_hopper) == (changes["d_model"] % 64 == 0)


def test_a_norm_whose_weight_would_not_fit_fp16_stays():
    model = linear_model()
    model.layers[2].norm.weight.data *= 1e7
    proto = export_onnx(model)
    for precision, fused in (("fp16", 2), ("bf16", 3)):
        nodes = linear_nodes(lower_tensorrt(proto, precision, largest_batch=1))
        assert sum(attribute(node, "normed") for node in nodes.values()) == fused


def test_more_linear_nodes_than_products_are_refused():
    def lowered():
        return gs.import_onnx(lower_tensorrt(export_onnx(linear_model()), "fp16", largest_batch=1))

    graph = lowered()
    first = next(node for node in graph.nodes if node.op == "StmLinear")
    graph.nodes.append(plugin_node("StmLinear", "another", list(first.inputs), [gs.Variable("out", np.float16)]))
    with pytest.raises(ExportError, match="10 StmLinear"):
        check_lowered(graph)
    graph = lowered()
    next(node for node in graph.nodes if node.attrs.get("adds")).attrs["adds"] = 0
    with pytest.raises(ExportError, match="2 of which add and 3 normalise"):
        check_lowered(graph)
