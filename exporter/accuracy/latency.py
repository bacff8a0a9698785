"""Latency of the table's methods as TensorRT engines, each timed in the same rounds as the unmerged model's."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import wait as wait_for
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stm.errors import StmError
from stm.reduction import Reduction, from_description

from ..files import written_aside
from ..gpus import driver
from ..progress import Steps
from .cells import Bench, Candidate, Cell
from .records import Records
from .results import UNMERGED, Latency

if TYPE_CHECKING:
    from ..bench.backends import EngineBackend
    from ..bench.workshop import Spec, Workshop

PRECISION = "fp16"
EXPORTERS = 8


def require_engines(plugin_library: str | Path | None) -> None:
    """Raises:
    MissingDependencyError: no GPU, TensorRT or plugin library; says what works without.
    """
    from ..bench.runner import _require_engines

    _require_engines(plugin_library)


def engine_of(workshop: Workshop, bench: Bench, candidate: Candidate | None, label: str, batch: int) -> EngineBackend:
    """A candidate's engine for this batch (None: the unmerged model's). Random weights: speed does not depend on them.

    Raises:
        StmError: it cannot be exported or built; says why.
    """
    return _engine(workshop, spec_of(bench, candidate, label), candidate.reduction if candidate else None, batch)


def _engine(workshop: Workshop, spec: Spec, reduction: Reduction | None, batch: int) -> EngineBackend:
    return workshop.engine(spec, batch) if reduction is None else reduced_engine(workshop, spec, reduction, batch)


def spec_of(bench: Bench, candidate: Candidate | None, label: str) -> Spec:
    from ..bench.workshop import Spec

    config = bench.config if candidate is None else candidate.model.config
    return Spec(config.name, label, config.image_size, PRECISION, config.num_classes, plan=candidate.plan if candidate else None)


def reduced_engine(workshop: Workshop, spec: Any, reduction: Reduction, batch: int) -> EngineBackend:
    """The engine of a method that looks at the image."""
    from ..bench.backends import EngineBackend
    from ..engine import BatchProfile, BuildOptions, lower_for_engine

    profile = BatchProfile(batch, batch, batch)
    lowered = lower_for_engine(reduced_portable(workshop, spec, reduction), PRECISION, BuildOptions(profile), workshop.plugin_library)
    engine, size, origin = workshop._built(lowered, f"{spec.model}-{spec.rate}-{PRECISION}-b{batch}", profile)
    return EngineBackend("engine", engine, spec.image_size, PRECISION, weights=workshop.weights(spec), engine_bytes=size, notes=(origin,))


def reduced_portable(workshop: Workshop, spec: Spec, reduction: Reduction) -> Any:
    """The method's portable ONNX model; with a folder kept there, as `Workshop.portable` does."""
    import onnx

    from stm.reduction import with_reduction

    from ..bench.workshop import _code_sha256
    from ..onnx_export import export_onnx

    if workshop.folder is None:
        return export_onnx(with_reduction(workshop.model(spec), reduction))
    made_from = [workshop.weights(spec), reduction.describe(), spec.image_size, _code_sha256()]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    path = workshop.folder / f"{spec.model}-{spec.rate}-{key}.onnx"
    if path.is_file():
        return onnx.load(str(path))
    model = export_onnx(with_reduction(workshop.model(spec), reduction))
    with written_aside(path) as aside:
        onnx.save(model, str(aside))
    return model


