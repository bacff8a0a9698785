"""optimize_plan: a model, a budget and perhaps images -> the merge plan that changes the model least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stm.calibration import calibrate_constants
from stm.factory import with_plan
from stm.plan import MergePlan
from stm.vim import VisionMamba

from .budget import Budget, parse_budget
from .constants import flat_constants, quadratic, ridge, size_constants, with_constants
from .evaluation import Divergence
from .images import HELD_OUT, search_images
from .search import DROP, WEIGHTS, Limits, Progress, Search, paper_plan

SEARCH_SHARE = 0.75  # of the limits; the rest is for least squares
RIDGES = (1.0, 0.1, 0.01)
LEAST_SQUARES_STEPS = 4
BACKWARD_COST = 15  # forwards of all images that a step takes, about: five backward passes
KERNEL = {
    True: "the edge rule: merging costs no launch and no table in the engine",
    False: "a position table a layer, read by the same kernel as the edge rule",
}


@dataclass(frozen=True)
class Optimized:
    """What `optimize_plan` found. Divergences are means over the images searched on and over those held out (None: too few).

    `start` is the paper's plan at the same budget, None where its family cannot meet it.
    """

    plan: MergePlan
    start: MergePlan | None
    budget: Budget
    objective: str
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

    @property
    def edge(self) -> bool:
        return is_edge(self.plan)

    def to_dict(self) -> dict[str, Any]:
        names = ("objective", "stopped", "evaluations", "seconds", "images", "held_out_images", "divergence", "start_divergence", "held_out")
        figures = {name: getattr(self, name) for name in (*names, "start_held_out", "data")}
        return {"budget": str(self.budget), "cost": self.budget.cost(self.plan), "unit": self.budget.unit, "edge_rule": self.edge, **figures}

    def lines(self) -> list[str]:
        """For people."""
        what = {"kl": "KL from the unmerged model, nats", "state": "class-token state error (eq. 9, relative)"}[self.objective]

        def row(name: str, value: float | None, start: float | None, count: int) -> str:
            if value is None:
                return f"  {name:<21} not measured: too few images ({count})"
            text = f"  {name:<21} {value:.5f} on {count} images"
            if start is None:
                return text + "; the paper's edge plan cannot meet this budget"
            better = f", {start / value:.1f} times less" if 0 < value < start else "" if value < start else ", NOT better"
            return text + f" (the paper's edge plan at this budget: {start:.5f}{better})"

        return [
            f"  searched              {self.evaluations} plans in {self.seconds:.0f} s on {self.data}; {self.stopped}",
            f"  objective             {what}",
            row("there", self.divergence, self.start_divergence, self.images),
            row("held out", self.held_out, self.start_held_out, self.held_out_images),
            f"  budget                {self.budget.cost(self.plan):.4g} of {self.budget}",
            f"  in the engine         {KERNEL[self.edge]}; weights {_weights_cost(self.plan)}",
        ]


def is_edge(plan: MergePlan) -> bool:
    """Whether the plan has the form of the edge rule: at most one group a side, the outermost tokens into the next one."""
    for layer in plan.layers:
        length = plan.seqlen if layer == 0 else plan.lengths[layer - 1]
        cls = plan.cls_index if layer == 0 else plan.cls_positions[layer - 1]
        for left in (True, False):
            groups = [group for group in plan.groups(layer) if (group.target < cls) == left]
            for group in groups:
                count = len(group.sources)
                wanted = list(range(count)) if left else list(range(length - count, length))
                if len(groups) > 1 or list(group.sources) != wanted or group.target != (count if left else length - count - 1):
                    return False
    return True


def _weights_cost(plan: MergePlan) -> str:
    if plan.weights in ("hsp", "hsp_literal", "decay"):
        return f"{plan.weights}: computed for each image"
    return f"{plan.weights}: fixed, computed by nobody at run time"


def optimize_plan(
    model: VisionMamba,
    budget: str | Budget,
    images: Tensor | None = None,
    *,
    held_out: Tensor | None = None,
    off_centre: bool = True,
    objective: str = "kl",
    weights: Sequence[str] = WEIGHTS,
    least_squares: bool = True,
    seconds: float | None = 600.0,
    evaluations: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    data: str | None = None,
    better: Callable[[MergePlan, float], None] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Optimized:
    """Search the plan within `budget` whose model differs least from the unmerged one; no labels, no training.

    Args:
        model: with trained weights; its own plan is ignored.
        budget: text for `parse_budget` or a `Budget`.
        images: unlabelled, normalised (n, 3, height, width), a handful will do; None: generated ones (`dead_leaves`).
        held_out: images for the check; None: every fourth of `images`.
        off_centre: search on a copy of each image with its middle moved elsewhere, too (generated images need none).
        objective: "kl" or "state", see `Divergence`.
        weights: ways of weighing to search over, of hsp, decay, mean, sum, drop.
        least_squares: end with constants by Gauss-Newton (`constants.py`); kept only where they are better.
        seconds, evaluations: limits. With `evaluations` alone the result depends on nothing but the arguments.
        better: called with every plan that is the best so far, for example to save it.
        report: called after every plan.

    Raises:
        ConfigError: no images, a limit of 0, an unknown option. PlanError: the budget cannot be met. ShapeError: images that do not fit.
    """
    config, device = model.config, next(model.parameters()).device
    if isinstance(budget, str):
        budget = parse_budget(budget, config)
    limits = Limits.of(seconds, evaluations)
    looked = search_images(config, device, images, held_out, off_centre, seed, batch, data)
    divergence = Divergence(model, looked.batches, objective)
    search = Search(divergence, budget, weights=weights, limits=limits, seed=seed, better=better, report=report)
    search.share = SEARCH_SHARE if least_squares else 1.0
    state = search.run()
    plan, value, stopped = search.plan(state), search.best_value, search.stopped
    if least_squares and plan.merges and stopped != "interrupted":
        plan, value = _least_squares(model, search, plan, value, looked.batches, objective, seed)
        stopped = search.stopped
    start = paper_plan(config, budget)
    check = Divergence(model, looked.checks, objective) if looked.checks else None
    return Optimized(
        plan=plan,
        start=start,
        budget=budget,
        objective=objective,
        stopped=stopped,
        evaluations=search.evaluations,
        seconds=round(limits.elapsed, 1),
        images=looked.images,
        held_out_images=looked.held_out,
        divergence=value,
        start_divergence=search.start[1] if search.start else None,
        held_out=float(check(plan).mean()) if check else None,
        start_held_out=float(check(start).mean()) if check and start else None,
        data=looked.data,
    )


def _least_squares(
    model: VisionMamba, search: Search, plan: MergePlan, value: float, batches: Sequence[Tensor], objective: str, seed: int
) -> tuple[MergePlan, float]:
    """Constants for the plan's groups by ridge regression, from the best of several starts; what is not better is not taken.

    The matrix is made from three quarters of the batches' images; the ridge is chosen on all of them, where a step fitted to
    the noise of few images loses.
    """
    search.stage, search.share = "least squares", 1.0

    def tried(candidate: MergePlan) -> float:
        nonlocal plan, value
        found = float(search.divergence(candidate).mean())
        search.evaluations += 1
        if found < value and search.budget.holds(candidate):
            plan, value = candidate, found
            if search.better:
                search.better(plan, value)
        if search.report:
            start = search.start[1] if search.start else value
            search.report(Progress(search.stage, search.evaluations, search.limits.elapsed, start, value))
        return found

    try:
        fit = [images[torch.arange(len(images)) % HELD_OUT != HELD_OUT - 1] if len(images) >= HELD_OUT else images for images in batches]
        starts = [with_constants(plan, torch.zeros(sum(plan.removed(layer) for layer in plan.layers), dtype=torch.float64)), size_constants(plan)]
        computed = plan.with_weights("hsp")
        starts += [calibrate_constants(with_plan(model, None), computed, batches)]
        if plan.weights == "constant":
            starts.append(plan)
        at_value, _, at = min((tried(start), index, start) for index, start in enumerate(starts))
        for step in range(LEAST_SQUARES_STEPS):
            if search.limits.spent(search.evaluations) or not search.limits.has(BACKWARD_COST * search.divergence.seconds):
                break
            near = quadratic(model, at, fit, objective, seed=seed + step)
            before = at_value
            for strength in RIDGES:
                candidate = with_constants(at, flat_constants(at) + ridge(near.hessian, near.gradient, strength))
                found = tried(candidate)
                if found < at_value:
                    at_value, best = found, candidate
            if at_value >= before * (1 - 1e-3):
                break
            at = best
    except KeyboardInterrupt:
        search.stopped = "interrupted"
    return plan, value


__all__ = ["DROP", "Optimized", "is_edge", "optimize_plan"]
