"""inspect: what is in an .onnx, a plan, or a weights file."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from stm.errors import ConfigError, MissingDependencyError, StmError

from .errors import ArtefactError
from .file_metadata import load_onnx, parse_metadata
from .op_schema import DOMAIN


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a file; `kind` in the result is "onnx", "engine", "plan" or "checkpoint".

    Raises:
        ArtefactError: no such file, or not an ONNX model.
        PlanError, CheckpointError: the file is broken.
        ConfigError: the suffix says nothing we know.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"no file {path}")
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if path.suffix in (".engine", ".plan"):
        return _inspect_engine(path)
    if path.suffix == ".json":
        return _inspect_plan(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors"):
        return _inspect_checkpoint(path)
    raise ConfigError(f"{path}: inspect reads .onnx, .engine, .json (a plan), and .pth, .pt, .bin, .ckpt, .safetensors (weights)")


def _inspect_onnx(path: Path) -> dict[str, Any]:
    model = load_onnx(path)
    meta = {entry.key.removeprefix("stm."): entry.value for entry in model.metadata_props if entry.key.startswith("stm.")}
    checked = parse_metadata(path, model) if meta else {"seqlen": None, "num_classes": None}
    ours = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)

    def shape(value: onnx.ValueInfoProto) -> str:
        dims = [dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        return f"{value.name} {kind} ({', '.join(dims)})"

    return {
        "kind": "onnx",
        "file": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [shape(value) for value in model.graph.input],
        "outputs": [shape(value) for value in model.graph.output],
        "nodes": len(model.graph.node),
        "stm_nodes": dict(sorted(ours.items())),
        "nodes_without_body": sorted(ours.keys() - {function.name for function in model.functions}),
        "functions": [function.name for function in model.functions],
        "made_by_us": bool(meta),
        "metadata": {key: value for key, value in meta.items() if key not in ("plan", "classes", "seqlen")},
        "seqlen": checked["seqlen"],
        "classes": checked["num_classes"],
    }


def _inspect_engine(path: Path) -> dict[str, Any]:
    """The sidecar, whether the file is the one it speaks of, and the layers where TensorRT and a GPU are here."""
    from .engine import engine_layers, load_engine, process, read_sidecar  # nothing here needs torch: an engine's machine often has none

    sidecar = read_sidecar(path)
    found: dict[str, Any] = {"kind": "engine", "file": str(path), "bytes": path.stat().st_size}
    found["matches_sidecar"] = hashlib.sha256(path.read_bytes()).hexdigest() == sidecar["engine_sha256"]
    found |= {key: value for key, value in sidecar.items() if key not in ("schema", "kind", "plan", "classes")}
    found["classes"] = len(sidecar["classes"]) if sidecar.get("classes") else None
    try:
        engine, _ = load_engine(path)
    except StmError as error:
        found["layers"] = f"not read: {error}"
    else:
        layers = engine_layers(engine, process().trt)
        found["layers"] = len(layers)
        found["plugin_layers"] = sum(layer["plugin"] for layer in layers)
        found["layer_list"] = [_layer_line(layer) for layer in layers]
    return found


def _layer_line(layer: dict[str, Any]) -> str:
    """Whose it is, its type and name; the first of the ONNX nodes that it came from where TensorRT's name does not tell."""
    told = layer["nodes"] and layer["name"].startswith("__my")
    return f"{'ours   ' if layer['plugin'] else 'TensorRT'} {layer['type']:<14} {layer['name']}{'  of ' + layer['nodes'][0] if told else ''}"


def _inspect_plan(path: Path) -> dict[str, Any]:
    from stm import MergePlan, model_config, plan_summary
    from stm.registry import list_models

    plan = MergePlan.load(path)
    described: dict[str, Any] = {"kind": "plan", "file": str(path), "proportional_decay": plan.proportional_decay, "depth": plan.depth}
    if plan.model in list_models():
        described |= plan_summary(model_config(plan.model, plan.image_size), plan)
    else:
        described |= {"model": plan.model, "seqlen": plan.lengths, "tokens_left": plan.tokens_left, "token_layers_removed": plan.token_layers_removed}
    described["merges"] = {str(layer): [f"{list(g.sources)} -> {g.target}" for g in groups] for layer, groups in sorted(plan.layers.items())}
    return described


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    try:
        from stm import load_checkpoint
        from stm.registry import list_models, model_entry
    except ImportError as error:
        raise MissingDependencyError(f"reading weights needs PyTorch ({error}): pip install torch") from None
    try:
        loaded = load_checkpoint(path)
    except Exception as error:
        if "has no 'model'" not in str(error):
            raise
        loaded = load_checkpoint(path, ema=True)
    state = loaded.state_dict
    fits = None
    pos, depth = state.get("pos_embed"), len({name.split(".")[1] for name in state if name.startswith("layers.")})
    for name in list_models():
        config = model_entry(name).config
        if pos is not None and pos.dim() == 3 and pos.shape[2] == config.d_model and depth == config.depth and pos.shape[1] == config.seqlen:
            fits = name
            break
    return {
        "kind": "checkpoint",
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": loaded.sha256,
        "entry": loaded.source,
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
        "tokens": None if pos is None else pos.shape[1],
        "fits": fits,
    }
