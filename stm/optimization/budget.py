"""How much a plan may cost: true FLOPs, token-layers, or a latency by a measured table."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stm.config import VimConfig
from stm.errors import ConfigError, PlanError
from stm.flops import gflops_true
from stm.plan import MergePlan, make_plan

from .layout import fixed_tokens, plan_of


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of one layer by the tokens it computes on, and of all that is no layer; linear in between.

    Raises:
        ConfigError: fewer than two lengths, or a time that is not positive.
    """

    layer_ms: Mapping[int, float]
    fixed_ms: float = 0.0

    def __post_init__(self) -> None:
        if len(self.layer_ms) < 2:
            raise ConfigError(f"a latency table needs a layer's time at two lengths at least, it has {len(self.layer_ms)}; measure more")
        for length, ms in self.layer_ms.items():
            if length < 1 or not 0 < ms < 1e6:
                raise ConfigError(f"latency table: {ms!r} ms at {length} tokens; both must be positive")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read {"layer_ms": {"197": 0.041, "99": 0.025, ..}, "fixed_ms": 0.12}.

        Raises:
            ConfigError: no such file, or not such a table.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls({int(length): float(ms) for length, ms in data["layer_ms"].items()}, float(data.get("fixed_ms", 0.0)))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f'cannot read latency table {path}: {type(error).__name__}: {error}; it looks like {{"layer_ms": {{"197": 0.041, "99": 0.025}}, '
                '"fixed_ms": 0.12}'
            ) from None

    def layer(self, length: int) -> float:
        known = sorted(self.layer_ms)
        right = min(max(bisect_left(known, length), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        share = (length - low) / (high - low)
        return max(0.0, (1 - share) * self.layer_ms[low] + share * self.layer_ms[high])

    def __call__(self, lengths: list[int]) -> float:
        return self.fixed_ms + sum(self.layer(length) for length in lengths)


@dataclass(frozen=True)
class Budget:
    """`cost(plan) <= limit` in `unit`: GFLOPs (true), token-layers (computed), or ms."""

    config: VimConfig
    unit: str
    limit: float
    table: LatencyTable | None = None

    def cost(self, plan: MergePlan) -> float:
        if self.unit == "GFLOPs":
            return gflops_true(self.config, plan)
        if self.unit == "ms":
            assert self.table is not None
            return self.table(plan.lengths)
        return float(sum(plan.lengths))

    @property
    def whole(self) -> float:
        """Cost without merging."""
        return self.cost(make_plan(self.config))

    def holds(self, plan: MergePlan) -> bool:
        return self.cost(plan) <= self.limit * (1 + 1e-12)

    @property
    def most_saved(self) -> int:
        """Token-layers that can be removed at all: every token that may leave, before layer 1."""
        return (self.config.seqlen - len(fixed_tokens(self.config))) * max(0, self.config.depth - 1)

    @property
    def least(self) -> int:
        """Token-layers to remove, without the merge's own cost; the search adds what a plan still lacks.

        Raises:
            PlanError: the budget cannot be met; names what can.
        """
        config = self.config
        fixed = fixed_tokens(config)
        free = config.seqlen - len(fixed)
        lengths = [config.seqlen] + [config.seqlen - free] * (config.depth - 1)
        lowest = float(sum(lengths))
        if self.unit == "GFLOPs":
            lowest = gflops_true(config, plan_of(config, [config.depth if token in fixed else 1 for token in range(config.seqlen)], "sum"))
        elif self.table is not None:
            lowest = self.table(lengths)
        if self.limit < lowest:
            raise PlanError(
                f"budget {self.limit:.4g} {self.unit} cannot be met by {config.name!r}: merging before layer 1 all tokens that may go leaves "
                f"{lowest:.4g} of {self.whole:.4g} {self.unit} ({lowest / self.whole:.3f}x); raise the budget or take a smaller model or image"
            )
        share = (self.whole - self.limit) / (self.whole - lowest) if self.whole > lowest else 0.0
        return max(0, min(self.most_saved, int(share * self.most_saved)))

    def __str__(self) -> str:
        return f"{self.limit:.4g} {self.unit} ({self.limit / self.whole:.3f}x)"


def parse_budget(text: str, config: VimConfig, table: LatencyTable | None = None) -> Budget:
    """A budget from text: "0.6x" of the unmerged model's true FLOPs (or ms, if a latency table is given), "-40%" the same,
    "1920tl" token-layers removed, "1.2ms" by the table.

    Raises:
        ConfigError: none of these, or ms without a table. PlanError: it cannot be met.
    """
    found = re.fullmatch(r"\s*(-?)(\d+(?:\.\d+)?)\s*(x|%|tl|ms)\s*", text)
    if found is None or (found[3] == "%") != (found[1] == "-"):
        raise ConfigError(f"--budget {text!r}: give 0.6x (of true FLOPs), -40%, 1920tl (token-layers removed) or 1.2ms (with --latency-table)")
    number, unit = float(found[2]), found[3]
    if unit == "ms" and table is None:
        raise ConfigError(f"--budget {text}: milliseconds need --latency-table FILE, a layer's measured time by its length")
    if unit == "tl":
        budget = Budget(config, "token-layers", config.seqlen * config.depth - number)
    elif unit == "ms":
        budget = Budget(config, "ms", number, table)
    else:
        whole = Budget(config, "GFLOPs" if table is None else "ms", 0.0, table)
        budget = Budget(config, whole.unit, whole.whole * (number if unit == "x" else 1 - number / 100), table)
    if budget.limit >= budget.whole:
        raise ConfigError(f"--budget {text}: nothing to save, the unmerged model costs {budget.whole:.4g} {budget.unit}; give less")
    budget.least  # noqa: B018  (raises if it cannot be met)
    return budget
