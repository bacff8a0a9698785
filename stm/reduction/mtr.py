"""MTR (arXiv 2507.14042): Delta as importance, asymmetric groups; and its side-balanced form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stm.config import VimConfig

from .base import Reduction, Selection, Shares, Tokens, halves, patches, position, sides, similarity, take, time_score
from .tome import BalancedSides


def _least_into_next(score: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` least important tokens, each with its most similar one among the next third: indices (batch, count)."""
    targets = min(max(1, score.shape[1] // 3), score.shape[1] - count)
    ranked = torch.topk(score, count + targets, largest=False).indices
    source, target = ranked[:, :count], ranked[:, count:]
    best = similarity(take(metric, source), take(metric, target)).max(-1).indices
    return source, torch.gather(target, 1, best)


class MTR(Reduction):
    """Rank patches by Delta of the layer before (sum over directions, mean over channels): a token with a small step
    takes in little. The r least important are sources, the next third are targets, the most important stay untouched.
    Each source joins its most similar target (cosine of the residual stream) by plain average; order is kept.

    Readings: r sources instead of a third of the tokens, so that counts are those of the schedule; Delta is that of
    the layer before, as for our own weights.
    """

    name = "mtr"

    def most(self, length: int) -> int:
        return (length - 1) // 2

    def matching_flops(self, length: int, count: int) -> int:
        """Ours, in R-MeeTo's style: Delta's mean 2 N d_inner, norms of sources and targets, r x N/3 cosines, the merge."""
        D, third = self.config.d_model, length // 3
        return 2 * length * self.config.d_inner + 6 * (count + third) * D + 2 * D * count * third + count * D

    def select(self, layer: int, tokens: Tokens) -> Selection:
        score, metric = patches(time_score(tokens), tokens.cls), patches(tokens.x, tokens.cls)
        gone, into = _least_into_next(score, metric, self.schedule[layer])
        return Selection(position(gone, tokens.cls), position(into, tokens.cls))

    def shares(self, tokens: Tokens, selection: Selection, sizes: Tensor, taken: Tensor) -> Shares:
        return Shares.mean(torch.ones_like(sizes), taken)


class BalancedMTR(BalancedSides, MTR):
    """MTR within each side of the class token, r/2 a side: its position is exact. Not published."""

    name = "mtr-balanced"

    def __init__(self, config: VimConfig, schedule: Mapping[int, int]) -> None:
        super().__init__(config, schedule)
        self.check_sides(self.name)

    def select(self, layer: int, tokens: Tokens) -> Selection:
        gone, into, offset = [], [], 0
        scores, metrics = sides(time_score(tokens), tokens.cls), sides(tokens.x, tokens.cls)
        for score, metric, count in zip(scores, metrics, halves(self.schedule[layer]), strict=True):
            if count:
                source, target = _least_into_next(score, metric, count)
                gone.append(source + offset)
                into.append(target + offset)
            offset = metric.shape[1] + 1
        return Selection(torch.cat(gone, 1), torch.cat(into, 1))
