"""Name tensors and nodes after the torch modules that make them.

Before: a ModelProto fresh from torch.onnx.export, whose nodes carry `pkg.torch.onnx.name_scopes`.
After: the output of the last node of module M is called M ("layers.3.mixer.in_proj"), nodes are called after their
module, a weight that the exporter folded is called after the module that reads it, and the batch axis is "batch"
everywhere. Parity bisection, engine inspection and refitting find tensors by these names.
"""

from __future__ import annotations

import ast

import onnx

from ..errors import ExportError

SCOPES = "pkg.torch.onnx.name_scopes"
_ROLES = {"MatMul": {1: "weight_t"}, "Gemm": {1: "weight", 2: "bias"}}
_CONV_ROLES = {1: "weight"}


def module_of(node: onnx.NodeProto) -> str | None:
    """Path of the innermost torch module that a node belongs to, "" for the model itself, None if unknown."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = ast.literal_eval(entry.value)
            path = str(scopes[-2]) if len(scopes) > 1 else ""
            return "" if path.startswith("_") else path  # the exporter's own, not a module of the model
    return None


def name_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename in place; see the module's text.

    Raises:
        ExportError: the exporter left no scopes.
    """
    graph = model.graph
    modules = [module_of(node) or "" for node in graph.node]
    if not any(modules):
        raise ExportError("name_tensors: no node says which torch module it belongs to; is this model fresh from torch.onnx.export?")
    fixed = {value.name for value in (*graph.input, *graph.output)}
    taken = fixed | {initializer.name for initializer in graph.initializer}
    renamed: dict[str, str] = {}

    def rename(old: str, new: str) -> None:
        if old and old not in fixed and old not in renamed and new not in taken:
            taken.add(new)
            renamed[old] = new

    last = {scope: node for scope, node in zip(modules, graph.node, strict=True) if scope}
    for scope, node in last.items():
        rename(node.output[0], scope)
    initializers = {initializer.name for initializer in graph.initializer}
    for scope, node in zip(modules, graph.node, strict=True):
        if not scope:
            continue
        module: str = scope
        roles = _ROLES.get(node.op_type, {})
        if node.op_type.startswith("StmSelectiveScan"):
            roles = {2: "A_b" if module.endswith("_b") else "A"}
            module = module.rpartition(".")[0]
        elif node.op_type.startswith("StmCausalConvSilu"):
            roles = _CONV_ROLES
        for index, role in roles.items():
            if index < len(node.input) and node.input[index] in initializers and not node.input[index].startswith(f"{module}."):
                rename(node.input[index], f"{module}.{role}")
    counts: dict[str, int] = {}
    for scope, node in zip(modules, graph.node, strict=True):
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[base] = counts.get(base, 0) + 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for holder in (graph.initializer, graph.value_info):
        for item in holder:
            item.name = renamed.get(item.name, item.name)
    _name_batch(graph)
    return model


def _name_batch(graph: onnx.GraphProto) -> None:
    symbols = {d.dim_param for value in (*graph.input, *graph.output) for d in value.type.tensor_type.shape.dim[:1] if d.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = "batch"
