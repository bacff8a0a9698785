"""evaluate: one pass over the data, every subject on every batch, predictions kept as they come."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stm import MergePlan, VisionMamba
from stm.config import ImageSize
from stm.errors import ConfigError
from stm.reduction import Reduction

from ..errors import ArtefactError, ParityError
from ..files import check_writable
from ..images import Floats
from ..op_schema import INPUT, OUTPUT
from .data import ImageSet, open_images
from .preprocessing import Preprocessing, UnreadableImageError, decode
from .ranks import Ranks
from .records import Prediction, Records
from .results import Evaluation, count
from .subjects import Subject, Subjects, file_subjects, model_subjects, require_device

UNREADABLE = ("stop", "skip")
_KEPT = 5  # classes an image

Item = tuple[int, torch.Tensor | None, str]
Batch = tuple[list[int], torch.Tensor, list[tuple[int, str]]]


class _Images(Dataset[Item]):
    """Preprocessed images of some indices; one that cannot be read comes as its reason."""

    def __init__(self, images: ImageSet, indices: Sequence[int], preprocessing: Preprocessing) -> None:
        self.images, self.indices, self.preprocessing = images, indices, preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Item:
        index = self.indices[place]
        try:
            return index, torch.from_numpy(self.preprocessing(decode(self.images.samples[index].read()))), ""
        except (UnreadableImageError, ConfigError) as error:
            return index, None, str(error)


def _collate(items: list[Item]) -> Batch:
    good = [(index, image) for index, image, _ in items if image is not None]
    stacked = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return [index for index, _ in good], stacked, [(index, reason) for index, image, reason in items if image is None]


def _quiet_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def default_workers(device: str, local_size: int) -> int:
    """Processes that decode: the cores, shared by the ranks of this machine; few where the model runs on them too."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // max(1, local_size)
    return min(16, cores) if device == "cuda" else min(2, cores - 1)


def evaluate(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    files: Sequence[str | os.PathLike[str]] = (),
    model: str | VisionMamba | None = None,
    plans: Sequence[str] | Mapping[str, str | MergePlan | Reduction | None] = ("none",),
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    seed: int = 0,
    image_size: ImageSize = 224,
    num_classes: int | None = None,
    pos_embed_resize: str = "correct",
    merge_weights: str | None = None,
    rule: str | None = None,
    proportional_decay: bool = False,
    precision: str = "fp32",
    device: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    class_order: str | os.PathLike[str] | None = None,
    crop_ratio: float | None = None,
    limit: int | None = None,
    unreadable: str = "stop",
    batch: int | None = None,
    workers: int | None = None,
    plugin_library: str | Path | None = None,
    show_progress: bool = False,
) -> Evaluation | None:
    """Top-1 and top-5 of a model under several plans, or of .onnx and .engine files, on labelled images.

    Every image goes through every subject in one pass; differences to the first unmerged subject are paired. Predictions are kept
    in `output` batch by batch, so the same call goes on after an interruption. Under torchrun every process takes a disjoint part
    of the images; all need the same `output` folder.

    Args:
        data: a folder or .tar files, see `open_images`.
        output: folder of the run; None keeps nothing.
        files: .onnx or .engine files; or
        model, plans: a model, and what it runs under: see `parse_spec`.
        labels, class_order: where labels do not lie in the data, see `open_images`.
        limit: only so many images, evenly spread.
        unreadable: "stop" at an image that cannot be decoded, or "skip" it (it does not count; a resumed run tries it again).
        workers: processes that decode images, 0 for none.

    Returns:
        The result; None in processes of torchrun other than the first.

    Raises:
        StmError: see the kinds in `stm.errors` and `exporter.errors`; ArtefactError where `output` holds another run.
    """
    started = time.perf_counter()
    ranks = Ranks.from_environment()
    if unreadable not in UNREADABLE:
        raise ConfigError(f"unreadable is {unreadable!r}; choose from {', '.join(UNREADABLE)}")
    if bool(files) == (model is not None):
        raise ConfigError("give .onnx or .engine files, or --model (not both)")
    if ranks.size > 1 and output is None:
        raise ConfigError(f"{ranks.size} processes meet in the output folder; give one")
    if output is not None:
        check_writable(Path(output) / "eval.json")
    if files:
        subjects = file_subjects(files, device=device, local_rank=ranks.local_rank, crop_ratio=crop_ratio, plugin_library=plugin_library)
    else:
        assert model is not None
        subjects = model_subjects(
            model,
            plans,
            checkpoint=checkpoint,
            weights=weights,
            ema=ema,
            seed=seed,
            image_size=image_size,
            num_classes=num_classes,
            pos_embed_resize=pos_embed_resize,
            merge_weights=merge_weights,
            rule=rule,
            proportional_decay=proportional_decay,
            precision=precision,
            device=require_device(device, ranks.local_rank),
            crop_ratio=crop_ratio,
        )
    places = [data] if isinstance(data, str | os.PathLike) else list(data)
    images = open_images(places, subjects.config.num_classes, labels=labels, class_order=class_order, class_names=subjects.classes, limit=limit)
    size = subjects.batch(batch)
    identity = {**subjects.identity(), "data": images.identity()}
    with contextlib.ExitStack() as stack:
        folder = Path(output) if output is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stm-eval-")))
        records = Records(folder, identity, ranks.rank)
        stack.callback(ranks.leave)
        ranks.join()
        if ranks.rank == 0:
            records.begin()
        ranks.barrier()
        records.check()
        done = {index for index, made in records.predictions().items() if made.unreadable is None}
        ranks.barrier()  # nobody writes before all have read
        left = [index for index in range(len(images.samples)) if index not in done]
        mine = ranks.part(left)
        loader = DataLoader(
            _Images(images, mine, subjects.preprocessing),
            batch_size=size,
            num_workers=default_workers(subjects.device, ranks.local_size) if workers is None else workers,
            collate_fn=_collate,
            worker_init_fn=_quiet_worker,
        )
        with (
            records,
            tqdm(
                total=len(images.samples),
                initial=len(done),
                unit="image",
                disable=not show_progress or ranks.rank != 0 or not sys.stderr.isatty(),
                leave=False,
                file=sys.stderr,
            ) as bar,
        ):
            _run(subjects.members, images, loader, records, unreadable, bar, ranks)
        ranks.barrier()
        if ranks.rank != 0:
            return None
        result = _result(subjects, images, records, ranks, identity)
        result.resumed, result.seconds = len(done), round(time.perf_counter() - started, 3)
        if output is not None:
            result.write(folder)
    return result


