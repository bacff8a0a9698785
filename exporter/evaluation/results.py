"""What an evaluation found, as data, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import written_aside
from .published import Published
from .records import Prediction
from .statistics import PairedDifference, wilson_interval

SCHEMA = 1


@dataclass(frozen=True)
class Share:
    """`hits` of `images`, with Wilson's 95 % interval; shares, not percent."""

    hits: int
    images: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, images: int) -> Share:
        return cls(hits, images, *wilson_interval(hits, images))

    @property
    def value(self) -> float:
        return self.hits / self.images if self.images else 0.0

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


@dataclass(frozen=True)
class Accuracy:
    """One subject. `difference` and `agreement` (same best class) are against the baseline, None for it.

    `images_per_second` is of inference alone on one device, copies included and data loading not; the first batch after a
    start is left out where there are others. `stm bench` measures speed properly.
    """

    name: str
    figures: dict[str, Any]
    top1: Share
    top5: Share
    difference: PairedDifference | None
    agreement: float | None
    images_per_second: float | None
    published: tuple[Published, ...] = ()


@dataclass
class Evaluation:
    """Everything of one run; `write(folder)` leaves eval.json and eval.md beside the predictions."""

    model: str
    weights: str
    weights_random: bool
    identity: dict[str, Any]
    environment: dict[str, Any]
    images: int
    accuracies: list[Accuracy]
    baseline: str | None
    unreadable: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0
    processes: int = 1
    outputs: list[str] = field(default_factory=list)

    exit_code = 0

    def __getitem__(self, name: str) -> Accuracy:
        return next(accuracy for accuracy in self.accuracies if accuracy.name == name)

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for a in self.accuracies:
            row = asdict(a)
            for key, share in (("top1", a.top1), ("top5", a.top5)):
                row[key] = {"value": share.value, **asdict(share)}
            row["difference"] = {**asdict(a.difference), "verdict": a.difference.verdict} if a.difference else None
            rows.append(row)
        plain = {key: value for key, value in vars(self).items() if key != "accuracies"}
        return {"schema": SCHEMA, "kind": "eval", **plain, "accuracies": rows}

    def write(self, folder: str | Path) -> list[str]:
        folder = Path(folder)
        self.outputs = [str(folder / "eval.json"), str(folder / "eval.md")]
        with written_aside(folder / "eval.md") as aside:
            aside.write_text("# stm eval\n\n" + markdown(self), encoding="utf-8")
        with written_aside(folder / "eval.json") as aside:
            aside.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return self.outputs

    def lines(self) -> list[str]:
        """For people, on a terminal."""
        out = [f"{self.model}, {_what(self)}: {self.images} images, {self.weights}"]
        if self.weights_random:
            out.append(f"  WARNING: {self.weights}. These accuracies mean nothing.")
        width = max(len(a.name) for a in self.accuracies)
        for a in self.accuracies:
            out.append(f"  {a.name:<{width}}  top-1 {a.top1}  top-5 {a.top5.value:.2%}{_published_text(a)}")
            if a.difference:
                out.append(f"  {'':<{width}}  {_difference_text(a)} of {self.baseline}")
        if self.unreadable:
            out.append(f"  {len(self.unreadable)} images could not be read and do not count: {self.unreadable[0]['image']}, ..")
        out += [f"  note: {note}" for note in self.notes]
        return [*out, *(f"wrote {path}" for path in self.outputs)]


def _what(result: Evaluation) -> str:
    identity = result.identity
    return f"{identity['precision']} on {identity['device']}"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _difference_text(a: Accuracy) -> str:
    d = a.difference
    assert d is not None
    return f"{_points(d.value)} points ({_points(d.low)} to {_points(d.high)}; McNemar p {d.p:.2g}; {d.verdict}), agrees with {a.agreement:.2%}"


