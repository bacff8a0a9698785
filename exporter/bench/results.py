"""What a benchmark found, as data: JSON in and out, and the performance gate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArtefactError, PerformanceError
from .statistics import Ratio, Summary

SCHEMA = 1


@dataclass(frozen=True, order=True)
class Case:
    """One row of a table: model x rate x resolution x precision x batch. `rate` is "0", "0.2", "stm-20" or a file's name."""

    model: str
    rate: str
    image_size: tuple[int, int]
    precision: str
    batch: int
    seqlen: int = 0
    tokens_left: int = 0

    @property
    def pixels(self) -> str:
        height, width = self.image_size
        return str(height) if height == width else f"{height}x{width}"

    def __str__(self) -> str:
        return f"{self.model}, rate {self.rate}, {self.pixels} px, {self.precision}, batch {self.batch}"


@dataclass(frozen=True)
class Measurement:
    """One backend in one case.

    `rounds_ms` holds a figure a round (a burst of inferences between two clock readings, divided by their number): medians,
    throughput and ratios come from it. `latency` is over single inferences, where p90 and p99 mean something.
    `difference` is the norm of (logits - the subject's) over the norm of the subject's; None where weights differ.
    """

    case: Case
    backend: str
    device: str
    launch: str
    precision: str
    rounds_ms: tuple[float, ...]
    median_ms: float
    spread: float
    latency: Summary
    images_per_second: float
    memory: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    difference: float | None = None
    gpu_state: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return f"{self.backend}, {self.launch}" if self.launch != "host" else self.backend


@dataclass(frozen=True)
class Skipped:
    case: Case
    backend: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The subject's time over a rival's, round by round: under 1, the subject is faster."""

    case: Case
    subject: str
    rival: str
    launch: str
    ratio: Ratio


@dataclass
class BenchResult:
    """Everything of one run; `check()` applies the gate, `write(folder)` leaves JSON, Markdown and plots."""

    environment: dict[str, Any]
    method: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    max_ratio: float | None = None
    outputs: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Why the gate fails; empty if it passes or none was set. What was asked for and not measured fails too."""
        if self.max_ratio is None:
            return []
        slow = [
            f"{c.case}: {c.subject} takes {c.ratio.median:.3f} times {c.rival} ({c.launch}; 95 % interval {c.ratio.low:.3f} to {c.ratio.high:.3f}), "
            f"allowed {self.max_ratio:g}"
            for c in self.comparisons
            if not c.ratio.median <= self.max_ratio
        ]
        absent = [
            f"{s.case}: {s.backend} was not measured ({s.reason}), so the ratio allowed, {self.max_ratio:g}, is not shown" for s in self.skipped
        ]
        if not self.comparisons and not absent:
            absent = [f"nothing was compared, so the ratio allowed, {self.max_ratio:g}, is not shown; name a rival with --vs"]
        return slow + absent

    def check(self) -> None:
        """Raises:
        PerformanceError: a ratio is over the gate, or a comparison is missing; names measured and allowed.
        """
        if failures := self.failures:
            raise PerformanceError("; ".join(failures))

    @property
    def exit_code(self) -> int:
        return PerformanceError.exit_code if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "bench",
            "environment": self.environment,
            "method": self.method,
            "measurements": [asdict(m) for m in self.measurements],
            "skipped": [asdict(s) for s in self.skipped],
            "comparisons": [asdict(c) for c in self.comparisons],
            "profiles": self.profiles,
            "gate": {"max_ratio": self.max_ratio, "passed": not self.failures, "failures": self.failures},
            "outputs": self.outputs,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "bench.json") -> BenchResult:
        """Raises:
        ArtefactError: not what `to_dict` made, or of another schema.
        """
        if not isinstance(data, dict) or data.get("kind") != "bench" or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ArtefactError(f"{where}: schema is {found!r}, expected a file of `stm bench` with schema {SCHEMA}; measure again")

        def case(row: dict[str, Any]) -> Case:
            return Case(**{**row["case"], "image_size": (int(row["case"]["image_size"][0]), int(row["case"]["image_size"][1]))})

        try:
            return cls(
                environment=data["environment"],
                method=data["method"],
                measurements=[
                    Measurement(
                        **{
                            **row,
                            "case": case(row),
                            "latency": Summary(**row["latency"]),
                            "rounds_ms": tuple(row["rounds_ms"]),
                            "notes": tuple(row["notes"]),
                        }
                    )
                    for row in data["measurements"]
                ],
                skipped=[Skipped(**{**row, "case": case(row)}) for row in data["skipped"]],
                comparisons=[Comparison(**{**row, "case": case(row), "ratio": Ratio(**row["ratio"])}) for row in data["comparisons"]],
                profiles=data["profiles"],
                max_ratio=data["gate"]["max_ratio"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(f"{where} is damaged ({type(error).__name__}: {error}); measure again") from None

    @classmethod
    def merged(cls, results: Iterable[BenchResult]) -> BenchResult:
        """One result from several runs on the same GPU. A case and backend measured twice keeps its last figures, with the
        ratios of that run: ratios are never formed across runs.

        Raises:
            ArtefactError: runs of different GPUs.
        """
        several = list(results)
        if not several:
            raise ArtefactError("no results to merge")
        gpus = sorted({str(result.environment.get("gpu") or result.environment.get("cpu")) for result in several})
        if len(gpus) > 1:
            raise ArtefactError(f"these runs are of different machines ({', '.join(gpus)}); make one document for each")
        measurements: dict[Any, Measurement] = {}
        comparisons: dict[Any, Comparison] = {}
        skipped: dict[Any, Skipped] = {}
        for result in several:
            measurements |= {(m.case, m.label): m for m in result.measurements}
            comparisons |= {(c.case, c.subject, c.rival, c.launch): c for c in result.comparisons}
            skipped |= {(s.case, s.backend): s for s in result.skipped}
        measured = {(m.case, m.backend) for m in measurements.values()}
        last = several[-1]
        environment = {**last.environment, "runs": [result.environment.get("date") for result in several]}
        return replace(
            last,
            environment=environment,
            measurements=list(measurements.values()),
            skipped=[s for key, s in skipped.items() if key not in measured],
            comparisons=list(comparisons.values()),
            profiles=[profile for result in several for profile in result.profiles],
            outputs=[],
        )

    def lines(self) -> list[str]:
        """For people, on a terminal."""
        from .report import terminal_lines

        return terminal_lines(self)

    def write(self, folder: str | Path) -> list[str]:
        """bench.json, bench.md and the plots that the cases allow; returns their paths."""
        from .report import write_report

        return write_report(self, Path(folder))
