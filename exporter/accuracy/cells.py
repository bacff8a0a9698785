"""What the table compares: methods by name, and each at a budget as a model ready to run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stm import MergePlan, VimConfig, VisionMamba, make_plan, plan_summary, state_dict_sha256, with_plan
from stm.calibration import calibrate_constants
from stm.checkpoint import fit_state_dict
from stm.data import NUM_CLASSES, VARIANTS, DigitPairs
from stm.errors import ConfigError, PlanError, StmError
from stm.flops import gflops_true
from stm.optimization import images as images_module
from stm.reduction import (
    METHODS,
    Reduction,
    create_reduction,
    even_schedule,
    freeze,
    load_reduction,
    matching_flops,
    reduction_gflops_true,
    reduction_summary,
    schedule_text,
    with_reduction,
)
from stm.registry import PackagedWeights, list_models, model_entry

from .budgets import AS_IT_IS, FLOPS, TOKEN_LAYERS, Budget, at_flops, k_schedule

OURS = {  # name -> (rule, weights, proportional decay)
    "stm": ("edge", "hsp", False),
    "stm-literal": ("edge", "hsp_literal", False),
    "stm-decay": ("edge", "decay", False),
    "stm-constant": ("edge", "constant", False),
    "stm-sum": ("edge", "sum", False),
    "stm-mean": ("edge", "mean", False),
    "stm-proportional": ("edge", "hsp", True),
    "stm-frontier": ("frontier", "hsp", False),
    "stm-spread": ("spread", "hsp", False),
    "stm-one-sided": ("one_sided", "hsp", False),
}
REFERENCE = "stm"
CONTROLS = ("smaller", "resolution")
FROZEN = "frozen-"
AT = "@"
"""mtr@best: MTR before the layers of the plan `best`, with its counts; tells a plan's schedule from its choice of tokens."""
GROUPS: dict[str, tuple[str, ...]] = {
    "weights": ("stm", "stm-literal", "stm-decay", "stm-constant", "stm-sum", "stm-mean", "stm-proportional"),
    "generators": ("stm", "stm-frontier", "stm-spread", "stm-one-sided"),
    "rivals": tuple(METHODS),
    "frozen": tuple(FROZEN + name for name in METHODS),
    "controls": CONTROLS,
}
DEFAULT = ("weights", "generators", "rivals", "controls")
CALIBRATION_IMAGES = 64


def family(name: str) -> str:
    """stm, ablation, rival, like (a rival before a plan's layers), frozen, control, or plan (a file of the user's)."""
    if name == REFERENCE:
        return "stm"
    if name in OURS:
        return "ablation"
    if name in METHODS:
        return "rival"
    if AT in name and name.partition(AT)[0] in METHODS:
        return "like"
    return "control" if name in CONTROLS else "frozen" if name.removeprefix(FROZEN) in METHODS and name.startswith(FROZEN) else "plan"


def parse_methods(names: Sequence[str], plans: Sequence[str] = ()) -> list[str]:
    """Names and groups -> names, each once, in order; "mtr@best" and "rivals@best" where `best` is one of `plans`.

    Raises:
        ConfigError: an unknown name or plan.
    """
    known = [*OURS, *METHODS, *GROUPS["frozen"], *CONTROLS]
    found: list[str] = []
    for name in names:
        method, at, plan = name.partition(AT)
        if at and (method == "rivals" or method in METHODS):
            if plan not in plans:
                raise ConfigError(f"method {name!r} takes its layers from the plan {plan!r}; give --plan {plan}=FILE.json")
            found += [one + AT + plan for one in (METHODS if method == "rivals" else [method])]
        elif name == "all":
            found += known
        elif name in GROUPS:
            found += GROUPS[name]
        elif name in known:
            found.append(name)
        else:
            raise ConfigError(
                f"no method {name!r}; groups: all, {', '.join(GROUPS)}; methods: {', '.join([*OURS, *METHODS, *CONTROLS])}; frozen-NAME of a rival; "
                "NAME@PLAN: a rival, or rivals, before the layers of a --plan"
            )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Cell:
    """A method at a budget: one row of the table in each variant. `plan`, `reduction`: a file of the user's; `like`: the plan whose
    schedule a rival takes."""

    name: str
    budget: Budget
    plan: MergePlan | None = None
    like: MergePlan | None = None
    reduction: Reduction | None = None

    @property
    def family(self) -> str:
        return family(self.name)


