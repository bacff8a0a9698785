"""Fuse what lies between in_proj and out_proj into StmConvXProj and StmMambaScan.

Before: for each layer Split(in_proj), two StmCausalConvSilu, two x_proj and dt_proj MatMuls, two StmSelectiveScan, their sum
gated by silu(z)/2, and StmMergeWeights nodes that read this layer's delta and B. In the last layer slices select the class
token.
After: StmConvXProj(xz) -> x_dbl, StmMambaScan(xz, x_dbl) -> y, merge weights; the half is folded into out_proj, exactly.
The plugin takes the whole outputs of the GEMMs, because TensorRT merges GEMMs on one input and pays copies to cut them apart.

Methods that look at the image (stm.reduction) read more of a layer: delta, B or C, which become pieces of x_dbl; or the output
of one direction, which the plugin adds up and gates. Such a layer gets a StmMambaScan a direction, the other one silenced by
zero weights and the gate held at a constant, and adds and gates in ops of the runtime: one more scan than the plan's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ..errors import ExportError
from ..op_schema import WEIGHT_MODE_NUMBERS, WEIGHT_OPS
from .tensorrt_common import Array, check_domain, constant, only_consumer, plugin_node, producer, through_slice, value

_SCANS = ("StmSelectiveScanFwd", "StmSelectiveScanScaledFwd")
_SCANS_BACK = ("StmSelectiveScanBwd", "StmSelectiveScanScaledBwd")
_MODE_OF = {op: mode for mode, op in WEIGHT_OPS.items()}


@dataclass
class _Direction:
    """One direction of a mixer, as found in the graph. Token range of the sequence: start..stop (None: to the end)."""

    scan: gs.Node
    split: gs.Node  # of in_proj's output
    parts: gs.Node  # Split of x_proj's output
    xz: gs.Tensor
    z: gs.Tensor
    start: int
    stop: int | None
    delta: gs.Tensor
    B: gs.Tensor
    conv_weight: Array
    conv_bias: Array
    x_proj: Array  # (dt_rank + 2 d_state, d_inner)
    dt_weight: Array  # (d_inner, dt_rank)
    dt_bias: Array
    A: Array
    D: Array
    decay_scale: Array | None


def _read_direction(scan: gs.Node) -> _Direction:
    where = scan.name
    conv = producer(scan.inputs[0], "StmCausalConvSiluFwd", "StmCausalConvSiluBwd", where=where)
    x, start, stop = through_slice(conv.inputs[0])
    split = producer(x, "Split", where=where)
    if split.outputs[0] is not x or len(split.outputs) != 2:
        raise ExportError(f"tensorrt: {where}: x is not the first half of in_proj's output")
    dt_proj = producer(scan.inputs[1], "MatMul", where=where)
    parts = producer(dt_proj.inputs[0], "Split", where=where)
    if [parts.outputs[0], parts.outputs[1], parts.outputs[2]] != [dt_proj.inputs[0], scan.inputs[3], scan.inputs[4]]:
        raise ExportError(f"tensorrt: {where}: x_proj's output is not split into dt, B, C in this order")
    x_proj = producer(parts.inputs[0], "MatMul", where=where)
    if x_proj.inputs[0] is not conv.outputs[0]:
        raise ExportError(f"tensorrt: {where}: x_proj does not read the convolution's output")
    return _Direction(
        scan=scan,
        split=split,
        parts=parts,
        xz=split.inputs[0],
        z=split.outputs[1],
        start=start,
        stop=stop,
        delta=scan.inputs[1],
        B=scan.inputs[3],
        conv_weight=value(conv.inputs[1], where),
        conv_bias=value(conv.inputs[2], where),
        x_proj=value(x_proj.inputs[1], where).T,
        dt_weight=value(dt_proj.inputs[1], where).T,
        dt_bias=value(scan.inputs[6], where),
        A=value(scan.inputs[2], where),
        D=value(scan.inputs[5], where),
        decay_scale=value(scan.inputs[7], where) if len(scan.inputs) > 7 else None,
    )


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _after_slice(tensor: gs.Tensor) -> tuple[gs.Tensor, int]:
    """Follow a tensor's only consumer if it is a Slice; returns the tensor after it and its start."""
    if len(tensor.outputs) == 1 and tensor.outputs[0].op == "Slice":
        sliced = tensor.outputs[0].outputs[0]
        return sliced, through_slice(sliced)[1]
    return tensor, 0


