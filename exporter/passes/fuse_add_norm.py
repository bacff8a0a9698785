"""Fuse residual add, token merge and RMSNorm into StmAddMergeNorm.

Before: Add(residual, GEMM) [-> StmMergeTokens] -> StmRmsNorm. The GEMM is a layer's out_proj; before the first norm it is the
patch embedding, and the residual the table of fuse_patch_embed; before the last one the residual is cut to the class token.
After: one node a norm. TensorRT would keep add and norm in two kernels, because the sum has two readers.

Methods that look at the image (stm.reduction) move and scale rows of both operands first; that stays in ops of the runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..errors import ExportError
from .tensorrt_common import Array, check_domain, constant, plugin_node, producer, through_slice, value


def _operands(add: gs.Node) -> tuple[gs.Tensor, gs.Tensor] | None:
    """(residual, hidden) of an Add whose hidden operand comes from a GEMM; None for another Add."""
    for residual, hidden in (add.inputs, add.inputs[::-1]):
        if _is_from_gemm(hidden):
            return residual, hidden
    return None


def _is_from_gemm(tensor: gs.Tensor) -> bool:
    """Whether a GEMM makes a tensor, its rows moved or scaled at most."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None:
        return False
    if node.op == "MatMul":
        return isinstance(node.inputs[1], gs.Constant)
    if node.op == "Mul":
        return any(_is_from_gemm(operand) for operand in node.inputs)
    return node.op in ("Gather", "GatherElements", "GatherND") and _is_from_gemm(node.inputs[0])


def _edge(sources: list[int], targets: list[int], length: int) -> tuple[int, int] | None:
    """(left, right) if the sources are the outermost tokens of each side, merging into the next one inward."""
    left = 0
    while left < len(sources) and sources[left] == left:
        left += 1
    right = len(sources) - left
    expected_sources = [*range(left), *range(length - right, length)]
    expected_targets = [left] * left + [length - right - 1] * right
    return (left, right) if sources == expected_sources and targets == expected_targets else None


def _table(sources: list[int], targets: list[int], keep: list[int]) -> tuple[Array, Array, Array]:
    """begin, members, member_weight: for each token kept, itself (weight -1: one) and what joins it, ascending."""
    joins: dict[int, list[tuple[int, int]]] = {position: [(position, -1)] for position in keep}
    for column, (source, target) in enumerate(zip(sources, targets, strict=True)):
        joins[target].append((source, column))
    begin, members, columns = [0], [], []
    for position in keep:
        for member, column in sorted(joins[position]):
            members.append(member)
            columns.append(column)
        begin.append(len(members))
    return tuple(np.asarray(column, dtype=np.int32) for column in (begin, members, columns))  # type: ignore[return-value]


def _fuse(graph: gs.Graph, norm: gs.Node) -> None:
    where = norm.name
    stream = norm.inputs[0]
    merge = stream.inputs[0] if stream.inputs and stream.inputs[0].op == "StmMergeTokens" else None
    before = merge.inputs[0] if merge is not None else stream
    add = producer(before, "Add", where=where)
    operands = _operands(add)
    if operands is None:
        raise ExportError(f"tensorrt: {where}: the sum that it normalises has no operand from a MatMul (out_proj or the patch embedding)")
    residual, hidden = operands
    full, cls_index, stop = through_slice(residual)
    if stop is not None:
        if stop != cls_index + 1 or merge is not None:
            raise ExportError(f"tensorrt: {where}: the residual is cut to tokens {cls_index}..{stop - 1}, expected one class token")
        residual = full
    else:
        cls_index = -1
    epsilon = float(value(norm.inputs[2], where).reshape(-1)[0])
    inputs: list[gs.Tensor] = [residual, hidden, norm.inputs[1]]
    attributes: dict[str, int | float | str] = {"merge": "none", "cls_index": cls_index, "epsilon": epsilon}
    if merge is not None:
        weights = merge.inputs[1]
        keep, sources, targets = ([int(v) for v in value(merge.inputs[i], where)] for i in (2, 3, 4))
        length = max(*keep, *sources) + 1
        sides = _edge(sources, targets, length)
        inputs.append(weights)
        if sides is not None:
            attributes |= {"merge": "edge", "left": sides[0], "right": sides[1]}
        else:
            attributes |= {"merge": "table", "out_len": len(keep)}
            names = ("begin", "members", "member_weight")
            inputs += [constant(f"{merge.name}.{n}", t) for n, t in zip(names, _table(sources, targets, keep), strict=True)]
    normed = norm.outputs[0]
    add.outputs = []
    if merge is not None:
        merge.outputs = []
    norm.outputs = []
    graph.nodes.append(plugin_node("StmAddMergeNorm", where.rpartition("/")[0] + ".add_merge_norm", inputs, [stream, normed], **attributes))


def fuse_add_norm(graph: gs.Graph) -> gs.Graph:
    """Fuse every norm in place.

    Raises:
        ExportError: a merge or a norm stands where a ViM has none; says what and where.
    """
    check_domain(graph)
    for norm in [node for node in graph.nodes if node.op == "StmRmsNorm"]:
        _fuse(graph, norm)
    graph.cleanup().toposort()
    left = sorted({node.op for node in graph.nodes if node.op in ("StmRmsNorm", "StmMergeTokens")})
    if left:
        raise ExportError(f"tensorrt: {', '.join(left)} left after fusing the norms")
    return graph
