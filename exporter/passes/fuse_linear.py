"""Give the products of few tokens to StmLinear, and the norms between them.

Before: MatMul(x, weight) of a mixer's in_proj or out_proj, or of the patch embedding, weight (in_features, out_features).
After: StmLinear(x, weight), weight turned, where the largest batch has so few tokens that latency is what counts: our kernel brings
its weights while the kernel before it still runs, and the one after it does the same, which no kernel of the runtime lets them.
With many tokens the runtime's products are faster and stay.

Then, before: out_proj -> StmAddMergeNorm without a merge -> in_proj of the next layer, both products StmLinear.
After: out_proj adds the residual, in_proj normalises its rows; the norm's weight is multiplied into in_proj's.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs

from .tensorrt_common import Array, constant, plugin_node, value

# Up to here StmLinear is faster than TensorRT 10.6's kernels (H200, docs/performance.md). Products (tokens x in_features x
# out_features) of an in_proj; the out_proj that goes with it has half as many. Elements of a weight.
MOST_PRODUCTS = 233e6
MOST_WEIGHTS = 600_000
_MODULES = re.compile(r"(?:layers\.\d+\.mixer\.(?:in|out)_proj|patch_embed\.proj)(?:/|$)")


def _tokens(node: gs.Node) -> int | None:
    """Tokens of an image in a product's output (batch, tokens, out_features), or as its only reader puts them out; None if unknown."""
    for tensor in (node.outputs[0], *(out for reader in node.outputs[0].outputs for out in reader.outputs[:1])):
        if tensor.shape is not None and len(tensor.shape) == 3 and isinstance(tensor.shape[1], int):
            return tensor.shape[1]
    return None


def _is_small(weight: Array, rows: int) -> bool:
    into, out = weight.shape
    products = rows * into * out * (2 if into > out else 1)
    return bool(into % 64 == 0 and out % 16 == 0 and into * out <= MOST_WEIGHTS and products <= MOST_PRODUCTS)


def _linear(node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Tensor], **attributes: int | float) -> gs.Node:
    """A StmLinear in the place of a product, which loses its tensors."""
    name = node.name.removesuffix("/MatMul").removesuffix("/StmLinear") + "/StmLinear"
    node.inputs.clear()
    node.outputs.clear()
    return plugin_node("StmLinear", name, inputs, outputs, **attributes)


def _only_reader(tensor: gs.Tensor, op: str) -> gs.Node | None:
    (reader,) = tensor.outputs if len(tensor.outputs) == 1 else (None,)
    return reader if reader is not None and reader.op == op and reader.inputs[0 if op == "StmLinear" else 1] is tensor else None


def _fuse_norm(graph: gs.Graph, first: gs.Node) -> None:
    """Take the norm behind `first` apart, if it stands between two StmLinear and does nothing else."""
    norm = _only_reader(first.outputs[0], "StmAddMergeNorm")
    if norm is None or norm.attrs["merge"] != "none" or norm.attrs["cls_index"] >= 0 or isinstance(norm.inputs[0], gs.Constant):
        return
    residual, hidden, gain = norm.inputs
    stream, normed = norm.outputs
    second = _only_reader(normed, "StmLinear")
    if second is None:
        return
    name = normed.name
    scaled = constant(f"{second.inputs[1].name}_normed", value(second.inputs[1], second.name) * value(gain, norm.name))
    sixteenth = gs.Variable(f"{name}.sixteenth", np.float32, hidden.shape)
    squares = gs.Variable(f"{name}.squares", np.float32)
    norm.inputs.clear()
    norm.outputs.clear()
    out = list(second.outputs)
    graph.nodes.append(_linear(second, [sixteenth, scaled, squares], out, normed=1, adds=second.attrs["adds"], epsilon=norm.attrs["epsilon"]))
    before = list(first.inputs)
    graph.nodes.append(
        _linear(first, [*before, residual], [sixteenth, stream, squares], adds=1, normed=first.attrs["normed"], epsilon=first.attrs["epsilon"])
    )


def fuse_linear(graph: gs.Graph, precision: str, largest_batch: int | None) -> gs.Graph:
    """Rewrite in place.

    Args:
        precision: fp32 changes nothing, the kernel has none.
        largest_batch: of the engine's profile; None, unknown, changes nothing.
    """
    if precision == "fp32" or largest_batch is None:
        return graph
    for node in list(graph.nodes):
        if node.op != "MatMul" or not _MODULES.match(node.name) or not isinstance(node.inputs[1], gs.Constant):
            continue
        weight, tokens = node.inputs[1], _tokens(node)
        if tokens is None or weight.values.ndim != 2 or not _is_small(weight.values, largest_batch * tokens):
            continue
        turned = constant(f"{weight.name}_rows", np.ascontiguousarray(weight.values.T))
        graph.nodes.append(_linear(node, [node.inputs[0], turned], list(node.outputs)))
    graph.cleanup().toposort()
    for node in list(graph.nodes):
        if node.op == "StmLinear" and node.outputs:
            _fuse_norm(graph, node)
    graph.cleanup().toposort()
    return graph
