"""Lower the scans of Hidden State Alignment (stm.reduction), which walk the whole sequence while tokens are missing.

Before: a mixer on kept tokens whose u, B, C and time steps are spread over all places (row gather times a mask), two
StmSelectiveScanLinear with the time steps as they are, and the kept places gathered from their outputs. The time step of a pruned
place is that of an earlier layer: mask x softplus(dt_proj(dt)) + (1 - mask) x earlier.
After: StmConvXProj on the kept tokens, and a StmMambaScan a direction on the whole sequence. It gets
* x = the convolution before its SiLU, spread (silu(0) = 0: no input at pruned places), behind a convolution that changes nothing;
* dt = the dt of every layer that gives time steps, side by side, each zero where another layer's counts, and a column of 0 and 1
  for each bias but this layer's. dt_proj's weights lie side by side, too, so that delta is the right one at each place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ..errors import ExportError
from .fuse_mixer import both, both_directions, conv_xproj, scan_alone, x_dbl_part
from .gather_rows import row_index
from .tensorrt_common import Array, check_domain, constant, producer, value

_FORWARD, _BACKWARD = "StmSelectiveScanLinearFwd", "StmSelectiveScanLinearBwd"


@dataclass
class _Slot:
    """Time steps of one layer: dt (batch, seqlen, dt_rank) spread over all places and 0 elsewhere, its projection, and where it counts."""

    dt: gs.Tensor
    weight: Array  # (d_inner, dt_rank)
    bias: Array
    place: gs.Tensor | None  # (batch, seqlen, 1), 0 or 1; None: everywhere


@dataclass
class _Direction:
    scan: gs.Node
    conv: gs.Node
    split: gs.Node
    parts: gs.Node
    index: gs.Tensor  # (batch, seqlen, 1): which kept token lies at a place
    mask: gs.Tensor  # (batch, seqlen, 1)
    conv_weight: Array
    conv_bias: Array
    x_proj: Array
    A: Array
    D: Array


class _Nodes:
    """Appends nodes with names of one scan."""

    def __init__(self, graph: gs.Graph, name: str) -> None:
        self.graph, self.name, self.count = graph, name, 0

    def __call__(self, op: str, *inputs: gs.Tensor | Array, **attributes: object) -> gs.Tensor:
        self.count += 1
        base = f"{self.name}.aligned{self.count}"
        tensors = [t if isinstance(t, gs.Tensor) else constant(f"{base}.in{i}", t) for i, t in enumerate(inputs)]
        out = gs.Variable(base, np.float32)
        self.graph.nodes.append(gs.Node(op, f"{base}/{op}", attributes, tensors, [out]))
        return out

    def spread(self, values: gs.Tensor, index: gs.Tensor, mask: gs.Tensor) -> gs.Tensor:
        return self("Mul", self("GatherND", values, index, batch_dims=1), mask)


def _spread(tensor: gs.Tensor, where: str) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """(values, index, mask) behind a row gather times a mask."""
    node = producer(tensor, "Mul", where=where)
    for gathered, mask in (node.inputs, node.inputs[::-1]):
        index = row_index(gathered.inputs[0]) if gathered.inputs else None
        if index is not None:
            return gathered.inputs[0].inputs[0], index, mask
    raise ExportError(f"tensorrt: {where}: {tensor.name!r} is not a row gather times a mask")


def _read(scan: gs.Node) -> _Direction:
    where = scan.name
    u, index, mask = _spread(scan.inputs[0], where)
    conv = producer(u, "StmCausalConvSiluFwd", "StmCausalConvSiluBwd", where=where)
    split = producer(conv.inputs[0], "Split", where=where)
    spread_b, spread_c = (_spread(scan.inputs[i], where) for i in (3, 4))
    parts = producer(spread_b[0], "Split", where=where)
    if [parts.outputs[1], parts.outputs[2]] != [spread_b[0], spread_c[0]] or split.outputs[0] is not conv.inputs[0]:
        raise ExportError(f"tensorrt: {where}: B and C, or x, are not parts of x_proj's and in_proj's outputs")
    x_proj = producer(parts.inputs[0], "MatMul", where=where)
    if x_proj.inputs[0] is not u or np.any(_numbers(scan.inputs[6], where)):
        raise ExportError(f"tensorrt: {where}: x_proj does not read the convolution's output, or the scan adds a bias to its time steps")
    constants = (conv.inputs[1], conv.inputs[2], x_proj.inputs[1], scan.inputs[2], scan.inputs[5])
    weight, bias, projection, A, D = (value(tensor, where) for tensor in constants)
    return _Direction(scan, conv, split, parts, index, mask, weight, bias, projection.T, A, D)


def _numbers(tensor: gs.Tensor, where: str) -> Array:
    if tensor.inputs and tensor.inputs[0].op == "ConstantOfShape":
        filled = tensor.inputs[0].attrs.get("value")
        return np.zeros(1) if filled is None else np.asarray(filled.values)
    return value(tensor, where)


def _slots(times: gs.Tensor, nodes: _Nodes, where: str, known: dict[int, list[_Slot]]) -> list[_Slot]:
    """The layers whose time steps lie in `times`, this scan's own first. `known`: of earlier layers, which several scans read."""
    if id(times) not in known:
        known[id(times)] = _find_slots(times, nodes, where, known)
    return known[id(times)]