def _published_text(a: Accuracy) -> str:
    if not a.published:
        return ""
    first = a.published[0]
    return f"  (paper {first.top1:.1f} %, measured {100 * a.top1.value - first.top1:+.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def markdown(result: Evaluation) -> str:
    """What was run, the table, the paper's cells with their sources, notes. Deterministic in `result`."""
    identity, machine = result.identity, result.environment
    data, shape = identity["data"], identity["preprocessing"]
    size = "x".join(map(str, shape["size"]))
    out = [
        f"Model: {result.model}, {_what(result)}; {result.weights}.",
        "",
        f"Data: {result.images} images ({data['kind']}), index {data['sha256'][:16]}; shorter side to size / {shape['crop_ratio']:g}, bicubic, "
        f"centre crop {size}.",
        "",
        f"Machine: {machine.get('gpu') or machine.get('cpu')}, {result.processes} process{'es' if result.processes > 1 else ''}; "
        f"{', '.join(f'{name} {version}' for name, version in (machine.get('versions') or {}).items())}.",
        "",
        "### Accuracy",
        "",
    ]
    if result.weights_random:
        out[0:0] = [f"**{result.weights}: these accuracies mean nothing.**", ""]
    rows = []
    for a in result.accuracies:
        f, d = a.figures, a.difference
        rows.append(
            [
                a.name,
                str(f["tokens_left"]),
                str(f["token_layers_removed"]),
                f"{f['gflops_true']:.3f} / {f['gflops_paper']:.3f}",
                str(a.top1),
                f"{a.top5.value:.2%}",
                f"{_points(d.value)} ({_points(d.low)} to {_points(d.high)}), {d.verdict}" if d else "",
                f"{d.p:.2g} ({d.lost} lost, {d.gained} gained)" if d else "",
                f"{a.agreement:.2%}" if a.agreement is not None else "",
                f"{a.images_per_second:,.0f}" if a.images_per_second is not None else "",
                "; ".join(dict.fromkeys(f"{p.top1:.1f}{f' at {p.flops}' if p.flops else ''}" for p in a.published)),
            ]
        )
    head = ["plan", "tokens left", "token-layers removed", "GFLOPs, true / paper", "top-1 (95 % interval)", "top-5"]
    head += [f"points to {result.baseline or 'unmerged'} (95 %)", "McNemar p", "agreement", "images/s a device", "paper's top-1"]
    out += _table(head, rows)
    out += [
        "",
        "Intervals of top-1 are Wilson's; those of differences are paired (Bonett and Price), for the images both classified; `within noise`: the "
        "interval holds 0. Images/s is inference with copies, without data loading; `stm bench` measures speed.",
    ]
    cells = [(a, p) for a in result.accuracies for p in a.published]
    if cells:
        text = [[a.name, f"{p.top1:.1f}", p.flops, f"{100 * a.top1.value:.2f}", f"{100 * a.top1.value - p.top1:+.2f}", p.source] for a, p in cells]
        out += ["", "### Beside the paper (arXiv 2509.22691)", ""]
        out += _table(["plan", "paper's top-1", "paper's FLOPs", "measured top-1", "measured - paper", "where it stands"], text)
        out += ["", "The paper's figures are for the 50,000 images of ImageNet-1k's validation set and the official weights."]
    if result.unreadable:
        out += ["", "### Not read", "", *_table(["image", "reason"], [[row["image"], row["reason"]] for row in result.unreadable[:50]])]
        if len(result.unreadable) > 50:
            out.append(f"\nand {len(result.unreadable) - 50} more, in eval.json.")
    if result.notes:
        out += ["", *(f"Note: {note}." for note in result.notes)]
    return "\n".join(out) + "\n"


def count(
    predictions: Mapping[int, Prediction],
    figures: Mapping[str, dict[str, Any]],
    published: Mapping[str, tuple[Published, ...]],
    baseline: str | None,
    timings: Sequence[Mapping[str, Any]],
) -> list[Accuracy]:
    """Predictions -> accuracies; unreadable images do not count."""
    read = [made for made in predictions.values() if made.unreadable is None]
    n = len(read)
    right = {name: [made.classes[name][0] == made.label for made in read] for name in figures}
    steady = [row for row in timings if not row["warm_up"]] or list(timings)
    accuracies = []
    for name in figures:
        top5 = sum(made.label in made.classes[name][:5] for made in read)
        difference = agreement = None
        if baseline is not None and name != baseline and n:
            pairs = list(zip(right[baseline], right[name], strict=True))
            lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
            difference = PairedDifference.of(lost, gained, n)
            agreement = sum(made.classes[name][0] == made.classes[baseline][0] for made in read) / n
        seconds = sum(float(row["seconds"][name]) for row in steady)
        speed = sum(int(row["images"]) for row in steady) / seconds if seconds else None
        share1, share5 = Share.of(sum(right[name]), n), Share.of(top5, n)
        accuracies.append(Accuracy(name, dict(figures[name]), share1, share5, difference, agreement, speed, published.get(name, ())))
    return accuracies
