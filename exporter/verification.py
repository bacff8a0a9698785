"""verify a file that exists: against PyTorch, rebuilt from the file's metadata, or against saved outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from .engine import BatchProfile, BuildOptions, load_engine
from .errors import ArtefactError
from .images import parity_inputs
from .parity import ParityReport, judge_against, load_reference, verify
from .runtimes.ort import onnxruntime_runner
from .runtimes.trt import tensorrt_runner


def read_metadata(path: Path) -> dict[str, Any]:
    """What an ONNX file says about itself, under the names of an engine's sidecar.

    Raises:
        ArtefactError: no such file, not ONNX, or not made by us.
    """
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise ArtefactError(f"cannot read {path} as ONNX: {str(error)[:200]}") from None
    meta = {entry.key.removeprefix("stm."): entry.value for entry in model.metadata_props if entry.key.startswith("stm.")}
    if not meta:
        raise ArtefactError(f"{path} has no stm metadata: not made by stm-export, or stripped since; export it again")
    plain = ("model", "weights", "weights_sha256", "precision")
    try:
        return {
            **{key: meta[key] for key in plain},
            "weights_random": json.loads(meta["weights_random"]),
            "image_size": json.loads(meta["image_size"]),
            "num_classes": json.loads(meta["config"])["num_classes"],
            "plan": json.loads(meta["plan"]) if meta["plan"] else None,
            "pos_embed_resize": meta.get("pos_embed_resize", "correct"),
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path}: its stm metadata is damaged ({error}); export it again") from None


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
        ArtefactError: the weights are not those the file was made from; names both hashes.
    """
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
        return judge_against(runner, feeds, wanted, precision, f"saved outputs in {reference}")

    from stm import MergePlan, create_model, state_dict_sha256

    from .engine_parity import profile_batches, verify_engine
    from .onnx_export import export_onnx
    from .passes.tensorrt import lower_tensorrt

    random = meta["weights_random"]
    if not random and checkpoint is None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; pass --checkpoint FILE, or --reference DIR with saved outputs")
    if random and checkpoint is not None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; drop --checkpoint")
    size, plan = meta["image_size"], meta["plan"]
    model = create_model(
        meta["model"],
        checkpoint=checkpoint,
        plan=MergePlan.from_dict(plan) if plan else None,
        image_size=(size[0], size[1]),
        num_classes=meta["num_classes"],
        seed=int(meta["weights"].partition("(seed ")[2].partition(")")[0] or 0) if random else 0,
        ema=ema,
        pos_embed_resize=meta.get("pos_embed_resize", "correct"),
    )
    found = state_dict_sha256(model.state_dict())
    if found != meta["weights_sha256"]:
        raise ArtefactError(
            f"the weights' hash is {found[:16]}.., {path} was made from {meta['weights_sha256'][:16]}..; pass the right --checkpoint (and --ema)"
        )
    if not engine:
        return verify(path, model, precision=precision, batches=batches, bisect=bisect)
    options = BuildOptions(batch=BatchProfile(**meta["batch"]))
    lowered = lower_tensorrt(export_onnx(model), precision)
    config = model.config
    feeds = parity_inputs(config.image_size, config.mean, config.std, profile_batches(options.batch, tuple(batches)))
    return verify_engine(loaded, lowered, model, precision, options, feeds=feeds, bisect=bisect, plugin_library=plugin_library)
