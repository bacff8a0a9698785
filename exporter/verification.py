"""verify a file that exists: against PyTorch, rebuilt from the file's metadata, or against saved outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stm.errors import ConfigError, MissingDependencyError, StmError

from .engine import BatchProfile, BuildOptions, adds_up_in_fp16, load_engine, lower_for_engine, require_torch_gpu
from .errors import ArtefactError, ParityError
from .file_metadata import read_metadata
from .images import parity_inputs
from .parity import ParityReport, judge_against, load_reference, verify
from .runtimes.ort import onnxruntime_runner
from .runtimes.trt import tensorrt_runner


def verify_file(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    ema: bool = False,
    reference: str | os.PathLike[str] | None = None,
    batches: Sequence[int] = (1, 5),
    bisect: bool = False,
    plugin_library: str | Path | None = None,
) -> ParityReport:
    """Run an ONNX file on ONNX Runtime, or an engine on TensorRT, and judge it.

    With `reference`, a folder of inputs.json and outputs.json, nothing else is needed. Without, the model is rebuilt
    from the file's metadata: random weights from their seed, others from `checkpoint`.

    Raises:
        ArtefactError: the weights are not those the file was made from, or the reference is another file's; names both.
        MissingDependencyError: no torch to rebuild the model with.
    """
    if reference is not None and (idle := [name for name, value in (("--checkpoint", checkpoint), ("--ema", ema), ("--bisect", bisect)) if value]):
        raise ConfigError(f"{', '.join(idle)}: --reference compares with saved outputs and rebuilds no model; give one or the other")
    path = Path(path)
    engine = path.suffix in (".engine", ".plan")
    if engine:
        loaded, meta = load_engine(path, plugin_library)
        runner = tensorrt_runner(loaded)
    else:
        meta, runner = read_metadata(path), onnxruntime_runner(path)
    precision = meta["precision"]
    if reference is not None:
        feeds, wanted = load_reference(Path(reference))
        _check_reference_fits(path, Path(reference), feeds, meta)
        try:
            return judge_against(runner, feeds, wanted, precision, f"saved outputs in {reference}")
        except StmError:
            raise
        except Exception as error:
            raise ParityError(f"{runner.name} cannot run {path}: {str(error).strip()[:400]}") from error

    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"comparing with PyTorch needs it ({error}): pip install torch. Without it, compare with saved outputs: --reference DIR"
        ) from None
    if engine:
        require_torch_gpu()
    from stm import MergePlan, create_model, state_dict_sha256

    from .engine_parity import profile_batches, verify_engine
    from .onnx_export import export_onnx

    random, published = meta["weights_random"], meta.get("weights_kind") == "published" and checkpoint is None
    if not random and not published and checkpoint is None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; pass --checkpoint FILE, or --reference DIR with saved outputs")
    if random and checkpoint is not None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; drop --checkpoint")
    size, plan = meta["image_size"], meta["plan"]
    model = create_model(
        meta["model"],
        pretrained=published,
        checkpoint=checkpoint,
        plan=MergePlan.from_dict(plan) if plan else None,
        image_size=(size[0], size[1]),
        num_classes=meta["num_classes"],
        seed=meta["seed"] if random else 0,
        ema=ema or bool(meta.get("ema")),
        pos_embed_resize=meta.get("pos_embed_resize", "correct"),
    )
    if meta.get("reduction"):
        from stm.reduction import from_description, with_reduction

        model = with_reduction(model, from_description(meta["reduction"], model.config))
    found = state_dict_sha256(model.state_dict())
    if found != meta["weights_sha256"]:
        raise ArtefactError(
            f"the weights' hash is {found[:16]}.., {path} was made from {meta['weights_sha256'][:16]}..; pass the right --checkpoint (and --ema)"
        )
    if not engine:
        return verify(path, model, precision=precision, batches=batches, bisect=bisect)
    hardware_compatible = bool((meta.get("build") or {}).get("hardware_compatible"))
    options = BuildOptions(batch=BatchProfile(**meta["batch"]), hardware_compatible=hardware_compatible, fp16_accumulation=adds_up_in_fp16(meta))
    lowered = lower_for_engine(export_onnx(model), precision, options, plugin_library)
    config = model.config
    feeds = parity_inputs(config.image_size, config.mean, config.std, profile_batches(options.batch, tuple(batches)))
    return verify_engine(loaded, lowered, model, precision, options, feeds=feeds, bisect=bisect, plugin_library=plugin_library)


def _check_reference_fits(path: Path, reference: Path, feeds: Sequence[Any], meta: dict[str, Any]) -> None:
    """Refuse inputs of another image size, or of batches that an engine does not take."""
    height, width = meta["image_size"]
    for feed in feeds:
        if tuple(feed.shape[1:]) != (3, height, width):
            raise ArtefactError(f"{reference} holds inputs of shape {tuple(feed.shape)}, {path} takes (batch, 3, {height}, {width}): another file's")
        batch = meta.get("batch")
        if batch and not batch["min"] <= len(feed) <= batch["max"]:
            raise ArtefactError(
                f"{reference} holds a batch of {len(feed)}, {path} takes {batch['min']} to {batch['max']}: give the reference that was made with it"
            )