def _is_half_silu(tensor: gs.Tensor, z: gs.Tensor, where: str) -> bool:
    half = producer(tensor, "Mul", where=where)
    for silu, factor in (half.inputs, half.inputs[::-1]):
        if not isinstance(factor, gs.Constant) or factor.values.size != 1 or float(factor.values.reshape(-1)[0]) != 0.5:
            continue
        gate = producer(silu, "Mul", where=where)
        for plain, sigmoid in (gate.inputs, gate.inputs[::-1]):
            if sigmoid.inputs and sigmoid.inputs[0].op == "Sigmoid" and sigmoid.inputs[0].inputs[0] is plain and through_slice(plain)[0] is z:
                return True
    return False


def both(forward: Array, backward: Array, name: str) -> Array:
    if forward.shape != backward.shape:
        raise ExportError(f"tensorrt: {name} has shape {forward.shape} forward and {backward.shape} backward")
    return np.stack([forward, backward])


def both_directions(name: str, suffix: str = "", **arrays: tuple[Array, Array]) -> dict[str, gs.Constant]:
    """A mixer's constants (2, ...) by key; one object each, for several nodes may read them."""
    called = {"A": "A_both", "D": "D_both"}
    return {key: constant(f"{name}.{called.get(key, key)}{suffix}", both(*pair, f"{name}.{key}")) for key, pair in arrays.items()}


def _merge_weight_nodes(direction: _Direction) -> list[tuple[gs.Node, int]]:
    """StmMergeWeights nodes that read this direction's delta, each with the first token it looks at."""
    found = []
    for consumer in list(direction.delta.outputs):
        if consumer.op in _MODE_OF:
            found.append((consumer, 0))
        elif consumer.op == "Slice":
            sliced = consumer.outputs[0]
            found += [(node, through_slice(sliced)[1]) for node in sliced.outputs if node.op in _MODE_OF]
    return found


def _check_span(node: gs.Node, first: int, pairs: list[tuple[int, int]], scale: Array | None) -> None:
    """The plugin derives the span between source and target from the pair; the graph must mean the same."""
    span = value(node.inputs[4], node.name)
    expected = np.zeros_like(span)
    for row, (p, q) in enumerate(pairs):
        tokens = range(p + 1, q + 1) if p < q else range(q, p)
        for token in tokens:
            expected[row, token - first] = 1.0 if scale is None else scale[token]
    if not np.array_equal(span, expected):
        raise ExportError(f"tensorrt: {node.name}: the span of tokens between source and target is not the one that the plugin derives")


def _replace_weights(graph: gs.Graph, name: str, directions: tuple[_Direction, _Direction]) -> tuple[int, Array | None, gs.Tensor | None]:
    """Take the merge weights of the next layer over; returns (mode number, pairs, the tensor to produce)."""
    pairs: list[tuple[int, int]] = []
    modes, nodes = set(), []
    for direction in directions:
        for node, first in _merge_weight_nodes(direction):
            sources, targets = (value(node.inputs[i], node.name) + first for i in (5, 6))
            mine = [(int(p), int(q)) for p, q in zip(sources, targets, strict=True)]
            _check_span(node, first, mine, direction.decay_scale)
            pairs += mine
            modes.add(_MODE_OF[node.op])
            nodes.append(node)
    if not nodes:
        return 0, None, None
    if len(modes) != 1:
        raise ExportError(f"tensorrt: {name}: merge weights of several modes {sorted(modes)}")
    joined = nodes[0].outputs[0]
    if len(nodes) > 1:
        concat = only_consumer(joined, "Concat", where=name)
        if [tensor.inputs[0] for tensor in concat.inputs] != nodes:
            raise ExportError(f"tensorrt: {name}: merge weights are not joined left side first")
        joined = concat.outputs[0]
    joined.inputs.clear()
    return WEIGHT_MODE_NUMBERS[modes.pop()], np.asarray(pairs, dtype=np.int32), joined


def _is_read_alone(scan: gs.Node) -> bool:
    """Whether something beside the sum of the directions reads a scan's output."""
    return len(scan.outputs[0].outputs) > 1


