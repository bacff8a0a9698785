"""How much a method may save: token-layers, or a share of true FLOPs; and the schedules that save just that."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from stm import VimConfig, make_plan
from stm.errors import ConfigError, PlanError
from stm.flops import gflops_true
from stm.plan import PRESETS, constant_schedule

TOKEN_LAYERS, FLOPS, NONE = "token-layers", "flops", "none"
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Budget:
    """`value` token-layers removed, or the share of true FLOPs saved (0.4)."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        if self.kind == NONE:
            return "as it is"
        return f"TL {self.value:.0f}" if self.kind == TOKEN_LAYERS else f"-{100 * self.value:g} % FLOPs"

    def holds(self, figures: dict[str, Any]) -> bool:
        """Whether a plan with these figures spends this budget: within 1 % of the token-layers, or half a point of FLOPs."""
        if self.kind == TOKEN_LAYERS:
            return bool(abs(figures["token_layers_removed"] - self.value) <= 0.01 * self.value)
        return bool(abs(figures["gflops_true_change"] + self.value) <= 0.005)


AS_IT_IS = Budget(NONE, 0.0)
"""Of a model that nothing is taken from: the unmerged one, the next smaller one."""


def parse_flops(text: str) -> float:
    """Share saved: 0.4 of "40%", "-40%", "0.6x", "0.4".

    Raises:
        ConfigError: none of these.
    """
    found = re.fullmatch(r"\s*-?(\d+(?:\.\d+)?)\s*(%|x?)\s*", text)
    share = -1.0
    if found:
        number, unit = float(found[1]), found[2]
        share = number / 100 if unit == "%" else 1 - number if unit == "x" else number
    if not 0 < share < 1:
        raise ConfigError(f"--flops {text!r}: give what is saved, 40% or 0.4, or what is left, 0.6x")
    return round(share, 6)


def budgets(config: VimConfig, token_layers: list[int] | None, flops: list[str] | None) -> list[Budget]:
    """What was asked for; token-layers default to those of the presets (552, 792, 960, 1,076 on 197 tokens and 24 layers), FLOPs to -40 %.

    Raises:
        ConfigError: a budget twice.
    """
    if token_layers is None:
        token_layers = [make_plan(config, preset=name).token_layers_removed for name in PRESETS]
        token_layers = list(dict.fromkeys(value for value in token_layers if value))
    found = [Budget(TOKEN_LAYERS, value) for value in token_layers] + [Budget(FLOPS, parse_flops(text)) for text in flops or ["40%"]]
    for one in found:
        if found.count(one) > 1:
            raise ConfigError(f"budget {one.label} is given twice")
    return found


def k_schedule(config: VimConfig, token_layers: int, *, one_sided: bool = False) -> dict[int, tuple[int, int]]:
    """The paper's family: k tokens a side before each layer from layer 1 until some count is gone, with the least k that reaches
    `token_layers` and the count that comes nearest. Its presets are members (1,076: k = 2, 79 gone).

    Raises:
        PlanError: the sides do not hold so many; names both values.
    """
    room = config.cls_index - 1 + (0 if one_sided else config.seqlen - 2 - config.cls_index)

    def removed(schedule: dict[int, tuple[int, int]]) -> int:
        return sum((left + right) * (config.depth - layer) for layer, (left, right) in schedule.items())

    most = 0
    for k in range(1, max(1, room) + 1):
        limit = min(room, 2 * k * (config.depth - 1))
        whole = constant_schedule(config, k, limit, one_sided=one_sided) if limit > 0 else {}
        if (reached := removed(whole)) >= token_layers:
            options = (constant_schedule(config, k, count, one_sided=one_sided) for count in range(1, limit + 1))
            return min(options, key=lambda schedule: abs(removed(schedule) - token_layers))
        most = max(most, reached)
    where = " on one side" if one_sided else ""
    raise PlanError(f"{token_layers} token-layers cannot be removed from {config.name!r}{where}: at most {most}, with one token kept a side")


def at_flops(config: VimConfig, share: float, make: Callable[[int], tuple[Thing, float]]) -> Thing:
    """The thing whose true GFLOPs come nearest to 1 - share of the unmerged model's.

    Args:
        make: token-layers removed -> (thing, its true GFLOPs), falling; PlanError where so many cannot go.

    Raises:
        PlanError: none comes within 1 % of the unmerged model's FLOPs; names both values.
    """
    whole = gflops_true(config)
    target = (1 - share) * whole
    low, high = 0, config.seqlen * config.depth  # low saves too little, high too much or is impossible
    above, below = whole, 0.0  # GFLOPs at low and, as far as known, at high
    best: tuple[float, Thing] | None = None
    step = 0
    while high - low > 1:
        step += 1
        # FLOPs fall nearly in a line, so interpolating ends in a few steps; a bisection now and then keeps the bound.
        guess = low + round((above - target) / (above - below) * (high - low)) if step % 3 else (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        try:
            thing, figure = make(middle)
        except PlanError:
            high, below = middle, 0.0
            continue
        if best is None or abs(figure - target) < abs(best[0] - target):
            best = figure, thing
        if abs(figure - target) < 2e-4 * whole:
            break
        if figure > target:
            low, above = middle, figure
        else:
            high, below = middle, figure
    if best is None or abs(best[0] - target) > 0.01 * whole:
        reached = f"{best[0] / whole - 1:+.1%}" if best else "nothing"
        raise PlanError(f"-{share:.1%} FLOPs cannot be reached: the nearest is {reached}")
    return best[1]
