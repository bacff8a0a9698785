"""Compute what depends on weights alone: A = -exp(A_log), squeezed convolution weights, transposed matrices.

Before: a ModelProto fresh from torch.onnx.export, which folds small constants only (its limit is a number of elements).
After: no Exp, Neg, Squeeze or Transpose of initializers is left; initializers that nothing reads are gone.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def _evaluate(node: onnx.NodeProto, values: list[np.ndarray]) -> np.ndarray | None:  # type: ignore[type-arg]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Exp":
        return np.asarray(np.exp(values[0]))
    if node.op_type == "Neg":
        return np.asarray(-values[0])
    if node.op_type == "Squeeze":
        axes = tuple(int(axis) for axis in values[1]) if len(values) > 1 else None
        return np.squeeze(values[0], axes)
    if node.op_type == "Transpose":
        return np.transpose(values[0], attributes.get("perm"))
    return None


def fold_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold in place."""
    graph = model.graph
    constants = {initializer.name: initializer for initializer in graph.initializer}
    outputs = {output.name for output in graph.output}
    kept = []
    for node in graph.node:
        foldable = node.input and all(name in constants for name in node.input) and not outputs.intersection(node.output)
        folded = _evaluate(node, [numpy_helper.to_array(constants[name]) for name in node.input]) if foldable else None
        if folded is None:
            kept.append(node)
        else:
            constants[node.output[0]] = numpy_helper.from_array(np.ascontiguousarray(folded), node.output[0])
    read = {name for node in kept for name in node.input} | outputs
    del graph.node[:]
    graph.node.extend(kept)
    del graph.initializer[:]
    graph.initializer.extend(constant for name, constant in constants.items() if name in read)
    return model