def _sum_of_directions(first: gs.Node, name: str) -> tuple[gs.Node, gs.Tensor, int]:
    """(the Add of both directions, the forward one's operand of it, the token that it starts with)."""
    summed, cls_start = _after_slice(first.outputs[0])
    adds = [node for node in summed.outputs if node.op == "Add" and through_slice(_other(node, summed))[0].inputs[0].op in _SCANS_BACK]
    if len(adds) != 1:
        raise ExportError(f"tensorrt: {name}: {len(adds)} sums of the two directions, expected one")
    return adds[0], summed, cls_start


_GATE = 1.28125  # silu is about 1 there, and fp16 and bf16 have this number
_GATED = _GATE / (1 + float(np.exp(-_GATE)))


def scan_alone(graph: gs.Graph, name: str, index: int, x: gs.Tensor, x_dbl: gs.Tensor, y: gs.Tensor, weights: dict[str, gs.Constant]) -> None:
    """Make y (batch, seqlen, d_inner), one direction's output before the gate, by a StmMambaScan that hears nothing else.

    Args:
        index: 0 forward, 1 backward.
        x: (batch, seqlen, d_inner), what the direction's convolution reads.
        weights: conv_weight, conv_bias, dt_weight, dt_bias, A and D of both directions.
    """
    alone, inner = name + ("", "_b")[index], weights["A"].shape[1]
    held, gated = gs.Variable(f"{alone}.held_gate", np.float32), gs.Variable(f"{alone}.y_gated", np.float32)
    pads, level = constant(f"{alone}.gate_pads", np.asarray([0, 0, 0, 0, 0, inner])), constant(f"{alone}.gate_level", np.asarray(_GATE, np.float32))
    graph.nodes.append(gs.Node("Pad", f"{alone}.hold_gate/Pad", {"mode": "constant"}, [x, pads, level], [held]))
    constants = []
    for key, tensor in weights.items():
        if key.startswith("conv"):  # the other direction's input is then silu(0) = 0
            array = tensor.values.copy()
            array[1 - index] = 0
            tensor = constant(f"{alone}.{key}_alone", array)
        constants.append(tensor)
    graph.nodes.append(plugin_node("StmMambaScan", f"{name}.mamba_scan{('', '_b')[index]}", [held, x_dbl, *constants], [gated]))
    gain = constant(f"{alone}.gate_gain", np.asarray(1 / _GATED, np.float32))
    y.inputs.clear()
    graph.nodes.append(gs.Node("Mul", f"{alone}.release_gate/Mul", {}, [gated, gain], [y]))


