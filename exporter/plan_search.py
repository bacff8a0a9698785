"""stm plan --optimize: a model by name, a budget and perhaps a folder of images -> the best plan found, or the best schedule of a method
that looks at the image, kept while it searches."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stm import VimConfig
from stm.config import ImageSize
from stm.errors import ConfigError
from stm.optimization import LatencyTable, Optimized, OptimizedSchedule, optimize_plan, optimize_schedule, parse_budget
from stm.optimization.images import normalised
from stm.reduction import create_reduction, save_reduction
from stm.registry import model_config

from .accuracy.fast_scan import fast_scan
from .deploy import load_model
from .evaluation.data import IMAGE_SUFFIXES
from .evaluation.subjects import require_device
from .images import load_image, preprocess

if TYPE_CHECKING:
    from stm.optimization.search import Progress

IMAGES = {"cpu": 64, "cuda": 512}  # taken of a folder or made, by device


def search_plan(
    name: str,
    budget: str,
    *,
    reduction: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    seed: int = 0,
    num_classes: int | None = None,
    pos_embed_resize: str = "correct",
    image_size: ImageSize = 224,
    images: str | os.PathLike[str] | None = None,
    data: str | None = None,
    count: int | None = None,
    objective: str = "kl",
    seconds: float | None = None,
    evaluations: int | None = None,
    latency_table: str | os.PathLike[str] | None = None,
    device: str | None = None,
    save: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> Optimized | OptimizedSchedule:
    """`stm.optimization.optimize_plan` on a model by name, or `optimize_schedule` where a reduction is named.

    Args:
        reduction: a method of stm.reduction, whose schedule is searched; it decides for each image which tokens go.
        images: a folder of unlabelled pictures, searched with its subfolders; at most `count`, evenly spread.
        data: "digits": the training images of stm.data, both variants; for vim-n.
        count: images to take or make (default 64, 512 on a GPU).
        seconds, evaluations: limits; without either 600 s.
        save: where the best plan so far is kept.

    Raises:
        StmError: what is wrong with budget, weights, images or table.
    """
    config = model_config(name, image_size, num_classes)
    # First what is quick to refuse.
    parse_budget(budget, config, table := LatencyTable.load(latency_table) if latency_table else None)
    if images is not None and data is not None:
        raise ConfigError("give --images or --data, not both")
    if reduction is not None:
        create_reduction(reduction, config, schedule={})
        if objective != "kl":
            raise ConfigError(f"--objective {objective}: with --reduction the search looks at the logits (kl)")
    if data not in (None, "digits"):
        raise ConfigError(f"--data is {data!r}; only 'digits' can be made here, a folder is given with --images")
    device = require_device(device)
    wanted = count or IMAGES[device]
    files = image_files(Path(images), wanted) if images is not None else []
    model = load_model(
        name,
        checkpoint=checkpoint,
        weights=weights,
        ema=ema,
        image_size=image_size,
        num_classes=num_classes,
        seed=seed,
        pos_embed_resize=pos_embed_resize,
    ).to(device)
    given: Tensor | None = None
    said = None
    if files:
        given = read_images(files, config)
        said = f"{len(files)} images of {images}, as they are and with their middle moved"
    elif data == "digits":
        given, said = digits(config, wanted), "digit pairs, centred and anywhere"
    elif count:
        from stm.optimization.images import dead_leaves

        given, said = dead_leaves(config, count, seed), "generated images"
    try:
        with fast_scan(device, model.config.d_inner, model.config.d_state):
            limit = parse_budget(budget, model.config, table)
            common: dict[str, Any] = {
                "off_centre": bool(files),
                "seconds": 600.0 if seconds is None and evaluations is None else seconds,
                "evaluations": evaluations,
                "seed": seed,
                "data": said,
                "report": _Line() if show_progress and sys.stderr.isatty() else None,
            }
            if reduction is not None:
                keep_schedule = (lambda found, value: save_reduction(found, save)) if save else None
                return optimize_schedule(model, reduction, limit, given, better=keep_schedule, **common)
            keep_plan = (lambda plan, value: plan.save(save)) if save else None
            return optimize_plan(model, limit, given, objective=objective, better=keep_plan, **common)
    finally:
        if show_progress and sys.stderr.isatty():
            print(file=sys.stderr)


def image_files(folder: Path, count: int) -> list[Path]:
    """At most `count` pictures of a folder and its subfolders, evenly spread over their sorted names.

    Raises:
        ConfigError: no such folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: no such folder; give one with pictures ({', '.join(IMAGE_SUFFIXES)}), labels are not needed")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ConfigError(f"--images {folder}: no pictures in it ({', '.join(IMAGE_SUFFIXES)}); leave --images out to search on generated ones")
    return [files[index * len(files) // count] for index in range(count)] if len(files) > count else files


def read_images(files: list[Path], config: VimConfig) -> Tensor:
    """The published preprocessing of each, (n, 3, height, width)."""
    pixels = [torch.from_numpy(preprocess(load_image(file), config.image_size, config.mean, config.std)) for file in files]
    return torch.stack(pixels)


def digits(config: VimConfig, count: int) -> Tensor:
    """Training images of stm.data, the variants in turn by fours, so that every fourth is of either.

    Raises:
        ConfigError: another image size than the generator's.
    """
    from stm.data import VARIANTS, DigitPairs
    from stm.data.digit_pairs import IMAGE_SIZE

    if config.image_size != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = config.image_size
        raise ConfigError(f"--data digits has images of {IMAGE_SIZE}x{IMAGE_SIZE}, the model takes {height}x{width}; give --images")
    indices = torch.arange(-(-count // 2))
    variants = torch.stack([DigitPairs("train", variant).batch(indices)[0] for variant in VARIANTS], 1)
    order = torch.cat([torch.stack([variants[i : i + 4, v] for v in range(len(VARIANTS))]).flatten(0, 1) for i in range(0, len(indices), 4)])
    return normalised(order[:count], config)


class _Line:
    """One line on a terminal that says how far the search is."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            text = f"{progress.stage}: {progress.evaluations} plans, {progress.seconds:.0f} s, {progress.start:.4f} -> {progress.best:.5f}"
            print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)
