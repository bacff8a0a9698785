"""measure: every method at every budget on both image variants, a record at a time; what `stm bench accuracy` runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stm import MergePlan, VisionMamba, model_config, plan_summary, state_dict_sha256, with_plan
from stm.data import NUM_CLASSES, VARIANTS, DigitPairs
from stm.data.digit_pairs import SOURCES
from stm.errors import ConfigError, PlanError

from ..bench.environment import environment
from ..deploy import load_model
from ..errors import ParityError
from ..evaluation.subjects import require_device
from ..files import check_writable
from ..progress import Steps
from .budgets import AS_IT_IS, budgets
from .cells import DEFAULT, GROUPS, Bench, Candidate, Cell, cells, load_plan, next_smaller, normalised, parse_methods
from .fast_scan import fast_scan
from .observe import observe
from .records import RUN_FILE, Records, read_run
from .results import UNMERGED, Run

DEFAULT_IMAGES = 2000
Key = tuple[str, ...]
DEFAULT_LATENCY = ("stm", "stm-mean", "tome", "mtr", "resolution")


@dataclass(frozen=True)
class Reference:
    """The unmerged model on the images of a variant: kept for all methods."""

    images: list[Tensor]
    labels: Tensor
    logits: list[Tensor]
    states: list[list[Tensor]]
    tokens: list[list[Tensor]]


def measure(
    model: str | VisionMamba,
    output: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    seed: int = 0,
    methods: Sequence[str] = DEFAULT,
    token_layers: list[int] | None = None,
    flops: list[str] | None = None,
    plans: Mapping[str, Sequence[str | os.PathLike[str] | MergePlan]] | None = None,
    variants: Sequence[str] = VARIANTS,
    images: int = DEFAULT_IMAGES,
    latency: Sequence[str] | None = None,
    latency_batches: Sequence[int] = (1, 128),
    build_jobs: int = 1,
    latency_only: bool = False,
    smaller: VisionMamba | None = None,
    device: str | None = None,
    batch: int | None = None,
    minutes: float | None = None,
    plugin_library: str | Path | None = None,
    show_progress: bool = False,
) -> Run:
    """Measure what is not yet in `output`, and report all that is.

    Args:
        model: a name (its packaged weights, or `checkpoint`), or a model with 100 classes.
        output: folder of the run; the same call goes on where it stopped, and more methods, budgets or plans can be added later. None
            keeps nothing.
        methods: names and groups, see `cells.parse_methods`.
        token_layers, flops: budgets, see `budgets.budgets`.
        plans: name -> plan files or plans of the user's.
        images: test images of each variant; the same ones always, and those of a smaller number are among them.
        latency: methods and groups whose TensorRT engines are timed ("default": `DEFAULT_LATENCY`; of groups what is measured); None: none.
            Needs a GPU, TensorRT and our plugin library.
        build_jobs: processes that build the engines ahead of the timing; above 1 TensorRT chooses the kernels of all of them on a GPU that is
            busy.
        latency_only: measure no accuracy, time engines for the table in `output`; its weights are not needed.
        smaller: control; None: the next smaller model with packaged weights.
        batch: images at once; default 2,048 for vim-n and 682 for vim-t on a GPU, 16 on a CPU.
        minutes: start nothing new after so many minutes.

    Raises:
        StmError: see the kinds in `stm.errors` and `exporter.errors`; ArtefactError where `output` holds another run.
    """
    started = time.monotonic()
    deadline = None if minutes is None else started + 60 * minutes
    if minutes is not None and not minutes >= 0:
        raise ConfigError(f"minutes is {minutes}; give 0 or more")
    if images < 1 or (batch is not None and batch < 1):
        raise ConfigError(f"images {images}, batch {batch}: give at least 1")
    for variant in variants:
        if variant not in VARIANTS or list(variants).count(variant) > 1:
            raise ConfigError(f"variants are {', '.join(variants)}; choose from {', '.join(VARIANTS)}, each once")
    if output is not None:
        check_writable(Path(output) / RUN_FILE)
    if build_jobs > 1 and latency is None:
        raise ConfigError(f"build jobs {build_jobs}: engines are built to be timed; add --latency, or leave --build-jobs out")
    if latency_only and latency is None:
        raise ConfigError("latency only: of which methods? add --latency")
    if latency_only and (output is None or not (Path(output) / RUN_FILE).is_file()):
        raise ConfigError(f"latency only goes on with a table, and {output or 'no -o'} holds none: leave it out, or give that table's -o")
    if latency_only and (checkpoint is not None or isinstance(model, VisionMamba)):
        raise ConfigError("latency only takes no weights, speed does not depend on them: name the model, and leave the checkpoint out")
    names = parse_methods(methods, tuple(plans or {}))
    config = model.config if isinstance(model, VisionMamba) else model_config(model, num_classes=NUM_CLASSES)
    if config.num_classes != NUM_CLASSES:
        raise ConfigError(f"{config.name} has {config.num_classes} classes, the images of stm.data have {NUM_CLASSES}")
    wanted = budgets(config, token_layers, flops)
    loaded = {name: [plan if isinstance(plan, MergePlan) else load_plan(plan, config) for plan in files] for name, files in (plans or {}).items()}
    todo = cells(config, names, wanted, loaded)
    if latency is not None:
        from .latency import require_engines

        known = {cell.name for cell in todo}
        groups = {"default": DEFAULT_LATENCY, "all": tuple(known - {UNMERGED}), **GROUPS}
        latency = list(dict.fromkeys(name for one in latency for name in groups.get(one, [one]) if one not in groups or name in known))
        if strange := [name for name in latency if name not in known]:
            raise ConfigError(f"latency of {strange[0]!r} is asked for, which is not measured; methods: {', '.join(sorted(known))}")
        require_engines(plugin_library)
    where = require_device(device)
    base = _load(model, checkpoint, "random" if latency_only else weights, seed)
    digest = state_dict_sha256(base.state_dict())
    source, random = (str(base.provenance), base.provenance.is_random) if base.provenance else ("of the model given", False)
    bench = Bench(base.to(where).requires_grad_(False))
    if "smaller" in names:
        found, bench.no_smaller = (_whole(smaller), "") if smaller is not None else next_smaller(config)
        bench.smaller = None if found is None else found.to(where).requires_grad_(False)
    identity = {
        "model": config.name,
        "config": asdict(config),
        "weights_sha256": digest,
        "variants": list(VARIANTS),
        "images": images,
        "data_sha256": hashlib.sha256(SOURCES.read_bytes()).hexdigest(),
        "precision": "fp32",
        "device": where,
    }
    about: dict[str, Any] = {
        "weights": source,
        "weights_random": random,
        "environment": environment(),
        "methods": [UNMERGED, *loaded, *names],
        "budgets": list(dict.fromkeys(cell.budget.label for cell in todo if cell.budget != AS_IT_IS)),
        "asked_variants": list(variants),
    }
    if latency_only:
        earlier = Records(Path(str(output)))
        head = earlier.head()
        identity |= {key: head["identity"].get(key) for key in ("weights_sha256", "images", "device")}
        about = {
            **{key: value for key, value in head.items() if key not in ("schema", "kind", "identity")},
            "methods": about["methods"],
            "budgets": about["budgets"],
        }
        variants = ()
        _require_rows(earlier, [cell for cell in todo if cell.name in (latency or ())])
    with contextlib.ExitStack() as stack:
        folder = Path(output) if output is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stm-accuracy-")))
        records = Records(folder)
        mine: list[Key] = [(variant, cell.name, cell.budget.label) for variant in variants for cell in todo]
        mine += [("latency", cell.name, cell.budget.label, f"b{batch}") for cell in todo if cell.name in (latency or ()) for batch in latency_batches]
        before_us = [key for one in records.left() if (key := tuple(one)) not in mine]
        # Noted first, so that a run that is killed does not pass for a whole one.
        lacking = [key for key in mine if not records.path(*key).exists()]
        about = records.begin(identity, {**about, "left": len(before_us) + len(lacking), "left_keys": [*before_us, *lacking]})
        # The reference scan launches a few kernels a token: a GPU wants as many images at once as it holds.
        size = batch or (max(64, (1 << 18) // config.d_inner) if where == "cuda" else 16)
        impossible: dict[tuple[str, str], str] = {}
        left: list[Key] = []
        with Steps(len(variants) * len(todo) + len(latency or ()) * len(wanted), show_progress) as steps:
            timed, exports = [cell for cell in todo if cell.name in (latency or ())], None
            if timed and where == "cuda":
                from .latency import Exports

                exports = stack.enter_context(Exports(bench, records, timed, latency_batches, build_jobs, plugin_library))
            if not latency_only:
                about["scan"] = "Triton" if stack.enter_context(fast_scan(where, config.d_inner, config.d_state)) else "torch"
            for variant in variants:
                left += _variant(bench, records, variant, todo, images, size, impossible, deadline, steps)
            if latency is not None:
                from .latency import time_engines

                left += time_engines(bench, records, timed, latency_batches, plugin_library, deadline, steps, exports)
        about["left"], about["left_keys"] = len(before_us) + len(left), [*before_us, *left]
        tried = set() if latency_only else {(cell.name, cell.budget.label) for cell in todo}
        before = [one for one in about.get("impossible", []) if (one["name"], one["budget"]) not in tried]
        about["impossible"] = before + [{"name": name, "budget": budget, "reason": why} for (name, budget), why in impossible.items()]
        if not latency_only:
            about["seconds"] = round(time.monotonic() - started, 1)
        records.begin(identity, about)
        result = read_run(folder)
        if output is not None:
            result.write(folder)
    return result


def _require_rows(table: Records, asked: Sequence[Cell]) -> None:
    """Raises:
    ConfigError: one of these is no row of the table, and not for being impossible.
    """
    known = {(one["name"], one["budget"]) for one in table.head().get("impossible", [])}
    pairs = [(cell.name, cell.budget.label) for cell in asked]
    lost = [pair for pair in pairs if pair not in known and not any(table.path(variant, *pair).exists() for variant in VARIANTS)]
    if lost:
        raise ConfigError(
            f"latency only: {lost[0][0]} at {lost[0][1]} ({len(lost)} such) is not in the table of {table.folder}; give "
            "its budgets and --plan files, or measure its accuracy first"
        )


def _load(model: str | VisionMamba, checkpoint: str | os.PathLike[str] | None, weights: str, seed: int) -> VisionMamba:
    if isinstance(model, VisionMamba):
        return _whole(model)
    return _whole(load_model(model, checkpoint=checkpoint, weights=weights, seed=seed, num_classes=NUM_CLASSES))


def _whole(model: VisionMamba) -> VisionMamba:
    """Unmerged, and with all tokens in the last layer, so that the class token has its place in every layer."""
    whole = with_plan(model, None).eval()
    whole.cls_only_last = False
    return whole


def expired(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _variant(
    bench: Bench,
    records: Records,
    variant: str,
    todo: Sequence[Cell],
    images: int,
    size: int,
    impossible: dict[tuple[str, str], str],
    deadline: float | None,
    steps: Steps,
) -> list[Key]:
    """Measure what this variant lacks; returns the keys of the records still to be made."""
    reference: Reference | None = None

    def the_reference() -> Reference:
        nonlocal reference
        if reference is None:
            reference = _reference(bench, variant, images, size)
        return reference

    none = (variant, UNMERGED, AS_IT_IS.label)
    if records.get({}, *none) is None:
        if expired(deadline):
            return [none, *(key for cell in todo if not _recorded(bench, records, cell, key := (variant, cell.name, cell.budget.label)))]
        with steps.step(f"{variant}: unmerged"):
            records.put(_unmerged(bench, the_reference(), variant), {}, *none)
    left: list[Key] = []
    for cell in todo:
        with steps.step(f"{variant}: {cell.name} {cell.budget.label}"):
            key = (variant, cell.name, cell.budget.label)
            if expired(deadline):
                if not _recorded(bench, records, cell, key):
                    left.append(key)
                continue
            try:
                candidate = bench.make(cell)
                if records.get(candidate.identity, *key) is not None:
                    continue
                record = _record(candidate, cell, variant, the_reference(), bench)
            except (PlanError, ParityError) as error:
                impossible[cell.name, cell.budget.label] = str(error)
                continue
            except torch.cuda.OutOfMemoryError:
                where = f"{cell.name} at {cell.budget.label}"
                raise ConfigError(f"{where} does not fit into the GPU's memory with {size} images at once; lower --batch") from None
            records.put(record, candidate.identity, *key)
    return left


def _recorded(bench: Bench, records: Records, cell: Cell, key: Key) -> bool:
    """Whether this is measured already, told without making the model where the name says what it is."""
    if not records.path(*key).exists():
        return False
    named = cell.plan is None and cell.like is None and cell.reduction is None
    return named or records.get(bench.make(cell).identity, *key) is not None


def _reference(bench: Bench, variant: str, images: int, size: int) -> Reference:
    data = DigitPairs("test", variant, device=bench.device)
    pixels, labels, seen = [], [], []
    for first in range(0, images, size):
        made, truth = data.batch(torch.arange(first, min(first + size, images)))
        pixels.append(made)
        labels.append(truth)
        seen.append(observe(bench.base, normalised(made, bench.config)))
    return Reference(pixels, torch.cat(labels).cpu(), [s.logits for s in seen], [s.states for s in seen], [s.tokens for s in seen])


def _unmerged(bench: Bench, reference: Reference, variant: str) -> dict[str, Any]:
    logits = torch.cat(reference.logits)
    _finite(logits, UNMERGED)
    return {
        "kind": "accuracy",
        "variant": variant,
        "name": UNMERGED,
        "family": UNMERGED,
        "budget": AS_IT_IS.label,
        "figures": plan_summary(bench.config, None),
        "schedule": "nothing",
        "labels": reference.labels.tolist(),
        "top": logits.argmax(1).tolist(),
    }


def _record(candidate: Candidate, cell: Cell, variant: str, reference: Reference, bench: Bench) -> dict[str, Any]:
    """Run a candidate over the images and compare with the unmerged model."""
    started = time.perf_counter()
    model = candidate.model
    same_width = (model.config.d_model, model.config.depth) == (bench.config.d_model, bench.config.depth)
    top: list[Tensor] = []
    kl: list[Tensor] = []
    state: list[list[Tensor]] = []
    token: list[list[Tensor]] = []
    for place, pixels in enumerate(reference.images):
        seen = observe(model, normalised(pixels, model.config))
        _finite(seen.logits, cell.name)
        top.append(seen.logits.argmax(1))
        before = F.log_softmax(reference.logits[place].double(), 1)
        kl.append((before.exp() * (before - F.log_softmax(seen.logits.double(), 1))).sum(1).clamp_min(0))
        if same_width:
            state.append([relative_error(a, b) for a, b in zip(seen.states, reference.states[place], strict=True)])
            token.append([relative_error(a, b) for a, b in zip(seen.tokens, reference.tokens[place], strict=True)])
    record: dict[str, Any] = {
        "kind": "accuracy",
        "variant": variant,
        "name": cell.name,
        "family": cell.family,
        "budget": cell.budget.label,
        "figures": candidate.figures,
        "schedule": candidate.schedule,
        "plan": candidate.plan.to_dict() if candidate.plan else None,
        "top": torch.cat(top).tolist(),
        "kl": _rounded(torch.cat(kl)),
    }
    if same_width:
        states, tokens = (torch.stack([torch.cat(layer) for layer in zip(*found, strict=True)]) for found in (state, token))
        record["states"] = {"state": _rounded(states.mean(1)), "token": _rounded(tokens.mean(1)), "last": _rounded(states[-1])}
    return {**record, "seconds": round(time.perf_counter() - started, 3)}


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """Norm of a - b over the norm of b, an image: (batch, ..) -> (batch)."""
    a, b = a.flatten(1), b.flatten(1)
    error: Tensor = torch.linalg.vector_norm(a - b, dim=1) / torch.linalg.vector_norm(b, dim=1).clamp_min(1e-30)
    return error


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in np.asarray(values.double().cpu()).tolist()]


def _finite(logits: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise ParityError(f"{name}: the logits of {bad} of {len(logits)} images are not finite")
