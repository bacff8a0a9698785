"""A BenchResult for people: terminal, Markdown, plots; and for machines: JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtefactError
from ..files import written_aside
from .results import BenchResult, Case, Comparison, Measurement

BEGIN, END = "<!-- stm bench: begin -->", "<!-- stm bench: end -->"
_Axis = tuple[str, str, Callable[[Case], float], Callable[[Case], Any]]
_SERIES: tuple[_Axis, ...] = (  # name, label, place on the axis, what else must be equal
    ("batch", "batch", lambda c: float(c.batch), lambda c: (c.model, c.rate, c.image_size, c.precision)),
    ("resolution", "pixels a side", lambda c: math.sqrt(c.image_size[0] * c.image_size[1]), lambda c: (c.model, c.rate, c.precision, c.batch)),
    (
        "rate",
        "tokens left after the last layer, % of all",
        lambda c: round(100.0 * c.tokens_left / max(1, c.seqlen), 1),
        lambda c: (c.model, c.image_size, c.precision, c.batch),
    ),
)
_MAX_PANELS = 9


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _mib(memory: dict[str, int]) -> str:
    return f"{memory['peak'] / 2**20:,.0f}" if "peak" in memory else ""


def _ratio(found: Comparison) -> str:
    r = found.ratio
    return f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})"


def cases(result: BenchResult) -> list[Case]:
    """In the order measured."""
    return list(dict.fromkeys(m.case for m in result.measurements))


def winners(result: BenchResult) -> list[tuple[Case, Measurement, Measurement | None]]:
    """For each case the fastest and the next (another backend), by median."""
    found = []
    for case in cases(result):
        ordered = sorted((m for m in result.measurements if m.case == case), key=lambda m: m.median_ms)
        others = [m for m in ordered if m.backend != ordered[0].backend]
        found.append((case, ordered[0], others[0] if others else None))
    return found


def _machine(result: BenchResult) -> str:
    e = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in e.get("versions", {}).items())
    card = f"{e['gpu']} (sm_{e['gpu_sm']}), driver {e['driver']}" if e.get("gpu") else "no GPU"
    return f"{card}; {e.get('cpu')}, {e.get('cpu_cores')} cores; {versions}; {e.get('date')}"


def _states(result: BenchResult) -> str:
    parts = []
    for when in ("before", "after"):
        if state := (result.environment.get("gpu_state") or {}).get(when):
            parts.append(f"{when}: " + ", ".join(f"{key} {value}" for key, value in state.items()))
    clocks = [m.gpu_state["sm_mhz"] for m in result.measurements if m.gpu_state and "sm_mhz" in m.gpu_state]
    if clocks:
        parts.append(f"SM clock right after each backend's last round: {min(clocks):.0f} to {max(clocks):.0f} MHz")
    return "; ".join(parts) or "no GPU state (no nvidia-smi)"


def _method(result: BenchResult) -> str:
    m = result.method
    return (
        f"{m.get('rounds')} interleaved rounds of about {m.get('round_ms', 0):g} ms a backend (A B A B), warm-up {m.get('warmup_ms', 0):g} ms; "
        f"medians of rounds; spread = 10th to 90th percentile range over the median; p50, p90, p99 over single inferences; "
        f"ratios round by round with the bootstrap 95 % interval of their median; {m.get('weights', 'random weights')}"
    )


def terminal_lines(result: BenchResult) -> list[str]:
    lines = [_machine(result)]
    if result.environment.get("gpu"):
        lines.append(f"  {_states(result)}")
    for case in cases(result):
        left = f", {case.tokens_left} of {case.seqlen} tokens left" if case.tokens_left < case.seqlen else ""
        lines.append(f"{case}{left}")
        ratios = {(c.rival, c.launch): c for c in result.comparisons if c.case == case}
        for m in (m for m in result.measurements if m.case == case):
            text = f"  {m.label:<24} {_ms(m.median_ms):>9} ms  spread {m.spread:5.1%}  p90 {_ms(m.latency.p90)}  p99 {_ms(m.latency.p99)}"
            text += f"  {m.images_per_second:,.0f} images/s"
            if memory := _mib(m.memory):
                text += f"  {memory} MiB"
            lines.append(text)
            if m.notes or m.difference is not None:
                extra = [f"logits differ by {m.difference:.1e}"] if m.difference is not None else []
                lines.append(f"    {'; '.join([*extra, *m.notes])}")
        lines += [f"  {c.subject} / {c.rival}, {c.launch}: {_ratio(c)}" for c in ratios.values()]
        lines += [f"  {s.backend}: SKIPPED, {s.reason}" for s in result.skipped if s.case == case]
    shown = set(cases(result))
    lines += [f"{s.case}: {s.backend} SKIPPED, {s.reason}" for s in result.skipped if s.case not in shown]
    for profile in result.profiles:
        lines += profile_lines(profile)
    if result.max_ratio is not None:
        failures = result.failures
        lines.append(f"gate, ratio at most {result.max_ratio:g}: {'FAILED' if failures else 'passed'}")
        lines += [f"  PerformanceError: {failure}" for failure in failures]
    lines += [f"wrote {path}" for path in result.outputs]
    return lines


def profile_lines(profile: dict[str, Any], most: int = 14) -> list[str]:
    lines = [f"profile of {profile['engine']}, {profile['case']}: {profile['total_ms']:.3f} ms in {len(profile['nodes'])} nodes"]
    lines.append(f"  {'module':<34} {'us':>9} {'share':>6} {'nodes':>5} {'floor us':>9} {'x floor':>7}  bound by")
    for row in profile["modules"][:most]:
        floor = f"{row['floor_us']:9.1f} {row['us'] / row['floor_us']:7.1f}  {row['bound']}" if row.get("floor_us") else ""
        lines.append(f"  {row['module']:<34} {row['us']:9.1f} {row['share']:6.1%} {row['nodes']:>5} {floor}")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def markdown(result: BenchResult, plots: Sequence[str] = ()) -> str:
    """Machine, method, the latency table, who wins where, details, profiles, plots. Deterministic in `result`."""
    out = [f"Machine: {_machine(result)}.", "", f"State: {_states(result)}.", "", f"Method: {_method(result)}.", "", "### Latency", ""]
    labels = list(dict.fromkeys(m.label for m in result.measurements))
    rows = []
    for case in cases(result):
        mine = {m.label: m for m in result.measurements if m.case == case}
        cells = [f"{_ms(mine[label].median_ms)} ({mine[label].spread:.1%})" if label in mine else "" for label in labels]
        rows.append([case.model, case.rate, str(case.tokens_left), case.pixels, case.precision, str(case.batch), *cells])
    out += _table(["model", "rate", "tokens left", "px", "precision", "batch", *(f"{label}, ms (spread)" for label in labels)], rows)
    if result.comparisons:
        out += ["", "### Ratios: the subject's time over the rival's (under 1, the subject is faster)", ""]
        rows = [
            [str(c.case), c.subject, c.rival, c.launch, _ratio(c), f"{c.ratio.p10:.3f} to {c.ratio.p90:.3f}", str(c.ratio.rounds)]
            for c in result.comparisons
        ]
        out += _table(["case", "subject", "rival", "launch", "median (95 % interval)", "p10 to p90 of rounds", "rounds"], rows)
        out += ["", "### Who wins where", ""]
        rows = [
            [
                str(case),
                first.label,
                _ms(first.median_ms),
                second.label if second else "",
                f"{second.median_ms / first.median_ms:.2f}" if second else "",
            ]
            for case, first, second in winners(result)
        ]
        out += _table(["case", "fastest", "ms", "next", "times as long"], rows)
    out += ["", "### Details", ""]
    rows = [
        [
            str(m.case),
            m.label,
            m.precision,
            _ms(m.latency.p50),
            _ms(m.latency.p90),
            _ms(m.latency.p99),
            f"{m.images_per_second:,.0f}",
            _mib(m.memory),
            f"{m.difference:.1e}" if m.difference is not None else "",
            "; ".join(m.notes),
        ]
        for m in result.measurements
    ]
    head = ["case", "backend", "runs in", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak MiB", "logits differ by", "notes"]
    out += _table(head, rows)
    if result.skipped:
        out += ["", "### Not measured", "", *_table(["case", "backend", "reason"], [[str(s.case), s.backend, s.reason] for s in result.skipped])]
    for profile in result.profiles:
        out += ["", f"### Where the time goes: {profile['case']}", "", *_profile_table(profile)]
    out += _estimates(result)
    if plots:
        out += ["", *(f"![{Path(plot).stem.replace('-', ' ')}]({plot})" for plot in plots)]
    return "\n".join(out) + "\n"


def _estimates(result: BenchResult) -> list[str]:
    from .estimates import estimate_rows

    medians = {str(m.case): m.median_ms for m in result.measurements if m.backend == "engine" and m.launch == "graph"}
    rows = estimate_rows(result.profiles, medians)
    if not rows:
        return []
    text = (
        "ESTIMATES, not measurements: each module of the profiles above stays as many times its floor as it was here, with the other "
        "card's ceilings (data sheets, times the share that this card reaches of its own). The second figure counts half the FP32 lanes "
        "of an sm_80 multiprocessor against the scan."
    )
    return ["", "### Other cards, estimated", "", text, "", *_table(["case", "card", "ms (estimate)", "times this card"], rows)]


def _profile_table(profile: dict[str, Any]) -> list[str]:
    rows = []
    for row in profile["modules"]:
        if row["us"] < 0.05:  # constants that TensorRT lists as layers
            continue
        floor = [f"{row['floor_us']:.1f}", f"{row['us'] / row['floor_us']:.1f}", row["bound"]] if row.get("floor_us") else ["", "", ""]
        rows.append([row["module"], f"{row['us']:.1f}", f"{row['share']:.1%}", str(row["nodes"]), *floor])
    text = f"{profile['total_ms']:.3f} ms by TensorRT's profiler (plain launches, one synchronisation a node: more than in a graph)."
    head = ["module", "us", "share", "nodes", "floor us", "times the floor", "bound by"]
    return [text, "", f"Ceilings: {profile['ceilings'].get('source', '')}.", "", *_table(head, rows)]


# --- plots -----------------------------------------------------------------------------------------------------------------


def plottable(result: BenchResult) -> dict[str, list[tuple[str, dict[str, list[tuple[float, Measurement]]]]]]:
    """For each axis (batch, resolution, rate) with two values or more: panels of (title, backend -> points)."""
    axes: dict[str, list[tuple[str, dict[str, list[tuple[float, Measurement]]]]]] = {}
    for axis, _, x_of, group_of in _SERIES:
        groups: dict[Any, dict[str, list[tuple[float, Measurement]]]] = {}
        for m in result.measurements:
            groups.setdefault(group_of(m.case), {}).setdefault(m.label, []).append((x_of(m.case), m))
        panels = []
        for lines in groups.values():
            if len({x for points in lines.values() for x, _ in points}) < 2:
                continue
            case = next(iter(lines.values()))[0][1].case
            parts = {"batch": f"batch {case.batch}", "resolution": f"{case.pixels} px", "rate": f"rate {case.rate}"}
            title = ", ".join([case.model, *(part for name, part in parts.items() if name != axis), case.precision])
            panels.append((title, {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}))
        if panels:
            axes[axis] = panels
    return axes


def _apart(ticks: Sequence[float], log: bool, share: float = 0.08) -> list[float]:
    """The ascending ticks without those whose labels would run into the one before: nearer than `share` of the axis."""
    place = math.log2 if log else float
    span = place(ticks[-1]) - place(ticks[0])
    kept = list(ticks[:1])
    for tick in ticks[1:]:
        if place(tick) - place(kept[-1]) >= share * span:
            kept.append(tick)
    return kept


def draw_plots(result: BenchResult, folder: Path) -> list[Path]:
    """latency-vs-AXIS.png for each axis that varies; bars are the 10th to 90th percentile of rounds. Returns the files made."""
    axes = plottable(result)
    if not axes:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from .statistics import quantile

    labels = list(dict.fromkeys(m.label for m in result.measurements))
    style = {label: (f"C{index % 10}", "os^Dv<>P*X"[index % 10]) for index, label in enumerate(labels)}
    names = {axis: text for axis, text, _, _ in _SERIES}
    plain: Callable[[float, object], str] = lambda value, _: f"{value:g}"  # noqa: E731
    made = []
    for axis, panels in axes.items():
        panels = panels[:_MAX_PANELS]
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(1.2 + 4.6 * columns, 0.9 + 3.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for place in grid[len(panels) :]:
            place.set_visible(False)
        drawn: dict[str, Any] = {}
        for place, (title, lines) in zip(grid, panels, strict=False):
            ticks = sorted({x for points in lines.values() for x, _ in points})
            for label, points in lines.items():
                # Time an image where the batch varies: otherwise the batch hides everything else.
                per = [m.case.batch if axis == "batch" else 1 for _, m in points]
                y = [m.median_ms / n for (_, m), n in zip(points, per, strict=True)]
                low = [max(0.0, v - quantile(m.rounds_ms, 0.1) / n) for v, (_, m), n in zip(y, points, per, strict=True)]
                high = [max(0.0, quantile(m.rounds_ms, 0.9) / n - v) for v, (_, m), n in zip(y, points, per, strict=True)]
                colour, marker = style[label]
                drawn[label] = place.errorbar(
                    [x for x, _ in points], y, yerr=[low, high], color=colour, marker=marker, markersize=5, capsize=2, linewidth=1.4, label=label
                )
            if axis != "rate":
                place.set_xscale("log", base=2)
            else:
                place.invert_xaxis()  # more merging to the right
            place.set_yscale("log")
            place.set_xticks(_apart(ticks, log=axis != "rate"))
            place.xaxis.set_major_formatter(FuncFormatter(plain))
            place.xaxis.set_minor_formatter(NullFormatter())
            place.yaxis.set_major_formatter(FuncFormatter(plain))
            place.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
            place.yaxis.set_minor_formatter(NullFormatter())
            place.tick_params(labelsize=8, which="both")
            place.set_title(title, fontsize=9)
            place.set_xlabel(names[axis], fontsize=9)
            place.set_ylabel("ms an image" if axis == "batch" else "ms a batch", fontsize=9)
            place.grid(True, which="major", alpha=0.3)
        figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=min(4, len(drawn)), fontsize=9, frameon=False)
        where = result.environment.get("gpu") or result.environment.get("cpu") or ""
        figure.suptitle(f"Latency against {'tokens left' if axis == 'rate' else axis}: {where}", fontsize=10)
        path = folder / f"latency-vs-{axis}.png"
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=110, format="png")
        made.append(path)
    return made


# --- files -------------------------------------------------------------------------------------------------------------------


def write_json(result: BenchResult, path: Path) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_report(result: BenchResult, folder: Path) -> list[str]:
    """bench.json, bench.md, plots."""
    plots = draw_plots(result, folder)
    with written_aside(folder / "bench.md") as aside:
        aside.write_text("# stm bench\n\n" + markdown(result, [plot.name for plot in plots]), encoding="utf-8")
    result.outputs = [str(folder / "bench.json"), str(folder / "bench.md"), *map(str, plots)]
    write_json(result, folder / "bench.json")
    return result.outputs


def read_json(path: Path) -> BenchResult:
    """Raises:
    ArtefactError: no such file, or not one of ours.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtefactError(f"cannot read {path} as a result of `stm bench`: {str(error)[:200]}") from None
    return BenchResult.from_dict(data, str(path))


def update_document(result: BenchResult, path: Path) -> list[str]:
    """Put the tables between the markers of a Markdown file and the plots into the folder of its name beside it; the rest of the
    file stays as it is.

    Raises:
        ArtefactError: the file does not exist or does not have the two markers, once each and in order.
    """
    return fill_document(path, lambda folder: draw_plots(result, folder), lambda plots: markdown(result, plots))


def fill_document(path: Path, draw: Callable[[Path], list[Path]], text: Callable[[list[str]], str]) -> list[str]:
    """What `update_document` does, for any report.

    Args:
        draw: makes the plots in a folder.
        text: Markdown, given the plots' paths as the document sees them.
    """
    try:
        old = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); make it with the lines {BEGIN} and {END}") from None
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ArtefactError(f"{path} does not have {BEGIN} and {END} once each, in this order; the tables go between them")
    folder = path.with_suffix("")
    plots = draw(folder)
    head, tail = old[: old.index(BEGIN) + len(BEGIN)], old[old.index(END) :]
    body = text([f"{folder.name}/{plot.name}" for plot in plots])
    with written_aside(path) as aside:
        aside.write_text(f"{head}\n\n{body}\n{tail}", encoding="utf-8")
    return [str(path), *map(str, plots)]
