"""Give the products of few tokens to StmLinear, and the norms between them.

Before: MatMul(x, weight) of a mixer's in_proj or out_proj, or of the patch embedding, weight (in_features, out_features).
After: StmLinear(x, weight), weight turned, where the largest batch has so few tokens that it is faster: our kernel brings its weights
while the kernel before it still runs, and the one after it does the same, which no kernel of the runtime lets them. With many tokens
the runtime's products are faster and stay.

Then, before: out_proj -> StmAddMergeNorm -> in_proj of the next layer, both products StmLinear, merges by the edge rule if any.
After: out_proj adds the residual and merges, in_proj normalises its rows; the norm's weight is multiplied into in_proj's.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs

from .tensorrt_common import Array, constant, plugin_node, value

# Up to here StmLinear is faster than TensorRT 10.6's kernels (H200, docs/performance.md). On Hopper: elements of the output of an
# in_proj; the patch embedding, with a quarter of them, goes with it. Elsewhere: products (tokens x in_features x out_features) of an
# in_proj or patch embedding, elements of its weight, as measured with the kernels that every GPU has. An out_proj goes with its in_proj.
MOST_OUTPUTS_HOPPER = 4.9e6
MOST_PRODUCTS = 233e6
MOST_WEIGHTS = 600_000
HOPPER = 90  # code for sm_90a runs on no other
MOST_MERGED = 11  # tokens at an end that the kernel merges: kMostMerged of plugins/kernels/linear.h
_MODULES = re.compile(r"(?:(layers\.\d+)\.mixer\.(in|out)_proj|patch_embed\.proj)(?:/|$)")


def _tokens(node: gs.Node) -> int | None:
    """Tokens of an image in a product's output (batch, tokens, out_features), or as its only reader puts them out; None if unknown."""
    for tensor in (node.outputs[0], *(out for reader in node.outputs[0].outputs for out in reader.outputs[:1])):
        if tensor.shape is not None and len(tensor.shape) == 3 and isinstance(tensor.shape[1], int):
            return tensor.shape[1]
    return None


def _runs(weight: Array, sm: int | None) -> bool:
    """Whether a shape of the kernel fits: any multiples of 64 on Hopper, elsewhere even the 99 KiB of shared memory that some GPUs have."""
    if weight.ndim != 2:
        return False
    into, out = weight.shape
    if sm == HOPPER and into % 64 == 0 and out % 64 == 0:
        return True
    columns, most = (16, 1536) if into % 128 == 0 else (32, 832)
    return bool(into % 64 == 0 and out % columns == 0 and into <= most)


def _is_small(node: gs.Node, is_embedding: bool, largest_batch: int, sm: int | None) -> bool:
    weight, tokens = node.inputs[1].values, _tokens(node)
    if tokens is None:
        return False
    if sm == HOPPER:
        outputs_of_in_proj = weight.shape[1] * (4 if is_embedding else 1)
        return bool(largest_batch * tokens * outputs_of_in_proj <= MOST_OUTPUTS_HOPPER)
    return bool(weight.size <= MOST_WEIGHTS and largest_batch * tokens * weight.size <= MOST_PRODUCTS)


def _linear(node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Tensor], **attributes: int | float) -> gs.Node:
    """A StmLinear in the place of a product, which loses its tensors."""
    name = node.name.removesuffix("/MatMul").removesuffix("/StmLinear") + "/StmLinear"
    node.inputs.clear()
    node.outputs.clear()
    return plugin_node("StmLinear", name, inputs, outputs, **attributes)


def _only_reader(tensor: gs.Tensor, op: str) -> gs.Node | None:
    (reader,) = tensor.outputs if len(tensor.outputs) == 1 else (None,)
    return reader if reader is not None and reader.op == op and reader.inputs[0 if op == "StmLinear" else 1] is tensor else None


def _fuse_norm(graph: gs.Graph, first: gs.Node, largest: float) -> None:
    """Take the norm behind `first` apart, if it stands between two StmLinear, merges as they can, and no weight exceeds `largest`."""
    norm = _only_reader(first.outputs[0], "StmAddMergeNorm")
    if norm is None or norm.attrs["merge"] == "table" or norm.attrs["cls_index"] >= 0 or isinstance(norm.inputs[0], gs.Constant):
        return
    left, right = norm.attrs["left"], norm.attrs["right"]
    if max(left, right) > MOST_MERGED:
        return
    residual, _, gain, *merge_weights = norm.inputs
    stream, normed = norm.outputs
    second = _only_reader(normed, "StmLinear")
    if second is None or second.attrs["adds"]:
        return
    name = normed.name
    weight = value(second.inputs[1], second.name) * value(gain, norm.name)
    if np.abs(weight).max() > largest:
        return
    scaled = constant(f"{second.inputs[1].name}_normed", weight)
    sixteenth = gs.Variable(f"{name}.sixteenth", np.float32)
    squares = gs.Variable(f"{name}.squares", np.float32)
    norm.inputs.clear()
    norm.outputs.clear()
    graph.nodes.append(_linear(second, [sixteenth, scaled, squares], list(second.outputs), normed=1, epsilon=norm.attrs["epsilon"]))
    graph.nodes.append(
        _linear(
            first,
            [*first.inputs, residual, *merge_weights],
            [sixteenth, stream, squares],
            adds=1,
            normed=first.attrs["normed"],
            epsilon=first.attrs["epsilon"],
            left=left,
            right=right,
        )
    )


def fuse_linear(graph: gs.Graph, precision: str, largest_batch: int | None, sm: int | None = None) -> gs.Graph:
    """Rewrite in place.

    Args:
        precision: fp32 changes nothing, the kernel has none.
        largest_batch: of the engine's profile; None, unknown, changes nothing.
        sm: of the GPU that the engine is for, 90 for compute capability 9.0; None, unknown, counts on no kernel of Hopper. See
            `engine.lower_for_engine`.
    """
    if precision == "fp32" or largest_batch is None:
        return graph
    products = [
        (match[1], match[2], node)  # (layer, in or out) of a mixer, (None, None) of the embedding
        for node in graph.nodes
        if node.op == "MatMul"
        and isinstance(node.inputs[1], gs.Constant)
        and (match := _MODULES.match(node.name))
        and _runs(node.inputs[1].values, sm)
    ]
    small = {layer for layer, which, node in products if which != "out" and _is_small(node, layer is None, largest_batch, sm)}
    for layer, _, node in products:
        if layer in small:
            weight = node.inputs[1]
            turned = constant(f"{weight.name}_rows", np.ascontiguousarray(weight.values.T))
            graph.nodes.append(_linear(node, [node.inputs[0], turned], list(node.outputs)))
    graph.cleanup().toposort()
    for node in list(graph.nodes):
        if node.op == "StmLinear" and node.outputs:
            _fuse_norm(graph, node, 65504 if precision == "fp16" else np.inf)
    graph.cleanup().toposort()
    return graph