class Exports:
    """ONNX files made by processes of their own while the accuracy pass has the GPU: an export is some ten seconds of one core.

    With `build_jobs` above 1 so many processes also build the engines, all of them alike, into the folder where `engine_of` finds them: those
    of methods that look at the image take TensorRT a minute of one core each. Before the first is timed, `settle` waits for the processes
    to leave the GPU.

    Where a process fails or dies, its work is done again when the engine is timed, and says why it cannot be.
    """

    def __init__(
        self,
        bench: Bench,
        records: Records,
        cells: Sequence[Cell],
        batches: Sequence[int],
        build_jobs: int = 1,
        plugin_library: str | Path | None = None,
    ) -> None:
        from ..bench.workshop import export_pool

        self.folder = records.folder / "engines"
        self._pool = export_pool(build_jobs if build_jobs > 1 else min(EXPORTERS, max(1, (os.cpu_count() or 2) // 2)))
        self._build = tuple(batches) if build_jobs > 1 else ()
        self._made: dict[str, Future[None]] = {}
        engines = engines_here(plugin_library)
        for cell in cells:
            try:
                candidate = bench.make(cell)
            except StmError:
                continue
            if all(_timed(records, candidate, cell, batch, engines) for batch in batches):
                continue
            described = candidate.reduction.describe() if candidate.reduction else None
            label = records_label(cell)
            spec = spec_of(bench, candidate, label)
            try:
                if not self._made:
                    self._made["0"] = self._pool.submit(export_ahead, self.folder, spec_of(bench, None, "0"), None, self._build, plugin_library)
                self._made[label] = self._pool.submit(export_ahead, self.folder, spec, described, self._build, plugin_library)
            except BrokenExecutor:  # a process died, of memory say
                break

    def settle(self, deadline: float | None) -> None:
        """Wait until no process builds any more, or until the deadline (`time.monotonic`)."""
        if self._build:
            wait_for(self._made.values(), None if deadline is None else max(0.0, deadline - time.monotonic()))

    def wait(self, label: str) -> None:
        for one in ("0", label):
            if one in self._made:
                self._made[one].exception()

    def __enter__(self) -> Exports:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def export_ahead(
    folder: Path, spec: Spec, described: Mapping[str, Any] | None, batches: Sequence[int] = (), plugin_library: str | Path | None = None
) -> None:
    """Leave the ONNX file that `engine_of` looks for in the folder, and the engines of the plan or the described method for `batches`.

    Those have a timing cache of their own: what is measured on a GPU that others use stays out of the user's.
    """
    import torch

    from stm import model_config

    from ..bench.workshop import Workshop

    torch.set_num_threads(2)
    workshop = Workshop("cuda", folder=folder, plugin_library=plugin_library, timing_cache=folder / f"ahead-{os.getpid()}.cache")
    if described is None:
        reduction = None
        workshop.portable(spec)
    else:
        reduction = from_description(described, model_config(spec.model, spec.image_size, spec.num_classes))
        reduced_portable(workshop, spec, reduction)
    for batch in batches:
        _engine(workshop, spec, reduction, batch)


def engines_here(plugin_library: str | Path | None) -> str:
    """What engines are made of: "TensorRT 10.6.0, kernels 6"; empty where that cannot be told."""
    from ..engine import process
    from ..libraries import load_plugin

    try:
        return f"TensorRT {process().trt.__version__}, kernels {load_plugin(plugin_library).kernel_version}"
    except StmError:
        return ""


def _timed(records: Records, candidate: Candidate, cell: Cell, batch: int, engines: str) -> bool:
    """Whether this is recorded, of engines made of the same; what failed is tried again."""
    before = records.get(candidate.identity, "latency", cell.name, cell.budget.label, f"b{batch}")
    return before is not None and not before["latency"]["reason"] and (not engines or before["latency"].get("engines", "") in ("", engines))


def time_engines(
    bench: Bench,
    records: Records,
    cells: Sequence[Cell],
    batches: Sequence[int],
    plugin_library: str | Path | None,
    deadline: float | None,
    steps: Steps,
    exports: Exports | None = None,
) -> list[tuple[str, ...]]:
    """Time what is not yet recorded; returns the keys of the records left."""
    from ..bench.workshop import Workshop
    from .runner import expired

    if exports is not None:
        exports.settle(deadline)
    workshop = Workshop("cuda", folder=records.folder / "engines", plugin_library=plugin_library)
    left: list[tuple[str, ...]] = []
    engines = engines_here(plugin_library)
    for cell in cells:
        with steps.step(f"latency: {cell.name} {cell.budget.label}"):
            try:
                candidate = bench.make(cell)
            except StmError:
                continue  # not possible, and said so by the accuracy pass
            for batch in batches:
                key = ("latency", cell.name, cell.budget.label, f"b{batch}")
                if _timed(records, candidate, cell, batch, engines):
                    continue
                if expired(deadline):
                    left.append(key)
                    continue
                if exports is not None:
                    exports.wait(records_label(cell))
                found = replace(_time(workshop, bench, candidate, cell, batch), engines=engines, date=time.strftime("%Y-%m-%d", time.gmtime()))
                records.put({"kind": "latency", "latency": asdict(found)}, candidate.identity, *key)
            workshop.clear()
    return left


def _time(workshop: Workshop, bench: Bench, candidate: Candidate, cell: Cell, batch: int) -> Latency:
    from ..bench.runner import compare
    from ..bench.timing import Method

    label = records_label(cell)
    gpu = next((card.name for card in driver().gpus), None)
    entries = []
    try:
        for name, made, rate in ((cell.name, candidate, label), (UNMERGED, None, "0")):
            entries.append((name, engine_of(workshop, bench, made, rate, batch).prepare(batch, "graph")))
        measured, comparisons = compare(candidate_case(bench, label, batch), entries, Method(rounds=9))
    except (StmError, RuntimeError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        return Latency(cell.name, cell.budget.label, batch, gpu=gpu, precision=PRECISION, reason=reason)
    finally:
        for _, prepared in entries:
            prepared.close()
    mine, base = measured
    ratio = comparisons[0].ratio
    return Latency(
        cell.name,
        cell.budget.label,
        batch,
        median_ms=mine.median_ms,
        spread=mine.spread,
        images_per_second=mine.images_per_second,
        ratio=(ratio.median, ratio.low, ratio.high),
        unmerged_ms=base.median_ms,
        gpu=gpu,
        precision=PRECISION,
    )


def records_label(cell: Cell) -> str:
    """A name for engines that is also a file's."""
    return Records(Path()).path(cell.name, cell.budget.label).stem


def candidate_case(bench: Bench, label: str, batch: int) -> Any:
    from ..bench.results import Case

    return Case(bench.config.name, label, bench.config.image_size, PRECISION, batch)