def _find_slots(times: gs.Tensor, nodes: _Nodes, where: str, known: dict[int, list[_Slot]]) -> list[_Slot]:
    node = producer(times, "Add", "Where", "Softplus", where=where)
    if node.op != "Add":  # torch exports softplus with its threshold
        raw = producer(node.inputs[1] if node.op == "Where" else node.inputs[0], "Add", where=where)
        projected, bias = raw.inputs if not isinstance(raw.inputs[0], gs.Constant) else raw.inputs[::-1]
        gemm = producer(projected, "MatMul", where=where)
        return [_Slot(gemm.inputs[0], value(gemm.inputs[1], where).T, value(bias, where), None)]
    now, index, mask = _spread(node.inputs[0], where)
    (own,) = _slots(now, nodes, where, known)
    gap, earlier = producer(node.inputs[1], "Mul", where=where).inputs
    found = [_Slot(nodes.spread(own.dt, index, mask), own.weight, own.bias, mask)]
    for slot in _slots(earlier, nodes, where, known):
        place = gap if slot.place is None else nodes("Mul", gap, slot.place)
        found.append(_Slot(nodes("Mul", slot.dt, gap), slot.weight, slot.bias, place))
    return found


def _convolve(direction: _Direction, nodes: _Nodes, backward: bool) -> gs.Tensor:
    """The convolution before its SiLU, tap by tap."""
    pads = [0, 0, 0, 0, 3, 0] if backward else [0, 3, 0, 0, 0, 0]
    padded = nodes("Pad", direction.conv.inputs[0], np.asarray(pads), np.float32(0), mode="constant")
    total: gs.Tensor | Array = direction.conv_bias
    for tap in range(4):
        start = 3 - tap if backward else tap
        stop = start - 3 if start < 3 else np.iinfo(np.int64).max
        part = nodes("Slice", padded, np.asarray([start]), np.asarray([stop]), np.asarray([1]))
        total = nodes("Add", nodes("Mul", part, direction.conv_weight[:, tap]), total)
    assert isinstance(total, gs.Tensor)
    return total