def _run(subjects: Sequence[Subject], images: ImageSet, loader: DataLoader[Item], records: Records, unreadable: str, bar: Any, ranks: Ranks) -> None:
    warm_up = True
    with contextlib.ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(subject.runner)
        for indices, pixels, bad in _batches(loader):
            if bad and unreadable == "stop":
                index, reason = bad[0]
                raise ConfigError(f"cannot read image {_where(images, index)}: {reason}. --unreadable skip goes on without such images")
            made = [_unreadable(images, index, reason) for index, reason in bad]
            timing = None
            if indices:
                best, seconds = {}, {}
                for subject in subjects:
                    best[subject.name], seconds[subject.name] = classify(subject, pixels.numpy(), lambda i, n=indices: _where(images, n[i]))
                for row, index in enumerate(indices):
                    sample = images.samples[index]
                    made.append(Prediction(index, sample.name, sample.label, {name: rows[row].tolist() for name, rows in best.items()}))
                timing = {"images": len(indices), "warm_up": warm_up, "seconds": {name: round(s, 6) for name, s in seconds.items()}}
                warm_up = False
            records.append(made, timing)
            bar.update(len(made) * ranks.size)


def _batches(loader: DataLoader[Item]) -> Iterator[Batch]:
    """The loader's batches; its workers' own failures (memory, a file taken away) keep their text."""
    yield from loader  # type: ignore[misc]


def _where(images: ImageSet, index: int) -> str:
    sample = images.samples[index]
    return str(sample.path) if images.kind != "shards" else f"{sample.path} ({sample.name})"


def _unreadable(images: ImageSet, index: int, reason: str) -> Prediction:
    sample = images.samples[index]
    return Prediction(index, sample.name, sample.label, unreadable=reason or "unknown")


def classify(subject: Subject, pixels: Floats, where: Any) -> tuple[Any, float]:
    """Best classes (images, up to 5), best first, and the seconds of the inference. Batches under an engine's least are filled up.

    Raises:
        ParityError: logits that are not finite.
    """
    n = pixels.shape[0]
    if n < subject.batches[0]:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], subject.batches[0] - n, axis=0)])
    outputs = subject.runner.infer({INPUT: np.ascontiguousarray(pixels)})
    logits = np.asarray(outputs[OUTPUT], dtype=np.float32)[:n]
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if wrong.size:
        raise ParityError(f"{subject.name}: logits of {where(int(wrong[0]))} are not finite; try another --precision (bf16, fp32)")
    return np.argsort(-logits, axis=1, kind="stable")[:, :_KEPT], float(subject.runner.last_inference_time() or 0.0)


def _result(subjects: Subjects, images: ImageSet, records: Records, ranks: Ranks, identity: dict[str, Any]) -> Evaluation:
    from ..bench.environment import environment

    predictions = records.predictions()
    absent = len(images.samples) - len(predictions)
    if absent or any(predictions[i].image != sample.name or predictions[i].label != sample.label for i, sample in enumerate(images.samples)):
        raise ArtefactError(f"{records.folder} holds {len(predictions)} predictions for {len(images.samples)} images; run again to go on")
    baseline = subjects.baseline
    names = [subject.name for subject in subjects.members]
    accuracies = count(
        predictions,
        {subject.name: subject.figures for subject in subjects.members},
        {subject.name: subject.published for subject in subjects.members},
        baseline.name if baseline else None,
        records.timings(),
    )
    notes = [*subjects.notes, *images.notes]
    read = sum(made.unreadable is None for made in predictions.values())
    if baseline is None and len(names) > 1:
        notes.append("no unmerged subject (--plan none,..), so no differences")
    if baseline is not None and read >= 100 and not subjects.weights_random:
        share = accuracies[names.index(baseline.name)].top1.high
        if share < 2 / subjects.config.num_classes:
            notes.append("top-1 is near chance: do the labels follow the model's order of classes")
    bad = [{"image": made.image, "reason": made.unreadable} for made in predictions.values() if made.unreadable is not None]
    return Evaluation(
        model=subjects.config.name,
        weights=subjects.weights,
        weights_random=subjects.weights_random,
        identity=identity,
        environment=environment(),
        images=read,
        accuracies=accuracies,
        baseline=baseline.name if baseline else None,
        unreadable=bad,
        notes=notes,
        processes=ranks.size,
    )
