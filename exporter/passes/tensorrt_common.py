"""What the passes of the `tensorrt` lowering share: constants, look-ups that name what they miss, plugin nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from ..errors import ExportError
from ..op_schema import DOMAIN, DOMAIN_VERSION, OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION

Array = NDArray[Any]


def value(tensor: gs.Tensor, where: str) -> Array:
    """The numbers of a constant tensor."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if tensor.inputs and tensor.inputs[0].op == "Constant":
        return np.asarray(tensor.inputs[0].attrs["value"].values)
    raise ExportError(f"tensorrt: {where}: {tensor.name!r} is not a constant")


def producer(tensor: gs.Tensor, *ops: str, where: str) -> gs.Node:
    """The node that makes a tensor, which must be one of `ops`."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in ops:
        raise ExportError(f"tensorrt: {where}: {tensor.name!r} is made by {node.op if node else 'nothing'}, expected {' or '.join(ops)}")
    return node


def only_consumer(tensor: gs.Tensor, *ops: str, where: str) -> gs.Node:
    nodes = [node for node in tensor.outputs if node.op in ops]
    if len(nodes) != 1 or len(tensor.outputs) != 1:
        raise ExportError(f"tensorrt: {where}: {tensor.name!r} feeds {[node.op for node in tensor.outputs]}, expected one {' or '.join(ops)}")
    return nodes[0]


def through_slice(tensor: gs.Tensor) -> tuple[gs.Tensor, int, int | None]:
    """The tensor before a Slice on axis 1 and the slice's start and stop (None: to the end); the tensor itself if none."""
    if not tensor.inputs or tensor.inputs[0].op != "Slice":
        return tensor, 0, None
    node = tensor.inputs[0]
    start, stop, axis = (int(value(node.inputs[i], node.name).reshape(-1)[0]) for i in (1, 2, 3))
    if axis != 1:
        raise ExportError(f"tensorrt: {node.name!r} slices axis {axis}, expected 1 (tokens)")
    return node.inputs[0], start, None if stop >= 1 << 31 else stop


def constant(name: str, array: Array) -> gs.Constant:
    return gs.Constant(name, np.ascontiguousarray(array).reshape(np.shape(array)))  # numpy makes a scalar a vector


def plugin_node(op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], **attributes: int | float | str) -> gs.Node:
    """A node of a fused op, its attributes checked against the op table, with plugin name space and version.

    Raises:
        ExportError: an attribute that the op does not have (the parser would drop it without a word), or an INT beyond
            32 bits (the parser would cut it).
    """
    known = {attribute.name for attribute in OPS[op].attributes}
    if unknown := attributes.keys() - known:
        raise ExportError(f"{op} has no attribute {sorted(unknown)}; it has {sorted(known)}")
    for key, number in attributes.items():
        if isinstance(number, int) and not -(1 << 31) <= number < 1 << 31:
            raise ExportError(f"{op}: attribute {key!r} is {number}; plugins get 32 bits")
    complete = {attribute.name: attributes.get(attribute.name, attribute.default) for attribute in OPS[op].attributes}
    return gs.Node(
        op,
        name,
        {**complete, "plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE},
        inputs,
        outputs,
        domain=DOMAIN,
    )


def check_domain(graph: gs.Graph) -> None:
    versions = {entry.domain: entry.version for entry in graph.import_domains or []}
    if versions.get(DOMAIN) != DOMAIN_VERSION:
        raise ExportError(
            f"tensorrt: the model imports {DOMAIN} at version {versions.get(DOMAIN)}, the op table is {DOMAIN_VERSION}; export it again"
        )
