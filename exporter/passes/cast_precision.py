"""Write the precision into the graph: TensorRT networks are strongly typed.

Before: a float32 graph of fused ops. After, for fp16 and bf16: GEMMs, among them the patch embedding, and the plugins'
activations are in that type; the residual stream, norm weights, A, D, biases of conv and delta, the merge weights and the scan's state stay in
float32 (facts: they are what breaks in half precision). Input `images` and output `logits` stay float32. So do products of two
computed tensors, which are the similarities and averages of methods that look at the image: what they decide is not decided by
rounding.

TensorRT adds up fp16 products of matrices in fp16 where such a kernel is faster, which PyTorch does not by itself and which makes an
engine's error two to three times as large. A MatMul between casts to and from float32 makes it read fp16, add up in float32 and write
fp16; fp16 GEMMs are written so. Not a Gemm with its bias, which between casts would run in float32: it becomes a MatMul, its weight
turned, and an Add in float32.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..errors import ExportError
from ..op_schema import OPS

PRECISIONS = ("fp32", "fp16", "bf16")
_TRANSPARENT = ("Reshape", "Transpose", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Pad")  # move values, whatever their type
_ONNX_TYPE = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def _half_constant(tensor: gs.Constant, precision: str) -> gs.Constant:
    """A constant in half precision; bf16 is rounded to nearest even, as numpy has no such type."""
    values = np.asarray(tensor.values, dtype=np.float32)
    if precision == "fp16":
        top = float(np.abs(values).max(initial=0.0))
        if top > 65504:
            raise ExportError(f"fp16: weight {tensor.name!r} reaches {top:.3g}, beyond 65504; use --precision bf16 or fp32")
        return gs.Constant(tensor.name + "_fp16", values.astype(np.float16))
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    proto = onnx.TensorProto(name=tensor.name + "_bf16", data_type=onnx.TensorProto.BFLOAT16, dims=values.shape, raw_data=rounded.tobytes())
    return gs.Constant(proto.name, gs.ir.tensor.LazyValues(proto))


def _split_gemm(graph: gs.Graph, node: gs.Node) -> None:
    """Gemm with constant weights -> MatMul, and Add where it has a bias."""
    plain = all(node.attrs.get(name, value) == value for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
    if not plain or not isinstance(node.inputs[1], gs.Constant):
        raise ExportError(f"fp16: {node.name} is no product with constant weights plus a bias")
    (x, weight, *bias), (out,) = node.inputs, node.outputs
    if node.attrs.get("transB"):
        taken = graph.tensors()
        name = next(name for n in itertools.count() if (name := f"{weight.name}_t{n or ''}") not in taken)
        weight = gs.Constant(name, np.ascontiguousarray(weight.values.T))
    node.op, node.attrs, node.inputs = "MatMul", {}, [x, weight]
    if bias:
        product = gs.Variable(f"{node.name}/product", np.float32, out.shape)
        graph.nodes.insert(graph.nodes.index(node) + 1, gs.Node("Add", f"{node.name}/Add", {}, [product, *bias], [out]))
        node.outputs = [product]


def cast_precision(graph: gs.Graph, precision: str, fp16_accumulation: bool = False) -> gs.Graph:
    """Set types in place; fp32 changes nothing.

    Args:
        graph: of fused ops, float32.
        precision: fp32, fp16 or bf16.
        fp16_accumulation: let TensorRT add up fp16 GEMMs in fp16 where that is faster.

    Raises:
        ExportError: an unknown precision, or a weight that does not fit it.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision is {precision!r}; choose from {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return graph
    half = _ONNX_TYPE[precision]
    dtype: object = np.float16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    halves: dict[str, gs.Constant] = {}
    casts: dict[str, gs.Tensor] = {}
    in_half: set[str] = set()  # tensors whose producer now makes half

    def cast(tensor: gs.Tensor, to: int, suffix: str) -> gs.Tensor:
        name = f"{tensor.name}.{suffix}"
        if name not in casts:
            out = gs.Variable(name, dtype if to == half else np.float32, tensor.shape)
            graph.nodes.append(gs.Node("Cast", f"{name}/Cast", {"to": to}, [tensor], [out]))
            casts[name] = out
        return casts[name]

    def to_half(tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            if tensor.name not in halves:
                halves[tensor.name] = _half_constant(tensor, precision)
            return halves[tensor.name]
        return tensor if tensor.name in in_half else cast(tensor, half, precision)

    wide_sums = precision == "fp16" and not fp16_accumulation
    if wide_sums:
        for node in [node for node in graph.nodes if node.op == "Gemm"]:
            _split_gemm(graph, node)
    for node in list(graph.nodes):  # in topological order
        spec = OPS.get(node.op)
        if spec is not None:
            if any(attribute.name == "precision" for attribute in spec.attributes):
                node.attrs["precision"] = precision
            for index, operand in enumerate(spec.inputs[: len(node.inputs)]):
                if operand.type == "T":
                    node.inputs[index] = to_half(node.inputs[index])
            made = [out for out, operand in zip(node.outputs, spec.outputs, strict=False) if operand.type == "T"]
        elif node.op in ("Gemm", "Conv") or (node.op == "MatMul" and any(isinstance(tensor, gs.Constant) for tensor in node.inputs)):
            for index in range(len(node.inputs)):
                node.inputs[index] = to_half(node.inputs[index])
            made = list(node.outputs)
            if wide_sums and node.op == "MatMul":
                node.inputs = [cast(tensor, onnx.TensorProto.FLOAT, "fp32") for tensor in node.inputs]
                total = gs.Variable(f"{made[0].name}.sums", np.float32, made[0].shape)
                node.outputs = [total]
                node = gs.Node("Cast", f"{total.name}/Cast", {"to": half}, [total], made)
                graph.nodes.append(node)
        elif node.op in _TRANSPARENT and node.inputs[0].name in in_half:
            if node.op == "Pad":
                node.inputs[2] = to_half(node.inputs[2])
            made = list(node.outputs)
        else:
            floats = [i for i, tensor in enumerate(node.inputs) if tensor.name in in_half]
            for index in floats:
                node.inputs[index] = cast(node.inputs[index], onnx.TensorProto.FLOAT, "fp32")
            made = []
        for out in made:
            if any(out is output for output in graph.outputs):
                inner = gs.Variable(f"{out.name}.{precision}", dtype, out.shape)
                node.outputs[node.outputs.index(out)] = inner
                graph.nodes.append(gs.Node("Cast", f"{out.name}/Cast", {"to": onnx.TensorProto.FLOAT}, [inner], [out]))
            else:
                out.dtype = dtype
                in_half.add(out.name)
    graph.cleanup().toposort()
    return graph
