"""Latency of the table's methods as TensorRT engines, each timed in the same rounds as the unmerged model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stm.errors import StmError
from stm.reduction import Reduction

from ..gpus import driver
from ..progress import Steps
from .cells import Bench, Candidate, Cell
from .records import Records
from .results import UNMERGED, Latency

if TYPE_CHECKING:
    from ..bench.backends import EngineBackend
    from ..bench.workshop import Workshop

PRECISION = "fp16"


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
    from ..bench.workshop import Spec

    config = bench.config if candidate is None else candidate.model.config
    plan = candidate.plan if candidate else None
    spec = Spec(config.name, label, config.image_size, PRECISION, config.num_classes, plan=plan)
    if candidate is not None and candidate.reduction is not None:
        return reduced_engine(workshop, spec, candidate.reduction, batch)
    return workshop.engine(spec, batch)


def reduced_engine(workshop: Workshop, spec: Any, reduction: Reduction, batch: int) -> EngineBackend:
    """The engine of a method that looks at the image."""
    from stm.reduction import with_reduction

    from ..bench.backends import EngineBackend
    from ..engine import BatchProfile
    from ..onnx_export import export_onnx
    from ..passes.tensorrt import lower_tensorrt

    model = workshop.model(spec)
    lowered = lower_tensorrt(export_onnx(with_reduction(model, reduction)), PRECISION)
    engine, size, origin = workshop._built(lowered, f"{spec.model}-{spec.rate}-{PRECISION}-b{batch}", BatchProfile(batch, batch, batch))
    return EngineBackend("engine", engine, spec.image_size, PRECISION, weights=workshop.weights(spec), engine_bytes=size, notes=(origin,))


def time_engines(
    bench: Bench,
    records: Records,
    cells: Sequence[Cell],
    batches: Sequence[int],
    plugin_library: str | Path | None,
    deadline: float | None,
    steps: Steps,
) -> int:
    """Time what is not yet recorded; returns how many are left."""
    from ..bench.workshop import Workshop
    from .runner import expired

    workshop = Workshop("cuda", folder=records.folder / "engines", plugin_library=plugin_library)
    left = 0
    for cell in cells:
        with steps.step(f"latency: {cell.name} {cell.budget.label}"):
            for batch in batches:
                if expired(deadline):
                    left += 1
                    continue
                try:
                    candidate = bench.make(cell)
                except StmError:
                    continue  # not possible, and said so by the accuracy pass
                key = ("latency", cell.name, cell.budget.label, f"b{batch}")
                before = records.get(candidate.identity, *key)
                if before is None or before["latency"]["reason"]:  # what failed is tried again
                    found = _time(workshop, bench, candidate, cell, batch)
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