@dataclass
class Candidate:
    """A cell made: a model on the device, its figures (as `plan_summary`), what identifies it, its schedule in words."""

    model: VisionMamba
    figures: dict[str, Any]
    identity: dict[str, Any]
    schedule: str
    plan: MergePlan | None = None
    reduction: Reduction | None = None


@dataclass
class Bench:
    """The trained model and what is made from it once.

    Args:
        base: unmerged, on the device, all tokens computed in the last layer.
        smaller: the next smaller model with weights, None where there is none (`no_smaller` says why).
    """

    base: VisionMamba
    smaller: VisionMamba | None = None
    no_smaller: str = "none given"
    _plans: dict[Any, MergePlan] = field(default_factory=dict)
    _reductions: dict[Any, Reduction] = field(default_factory=dict)
    _calibration: list[Tensor] = field(default_factory=list)

    @property
    def config(self) -> VimConfig:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def calibration(self) -> list[Tensor]:
        """Training images without their labels, half of each variant: what constants and frozen plans are made from."""
        if not self._calibration:
            half = CALIBRATION_IMAGES // len(VARIANTS)
            for variant in VARIANTS:
                images, _ = DigitPairs("train", variant, device=self.device).batch(torch.arange(half))
                self._calibration += list(torch.split(normalised(images, self.config), 16))
        return self._calibration

    def make(self, cell: Cell) -> Candidate:
        """Raises:
        StmError: this method cannot save so much on this model, or lacks what it needs; says why.
        """
        if cell.name == "resolution":
            return self._resolution(cell.budget)
        if cell.name == "smaller":
            return self._smaller()
        if cell.plan is not None:
            return self._planned(cell.plan)
        if cell.name in OURS:
            return self._ours(cell.name, cell.budget)
        if cell.reduction is not None:
            method, reduction = cell.reduction.method, cell.reduction
        elif cell.like is not None:
            method = cell.name.partition(AT)[0]
            reduction = scheduled_like(self.config, method, cell.like)
        else:
            method = cell.name.removeprefix(FROZEN)
            reduction = self._reduction(method, cell.budget, matching=method == cell.name)
            if cell.name != method:
                return self._frozen(cell, reduction)
        identity = {"method": method, "removed": {str(layer): count for layer, count in reduction.schedule.items()}}
        model = with_reduction(self.base, reduction)
        return Candidate(model, reduction_summary(reduction), identity, schedule_text(reduction), reduction=reduction)

    # --- plans -------------------------------------------------------------------------------------------------------------

    def _planned(self, plan: MergePlan, identity: dict[str, Any] | None = None) -> Candidate:
        figures = plan_summary(self.config, plan)
        return Candidate(with_plan(self.base, plan), figures, identity or {"plan": plan_digest(plan)}, plan_text(plan), plan)

    def _ours(self, name: str, budget: Budget) -> Candidate:
        rule, weights, proportional = OURS[name]

        def make(token_layers: int) -> tuple[MergePlan, float]:
            schedule = k_schedule(self.config, token_layers, one_sided=rule == "one_sided")
            kind = "hsp" if weights == "constant" else weights
            plan = make_plan(self.config, schedule=schedule, rule=rule, weights=kind, proportional_decay=proportional)
            return plan, gflops_true(self.config, plan)

        plan = at_flops(self.config, budget.value, make) if budget.kind == FLOPS else make(int(budget.value))[0]
        if weights != "constant":
            return self._planned(plan)
        if (key := (name, budget)) not in self._plans:
            self._plans[key] = calibrate_constants(self.base, plan, self.calibration())
        return self._planned(self._plans[key], {"constants_of": plan_digest(plan), "images": CALIBRATION_IMAGES})

    def _frozen(self, cell: Cell, reduction: Reduction) -> Candidate:
        if (key := (cell.name, cell.budget)) not in self._plans:
            self._plans[key] = freeze(self.base, reduction, self.calibration())
        removed = {str(layer): count for layer, count in reduction.schedule.items()}
        return self._planned(self._plans[key], {"frozen": reduction.name, "removed": removed, "images": CALIBRATION_IMAGES})

    # --- rivals ------------------------------------------------------------------------------------------------------------

    def _reduction(self, method: str, budget: Budget, matching: bool) -> Reduction:
        """A rival at a budget: its own layers where it has some and they hold so much, else the schedule of our plans."""
        entry = METHODS[method]

        def make(token_layers: int) -> tuple[Reduction, float]:
            schedule: dict[int, int] = {}
            if entry.layers is not None:
                layers = list(entry.layers(self.config))
                if budget.kind == FLOPS:  # only these can be met, and looking for others takes long
                    token_layers -= token_layers % math.gcd(*(self.config.depth - layer for layer in layers))
                try:
                    schedule = even_schedule(self.config, layers, token_layers)
                    created = create_reduction(method, self.config, schedule=schedule)
                    return created, flops(created)
                except PlanError:
                    pass  # its own layers do not hold so much
            schedule = {layer: left + right for layer, (left, right) in k_schedule(self.config, token_layers).items()}
            created = create_reduction(method, self.config, schedule=schedule)
            return created, flops(created)

        def flops(reduction: Reduction) -> float:
            return reduction_gflops_true(reduction) - (0 if matching else matching_flops(reduction) / 1e9)

        if (key := (method, budget, matching)) not in self._reductions:
            found = at_flops(self.config, budget.value, make) if budget.kind == FLOPS else make(int(budget.value))[0]
            self._reductions[key] = found
        return self._reductions[key]

    # --- controls ----------------------------------------------------------------------------------------------------------

    def _resolution(self, budget: Budget) -> Candidate:
        """The same weights on smaller images (position embedding interpolated), as near to the budget's FLOPs as the grid allows."""
        config = self.config
        target = gflops_true(config, self._ours(REFERENCE, budget).plan)
        sizes = []
        for step in range(1, config.grid[0]):
            height, width = (side - step * config.stride for side in config.image_size)
            if min(height, width) >= 2 * config.patch_size:
                sizes.append((height, width))
        if not sizes:
            raise PlanError(f"images of {config.image_size[0]}x{config.image_size[1]} cannot be made smaller by a patch")
        configs = [config.with_changes(image_size=size) for size in sizes]
        chosen = min(configs, key=lambda c: abs(gflops_true(c) - target))
        with torch.device("meta"):
            model = VisionMamba(chosen, cls_only_last=False)
        state = fit_state_dict(model, chosen, {k: v.detach() for k, v in self.base.state_dict().items()}, config.name)
        model.load_state_dict(state, strict=True, assign=True)
        figures = self._relative(plan_summary(chosen, None))
        figures["token_layers_removed"] = (config.seqlen - chosen.seqlen) * config.depth
        text = f"{chosen.image_size[0]}x{chosen.image_size[1]} px, {chosen.seqlen} tokens"
        return Candidate(model.to(self.device).eval().requires_grad_(False), figures, {"image_size": list(chosen.image_size)}, text)

    def _smaller(self) -> Candidate:
        if self.smaller is None:
            raise PlanError(f"no smaller model: {self.no_smaller}")
        config = self.smaller.config
        identity = {"model": config.name, "weights_sha256": state_dict_sha256(self.smaller.state_dict())}
        return Candidate(self.smaller, self._relative(plan_summary(config, None)), identity, f"{config.name}, nothing merged")

    def _relative(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Changes against the model of the table, not against itself."""
        whole = plan_summary(self.config, None)
        changes = {f"{key}_change": round(figures[key] / whole[key] - 1, 6) for key in ("gflops_true", "gflops_paper")}
        return {**figures, **changes}


def scheduled_like(config: VimConfig, method: str, plan: MergePlan) -> Reduction:
    """A rival with a plan's counts before the plan's layers; what is more than one step of it can remove goes before the next layers.

    Raises:
        PlanError: the layers left do not hold it.
    """
    schedule: dict[int, int] = {}
    length, late, limits = config.seqlen, 0, create_reduction(method, config, schedule={})
    for layer in range(1, config.depth):
        late += plan.removed(layer)
        count = min(late, limits.most(length))
        if limits.most(length) < length - 3:  # those that match remove at most half, with counts a side at most half of each
            count = min(count, 2 * ((length - 1) // 4))
        if count:
            schedule[layer] = count
            length, late = length - count, late - count
    if late:
        raise PlanError(f"{method} before the plan's layers: {late} of {config.seqlen - plan.tokens_left} tokens find no layer any more")
    return create_reduction(method, config, schedule=schedule)


def load_plan(path: str | os.PathLike[str], config: VimConfig) -> MergePlan | Reduction:
    """A file of `stm plan`: a merge plan, or the schedule of a method that looks at the image.

    Raises:
        PlanError: it is neither, or another model's.
    """
    try:
        kind = json.loads(Path(path).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None  # the plan's own reader says what is wrong
    return load_reduction(path, config) if kind == "reduction" else MergePlan.load(path)


def plan_digest(plan: MergePlan) -> str:
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()


def plan_text(plan: MergePlan) -> str:
    """The schedule in words, runs of equal counts together."""
    runs: list[list[int]] = []
    for layer in range(plan.depth):
        count = plan.removed(layer)
        if count and runs and runs[-1][0] == count and runs[-1][2] == layer - 1:
            runs[-1][2] = layer
        elif count:
            runs.append([count, layer, layer])
    words = ", ".join(f"{count} before {first}{f'..{last}' if last > first else ''}" for count, first, last in runs) or "nothing"
    return f"{words}: {plan.tokens_left} left, TL {plan.token_layers_removed}"


def cells(config: VimConfig, methods: Sequence[str], wanted: Sequence[Budget], plans: Mapping[str, Sequence[MergePlan | Reduction]]) -> list[Cell]:
    """All cells, budget by budget; a plan of the user's stands at the budget that it spends, or at one of its own.

    Raises:
        ConfigError: a plan with a method's name, two plans of one name at one budget, or a rival before the layers of what is no plan.
        PlanError: a plan of another model.
    """
    extra: list[Cell] = []
    for name, files in plans.items():
        if family(name) != "plan" or name in (*GROUPS, "all", "none"):
            raise ConfigError(f"--plan {name}=..: {name!r} is a method of the table; give the plan another name")
        for plan in files:
            if isinstance(plan, MergePlan):
                plan.check_fits(config)
            figures = plan_summary(config, plan) if isinstance(plan, MergePlan) else reduction_summary(plan)
            budget = next((one for one in wanted if one.holds(figures)), Budget(TOKEN_LAYERS, float(plan.token_layers_removed)))
            if any((cell.name, cell.budget) == (name, budget) for cell in extra):
                raise ConfigError(f"--plan {name}=..: two plans of this name spend {budget.label}; give them different names")
            extra.append(Cell(name, budget, plan) if isinstance(plan, MergePlan) else Cell(name, budget, reduction=plan))
    order = [*wanted, *dict.fromkeys(cell.budget for cell in extra if cell.budget not in wanted)]
    found: list[Cell] = []
    for budget in order:
        here = {cell.name: cell for cell in extra if cell.budget == budget}
        found += here.values()
        if budget in wanted:
            found += [Cell(name, budget) for name in methods if name != "smaller" and AT not in name]
        for name in methods:
            if (at := name.partition(AT)[2]) in here:
                if here[at].plan is None:
                    raise ConfigError(f"method {name!r} takes the layers of a merge plan, and {at} is a method's schedule; leave it out")
                found.append(Cell(name, budget, like=here[at].plan))
    return found + [Cell("smaller", AS_IT_IS) for name in methods if name == "smaller"]


def normalised(images: Tensor, config: VimConfig) -> Tensor:
    """uint8 images (batch, 3, side, side) as the model wants them: resized where its size is another (bicubic, antialiased)."""
    x = images.float() / 255
    if tuple(x.shape[2:]) != config.image_size:
        x = torch.nn.functional.interpolate(x, config.image_size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images_module.normalised(x, config)


def next_smaller(config: VimConfig) -> tuple[VisionMamba | None, str]:
    """The largest model below this one whose weights for these images are in the package; or why there is none."""
    from ..deploy import load_model

    known = [(model_entry(other).config.d_model, other) for other in list_models() if isinstance(model_entry(other).weights, PackagedWeights)]
    below = [other for size, other in sorted(known) if size < config.d_model]
    if not below:
        return None, f"no model below {config.name} comes with weights for these images"
    try:
        model = load_model(below[-1], num_classes=NUM_CLASSES)
    except StmError as error:
        return None, str(error)
    model.cls_only_last = False  # as `Bench.base`
    return model, ""
