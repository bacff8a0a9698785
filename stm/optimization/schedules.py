"""optimize_schedule: how many tokens a method that looks at the image removes before each layer, so that the model changes least.

Which tokens go is the method's own choice, image by image; searched is when they go. A candidate is a weight a layer; the number of
tokens is the least that meets the budget, shared out by the weights. First windows of layers (where they begin and how long they
are), then the window's ends and slope, then tokens moved from one layer to another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.errors import PlanError
from stm.factory import with_plan
from stm.reduction import Reduction, create_reduction, reduction_gflops_true, schedule_text, with_reduction
from stm.vim import VisionMamba

from .budget import Budget, parse_budget
from .evaluation import beaten
from .images import search_images
from .search import Limits, Progress

PATIENCE = 60  # exchanges in a row that bring nothing
GAIN = 1e-3  # what counts as better, of the divergence


@dataclass(frozen=True)
class OptimizedSchedule:
    """What `optimize_schedule` found. Divergences are means over the images searched on and over those held out (None: too few).

    `start` is the method at the same budget as it is usually run, as many tokens before each layer from layer 1; None where that cannot meet it.
    """

    reduction: Reduction
    start: Reduction | None
    budget: Budget
    stopped: str
    evaluations: int
    seconds: float
    images: int
    held_out_images: int
    divergence: float
    start_divergence: float | None
    held_out: float | None
    start_held_out: float | None
    data: str

    def to_dict(self) -> dict[str, Any]:
        names = (
            "stopped",
            "evaluations",
            "seconds",
            "images",
            "held_out_images",
            "divergence",
            "start_divergence",
            "held_out",
            "start_held_out",
            "data",
        )
        cost = reduction_cost(self.budget, self.reduction)
        return {
            "budget": str(self.budget),
            "cost": cost,
            "unit": self.budget.unit,
            "data": self.data,
            **{name: getattr(self, name) for name in names},
        }

    def lines(self) -> list[str]:
        """For people."""

        def row(name: str, value: float | None, start: float | None, count: int) -> str:
            if value is None:
                return f"  {name:<21} not measured: too few images ({count})"
            compared = f" (evenly from layer 1: {start:.5f})" if start is not None else "; evenly from layer 1 cannot meet this budget"
            return f"  {name:<21} {value:.5f} on {count} images{compared}"

        return [
            f"  schedule              {schedule_text(self.reduction)}",
            f"  searched              {self.evaluations} schedules in {self.seconds:.0f} s on {self.data}; {self.stopped}",
            "  objective             KL from the unmerged model, nats",
            row("there", self.divergence, self.start_divergence, self.images),
            row("held out", self.held_out, self.start_held_out, self.held_out_images),
            f"  budget                {reduction_cost(self.budget, self.reduction):.4g} of {self.budget}",
        ]


def reduction_cost(budget: Budget, reduction: Reduction) -> float:
    """What a method costs in the budget's unit. GFLOPs hold its matching; milliseconds by a table do not."""
    if budget.unit == "GFLOPs":
        return reduction_gflops_true(reduction)
    if budget.table is not None:
        return budget.table(reduction.lengths)
    return float(sum(reduction.lengths))


class Fit:
    """Weights by layer -> the method with the fewest tokens removed, shared out by them, that meets the budget."""

    def __init__(self, method: str, config: VimConfig, budget: Budget, options: dict[str, Any]) -> None:
        self.method, self.config, self.budget, self.options = method, config, budget, options

    def __call__(self, weights: Sequence[float]) -> Reduction | None:
        """`weights[i]` is layer i + 1's; None where the method cannot remove so much in these layers."""
        low, high = 0, self.config.seqlen - 3
        while high - low > 1:
            middle = (low + high) // 2
            made = self._made(weights, middle)
            enough = made is None or reduction_cost(self.budget, made) <= self.budget.limit
            low, high = (low, middle) if enough else (middle, high)
        made = self._made(weights, high)
        return made if made is not None and reduction_cost(self.budget, made) <= self.budget.limit else None

    def _made(self, weights: Sequence[float], count: int) -> Reduction | None:
        total, before, done, schedule = sum(weights), 0.0, 0, {}
        for index, weight in enumerate(weights):
            before += weight
            until = round(count * before / total)
            if until > done:
                schedule[index + 1] = until - done
                done = until
        try:
            return create_reduction(self.method, self.config, schedule=schedule, **self.options)
        except PlanError:
            return None


