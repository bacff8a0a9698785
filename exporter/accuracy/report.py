"""A Run for people: terminal, Markdown, a document with plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.report import _machine, _ms, _table, fill_document
from ..errors import ArtefactError
from ..files import written_aside
from .results import UNMERGED, Latency, Row, Run
from .statistics import NOISE, Interval, paired_difference

# (one, other, what is asked)
CLAIMS = (
    ("stm", "stm-one-sided", "both sides of the class token, not one"),
    ("stm", "stm-mean", "hidden-state weights, not size-weighted means"),
    ("stm", "stm-sum", "hidden-state weights, not plain sums"),
    ("stm", "stm-decay", "hidden-state weights, not the decay alone"),
    ("stm", "stm-literal", "least-squares weights, not the mean of quotients"),
    ("stm", "stm-constant", "weights of the image, not constants"),
    ("stm", "stm-proportional", "decay of the token kept, not of all it stands for"),
    ("stm", "stm-frontier", "from the edge, not pair by pair inwards"),
    ("stm", "stm-spread", "from the edge, not evenly spread"),
    ("tome-balanced", "tome", "ToMe with the same count on each side, not where it likes"),
    ("mtr-balanced", "mtr", "MTR with the same count on each side, not where it likes"),
    ("r-meeto-true", "r-meeto", "R-MeeTo with the class token at its true place, not a guessed one"),
)


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _interval(found: Interval) -> str:
    return f"{_points(found.value)} ({_points(found.low)} to {_points(found.high)}), {found.verdict}"


def _small(value: float) -> str:
    return f"{value:.3f}" if 0.0995 <= value < 1000 else f"{value:.2g}"


def _change(row: Row) -> str:
    return f"{row.figures['gflops_true']:.3f} ({row.figures['gflops_true_change']:+.1%})"


def _latency(found: Latency | None) -> str:
    if found is None or found.median_ms is None:
        return ""
    ratio = f" ({found.ratio[0]:.3f})" if found.ratio else ""
    return f"{_ms(found.median_ms)}{ratio}{_throughput(found.batch, found.median_ms)}"


def _throughput(batch: int, ms: float) -> str:
    return f", {1000 * batch / ms:,.0f}" if batch > 1 else ""


def _time_head(batch: int, what: str) -> str:
    return f"{what}{', images/s' if batch > 1 else ''}"


def terminal_lines(run: Run) -> list[str]:
    lines = [f"{run.model}, {run.head['weights']}; {run.images} test images a variant on {run.identity['device']}"]
    if run.head["weights_random"]:
        lines.append(f"  WARNING: {run.head['weights']}. These accuracies mean nothing.")
    for variant in run.variants:
        lines.append(f"{variant}: unmerged top-1 {run.unmerged(variant).top1}")
        for budget in run.budgets:
            rows = run.at(budget, variant)
            shown = [row for place, row in enumerate(rows) if place < 3 or row.family in ("stm", "plan")]
            lines.append(f"  {budget}")
            for row in shown:
                assert row.difference is not None
                text = f"    {row.name:<20} top-1 {row.top1.value:7.2%}  {_points(row.difference.value)} points ({row.difference.verdict})"
                text += f"  KL {_small(row.kl.value)}" if row.kl else ""
                lines.append(text + (f"  {_change(row)} GFLOPs" if row.name != "smaller" else f"  {row.figures['gflops_true']:.3f} GFLOPs"))
    lines += [f"  not possible: {one['name']} at {one['budget']}: {one['reason']}" for one in run.head.get("impossible", [])]
    lines += [f"  not timed: {one.name} at {one.budget}, batch {one.batch}: {one.reason}" for one in run.latencies if one.reason]
    if not run.whole:
        lines.append(f"  {run.head['left']} measurements are left; the same command goes on")
    return [*lines, *(f"wrote {path}" for path in run.outputs)]


def markdown(run: Run, plots: Sequence[str] = ()) -> str:
    """Model, data, tables by budget and variant, the claims, schedules, what could not be measured, plots. Deterministic in `run`."""
    h = run.head
    out = [f"## {run.model}", ""]
    if h["weights_random"]:
        out += [f"**{h['weights']}: these accuracies mean nothing.**", ""]
    if not run.whole:
        out += [f"**Not complete: {h['left']} measurements are left.**", ""]
    out += [
        f"Model: {run.model} at {run.config.image_size[0]}x{run.config.image_size[1]} px, {run.config.seqlen} tokens, {run.config.depth} layers; "
        f"{h['weights']}, sha256 {run.identity['weights_sha256'][:16]}.",
        "",
        f"Data: {run.images} test images of digit pairs of each variant, PyTorch, {run.identity['precision']}.",
        "",
        f"Machine: {_machine_of(run)}.",
        "",
        *_timed_with(run),
        *_unmerged_table(run),
    ]
    out += _overview(run)
    out += _claims(run)
    out += _against(run)
    for budget in run.budgets:
        for variant in run.variants:
            out += ["", f"### {run.model}, {budget}, {variant}", "", *_section(run, budget, variant)]
    out += _schedules(run)
    out += _missing(run)
    if plots:
        out += ["", *(f"![{Path(plot).stem.replace('-', ' ')}]({plot})" for plot in plots)]
    return "\n".join(out) + "\n"


def _machine_of(run: Run) -> str:
    from ..bench.results import BenchResult

    return _machine(BenchResult(run.head["environment"], {}))


def _timed_with(run: Run) -> list[str]:
    """On what the engines were timed, which need not be where accuracy was measured."""
    where = Counter(", ".join(filter(None, (one.gpu, one.engines, one.date))) for one in run.latencies if one.median_ms is not None)
    return [f"Engines timed: {'; '.join(f'{count} on {what}' for what, count in where.most_common())}.", ""] if where else []


def _unmerged_table(run: Run) -> list[str]:
    timed = {batch: next((one for one in run.latencies if one.batch == batch and one.unmerged_ms is not None), None) for batch in run.batches}
    rows = []
    for variant in run.variants:
        row = run.unmerged(variant)
        latencies = [
            _ms(one.unmerged_ms) + _throughput(batch, one.unmerged_ms) if one and one.unmerged_ms is not None else "" for batch, one in timed.items()
        ]
        rows.append([variant, str(row.top1), f"{row.figures['gflops_true']:.3f}", f"{row.figures['gflops_paper']:.3f}", *latencies])
    head = ["unmerged, on", "top-1 (95 %)", "GFLOPs, true", "GFLOPs, paper"]
    head += [_time_head(batch, f"TensorRT {_precision(run)}, batch {batch}, ms") for batch in timed]
    return _table(head, rows)


def _precision(run: Run) -> str:
    return next((one.precision for one in run.latencies if one.precision), "")


def _overview(run: Run) -> list[str]:
    """Points to the unmerged model by method and budget; bold: not distinguishable from the best of its column."""
    out: list[str] = []
    for variant in run.variants:
        found = {(row.name, row.budget): row for row in run.rows if row.variant == variant and row.difference}

        def cell(name: str, budget: str, found: dict[tuple[str, str], Row] = found) -> str:
            row = found.get((name, budget))
            if row is None or row.difference is None:
                return ""
            text = _points(row.difference.value) + (" (noise)" if row.difference.verdict == NOISE else "")
            return f"**{text}**" if row.best else text

        names = list(dict.fromkeys(name for name, _ in found if name != "smaller"))
        if names:
            rows = [[name, *(cell(name, budget) for budget in run.budgets)] for name in names]
            out += ["", f"### {run.model}, points of top-1 to the unmerged model, {variant}", "", *_table(["method", *run.budgets], rows)]
    return out


def _section(run: Run, budget: str, variant: str) -> list[str]:
    rows = []
    for row in run.at(budget, variant):
        d = row.difference
        assert d is not None
        latencies = [_latency(run.latency(row.name, row.budget, batch)) for batch in run.batches]
        rows.append(
            [
                f"**{row.name}**" if row.best else row.name,
                str(row.figures["tokens_left"]),
                str(row.figures["token_layers_removed"]) if row.name != "smaller" else "",
                _change(row),
                f"{row.figures['gflops_paper']:.3f}",
                str(row.top1),
                f"{_points(d.value)}, {d.verdict}",
                _interval(row.to_reference) if row.to_reference else "",
                f"{row.agreement:.2%}" if row.agreement is not None else "",
                f"{_small(row.kl.value)} ({_small(row.kl.low)} to {_small(row.kl.high)})" if row.kl else "",
                f"{_small(row.state.value)}" if row.state else "",
                *latencies,
            ]
        )
    head = ["method", "tokens left", "TL removed", "GFLOPs, true", "paper", "top-1 (95 %)", "points to unmerged", "points to stm (95 %)"]
    head += ["agreement", "KL (95 %)", "state error", *(_time_head(batch, f"ms, batch {batch} (of unmerged)") for batch in run.batches)]
    return _table(head, rows)


def claims(run: Run, variant: str) -> list[tuple[str, str, str, dict[str, Interval]]]:
    """(one, other, question, budget -> top-1 of one minus the other's), for pairs that were measured."""
    found = []
    for one, other, question in CLAIMS:
        cells = {}
        for budget in run.budgets:
            rows = {row.name: row for row in run.at(budget, variant)}
            if one in rows and other in rows:
                cells[budget] = paired_difference(rows[one].right, rows[other].right)
        if cells:
            found.append((one, other, question, cells))
    return found


def _claims(run: Run) -> list[str]:
    out: list[str] = []
    for variant in run.variants:
        table = claims(run, variant)
        if not table:
            continue
        rows = [
            [f"{question}: {one} - {other}", *(_interval(cells[budget]) if budget in cells else "" for budget in run.budgets)]
            for one, other, question, cells in table
        ]
        out += ["", f"### {run.model}, does it help? Points of top-1, {variant}", "", *_table(["claim", *run.budgets], rows)]
    return out


def against(run: Run, plan: str, variant: str) -> list[tuple[str, dict[str, Interval]]]:
    """(other, budget -> top-1 of the plan minus the other's) at the plan's budgets; the nearest first."""
    found: dict[str, dict[str, Interval]] = {}
    for budget in run.budgets:
        rows = {row.name: row for row in run.at(budget, variant)}
        if plan in rows:
            for name, row in rows.items():
                if name != plan:
                    found.setdefault(name, {})[budget] = paired_difference(rows[plan].right, row.right)
    return sorted(found.items(), key=lambda item: min(one.value for one in item[1].values()))


def _against(run: Run) -> list[str]:
    out: list[str] = []
    for plan in dict.fromkeys(row.name for row in run.rows if row.family == "plan"):
        for variant in run.variants:
            table = against(run, plan, variant)
            if table:
                there = [budget for budget in run.budgets if any(budget in found for _, found in table)]
                rows = [[f"{plan} - {other}", *(_interval(found[budget]) if budget in found else "" for budget in there)] for other, found in table]
                out += ["", f"### {run.model}, {plan} against the others, points of top-1, {variant}", "", *_table(["difference", *there], rows)]
    return out


def _schedules(run: Run) -> list[str]:
    """Methods with the same schedule at every budget share a line."""
    text = {(row.name, row.budget): row.schedule for row in run.rows}
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(row.name for row in run.rows if row.name != UNMERGED):
        alike.setdefault(tuple(text.get((name, budget), text.get((name, "as it is"), "")) for budget in run.budgets), []).append(name)
    rows = [[", ".join(names), *schedule] for schedule, names in alike.items()]
    return ["", f"### {run.model}, tokens removed before which layers", "", *_table(["method", *run.budgets], rows)] if rows else []


def _missing(run: Run) -> list[str]:
    rows = [[one["name"], one["budget"], one["reason"]] for one in run.head.get("impossible", [])]
    rows += [[one.name, f"{one.budget}, latency at batch {one.batch}", one.reason] for one in run.latencies if one.reason]
    if not run.batches:
        rows.append(["all", "latency", "not measured (--latency, on a machine with a GPU, TensorRT and our plugin library)"])
    return ["", f"### {run.model}, not measured", "", *_table(["method", "at", "reason"], rows)] if rows else []


# --- files -----------------------------------------------------------------------------------------------------------------


def write_report(run: Run, folder: Path) -> list[str]:
    """accuracy.md and plots; returns their paths."""
    from .plots import draw_plots

    plots = draw_plots(run, folder)
    with written_aside(folder / "accuracy.md") as aside:
        aside.write_text("# stm bench accuracy\n\n" + markdown(run, [plot.name for plot in plots]), encoding="utf-8")
    return [str(folder / "accuracy.md"), *map(str, plots)]


def update_document(runs: Run | Sequence[Run], path: str | Path) -> list[str]:
    """Put the tables of one run or several (each of its model) between the markers of a Markdown file, and the plots beside it.

    Raises:
        ArtefactError: the file or its markers are not there, or two runs are of one model.
    """
    from .plots import draw_plots

    several = [runs] if isinstance(runs, Run) else list(runs)
    models = [run.model for run in several]
    if twice := [model for model in models if models.count(model) > 1]:
        raise ArtefactError(f"two runs of {twice[0]} cannot stand in one document; give one of each model")
    drawn: dict[str, list[Path]] = {}

    def draw(folder: Path) -> list[Path]:
        for run in several:
            drawn[run.model] = draw_plots(run, folder)
        return [plot for plots in drawn.values() for plot in plots]

    def text(plots: list[str]) -> str:
        left = iter(plots)
        return "\n".join(markdown(run, [next(left) for _ in drawn[run.model]]) for run in several)

    return fill_document(Path(path), draw, text)


def combined(runs: Sequence[Run]) -> dict[str, Any]:
    """For --json."""
    return runs[0].to_dict() if len(runs) == 1 else {"kind": "accuracy", "runs": [run.to_dict() for run in runs]}
