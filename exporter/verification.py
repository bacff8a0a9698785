"""verify a file that exists: against PyTorch, rebuilt from the file's metadata, or against saved outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import onnx

from .errors import ArtefactError
from .parity import ParityReport, compare_logits, load_reference, run, verify
from .runtimes.ort import onnxruntime_runner
from .tolerances import tolerance


def read_metadata(path: Path) -> dict[str, str]:
    """The `stm.*` metadata of an ONNX file, without the prefix.

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
    return meta


def verify_file(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    ema: bool = False,
    reference: str | os.PathLike[str] | None = None,
    batches: Sequence[int] = (1, 5),
    bisect: bool = False,
) -> ParityReport:
    """Run an ONNX file on ONNX Runtime and judge it.

    With `reference`, a folder of inputs.json and outputs.json, nothing else is needed. Without, the model is rebuilt
    from the file's metadata: random weights from their seed, others from `checkpoint`.

    Raises:
        ArtefactError: the weights are not those the file was made from; names both hashes.
    """
    path = Path(path)
    meta = read_metadata(path)
    precision = meta["precision"]
    if reference is not None:
        feeds, wanted = load_reference(Path(reference))
        results = run([onnxruntime_runner(path)], feeds)
        (name, got), *_ = results.items()
        allowed = tolerance(precision)
        metrics, failures = compare_logits([i["logits"] for i in got], wanted, allowed)
        return ParityReport(name, f"saved outputs in {reference}", precision, [len(feed) for feed in feeds], metrics, allowed, failures)

    from stm import MergePlan, create_model, state_dict_sha256

    random = json.loads(meta["weights_random"])
    if not random and checkpoint is None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; pass --checkpoint FILE, or --reference DIR with saved outputs")
    if random and checkpoint is not None:
        raise ArtefactError(f"{path} was made from {meta['weights']}; drop --checkpoint")
    size = json.loads(meta["image_size"])
    model = create_model(
        meta["model"],
        checkpoint=checkpoint,
        plan=MergePlan.from_json(meta["plan"]) if meta["plan"] else None,
        image_size=(size[0], size[1]),
        num_classes=json.loads(meta["config"])["num_classes"],
        seed=int(meta["weights"].partition("(seed ")[2].partition(")")[0] or 0) if random else 0,
        ema=ema,
    )
    found = state_dict_sha256(model.state_dict())
    if found != meta["weights_sha256"]:
        raise ArtefactError(
            f"the weights' hash is {found[:16]}.., {path} was made from {meta['weights_sha256'][:16]}..; pass the right --checkpoint (and --ema)"
        )
    return verify(path, model, precision=precision, batches=batches, bisect=bisect)
