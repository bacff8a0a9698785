"""Model + plan -> portable ONNX: torch.export, our nodes with function bodies, checks, metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from onnxscript import opset18, values

from stm import VisionMamba, __version__, plan_summary, state_dict_sha256
from stm.reduction import ReducedVim, reduction_summary

from .errors import ExportError
from .images import CROP_RATIO, class_names
from .op_schema import DOMAIN, DOMAIN_VERSION, INPUT, OPS, OUTPUT, WEIGHT_OPS, conv_op_name, scan_op_name
from .passes.fold_weights import fold_weights
from .passes.name_tensors import name_tensors
from .passes.portable import portable
from .passes.strip_metadata import strip_metadata

OPSETS = (18, 19, 20)
IR_VERSION = 10


def _node(name: str, *inputs: Any) -> Any:
    return values.Op(values.Opset(DOMAIN, DOMAIN_VERSION), name, OPS[name].schema())(*inputs)


def _translation_table() -> dict[Any, Any]:
    """torch custom op -> one node of ours; bodies are attached afterwards (the exporter cannot inline them)."""

    def scan(u, delta, A, B, C, D, delta_bias, decay_scale, softplus, reverse):  # type: ignore[no-untyped-def]
        inputs = (u, delta, A, B, C, D, delta_bias) + (() if decay_scale is None else (decay_scale,))
        return _node(scan_op_name(reverse, decay_scale is not None, softplus), *inputs)

    def scan_with_state(*args):  # type: ignore[no-untyped-def]
        raise ExportError("selective_scan_fn(return_last_state=True) cannot be exported: our ONNX op returns y only; export with False")

    def conv(x, weight, bias, reverse):  # type: ignore[no-untyped-def]
        return _node(conv_op_name(reverse), x, weight, bias)

    def norm(x, weight, epsilon):  # type: ignore[no-untyped-def]
        return _node("StmRmsNorm", x, weight, opset18.Constant(value_float=epsilon))

    def weights(delta, delta_bias, A, B, span, sources, targets, mode):  # type: ignore[no-untyped-def]
        return _node(WEIGHT_OPS[mode], delta, delta_bias, A, B, span, sources, targets)

    def tokens(x, weights, keep, sources, targets):  # type: ignore[no-untyped-def]
        return _node("StmMergeTokens", x, weights, keep, sources, targets)

    ops = torch.ops.stm
    return {
        ops.selective_scan.default: scan,
        ops.selective_scan_with_state.default: scan_with_state,
        ops.causal_conv_silu.default: conv,
        ops.rms_norm.default: norm,
        ops.merge_weights.default: weights,
        ops.merge_tokens.default: tokens,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The torch exporter prints its steps and warns about torchvision; none of it is for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(module: torch.nn.Module, example: torch.Tensor, *, opset: int = 18, input_name: str = INPUT, output_name: str = OUTPUT) -> onnx.ModelProto:
    """torch.onnx.export of any module made of our ops, with a dynamic first axis; our nodes are bare.

    For other Mamba models: swap `selective_scan_fn` for `stm.selective_scan_fn`, then call this and `lower_portable`.

    Raises:
        ExportError: torch cannot export the module; its reason is quoted.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset is {opset}; choose from {', '.join(map(str, OPSETS))}")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                custom_translation_table=_translation_table(),
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                opset_version=opset,
                input_names=[input_name],
                output_names=[output_name],
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ExportError):
            raise cause from None
        raise ExportError(f"torch.onnx.export failed: {type(cause).__name__}: {str(cause).strip()[:400]}") from error
    assert program is not None
    return program.model_proto


def lower_portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold, name, strip, attach bodies: a traced model -> one that any ONNX runtime runs."""
    model = strip_metadata(name_tensors(fold_weights(model)))
    graph = portable(gs.import_onnx(model))
    graph.cleanup().toposort()
    graph.ir_version = IR_VERSION
    lowered = gs.export_onnx(graph)
    lowered.ir_version = IR_VERSION
    lowered.producer_name, lowered.producer_version = "stm-export", __version__
    return lowered


def summary_of(model: VisionMamba) -> dict[str, Any]:
    """The figures of a model's plan, or of the method that reduces its tokens."""
    return reduction_summary(model.reduction) if isinstance(model, ReducedVim) else plan_summary(model.config, model.plan)


