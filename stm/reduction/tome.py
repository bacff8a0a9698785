"""Token Merging (ToMe, arXiv 2210.09461) on ViM, and its side-balanced form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.errors import PlanError

from .base import Reduction, Selection, Tokens, best_links, halves, patches, position, sides


class ToMe(Reduction):
    """Bipartite matching: patches at even places (A) look for their most similar patch at odd places (B); the r best
    links merge by size-weighted mean at B's position.

    The class token is apart, and order is kept, so that its position afterwards depends on the image. The metric is
    the residual stream (ViM has no attention keys).
    """

    name = "tome"
    distance = "cosine"

    def most(self, length: int) -> int:
        return (length - 1) // 2

    def matching_flops(self, length: int, count: int) -> int:
        """R-MeeTo's count: 6 N D + 2 D (N/2)^2 + r D."""
        D = self.config.d_model
        return 6 * length * D + D * length * length // 2 + count * D

    def metric(self, tokens: Tokens) -> Tensor:
        return tokens.x

    def select(self, layer: int, tokens: Tokens) -> Selection:
        metric = self.metric(tokens)
        a, b = best_links(patches(metric, tokens.cls, 0, 2), patches(metric, tokens.cls, 1, 2), self.schedule[layer], self.distance)
        return Selection(position(2 * a, tokens.cls), position(2 * b + 1, tokens.cls))


class BalancedSides:
    """For methods that remove (r + 1) // 2 tokens left and r // 2 right of the class token: its position is exact."""

    config: VimConfig
    schedule: dict[int, int]

    def side_counts(self, layer: int) -> tuple[int, int] | None:
        return halves(self.schedule[layer])

    def check_sides(self, name: str) -> None:
        left, right = self.config.cls_index, self.config.seqlen - 1 - self.config.cls_index
        for layer, count in self.schedule.items():
            counts = halves(count)
            for side, have, gone in (("left", left, counts[0]), ("right", right, counts[1])):
                if gone > have // 2:
                    raise PlanError(f"{name}: layer {layer} removes {gone} of the {have} tokens on the {side}; at most half can go at once")
            left, right = left - counts[0], right - counts[1]


class BalancedToMe(BalancedSides, ToMe):
    """ToMe within each side of the class token, r/2 a side: nothing crosses it, and its position is exact.

    Not published; `facts/peers.md` 0.10 asks whether balance is what saves ViM-Ti.
    """

    name = "tome-balanced"

    def __init__(self, config: VimConfig, schedule: Mapping[int, int]) -> None:
        super().__init__(config, schedule)
        self.check_sides(self.name)

    def matching_flops(self, length: int, count: int) -> int:
        D = self.config.d_model
        return 6 * length * D + D * length * length // 4 + count * D  # two matchings of half the length

    def select(self, layer: int, tokens: Tokens) -> Selection:
        gone, into, offset = [], [], 0
        for metric, count in zip(sides(self.metric(tokens), tokens.cls), halves(self.schedule[layer]), strict=True):
            if count:
                a, b = best_links(metric[:, 0::2], metric[:, 1::2], count, self.distance)
                gone.append(2 * a + offset)
                into.append(2 * b + 1 + offset)
            offset = metric.shape[1] + 1
        return Selection(torch.cat(gone, 1), torch.cat(into, 1))
