"""Gather whole rows by one index a row.

Before: GatherElements(x, Expand(Unsqueeze(index))) on axis 1 of x (batch, n, d), as torch.gather exports a row gather: an int64
index for each element, twice to four times the bytes of the values.
After: GatherND(x, Unsqueeze(index)) with batch_dims 1: an index for each row.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from .tensorrt_common import value


def row_index(node: gs.Node) -> gs.Tensor | None:
    """The index (batch, k, 1) behind its expansion over a row; None if the node gathers something else."""
    if node.op != "GatherElements" or node.attrs.get("axis", 0) != 1:
        return None
    expand = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
    if expand is None or expand.op != "Expand" or not expand.inputs[0].inputs:
        return None
    unsqueeze = expand.inputs[0].inputs[0]
    if unsqueeze.op != "Unsqueeze" or list(value(unsqueeze.inputs[1], unsqueeze.name).reshape(-1)) not in ([-1], [2]):
        return None
    return expand.inputs[0]


def gather_rows(graph: gs.Graph) -> gs.Graph:
    """Rewrite in place; other GatherElements stay."""
    for node in graph.nodes:
        index = row_index(node)
        if index is not None:
            node.op, node.attrs, node.inputs[1] = "GatherND", {"batch_dims": 1}, index
    graph.cleanup().toposort()
    return graph
