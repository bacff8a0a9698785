"""Turn the patch embedding into one GEMM and one table.

Before: Conv(images) -> Reshape -> Transpose -> Slices, joined with the class token by Concat -> Add(position embedding).
After: StmPatchRows(images) -> MatMul(rows, weight) -> Add(table): the table (1, seqlen, d_model) holds what is the same for
every image, position embedding plus convolution bias or class token, in float32; rows of the class token are zeros.
fuse_add_norm makes the sum part of the first norm. TensorRT would run the convolution, two reformats, the Concat and the
Add as kernels of their own, five passes over the stream.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..errors import ExportError
from ..op_schema import INPUT
from .tensorrt_common import Array, check_domain, constant, only_consumer, plugin_node, producer, through_slice, value


def _convolution(graph: gs.Graph) -> gs.Node:
    """The convolution that reads the images."""
    found = [node for node in graph.nodes if node.op == "Conv" and any(node.inputs[0] is tensor for tensor in graph.inputs)]
    if len(found) != 1:
        raise ExportError(f"tensorrt: {len(found)} convolutions read the input {INPUT!r}, expected one, the patch embedding")
    return found[0]


def _geometry(conv: gs.Node, weight: Array) -> tuple[int, int]:
    """(patch size, stride) of a convolution that cuts patches and does nothing else."""
    attributes = conv.attrs
    strides = list(attributes.get("strides", [1, 1]))
    plain = (
        not any(attributes.get("pads", []))
        and attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and all(d == 1 for d in attributes.get("dilations", []))
        and attributes.get("group", 1) == 1
    )
    if not plain or weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3] or len(set(strides)) != 1:
        raise ExportError(
            f"tensorrt: {conv.name}: weight {weight.shape}, {dict(attributes)}; expected square patches of 3 channels, one stride, no padding"
        )
    return int(weight.shape[2]), int(strides[0])


def _patches(conv: gs.Node, patches: int) -> gs.Tensor:
    """The patches as (batch, patches, d_model), row-major."""
    where = conv.name
    flatten = only_consumer(conv.outputs[0], "Reshape", where=where)
    transpose = only_consumer(flatten.outputs[0], "Transpose", where=where)
    shape = [int(extent) for extent in value(flatten.inputs[1], where)]
    if len(shape) != 3 or shape[2] not in (patches, -1) or list(transpose.attrs.get("perm", [])) != [0, 2, 1]:
        raise ExportError(f"tensorrt: {where}: patches are reshaped to {shape} and transposed by {transpose.attrs.get('perm')}, not flattened")
    return transpose.outputs[0]


def _concat(patches: gs.Tensor, where: str) -> gs.Node:
    """The Concat that joins the patches, whole or in slices, with the class token."""
    parts = [patches, *(node.outputs[0] for node in patches.outputs if node.op == "Slice")]
    found = [node for part in parts for node in part.outputs if node.op == "Concat"]
    if not found or any(node is not found[0] for node in found):
        raise ExportError(f"tensorrt: {where}: the patches go to {len(found)} Concat, expected one, with the class token")
    return found[0]


def _class_token(tensor: gs.Tensor, where: str) -> Array:
    """The class token (d_model,) behind its expansion to the batch."""
    expand = producer(tensor, "Expand", where=where)
    token = value(expand.inputs[0], where)
    if token.shape[:2] != (1, 1) or token.ndim != 3:
        raise ExportError(f"tensorrt: {where}: the class token has shape {token.shape}, expected (1, 1, d_model)")
    return np.asarray(token[0, 0])


def _joined(concat: gs.Node, patches: gs.Tensor, count: int) -> tuple[int, Array]:
    """(place, values) of the class token between the patches, which must all be there, in order."""
    where = concat.name
    seen, places, tokens = 0, [], []
    for part in concat.inputs:
        whole, start, stop = through_slice(part)
        if whole is not patches:
            places.append(seen)
            tokens.append(_class_token(part, where))
            continue
        if start != seen:
            raise ExportError(f"tensorrt: {where}: patch {start} follows patch {seen - 1}")
        seen = count if stop is None else min(stop, count)
    if concat.attrs.get("axis") != 1 or len(places) != 1 or seen != count:
        raise ExportError(f"tensorrt: {where}: {seen} of {count} patches and {len(places)} class tokens, expected all and one")
    return places[0], tokens[0]


def _add_after(concat: gs.Node) -> tuple[gs.Node, Array]:
    """The Add of the position embedding, and its values (1, seqlen, d_model)."""
    add = only_consumer(concat.outputs[0], "Add", where=concat.name)
    (other,) = [tensor for tensor in add.inputs if tensor is not concat.outputs[0]]
    return add, value(other, add.name)


def fuse_patch_embed(graph: gs.Graph) -> gs.Graph:
    """Rewrite in place.

    Raises:
        ExportError: the graph does not start as a ViM's does; says what differs and where.
    """
    check_domain(graph)
    conv = _convolution(graph)
    weight = value(conv.inputs[1], conv.name)
    patch_size, stride = _geometry(conv, weight)
    images = conv.inputs[0]
    sides = list(images.shape[2:])
    if not all(isinstance(side, int) for side in sides):
        raise ExportError(f"tensorrt: {INPUT!r} has sides {sides}; position embeddings belong to one image size")
    count = int(np.prod([(side - patch_size) // stride + 1 for side in sides]))
    patches = _patches(conv, count)
    concat = _concat(patches, conv.name)
    cls_index, cls_token = _joined(concat, patches, count)
    add, table = _add_after(concat)
    d_model = int(weight.shape[0])
    if table.shape != (1, count + 1, d_model):
        raise ExportError(f"tensorrt: {add.name}: the position embedding has shape {table.shape}, expected {(1, count + 1, d_model)}")
    bias = value(conv.inputs[2], conv.name) if len(conv.inputs) > 2 else np.zeros(d_model, np.float32)
    same = np.broadcast_to(bias, table.shape[1:]).copy()
    same[cls_index] = cls_token

    proj = conv.name.rpartition("/")[0] or conv.name  # patch_embed.proj
    module = proj.rpartition(".")[0] or proj
    rows = gs.Variable(f"{module}.rows", np.float32)
    projected = gs.Variable(f"{module}.projected", np.float32)
    graph.nodes.append(
        plugin_node("StmPatchRows", f"{module}.patch_rows", [images], [rows], patch_size=patch_size, stride=stride, cls_index=cls_index)
    )
    weight_t = constant(f"{proj}.weight_t", weight.reshape(d_model, -1).T)
    graph.nodes.append(gs.Node("MatMul", f"{proj}/MatMul", {}, [rows, weight_t], [projected]))
    add.inputs = [constant(f"{module}.table", (table + same).astype(np.float32)), projected]
    graph.cleanup().toposort()
    return graph
