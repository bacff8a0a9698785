"""Bisection on engines: build the lowered graph once more with its inner tensors as outputs, and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from stm import VisionMamba

from .engine import BuildOptions, build_engine, deserialize, process
from .parity import comparable_tensors, deviating_tensor
from .runtimes.trt import tensorrt_runner
from .tolerances import tolerance

_SUFFIX = "/bisect"


def with_inner_outputs(lowered: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The same graph with each tensor of `names` as a float32 output called NAME/bisect."""
    graph = gs.import_onnx(lowered)
    tensors = graph.tensors()
    for name in names:
        out = gs.Variable(name + _SUFFIX, np.float32, None)
        graph.nodes.append(gs.Node("Cast", f"{name}{_SUFFIX}/Cast", {"to": onnx.TensorProto.FLOAT}, [tensors[name]], [out]))
        graph.outputs.append(out)
    marked = gs.export_onnx(graph)
    marked.ir_version = lowered.ir_version
    return marked


def first_deviation_on_engine(
    lowered: onnx.ModelProto,
    model: VisionMamba,
    inputs: Sequence[NDArray[np.float32]],
    precision: str,
    options: BuildOptions,
    plugin_library: str | Path | None = None,
) -> str | None:
    """Name of the first tensor of the lowered graph that leaves the tolerance on TensorRT; None if none does.

    Raises:
        BuildError: the graph with inner outputs does not build.
    """
    names = [name for name in comparable_tensors(lowered, model) if name != "head"]
    marked = with_inner_outputs(lowered, names)
    blob, _ = build_engine(marked, replace(options, opt_level=min(options.opt_level, 1)), plugin_library=plugin_library)
    runner = tensorrt_runner(deserialize(process(), blob, options.version_compatible))
    return deviating_tensor(runner, model, names, {name: name + _SUFFIX for name in names}, inputs, tolerance(precision).tensor_error)
