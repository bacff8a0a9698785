"""Give the products of few tokens to StmLinear.

Before: MatMul(x, weight) of a mixer's in_proj or out_proj, or of the patch embedding, weight (in_features, out_features).
After: StmLinear(x, weight), weight turned, where the largest batch has so few tokens that latency is what counts: our kernel brings
its weights while the kernel before it still runs, and the one after it does the same, which no kernel of the runtime lets them.
With many tokens the runtime's products are faster and stay.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs

from .tensorrt_common import constant, plugin_node

# Products (tokens x in_features x out_features) up to which StmLinear is faster than TensorRT 10.6's kernel on an H200; measured:
# docs/performance.md.
MOST_PRODUCTS = 240e6
MOST_IN_FEATURES = 1536  # more does not fit the 99 KiB of shared memory that some GPUs have
_MODULES = re.compile(r"(?:layers\.\d+\.mixer\.(?:in|out)_proj|patch_embed\.proj)(?:/|$)")


def _tokens(node: gs.Node) -> int | None:
    """Tokens of an image in a product's output (batch, tokens, out_features), or as its only reader puts them out; None if unknown."""
    for tensor in (node.outputs[0], *(out for reader in node.outputs[0].outputs for out in reader.outputs[:1])):
        if tensor.shape is not None and len(tensor.shape) == 3 and isinstance(tensor.shape[1], int):
            return tensor.shape[1]
    return None


def fuse_linear(graph: gs.Graph, precision: str, largest_batch: int | None) -> gs.Graph:
    """Rewrite in place.

    Args:
        precision: fp32 changes nothing, the kernel has none.
        largest_batch: of the engine's profile; None, unknown, changes nothing.
    """
    if precision == "fp32" or largest_batch is None:
        return graph
    for node in graph.nodes:
        if node.op != "MatMul" or not _MODULES.match(node.name) or not isinstance(node.inputs[1], gs.Constant):
            continue
        weight, tokens = node.inputs[1], _tokens(node)
        if tokens is None or weight.values.ndim != 2:
            continue
        into, out = weight.values.shape
        if into % 64 or out % 16 or into > MOST_IN_FEATURES or largest_batch * tokens * into * out > MOST_PRODUCTS:
            continue
        turned = constant(f"{weight.name}_rows", np.ascontiguousarray(weight.values.T))
        linear = plugin_node("StmLinear", node.name.removesuffix("/MatMul") + "/StmLinear", [node.inputs[0], turned], list(node.outputs))
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes.append(linear)
    graph.cleanup().toposort()
    return graph
