"""The search: a portfolio of schedules, weights, then rounds of table + knapsack + true forwards, then exchanges.

What is searched is a layout (`layout.py`) and how sources are weighed. The objective is the mean divergence of
`evaluation.Divergence`; every plan that is ever accepted meets the budget and was run, not predicted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.errors import ConfigError, PlanError
from stm.plan import MergePlan, constant_schedule, make_plan

from .budget import Budget
from .evaluation import Divergence
from .layout import Leaves, leaves_of, plan_of, saved

DROP = "drop"  # constant weights of 0
WEIGHTS = ("hsp", "decay", "mean", "sum", DROP)


def layout_plan(config: VimConfig, leaves: Sequence[int], weights: str, proportional_decay: bool = False) -> MergePlan:
    """`plan_of`, where `drop` stands for constants of 0."""
    if weights != DROP:
        return plan_of(config, leaves, weights, None, proportional_decay)
    counts = {layer: sum(leave == layer for leave in leaves) for layer in sorted(set(leaves) - {config.depth})}
    return plan_of(config, leaves, "constant", {layer: (0.0,) * count for layer, count in counts.items()}, proportional_decay)


# --- schedules to start from ------------------------------------------------------------------------------------------


def token_orders(config: VimConfig) -> dict[str, list[int]]:
    """In which order tokens leave: from the edges, evenly over the image, from the middle; sides in turn."""
    left = list(range(config.cls_index - 1))
    right = list(range(config.seqlen - 1, config.cls_index + 1, -1))

    def in_turn(a: list[int], b: list[int]) -> list[int]:
        longest = max(len(a), len(b))
        return [side[index] for index in range(longest) for side in (a, b) if index < len(side)]

    def spread(side: list[int]) -> list[int]:
        """Every second first, then every second of what is left between: any beginning lies evenly."""
        bits = max(1, (len(side) - 1).bit_length())
        return [side[index] for index in sorted(range(len(side)), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))]

    return {"edge": in_turn(left, right), "even": in_turn(spread(left), spread(right)), "inner": in_turn(left[::-1], right[::-1])}


def ramp(config: VimConfig, order: Sequence[int], first: int, last: int, least: int) -> Leaves | None:
    """As few tokens of `order` as save `least` token-layers, leaving at an even pace before layers first..last."""

    def layout(count: int) -> Leaves:
        leaves = [config.depth] * config.seqlen
        for index, token in enumerate(order[:count]):
            leaves[token] = first + index * (last - first + 1) // count
        return tuple(leaves)

    low, high = 0, len(order)
    if saved(layout(high), config.depth) < least:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saved(layout(middle), config.depth) >= least else (middle, high)
    return layout(high)


def two_cuts(config: VimConfig, order: Sequence[int], first: int, last: int, share: float, least: int) -> Leaves | None:
    """`share` of the tokens that one cut before `first` would take leave there, and before `last` as many as are lacking."""
    early = int(share * -(-least // (config.depth - first)))
    late = -(-max(0, least - early * (config.depth - first)) // (config.depth - last))
    if early + late > len(order):
        return None
    leaves = [config.depth] * config.seqlen
    for index, token in enumerate(order[: early + late]):
        leaves[token] = first if index < early else last
    return tuple(leaves)


def paper_plan(config: VimConfig, budget: Budget, weights: str = "hsp") -> MergePlan | None:
    """The paper's family at the budget: k outermost tokens a side before each layer from layer 1 until some count is gone; least k,
    least count. None where it cannot meet the budget."""
    room = max(0, config.cls_index - 1) + max(0, config.seqlen - 2 - config.cls_index)

    def plan(k: int, count: int) -> MergePlan:
        return make_plan(config, schedule=constant_schedule(config, k, count), weights=weights)

    for k in range(1, room + 1):
        high = min(room, 2 * k * (config.depth - 1))
        if high > 0 and budget.holds(plan(k, high)):
            low = 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if budget.holds(plan(k, middle)) else (middle, high)
            return plan(k, high)
    return None


# --- knapsack ---------------------------------------------------------------------------------------------------------


def knapsack(costs: Sequence[Sequence[float]], gains: Sequence[Sequence[int]], least: int) -> list[int] | None:
    """One option of each item so that the gains sum to `least` or more at the least sum of costs, exactly; None: impossible.

    Args:
        costs, gains: item -> option -> cost (any number), gain (>= 0).
    """
    best = torch.full((least + 1,), float("inf"), dtype=torch.float64)  # by gain; the last entry: `least` or more
    best[0] = 0.0
    before, chosen = [], []
    for item_costs, item_gains in zip(costs, gains, strict=True):
        rows = torch.full((len(item_costs), least + 1), float("inf"), dtype=torch.float64)
        for row, cost, gain in zip(rows, item_costs, item_gains, strict=True):
            gain = min(gain, least)
            row[gain:] = best[: least + 1 - gain] + cost
            row[least] = best[least - gain :].min() + cost
        before.append(best)
        best, choice = rows.min(0)
        chosen.append(choice)
    if best[least] == float("inf"):
        return None
    picked, at = [], least
    for item in reversed(range(len(costs))):
        option = int(chosen[item][at])
        picked.append(option)
        gain = min(gains[item][option], least)
        at = least - gain + int(before[item][least - gain :].argmin()) if at == least else at - gain
    return picked[::-1]


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(config: VimConfig, bands: int) -> list[tuple[int, ...]]:
    """The tokens that may leave, in `bands` stretches a side and each stretch's every second token apart: what is moved as one."""
    found = []
    for side in (range(config.cls_index - 1), range(config.cls_index + 2, config.seqlen)):
        tokens, count = list(side), max(1, min(bands, len(side)))
        for band in range(count):
            stretch = tokens[band * len(tokens) // count : (band + 1) * len(tokens) // count]
            found += [tuple(stretch[parity::2]) for parity in range(2) if stretch[parity::2]]
    return found


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A point of the search."""

    leaves: Leaves
    weights: str
    proportional_decay: bool = False


@dataclass(frozen=True)
class Progress:
    """What `report` gets."""

    stage: str
    evaluations: int
    seconds: float
    start: float
    best: float


class Spent(Exception):  # noqa: N818  (no error: the time or the evaluations are used up)
    """Raised inside a stage; the best so far stands."""


@dataclass
class Limits:
    """Of a search: seconds (None: none), evaluations (None: none)."""

    seconds: float | None
    evaluations: int | None
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, seconds: float | None, evaluations: int | None) -> Limits:
        """Raises:
        ConfigError: neither, or one that is not positive.
        """
        if seconds is None and evaluations is None:
            raise ConfigError("a search needs a limit: give seconds or evaluations")
        for name, limit in (("seconds", seconds), ("evaluations", evaluations)):
            if limit is not None and limit <= 0:
                raise ConfigError(f"{name} is {limit}; it must be positive")
        return cls(seconds, evaluations)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return self.seconds is None or self.elapsed + seconds <= self.seconds

    def spent(self, evaluations: int, share: float = 1.0) -> bool:
        if self.evaluations is not None and evaluations >= share * self.evaluations:
            return True
        return self.seconds is not None and self.elapsed >= share * self.seconds


class Search:
    """See the module. `run` searches until the limits are reached or nothing gets better; `best` is the best state so far."""

    def __init__(
        self,
        divergence: Divergence,
        budget: Budget,
        *,
        weights: Sequence[str] = WEIGHTS,
        limits: Limits,
        seed: int = 0,
        better: Callable[[MergePlan, float], None] | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        if unknown := [name for name in weights if name not in WEIGHTS]:
            raise ConfigError(f"weights to search over: {', '.join(unknown)} unknown; choose from {', '.join(WEIGHTS)}")
        self.divergence, self.budget, self.config = divergence, budget, budget.config
        self.weights, self.limits, self.random = tuple(weights), limits, random.Random(seed)
        self.better, self.report = better, report
        self.stage, self.share, self.stopped = "start", 1.0, "running"
        self.evaluations = 0
        self._known: dict[State, float] = {}
        self._best_values: Tensor | None = None
        self.start: tuple[State, float] | None = None
        self.best: State | None = None
        self.best_value = float("inf")

    # --- one state ---

    def plan(self, state: State) -> MergePlan:
        return layout_plan(self.config, state.leaves, state.weights, state.proportional_decay)

    def value(self, state: State, *, keep: bool = False) -> float:
        """Mean divergence; remembered, counted, and taken as the best if it is and meets the budget.

        Raises:
            Spent: the limits are reached.
        """
        if state in self._known and not keep:
            return self._known[state]
        if self.limits.spent(self.evaluations, self.share):
            raise Spent
        plan = self.plan(state)
        rival = None if keep else self._best_values
        values = self.divergence(plan, keep=keep, rival=rival)
        value = float(values.mean())
        self.evaluations += 1
        if rival is not None and len(values) < len(rival):  # out of the race: what the images seen say, and no better than the best
            value = self.best_value + max(1e-12, float((values - rival[: len(values)]).mean()))
        elif value < self.best_value and self.budget.holds(plan):
            self.best, self.best_value, self._best_values = state, value, values
            if self.better:
                self.better(plan, value)
        self._known[state] = value
        if self.report:
            start = self.start[1] if self.start else value
            self.report(Progress(self.stage, self.evaluations, self.limits.elapsed, start, self.best_value))
        return value

    def fitted(self, make: Callable[[int], State | None]) -> State | None:
        """make(token-layers) with as few as meet the budget: what the budget's linear estimate lacks is added."""
        least, most = self.budget.least, self.budget.most_saved
        while least <= most:
            state = make(least)
            if state is None or self.budget.holds(plan := self.plan(state)):
                return state
            excess = (self.budget.cost(plan) - self.budget.limit) / self.budget.whole
            least += max(1, int(excess * self.config.seqlen * self.config.depth))
        return None

    # --- stages ---

    def run(self) -> State:
        """Search; ends with the best state whatever stops it (limits, Ctrl-C).

        Raises:
            PlanError: the limits or Ctrl-C left no time for a single plan.
        """
        try:
            self._starts()
            for stage in (self._portfolio, self._weighing, self._rounds, self._exchanges):
                stage()
            self.stopped = "nothing better found"
        except Spent:
            self.stopped = "limit reached"
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        if self.best is None:
            raise PlanError("the search ended before it had run a single plan; give it more --seconds or --evaluations")
        return self.best

    def _starts(self) -> None:
        """The paper's plan at the budget, to be beaten."""
        self.stage = "start"
        plan = paper_plan(self.config, self.budget)
        if plan is not None:
            state = State(leaves_of(plan), "hsp")
            self.start = state, self.value(state)

    def _portfolio(self) -> None:
        """When and where: one cut before each layer, two cuts, ramps; from the edges, evenly, from the middle."""
        self.stage = "schedules"
        config, depth, mode = self.config, self.config.depth, "mean" if "mean" in self.weights else self.weights[0]
        orders = token_orders(config)
        tried: dict[tuple[str, int, int, float], float] = {}

        def attempt(name: str, first: int, last: int, share: float | None) -> None:
            """A ramp, or with `share` a first cut of that share of what it would take alone, and the rest in a second one."""
            key = (name, first, last, -1.0 if share is None else share)
            if key in tried or not 1 <= first <= last < depth:
                return

            def layout(least: int) -> State | None:
                order = orders[name]
                leaves = ramp(config, order, first, last, least) if share is None else two_cuts(config, order, first, last, share, least)
                return None if leaves is None else State(leaves, mode)

            state = self.fitted(layout)
            tried[key] = float("inf") if state is None else self.value(state)

        step = max(1, depth // 24)
        for name in orders:
            for layer in range(depth - 1, 0, -step):  # late ones run on few layers and set the mark for the early ones
                attempt(name, layer, layer, None)
        self.stage = "two cuts"
        for name, first, _, _ in sorted(tried, key=lambda key: tried[key])[:2]:
            for share in (0.75, 0.5):
                for last in range(first + 2 * step, depth, 2 * step):
                    attempt(name, first, last, share)
        for span in (depth // 3, depth // 6, depth // 12, 1):
            for name, first, last, _ in sorted(tried, key=lambda key: tried[key])[:1]:
                for a, b in ((first, last + span), (first - span, last), (first - span, last + span), (first + span, last + span)):
                    attempt(name, max(1, a), min(depth - 1, b), None)

    def _weighing(self) -> None:
        """How: every way of weighing, with and without proportional decay, on the best layout."""
        self.stage = "weights"
        base = self.best
        assert base is not None
        for weights in self.weights:
            for proportional in (False, True):
                self.value(self._in_budget(State(base.leaves, weights, proportional)))

    def _in_budget(self, state: State) -> State:
        """The state itself, or with tokens leaving earlier until it meets the budget (weights cost, too)."""
        leaves = list(state.leaves)
        while not self.budget.holds(self.plan(state)):
            movable = [token for token, leave in enumerate(leaves) if 1 < leave < self.config.depth]
            if not movable:
                break
            leaves[max(movable, key=lambda token: (leaves[token], -token))] -= 1
            state = State(tuple(leaves), state.weights, state.proportional_decay)
        return state

    def _rounds(self) -> None:
        """Table, knapsack, true forwards: first among the layers in use, which tells where to cut, then among all, which tells when;
        cells get finer when neither finds anything."""
        bands = 3
        while bands <= max(self.config.cls_index, 3):
            if not self._round(bands, wide=False) and not self._round(bands, wide=True):
                bands *= 2

    def _options(self, cell: Sequence[int], leaves: Leaves, wide: bool) -> list[int]:
        """Layers to try for a cell: those at which most tokens leave, and never; if `wide` those near its own, and coarsely all others."""
        depth = self.config.depth
        if wide:
            mean = sum(leaves[token] for token in cell) / len(cell)
            layers = {round(mean + step) for step in (-4, -2, -1, 0, 1, 2, 4)}
            layers |= {round(depth * share) for share in (0.25, 0.5, 0.75)} | {depth}
        else:
            layers = {layer for layer, _ in Counter(leave for leave in leaves if leave < depth).most_common(3)} | {depth}
        uniform = {leaves[token] for token in cell}
        return sorted({layer for layer in layers if 1 <= layer <= depth} - (uniform if len(uniform) == 1 else set()))

    def _round(self, bands: int, *, wide: bool) -> bool:
        """One table around the best state and what the knapsack makes of it; True if the best got better."""
        base = self.best
        assert base is not None
        before, depth = self.best_value, self.config.depth
        self.stage = f"table of {bands} bands"
        base_value = self.value(base, keep=True)
        parts = cells(self.config, bands)
        entries = [(index, layer) for index, cell in enumerate(parts) for layer in self._options(cell, base.leaves, wide)]
        self.random.shuffle(entries)  # an unfinished table is then unfinished everywhere
        costs: list[list[float]] = [[0.0] for _ in parts]
        gains = [[sum(depth - base.leaves[token] for token in cell)] for cell in parts]
        layers: list[list[int | None]] = [[None] for _ in parts]
        stop: Spent | None = None
        for index, layer in entries:
            try:
                value = self.value(_moved(base, parts[index], layer))
            except Spent as spent:
                stop = spent
                break
            costs[index].append(value - base_value)
            gains[index].append((depth - layer) * len(parts[index]))
            layers[index].append(layer)
        if stop:
            raise stop
        self.stage = f"knapsack of {bands} bands"
        # A penalty a changed cell bounds how far the additive model is trusted.
        scale = sorted(abs(cost) for row in costs for cost in row[1:])
        penalties = [0.0] + [scale[int(share * (len(scale) - 1))] for share in (0.05, 0.15, 0.3, 0.5, 0.75)] if scale else [0.0]
        for penalty in penalties:
            shifted = [[row[0]] + [cost + penalty for cost in row[1:]] for row in costs]

            def solve(least: int, table: list[list[float]] = shifted) -> State | None:
                picked = knapsack(table, gains, least)
                if picked is None:
                    return None
                state = base
                for index, option in enumerate(picked):
                    layer = layers[index][option]
                    state = state if layer is None else _moved(state, parts[index], layer)
                return state

            state = self.fitted(solve)
            if state is not None:
                self.value(state)
        return self.best_value < before * (1 - 1e-3)

    def _exchanges(self) -> None:
        """Random pairs of cells, one earlier, one later, while it helps; ends with the limits or when nothing has helped for long."""
        self.stage = "exchanges"
        depth, failures = self.config.depth, 0
        while failures < 200:
            base = self.best
            assert base is not None
            parts = cells(self.config, self.random.choice((6, 12, 24, max(1, self.config.cls_index))))
            earlier, later = self.random.sample(range(len(parts)), 2)
            step = self.random.choice((1, 1, 2, 4))
            leaves = list(base.leaves)
            for token in parts[earlier]:
                leaves[token] = max(1, leaves[token] - step)
            for token in parts[later]:
                leaves[token] = min(depth, leaves[token] + step)
            state = self._in_budget(State(tuple(leaves), base.weights, base.proportional_decay))
            value = self.best_value
            failures = 0 if state not in self._known and self.value(state) < value else failures + 1


def _moved(state: State, cell: Sequence[int], layer: int) -> State:
    leaves = list(state.leaves)
    for token in cell:
        leaves[token] = layer
    return State(tuple(leaves), state.weights, state.proportional_decay)
