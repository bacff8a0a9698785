"""Plots of a Run: accuracy against FLOPs and latency, state error against layer (the paper's figure 3), the plans as pictures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stm import plan_summary

from ..files import written_aside
from .results import UNMERGED, Row, Run

_MARKERS = "os^Dv<>P*Xhp8d"
_GROUPS = (  # title, families
    ("methods", ("stm", "plan", "rival", "control")),
    ("rules and weights of stm", ("stm", "ablation")),
    ("rivals before a plan's layers", ("stm", "plan", "like")),
    ("rivals frozen into plans", ("stm", "plan", "frozen")),
)
_ASIDE = tuple(title for title, families in _GROUPS if families[-1] in ("like", "frozen"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, dpi: int = 100) -> Path:
    """A PNG of 256 colours: a third of the size, and documents keep many."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    with written_aside(path) as aside, Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256).save(aside, "PNG", optimize=True)
    return path


def _groups(run: Run) -> list[tuple[str, list[str]]]:
    """Panels' rows: (title, names of methods), those that have more than stm itself."""
    found = []
    for title, families in _GROUPS:
        names = list(dict.fromkeys(row.name for row in run.rows if row.family in families))
        there = {row.family for row in run.rows}
        if any(name != "stm" for name in names) and (title not in _ASIDE or families[-1] in there):
            found.append((title, names))
    return found or [("methods", list(dict.fromkeys(row.name for row in run.rows if row.name != UNMERGED)))]


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """stm black and thick, controls grey and dashed, the others in colours that do not come twice."""
    from matplotlib import colormaps

    tab, dark = colormaps["tab10"], colormaps["Dark2"]
    colours = [*(tab(place) for place in (0, 1, 2, 3, 4, 5, 6, 8, 9)), *(dark(place) for place in range(8))]  # tab10 without its grey
    styles: dict[str, dict[str, Any]] = {}
    place = 0
    for name in names:
        if name == "stm":
            styles[name] = {"color": "black", "marker": "o", "linewidth": 2.4, "markersize": 5, "zorder": 5}
        elif name in ("resolution", "smaller"):
            styles[name] = {"color": "grey", "marker": "s" if name == "resolution" else "*", "linewidth": 1.2, "linestyle": "--", "markersize": 6}
        else:
            style = {"color": colours[place % len(colours)], "marker": _MARKERS[place % len(_MARKERS)], "linewidth": 1.2, "markersize": 4}
            styles[name], place = style, place + 1
    return styles


def draw_plots(run: Run, folder: Path) -> list[Path]:
    """All plots that the run has figures for; returns the files made."""
    if not any(row.name != UNMERGED for row in run.rows):
        return []
    made = [_accuracy(run, folder / f"accuracy-vs-flops-{run.model}.png", "GFLOPs, true", lambda row: float(row.figures["gflops_true"]))]
    for batch in run.batches:

        def place(row: Row, batch: int = batch) -> float | None:
            found = run.latency(row.name, row.budget, batch)
            if row.name == UNMERGED:
                return next((one.unmerged_ms for one in run.latencies if one.batch == batch and one.unmerged_ms), None)
            return found.median_ms if found else None

        made.append(_accuracy(run, folder / f"accuracy-vs-latency-b{batch}-{run.model}.png", f"ms, TensorRT, batch {batch}", place))
    if any(row.states for row in run.rows):
        made.append(_layers(run, folder / f"state-error-vs-layer-{run.model}.png"))
    if any(row.plan is not None for row in run.rows):
        made.append(_plans(run, folder / f"plans-{run.model}.png"))
    return made


