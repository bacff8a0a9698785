"""What the records say: shares, intervals, differences with a verdict; numbers in, numbers out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stm import MergePlan, VimConfig

from ..evaluation.results import Share
from ..evaluation.statistics import PairedDifference
from ..files import written_aside
from .statistics import Interval, bootstrap_mean, paired_difference

UNMERGED = "none"
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One method at one budget in one variant of the images.

    `difference`, `agreement`, `kl` and `state` are against the unmerged model on the same images, None for it. `state` is the
    relative error of the class token's hidden state in the last layer, `states` its mean in each layer, `tokens` that of the class token
    itself. `to_reference` compares top-1 with `stm` at the same budget, `to_best` with the best row there.
    """

    name: str
    family: str
    budget: str
    variant: str
    figures: dict[str, Any]
    schedule: str
    right: NDArray[np.bool_] = field(repr=False)
    top1: Share
    difference: PairedDifference | None = None
    agreement: float | None = None
    kl: Interval | None = None
    state: Interval | None = None
    states: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    to_reference: Interval | None = None
    to_best: Interval | None = None
    plan: MergePlan | None = None

    @property
    def best(self) -> bool:
        """Not distinguishable from the best row of its budget and variant."""
        return self.to_best is not None and self.to_best.high >= 0

    def to_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key not in ("right", "plan")}
        for key in ("difference", "kl", "state", "to_reference", "to_best", "top1"):
            value = plain[key]
            plain[key] = None if value is None else asdict(value)
        for key in ("difference", "to_reference", "to_best"):
            value = getattr(self, key)
            if value is not None:
                plain[key]["verdict"] = value.verdict
        return {**plain, "best": self.best}


@dataclass(frozen=True)
class Latency:
    """A method's engine, timed in the same rounds as the unmerged model's; `ratio` to it, under 1 is faster. `reason`: not measured.
    `engines`: what it was made of, "TensorRT 10.6.0, kernels 6"."""

    name: str
    budget: str
    batch: int
    median_ms: float | None = None
    spread: float | None = None
    images_per_second: float | None = None
    ratio: tuple[float, float, float] | None = None
    unmerged_ms: float | None = None
    gpu: str | None = None
    precision: str = ""
    reason: str = ""
    engines: str = ""
    date: str = ""


@dataclass
class Run:
    """Everything measured of one model."""

    head: dict[str, Any]
    rows: list[Row]
    latencies: list[Latency]
    outputs: list[str] = field(default_factory=list)

    exit_code = 0

    @property
    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = self.head["identity"]
        return found

    @property
    def model(self) -> str:
        return str(self.identity["model"])

    @property
    def config(self) -> VimConfig:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in self.identity["config"].items()}
        return VimConfig(**fields)

    @property
    def images(self) -> int:
        return int(self.identity["images"])

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.rows))

    @property
    def budgets(self) -> list[str]:
        """In the order asked for, then those of records from before."""
        there = list(dict.fromkeys(row.budget for row in self.rows if row.name not in (UNMERGED, "smaller")))
        asked = [label for label in self.head.get("budgets", []) if label in there]
        return asked + [label for label in there if label not in asked]

    @property
    def whole(self) -> bool:
        return not self.head.get("left", 0)

    def unmerged(self, variant: str) -> Row:
        return next(row for row in self.rows if row.name == UNMERGED and row.variant == variant)

    def at(self, budget: str, variant: str) -> list[Row]:
        """Rows of a section, best first; the next smaller model stands in each."""
        found = [row for row in self.rows if row.variant == variant and (row.budget == budget or row.name == "smaller")]
        return sorted(found, key=lambda row: (-row.top1.value, row.kl.value if row.kl else 0.0))

    def latency(self, name: str, budget: str, batch: int) -> Latency | None:
        return next((one for one in self.latencies if (one.name, one.budget, one.batch) == (name, budget, batch)), None)

    @property
    def batches(self) -> list[int]:
        return sorted({one.batch for one in self.latencies if one.median_ms is not None})

    @classmethod
    def of(cls, head: Mapping[str, Any], measured: Iterable[Mapping[str, Any]], timed: Iterable[Mapping[str, Any]]) -> Run:
        """Count what the records hold. Rows stand in the order of the command line; each variant needs its unmerged record."""
        by_variant: dict[str, list[Mapping[str, Any]]] = {}
        for record in measured:
            by_variant.setdefault(str(record["variant"]), []).append(record)
        order = [str(name) for name in head.get("methods", [])]
        rows: list[Row] = []
        for variant in sorted(by_variant, key=lambda name: (head["identity"]["variants"].index(name), name)):
            base = next(record for record in by_variant[variant] if record["name"] == UNMERGED)
            records = sorted(by_variant[variant], key=lambda r: order.index(r["name"]) if r["name"] in order else len(order))
            mine = [_row(record, base) for record in records]
            rows += _compared(mine)
        latencies = [Latency(**{**row["latency"], "ratio": tuple(row["latency"]["ratio"]) if row["latency"]["ratio"] else None}) for row in timed]
        return cls(dict(head), rows, latencies)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "accuracy",
            **self.head,
            "rows": [row.to_dict() for row in self.rows],
            "latencies": [asdict(one) for one in self.latencies],
            "outputs": self.outputs,
        }

    def lines(self) -> list[str]:
        from .report import terminal_lines

        return terminal_lines(self)

    def write(self, folder: str | Path) -> list[str]:
        """accuracy.json, accuracy.md and plots."""
        from .report import write_report

        folder = Path(folder)
        made = write_report(self, folder)
        self.outputs = [str(folder / "accuracy.json"), *made]
        with written_aside(folder / "accuracy.json") as aside:
            aside.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return self.outputs


def _row(record: Mapping[str, Any], base: Mapping[str, Any]) -> Row:
    labels, top, truth = (np.asarray(values) for values in (base["labels"], record["top"], base["top"]))
    if top.shape != labels.shape:
        raise ValueError(f"{record['name']} has {top.size} predictions for {labels.size} images")
    right, before = top == labels, truth == labels
    n = int(labels.size)
    is_base = record["name"] == UNMERGED
    states = record.get("states") or {}
    lost, gained = int((before & ~right).sum()), int((right & ~before).sum())
    return Row(
        name=str(record["name"]),
        family=str(record["family"]),
        budget=str(record["budget"]),
        variant=str(record["variant"]),
        figures=dict(record["figures"]),
        schedule=str(record["schedule"]),
        right=right,
        top1=Share.of(int(right.sum()), n),
        difference=None if is_base else PairedDifference.of(lost, gained, n),
        agreement=None if is_base else float((top == truth).mean()),
        kl=None if is_base else bootstrap_mean(record["kl"]),
        state=bootstrap_mean(states["last"]) if states else None,
        states=tuple(states.get("state", ())),
        tokens=tuple(states.get("token", ())),
        plan=MergePlan.from_dict(record["plan"]) if record.get("plan") else None,
    )


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Rows of a variant with their differences to `stm` and to the best of their budget, by paired bootstrap."""
    from dataclasses import replace

    out: list[Row] = []
    for row in rows:
        if row.name in (UNMERGED, "smaller"):
            out.append(row)
            continue
        beside = [other for other in rows if other.budget == row.budget]
        best = max(beside, key=lambda other: other.top1.hits)
        reference = next((other for other in beside if other.name == "stm"), None)
        out.append(
            replace(
                row,
                to_best=paired_difference(row.right, best.right),
                to_reference=paired_difference(row.right, reference.right) if reference is not None and reference is not row else None,
            )
        )
    return out
