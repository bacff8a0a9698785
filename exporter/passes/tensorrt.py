"""The `tensorrt` lowering: a portable model -> one whose patches, mixers, merges and norms are nodes of our plugin.

detach_bodies, fuse_patch_embed, fuse_aligned, fuse_mixer, gather_rows, fuse_add_norm, fuse_linear, cast_precision, then a
check: what should be ours is ours, nothing else is.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ..errors import ExportError
from ..op_schema import DOMAIN, OPS
from .cast_precision import cast_precision
from .detach_bodies import detach_bodies
from .fuse_add_norm import fuse_add_norm
from .fuse_aligned import fuse_aligned
from .fuse_linear import fuse_linear
from .fuse_mixer import fuse_mixer
from .fuse_patch_embed import fuse_patch_embed
from .gather_rows import gather_rows

FUSIONS = (detach_bodies, fuse_patch_embed, fuse_aligned, fuse_mixer, gather_rows, fuse_add_norm)  # whatever precision and batch


def lower_tensorrt(
    model: onnx.ModelProto, precision: str = "fp32", fp16_accumulation: bool = False, largest_batch: int | None = None, sm: int | None = None
) -> onnx.ModelProto:
    """Lower a portable model (unchanged) for TensorRT at fp32, fp16 or bf16.

    Args:
        fp16_accumulation: as in `cast_precision`.
        largest_batch: of the engine's profile, as in `fuse_linear`; None leaves every product to TensorRT.
        sm: of the GPU that the engine is for, as there.

    Raises:
        ExportError: the model is not a portable ViM export; says what differs and where.
    """
    graph = gs.import_onnx(model)
    for step in FUSIONS:
        graph = step(graph)
    graph = fuse_linear(graph, precision, largest_batch, sm)
    graph = cast_precision(graph, precision, fp16_accumulation)
    check_lowered(graph)
    # Reading types and shapes back from the portable graph would contradict what changed: TensorRT infers its own.
    lowered = gs.export_onnx(graph)
    del lowered.graph.value_info[:]
    lowered.ir_version = model.ir_version
    lowered.producer_name, lowered.producer_version = model.producer_name, model.producer_version
    del lowered.metadata_props[:]
    for entry in model.metadata_props:
        lowered.metadata_props.add(key=entry.key, value=precision if entry.key == "stm.precision" else entry.value)
    return lowered


def plugin_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that the plugin must take."""
    return [node.name for node in model.graph.node if node.domain == DOMAIN]


def check_lowered(graph: gs.Graph) -> None:
    """Raises:
    ExportError: a function is left, a node of ours is no fused op, or the counts of the ops do not agree.
    """
    if graph.functions:
        raise ExportError(f"tensorrt: functions {[f.name for f in graph.functions]} are left; TensorRT would prefer them to the plugin")
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain == DOMAIN or node.op.startswith("Stm"):
            if node.op not in OPS or not OPS[node.op].fused:
                raise ExportError(f"tensorrt: node {node.name!r} is {node.op}, which the plugin does not have")
            counts[node.op] = counts.get(node.op, 0) + 1
            if node.op == "StmLinear":
                for what in ("normed", "adds"):
                    counts[what] = counts.get(what, 0) + node.attrs[what]
    layers, scans = counts.get("StmConvXProj", 0), counts.get("StmMambaScan", 0)
    linears, normed, adds = (counts.pop(key, 0) for key in ("StmLinear", "normed", "adds"))
    if linears > 2 * layers + 1 or normed != adds or normed > max(layers - 1, 0):
        raise ExportError(
            f"tensorrt: {linears} StmLinear, {adds} of which add and {normed} normalise; a ViM has two a layer and the patch embedding's, "
            "and each norm between them is of two"
        )
    expected = {"StmPatchRows": 1, "StmConvXProj": layers, "StmMambaScan": scans, "StmAddMergeNorm": layers + 1 - normed}
    if not layers or not layers <= scans <= 2 * layers or counts != expected:
        raise ExportError(
            f"tensorrt: {counts}; a ViM has one StmPatchRows, a StmConvXProj and a StmMambaScan a layer (two where a method reads the "
            "directions apart), a StmAddMergeNorm before each, where two StmLinear do not do it, and one after"
        )