def conv_xproj(graph: gs.Graph, name: str, xz: gs.Tensor, weights: dict[str, gs.Constant], x_proj: Array) -> gs.Tensor:
    """x_dbl (2, batch, seqlen, row) of both directions; x_proj (2, dt_rank + 2 d_state, d_inner)."""
    row = -(-x_proj.shape[1] // 8) * 8
    padded = np.zeros((2, row, x_proj.shape[2]), dtype=np.float32)
    padded[:, : x_proj.shape[1]] = x_proj
    x_dbl = gs.Variable(f"{name}.x_dbl", np.float32, (2, "batch", None, row))
    inputs = [xz, weights["conv_weight"], weights["conv_bias"], constant(f"{name}.x_proj_weight", padded)]
    graph.nodes.append(plugin_node("StmConvXProj", f"{name}.conv_xproj", inputs, [x_dbl]))
    return x_dbl


def x_dbl_part(graph: gs.Graph, name: str, index: int, x_dbl: gs.Tensor, columns: int) -> gs.Tensor:
    """One direction's dt, B and C (batch, seqlen, columns); a node that nobody reads goes with the clean-up."""
    alone = name + ("", "_b")[index]
    one, part = gs.Variable(f"{alone}.x_dbl_one", np.float32), gs.Variable(f"{alone}.x_dbl_part", np.float32)
    ends = [constant(f"{alone}.x_dbl_{key}", np.asarray([v])) for key, v in (("start", 0), ("stop", columns), ("axis", 2))]
    which = constant(f"{alone}.x_dbl_index", np.asarray(index))
    graph.nodes.append(gs.Node("Gather", f"{alone}.x_dbl_one/Gather", {"axis": 0}, [x_dbl, which], [one]))
    graph.nodes.append(gs.Node("Slice", f"{alone}.x_dbl_part/Slice", {}, [one, *ends], [part]))
    return part


def _fuse(graph: gs.Graph, forward: gs.Node) -> None:
    name = forward.name.rpartition(".scan/")[0] or forward.name
    first = _read_direction(forward)
    add, summed, cls_start = _sum_of_directions(forward, name)
    back_out, _, _ = through_slice(_other(add, summed))
    second = _read_direction(producer(back_out, *_SCANS_BACK, where=name))
    if second.xz is not first.xz:
        raise ExportError(f"tensorrt: {name}: the two directions read different in_proj outputs")
    gated = only_consumer(add.outputs[0], "Mul", where=name)
    if not _is_half_silu(_other(gated, add.outputs[0]), first.z, name):
        raise ExportError(f"tensorrt: {name}: the sum of the directions is not gated by silu(z) / 2")
    cls_index = -1
    if first.stop is not None or second.start:
        cls_index = second.start
        if first.stop != cls_index + 1 or cls_start != cls_index or first.start or second.stop is not None:
            raise ExportError(f"tensorrt: {name}: slices of the class-token-only layer do not agree on one token")
    scales = (first.decay_scale, second.decay_scale)
    scale = None
    if scales[0] is not None and scales[1] is not None:
        scale = scales[0] if cls_index < 0 else np.concatenate([scales[0], scales[1][1:]])
    mode, pairs, weights = _replace_weights(graph, name, (first, second))

    rank, state = first.dt_weight.shape[1], first.A.shape[1]
    weight = both_directions(
        name,
        conv_weight=(first.conv_weight, second.conv_weight),
        conv_bias=(first.conv_bias, second.conv_bias),
        dt_weight=(first.dt_weight, second.dt_weight),
        dt_bias=(first.dt_bias, second.dt_bias),
        A=(first.A, second.A),
        D=(first.D, second.D),
    )
    x_dbl = conv_xproj(graph, name, first.xz, weight, both(first.x_proj, second.x_proj, f"{name}.x_proj"))
    for index, direction in enumerate((first, second)):
        direction.parts.inputs[0] = x_dbl_part(graph, name, index, x_dbl, rank + 2 * state)
    if _is_read_alone(first.scan) or _is_read_alone(second.scan):
        if cls_index >= 0 or weights is not None or scale is not None:
            raise ExportError(f"tensorrt: {name}: the directions are read apart in a layer of a merge plan or of the class token alone")
        for index, direction in enumerate((first, second)):
            scan_alone(graph, name, index, first.split.outputs[0], x_dbl, direction.scan.outputs[0], weight)
        return
    inputs = [first.xz, x_dbl, *weight.values()]
    y = gs.Variable(f"{name}.y", np.float32, gated.outputs[0].shape)
    outputs = [y]
    if weights is not None and pairs is not None:
        inputs.append(constant(f"{name}.merge_pairs", pairs))
        outputs.append(weights)
    if scale is not None:
        inputs.append(constant(f"{name}.decay_scale", scale.astype(np.float32)))
    graph.nodes.append(
        plugin_node("StmMambaScan", f"{name}.mamba_scan", inputs, outputs, cls_index=cls_index, weight_mode=mode, scaled_decay=int(scale is not None))
    )
    reader = only_consumer(gated.outputs[0], "MatMul", "GatherElements", where=name)
    reader.inputs[0] = y  # a GatherElements picks the class token where the image decides its place
    out_proj = reader if reader.op == "MatMul" else only_consumer(reader.outputs[0], "MatMul", where=name)
    out_proj.inputs[1] = constant(out_proj.inputs[1].name + "_half", value(out_proj.inputs[1], name) * np.float32(0.5))


def fuse_mixer(graph: gs.Graph) -> gs.Graph:
    """Fuse every mixer in place.

    Raises:
        ExportError: a scan stands in a graph that is not a ViM mixer; says what differs and where.
    """
    check_domain(graph)
    scans = [node for node in graph.nodes if node.op in _SCANS]
    if not scans:
        raise ExportError("tensorrt: the graph has no StmSelectiveScanFwd; is it a portable export of a ViM?")
    for scan in scans:
        _fuse(graph, scan)
    graph.cleanup().toposort()
    left = sorted({node.op for node in graph.nodes if node.op.startswith(("StmSelectiveScan", "StmCausalConvSilu", "StmMergeWeights"))})
    if left:
        raise ExportError(f"tensorrt: {', '.join(left)} left after fusing the mixers")
    return graph