def _accuracy(run: Run, path: Path, label: str, place: Callable[[Row], float | None]) -> Path:
    """Points of top-1 against the unmerged model over cost, symmetric log scale, so that a tenth of a point and forty can be told
    apart; bars are the paired 95 % intervals. Costs that lie far apart stand on a log scale, too."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    placed = {row.name for row in run.rows if place(row) is not None}
    everything = _groups(run)
    groups = [(title, names) for title, names in everything if placed & (set(names) - {"stm"})] or everything[:1]  # stm is in each, to compare
    figure = _figure(2.6 + 4.4 * len(run.variants), 0.6 + 3.6 * len(groups))
    grid = figure.subplots(len(groups), len(run.variants), squeeze=False, sharex="all", sharey="all")
    lowest = 100 * min((row.difference.low for row in run.rows if row.difference and place(row) is not None), default=0.0)
    highest = 100 * max((row.difference.high for row in run.rows if row.difference and place(row) is not None), default=0.0)
    ticks = [tick for tick in (-100, -50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5) if lowest * 1.2 <= tick <= max(0.5, highest)]
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    costs = [x for row in run.rows if (x := place(row)) is not None]
    places = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)] if costs and max(costs) > 4 * min(costs) > 0 else []
    for line, (title, names) in zip(grid, groups, strict=True):
        styles, drawn = _styles(names), {}
        for axes, variant in zip(line, run.variants, strict=True):
            whole = run.unmerged(variant)
            axes.axhline(0, color="tab:green", linewidth=1.2)
            if (x := place(whole)) is not None:
                axes.plot([x], [0], marker="D", color="tab:green", markersize=6)
            for name in names:
                rows = [(x, row.difference) for row in run.rows if (row.name, row.variant) == (name, variant) and (x := place(row)) is not None]
                points = sorted(((x, d) for x, d in rows if d is not None), key=lambda pair: pair[0])
                if points:
                    y = [100 * d.value for _, d in points]
                    errors = [[max(0.0, 100 * (d.value - d.low)) for _, d in points], [max(0.0, 100 * (d.high - d.value)) for _, d in points]]
                    drawn[name] = axes.errorbar([x for x, _ in points], y, yerr=errors, elinewidth=0.5, capsize=1.5, **styles[name])
            axes.set_yscale("symlog", linthresh=1, linscale=0.7)
            axes.set_yticks(ticks, minor=False)
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_locator(NullLocator())
            if places:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(FixedLocator(places))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(plain)
            axes.set_title(f"{variant} (unmerged {whole.top1.value:.2%}): {title}", fontsize=9)
            axes.grid(True, alpha=0.3)
            axes.tick_params(labelsize=8, labelbottom=True)
            axes.set_xlabel(label, fontsize=9)
        line[0].set_ylabel("points of top-1 to unmerged", fontsize=9)
        if drawn:
            line[-1].legend(list(drawn.values()), list(drawn), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    figure.suptitle(f"{run.model}: accuracy against {label} ({run.images} images; green: unmerged)", fontsize=10)
    return _save(figure, path)


def _layers(run: Run, path: Path) -> Path:
    """Relative error of the class token's hidden state in each layer, log scale; lines of a method's mean over images."""
    groups = [(title, names) for title, names in _groups(run) if title not in _ASIDE]
    lines = [(variant, title, names) for title, names in groups for variant in run.variants]
    figure = _figure(2.4 + 2.9 * len(run.budgets), 0.6 + 2.5 * len(lines))
    grid = figure.subplots(len(lines), len(run.budgets), squeeze=False, sharex="all", sharey="all")
    for line, (variant, title, names) in zip(grid, lines, strict=True):
        styles, drawn = _styles(names), {}
        for axes, budget in zip(line, run.budgets, strict=True):
            rows = {row.name: row for row in run.at(budget, variant)}
            for name in names:
                if name in rows and rows[name].states and name != "resolution":
                    shown = [(layer, value) for layer, value in enumerate(rows[name].states) if value > 1e-5]  # rounding below
                    style = {**styles[name], "markersize": 2.5}
                    drawn[name] = axes.plot([layer for layer, _ in shown], [value for _, value in shown], **style)[0]
            axes.set_yscale("log")
            axes.set_title(f"{variant}, {budget}", fontsize=8)
            axes.grid(True, alpha=0.3)
            axes.tick_params(labelsize=7, labelbottom=True)
        line[0].set_ylabel(f"state error\n({title})", fontsize=8)
        if drawn:
            line[-1].legend(list(drawn.values()), list(drawn), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    figure.suptitle(f"{run.model}: relative error of the class token's hidden state, layer by layer", fontsize=10)
    return _save(figure, path)


def _plans(run: Run, path: Path) -> Path:
    """What becomes of the patches, on a test image: a row a budget, a column a rule or plan (weights move no token)."""
    import torch

    from stm.data import DigitPairs

    from ..drawing import draw_groups

    config = run.config
    images, _ = DigitPairs("test", "centred").batch(torch.arange(1))
    sized = torch.nn.functional.interpolate(images.float() / 255, config.image_size, mode="bicubic", antialias=True, align_corners=False)
    pixels = sized.clamp(0, 1)[0].permute(1, 2, 0).numpy()
    seen: dict[tuple[str, str], Row] = {}
    for row in run.rows:
        if row.plan is not None and (row.family in ("stm", "plan", "frozen") or row.name in ("stm-frontier", "stm-spread", "stm-one-sided")):
            seen.setdefault((row.budget, row.name), row)
    names = list(dict.fromkeys(name for _, name in seen))
    budgets = [budget for budget in run.budgets if any((budget, name) in seen for name in names)]
    figure = _figure(0.4 + 2.5 * len(names), 0.6 + 2.85 * len(budgets))
    grid = figure.subplots(len(budgets), len(names), squeeze=False)
    for line, budget in zip(grid, budgets, strict=True):
        for axes, name in zip(line, names, strict=True):
            found = seen.get((budget, name))
            if found is None or found.plan is None:
                axes.set_axis_off()
                continue
            draw_groups(axes, config, found.plan, pixels)
            figures = plan_summary(config, found.plan)
            axes.set_title(f"{name}, {budget}\n{figures['tokens_left']} left, {figures['gflops_true_change']:+.1%} FLOPs", fontsize=8)
    title = f"{run.model}: patches that end as one token in one colour, the token kept outlined; red: the class token's place"
    figure.suptitle(textwrap.fill(title, 30 * len(names)), fontsize=10)
    return _save(figure, path, dpi=72)
