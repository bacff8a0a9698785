"""verify a file that exists: against PyTorch, rebuilt from the file's metadata, or against saved outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .engine import BatchProfile, BuildOptions, load_engine
from .errors import ArtefactError
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
    options = BuildOptions(batch=BatchProfile(**meta["batch"]))
    lowered = lower_tensorrt(export_onnx(model), precision)
    config = model.config
    feeds = parity_inputs(config.image_size, config.mean, config.std, profile_batches(options.batch, tuple(batches)))
    return verify_engine(loaded, lowered, model, precision, options, feeds=feeds, bisect=bisect, plugin_library=plugin_library)