class _Distance:
    """KL of a method's class probabilities from the unmerged model's, an image a number, float64 on the CPU."""

    def __init__(self, model: VisionMamba, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = with_plan(model, None), batches
        with torch.inference_mode():
            self.truth = [torch.log_softmax(self.model(batch).double(), -1) for batch in batches]

    @torch.inference_mode()
    def __call__(self, reduction: Reduction, rival: Tensor | None = None) -> Tensor:
        """As `Divergence`: with a `rival` to beat, the rest is left out once it cannot be beaten any more."""
        merged = with_reduction(self.model, reduction).to(next(self.model.parameters()).device)
        found: list[Tensor] = []
        for batch, truth in zip(self.batches, self.truth, strict=True):
            kl = (truth.exp() * (truth - torch.log_softmax(merged(batch).double(), -1))).sum(-1)
            found.append(kl.clamp_min(0).cpu())
            if rival is not None and beaten(torch.cat(found), rival):
                break
        return torch.cat(found)


class _Search:
    def __init__(self, distance: _Distance, fit: Fit, limits: Limits, better: Callable[[Reduction, float], None] | None, report: Any) -> None:
        self.distance, self.fit, self.limits, self.better, self.report = distance, fit, limits, better, report
        self.best: Reduction | None = None
        self.weights: list[float] = []
        self.values: Tensor | None = None
        self.start: float | None = None
        self.evaluations, self.stage = 0, "windows"
        self.seen: set[tuple[tuple[int, int], ...]] = set()

    def spent(self) -> bool:
        return self.limits.spent(self.evaluations)

    def tried(self, weights: Sequence[float]) -> bool:
        """Run it, unless known; whether it is the best now."""
        if self.spent() or not sum(weights):
            return False
        reduction = self.fit(weights)
        if reduction is None or (key := tuple(reduction.schedule.items())) in self.seen:
            return False
        self.seen.add(key)
        values = self.distance(reduction, self.values)
        self.evaluations += 1
        better = self.values is None or (len(values) == len(self.values) and float(values.mean()) < (1 - GAIN) * float(self.values.mean()))
        if better:
            self.best, self.weights, self.values = reduction, list(weights), values
            if self.better:
                self.better(reduction, float(values.mean()))
        if self.report and self.values is not None:
            now = float(self.values.mean())
            self.report(Progress(self.stage, self.evaluations, self.limits.elapsed, self.start if self.start is not None else now, now))
        return better

    def run(self, depth: int, seed: int) -> None:
        layers = depth - 1

        def window(first: int, last: int, slope: float = 1.0) -> list[float]:
            """1 before layers first..last; with a slope the last weighs so much more than the first."""
            span = max(1, last - first)
            return [slope ** ((layer - first) / span) if first <= layer <= last else 0.0 for layer in range(1, depth)]

        if self.tried(window(1, layers)) and self.values is not None:
            self.start = float(self.values.mean())
        best = (1, layers)
        for first in sorted({1, 2, *(max(1, depth * share // 12) for share in (2, 3, 4, 6, 8))}):
            for length in sorted({1, max(1, depth // 8), max(1, depth // 4), max(1, depth // 2), layers}):
                if (last := first + length - 1) <= layers and self.tried(window(first, last)):
                    best = (first, last)
        self.stage = "ends"
        moved = True
        while moved and not self.spent():
            moved = False
            for a, b in ((-1, -1), (1, 1), (0, 1), (0, -1), (1, 0), (-1, 0), (2, 2), (-2, -2)):
                first, last = best[0] + a, best[1] + b
                if 1 <= first <= last <= layers and self.tried(window(first, last)):
                    best, moved = (first, last), True
        for slope in (0.25, 0.5, 2.0, 4.0):
            self.tried(window(*best, slope))
        self.stage = "moves"
        g, idle = random.Random(seed), 0
        while self.best is not None and idle < PATIENCE and not self.spent():
            counts = [float(self.best.schedule.get(layer, 0)) for layer in range(1, depth)]
            source = g.choice([index for index, count in enumerate(counts) if count])
            near = g.random() < 0.7
            target = source + g.choice((-2, -1, 1, 2)) if near else g.randrange(layers)
            if not 0 <= target < layers or target == source:
                continue
            taken = counts[source] * g.choice((0.25, 0.5, 1.0))
            counts[source] -= taken
            counts[target] += taken
            idle = 0 if self.tried(counts) else idle + 1


def optimize_schedule(
    model: VisionMamba,
    method: str,
    budget: str | Budget,
    images: Tensor | None = None,
    *,
    held_out: Tensor | None = None,
    off_centre: bool = True,
    seconds: float | None = 600.0,
    evaluations: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    data: str | None = None,
    better: Callable[[Reduction, float], None] | None = None,
    report: Callable[[Progress], None] | None = None,
    **options: Any,
) -> OptimizedSchedule:
    """Search the schedule of `method` within `budget` whose model differs least from the unmerged one; no labels, no training.

    Args:
        model: with trained weights; its own plan is ignored.
        method: one of `stm.reduction.list_reductions()`; `options` are its own.
        budget, images, held_out, off_centre, seconds, evaluations, better, report: as `optimize_plan` has them.

    Raises:
        ConfigError: no images, no limit. PlanError: an unknown method, or no schedule of it meets the budget. ShapeError: images that do
            not fit.
    """
    config, device = model.config, next(model.parameters()).device
    create_reduction(method, config, schedule={}, **options)
    if isinstance(budget, str):
        budget = parse_budget(budget, config)
    limits = Limits.of(seconds, evaluations)
    looked = search_images(config, device, images, held_out, off_centre, seed, batch, data)
    search = _Search(_Distance(model, looked.batches), Fit(method, config, budget, options), limits, better, report)
    stopped = ""
    try:
        search.run(config.depth, seed)
    except KeyboardInterrupt:
        stopped = "interrupted"
    if search.best is None or search.values is None:
        raise PlanError(f"{method}: no schedule of it that was tried meets {budget} on {config.name!r}; raise the budget")
    start = search.fit([1.0] * (config.depth - 1))
    check = _Distance(model, looked.checks) if looked.checks else None
    return OptimizedSchedule(
        reduction=search.best,
        start=start,
        budget=budget,
        stopped=stopped or ("limit reached" if search.spent() else "nothing better found"),
        evaluations=search.evaluations,
        seconds=round(limits.elapsed, 1),
        images=looked.images,
        held_out_images=looked.held_out,
        divergence=float(search.values.mean()),
        start_divergence=search.start,
        held_out=_mean(check, search.best),
        start_held_out=_mean(check, start),
        data=looked.data,
    )


def _mean(check: _Distance | None, reduction: Reduction | None) -> float | None:
    return float(check(reduction).mean()) if check is not None and reduction is not None else None