def _rows(slots: list[_Slot], direction: _Direction, part: gs.Tensor, nodes: _Nodes) -> tuple[gs.Tensor, Array, Array]:
    """(one direction's rows of x_dbl on the whole sequence, dt_weight (d_inner, rank), dt_bias)."""
    places = [slot.place for slot in slots[1:] if slot.place is not None]
    weight = np.concatenate([slot.weight for slot in slots] + [(slot.bias - slots[0].bias)[:, None] for slot in slots[1:]], 1)
    fill = -weight.shape[1] % 4  # the fast kernels take multiples of 4
    weight = np.pad(weight, ((0, 0), (0, fill)))
    rank, width, axis = slots[0].weight.shape[1], direction.x_proj.shape[0], np.asarray([2])
    spread = nodes.spread(part, direction.index, direction.mask)  # dt, B and C at once
    dt, BC = (nodes("Slice", spread, np.asarray([a]), np.asarray([b]), axis) for a, b in ((0, rank), (rank, width)))
    columns = weight.shape[1] + width - rank
    joined = nodes("Concat", dt, *(slot.dt for slot in slots[1:]), *places, *([places[-1]] * fill), BC, axis=2)
    padded = nodes("Pad", joined, np.asarray([0, 0, 0, 0, 0, -columns % 8]), np.float32(0), mode="constant")
    return nodes("Unsqueeze", padded, np.asarray([0])), weight, slots[0].bias


def _fuse(graph: gs.Graph, first: _Direction, second: _Direction, known: dict[int, list[_Slot]]) -> None:
    name = first.scan.name.rpartition(".scan/")[0] or first.scan.name
    directions = (first, second)
    weights = both_directions(name, conv_weight=(first.conv_weight, second.conv_weight), conv_bias=(first.conv_bias, second.conv_bias))
    x_dbl = conv_xproj(graph, name, first.split.inputs[0], weights, both(first.x_proj, second.x_proj, f"{name}.x_proj"))
    rows, dt_weights, dt_biases, inputs = [], [], [], []
    for index, direction in enumerate(directions):
        nodes = _Nodes(graph, name + ("", "_b")[index])
        part = x_dbl_part(graph, name, index, x_dbl, direction.x_proj.shape[0])
        direction.parts.inputs[0] = part
        row, weight, bias = _rows(_slots(direction.scan.inputs[1], nodes, name, known), direction, part, nodes)
        rows.append(row)
        dt_weights.append(weight)
        dt_biases.append(bias)
        inputs.append(nodes.spread(_convolve(direction, nodes, index == 1), direction.index, direction.mask))
    whole = _Nodes(graph, name)
    whole.count = 1000
    spread_dbl = whole("Concat", *rows, axis=0)
    inner = first.A.shape[0]
    identity, zeros = np.zeros((inner, 4), np.float32), np.zeros(inner, np.float32)
    identity[:, 3] = 1  # a tap on the token itself
    scan_weights = both_directions(
        name,
        "_aligned",
        conv_weight=(identity, identity),
        conv_bias=(zeros, zeros),
        dt_weight=(dt_weights[0], dt_weights[1]),
        dt_bias=(dt_biases[0], dt_biases[1]),
        A=(first.A, second.A),
        D=(first.D, second.D),
    )
    for index, direction in enumerate(directions):
        scan_alone(graph, name, index, inputs[index], spread_dbl, direction.scan.outputs[0], scan_weights)


def fuse_aligned(graph: gs.Graph) -> gs.Graph:
    """Lower every aligned mixer in place; a graph without any stays as it is.

    Raises:
        ExportError: an aligned scan stands in a graph that is not a ViM mixer under Hidden State Alignment.
    """
    check_domain(graph)
    forward = [_read(node) for node in graph.nodes if node.op == _FORWARD]
    backward = {id(found.split): found for found in (_read(node) for node in graph.nodes if node.op == _BACKWARD)}
    if len(forward) != len(backward) or any(id(found.split) not in backward for found in forward):
        raise ExportError(f"tensorrt: {len(forward)} aligned forward scans and {len(backward)} backward ones, expected one each on an in_proj")
    known: dict[int, list[_Slot]] = {}
    for found in forward:
        _fuse(graph, found, backward[id(found.split)], known)
    if forward:
        graph.cleanup().toposort()
    return graph
