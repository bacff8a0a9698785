"""The `portable` lowering: attach to each of our nodes a function body in standard ops.

Before: nodes of domain `stm` are portable ops of the op table, without bodies.
After: every op type in use has one local function; a runtime without our library inlines it.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from ..errors import ExportError
from ..function_bodies import function_body
from ..op_schema import DOMAIN, DOMAIN_VERSION, OPS


def portable(graph: gs.Graph) -> gs.Graph:
    """Attach bodies in place.

    Raises:
        ExportError: a node of our domain is not a portable op, or has another number of inputs.
    """
    used: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain != DOMAIN:
            continue
        spec = OPS.get(node.op)
        if spec is None or spec.fused:
            raise ExportError(f"portable: node {node.name!r} is {DOMAIN}::{node.op}, which has no function body")
        if len(node.inputs) != len(spec.inputs):
            raise ExportError(f"portable: node {node.name!r} ({node.op}) has {len(node.inputs)} inputs, the op has {len(spec.inputs)}")
        used[node.op] = used.get(node.op, 0) + 1
    present = {function.name for function in graph.functions}
    for name in sorted(used.keys() - present):
        body = function_body(name, graph.opset)
        graph.functions.append(OnnxImporter.import_function(body, model_opset=graph.opset, model_import_domains=graph.import_domains))
    domains = {entry.domain: entry.version for entry in graph.import_domains or []}
    if used and domains.get(DOMAIN) != DOMAIN_VERSION:
        raise ExportError(f"portable: the model imports {DOMAIN} at version {domains.get(DOMAIN)}, the op table is {DOMAIN_VERSION}")
    return graph