def metadata(model: VisionMamba, precision: str, classes: list[str] | None = None) -> dict[str, str]:
    """What the file says about itself; read by `stm inspect`, the samples and the engine's sidecar."""
    config, provenance = model.config, model.provenance
    summary = summary_of(model)
    names = classes or class_names(model)
    if names is not None and len(names) != config.num_classes:
        raise ExportError(f"{len(names)} class names for {config.num_classes} classes; give one a class")
    height, width = config.image_size
    return {
        "stm.version": __version__,
        "stm.model": config.name,
        "stm.config": json.dumps(
            {k: getattr(config, k) for k in ("d_model", "depth", "d_state", "d_conv", "expand", "dt_rank", "patch_size", "stride", "num_classes")}
        ),
        "stm.precision": precision,
        "stm.weights": str(provenance) if provenance else "unknown",
        "stm.weights_kind": provenance.kind if provenance else "unknown",
        "stm.seed": json.dumps(provenance.seed if provenance else None),
        "stm.ema": json.dumps(bool(provenance and provenance.ema)),
        "stm.pos_embed_change": provenance.pos_embed_change if provenance else "",
        "stm.weights_random": json.dumps(bool(provenance and provenance.is_random)),
        "stm.checkpoint_sha256": provenance.sha256 if provenance and not provenance.is_random else "",
        "stm.pos_embed_resize": provenance.pos_embed_resize if provenance else "correct",
        "stm.weights_sha256": state_dict_sha256(model.state_dict()),
        "stm.plan": json.dumps(model.plan.to_dict()) if model.plan is not None else "",
        "stm.reduction": json.dumps(model.reduction.describe()) if isinstance(model, ReducedVim) else "",
        "stm.seqlen": json.dumps(summary["seqlen"]),
        "stm.tokens_left": str(summary["tokens_left"]),
        "stm.token_layers_removed": str(summary["token_layers_removed"]),
        "stm.gflops_paper": str(summary["gflops_paper"]),
        "stm.gflops_true": str(summary["gflops_true"]),
        "stm.image_size": json.dumps([height, width]),
        "stm.normalization": json.dumps({"mean": config.mean, "std": config.std, "scale": "0..1", "crop_ratio": CROP_RATIO, "resize": "bicubic"}),
        "stm.classes": json.dumps(names) if names else "",
    }


def export_onnx(model: VisionMamba, *, opset: int = 18, classes: list[str] | None = None) -> onnx.ModelProto:
    """Export a model and its plan, or a `stm.reduction.ReducedVim`, to a portable float32 ONNX model: input `images`
    (batch, 3, height, width), normalised; output `logits` (batch, num_classes); dynamic batch.

    Raises:
        ExportError: torch cannot export it, or the result breaks a promise of `check_portable`.
    """
    if model.config.d_conv != 4:
        raise ExportError(f"{model.config.name!r} has d_conv = {model.config.d_conv}; our convolution ops have 4 taps")
    height, width = model.config.image_size
    lowered = lower_portable(trace(model, torch.zeros(2, 3, height, width), opset=opset))
    lowered.graph.name = model.config.name
    for key, value in metadata(model, "fp32", classes).items():
        lowered.metadata_props.add(key=key, value=value)
    check_portable(lowered, opset)
    return lowered


_PATH = re.compile(rb'File "|site-packages|/home/|/root/|\.py"')


def check_portable(model: onnx.ModelProto, opset: int) -> None:
    """What a portable file promises.

    Raises:
        ExportError: onnx's full check fails; a literal batch, a Loop, a node without body, or a local path is left.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported model: {str(error)[:400]}") from None
    if model.ir_version > IR_VERSION:
        raise ExportError(f"IR version is {model.ir_version}, promised at most {IR_VERSION}")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("") != opset:
        raise ExportError(f"opset is {versions.get('')}, asked {opset}")
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param != "batch":
            raise ExportError(f"the first axis of {value.name!r} is {first.dim_value or first.dim_param!r}, not a dynamic 'batch'")
    bodies = {function.name for function in model.functions}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type not in bodies:
            raise ExportError(f"node {node.name!r} ({node.op_type}) has no function body")
        if node.op_type in ("Loop", "If"):
            raise ExportError(f"node {node.name!r} is a {node.op_type}; portable files have none")
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise ExportError(f"node {node.name!r} ({node.op_type}) holds a subgraph outside our functions")
    bare = onnx.ModelProto()
    bare.CopyFrom(model) if model.ByteSize() < 1 << 20 else _copy_without_weights(model, bare)
    if found := _PATH.search(bare.SerializeToString()):
        raise ExportError(f"the exported model contains a local path or stack trace near {found.group()!r}")


def _copy_without_weights(model: onnx.ModelProto, bare: onnx.ModelProto) -> None:
    bare.graph.node.extend(model.graph.node)
    bare.graph.value_info.extend(model.graph.value_info)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    bare.functions.extend(model.functions)
    bare.metadata_props.extend(entry for entry in model.metadata_props if entry.key != "stm.classes")
