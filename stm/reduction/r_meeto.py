"""R-MeeTo (arXiv 2412.12496) without its retraining."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stm.config import VimConfig

from .base import Tokens, check_choice
from .tome import ToMe

METRICS = ("x", "delta", "B", "C")
DISTANCES = ("cosine", "l1", "l2")


def interval_layers(config: VimConfig, interval: int = 2, first: int | None = None) -> tuple[int, ...]:
    """Layers 2, 4, .. before which R-MeeTo merges; `first` = 1 for its odd variant."""
    return tuple(range(interval if first is None else first, config.depth, interval))


class RMeeTo(ToMe):
    """ToMe's matching with the class token apart, every second layer; size-weighted mean, order restored.

    Args:
        cls_position: "compat" puts the class token back at floor(p (t - r) / t), t the patches before the step, as the
            public code does: a guess that lets patches change side, but static. "true" keeps its place.
        metric: what is compared: x (the residual stream), or Delta, B or C of the layer before, both directions.
        distance: cosine, l1 or l2.
        last_layer_trap: the public code's last merging layer ignores r and cuts down to `trap_tokens`.
    """

    name = "r-meeto"

    def __init__(
        self,
        config: VimConfig,
        schedule: Mapping[int, int],
        cls_position: str = "compat",
        metric: str = "x",
        distance: str = "cosine",
        last_layer_trap: bool = False,
        trap_tokens: int = 76,
    ) -> None:
        self.cls_position = check_choice(self.name, "cls_position", cls_position, ("compat", "true"))
        self.metric_name = check_choice(self.name, "metric", metric, METRICS)
        distance = check_choice(self.name, "distance", distance, DISTANCES)
        if last_layer_trap and schedule:
            last = max(schedule)
            before = config.seqlen - sum(count for layer, count in schedule.items() if layer != last)
            schedule = {**schedule, last: min(before - trap_tokens, self.most(before))}
        super().__init__(config, schedule)
        self.distance = distance

    def metric(self, tokens: Tokens) -> Tensor:
        if self.metric_name == "x":
            return tokens.x
        states = (tokens.forward_state, tokens.backward_state)
        return torch.cat([getattr(state, "time" if self.metric_name == "delta" else self.metric_name) for state in states], -1)

    def cls_place(self, layer: int, tokens: Tokens) -> int | None:
        if self.cls_position == "true":
            return None
        count = tokens.x.shape[1] - 1
        assert isinstance(tokens.cls, int)
        return tokens.cls * (count - self.schedule[layer]) // count
