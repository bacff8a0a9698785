"""UTR (Rethinking Token Reduction for State Space Models, arXiv 2410.14725): prune some of the links, merge the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.errors import PlanError

from .base import Reduction, Selection, Shares, Tokens, best_links, output_score, patches, position, take


class UTR(Reduction):
    """Importance mean_d max(0, y); the less important half (A) looks for its most similar token in the other half (B);
    the r best links go: on the residual branch all merge by plain average, on the hidden branch a share `prune` of them is
    dropped and the others merge. Order is kept.

    Readings: r links instead of a share of them; of these the most similar are pruned (their target says the same).
    The hidden branch is what the layer before added, the residual branch the stream before that.

    Args:
        prune: share q of the links that the hidden branch prunes; 0.5 is the paper's best.
    """

    name = "utr"

    def __init__(self, config: VimConfig, schedule: Mapping[int, int], prune: float = 0.5) -> None:
        super().__init__(config, schedule)
        if not 0 <= prune <= 1:
            raise PlanError(f"utr: prune is {prune}; it is a share, 0..1")
        self.prune = prune

    def most(self, length: int) -> int:
        return (length - 1) // 2

    def matching_flops(self, length: int, count: int) -> int:
        """Ours: the score in both directions, and R-MeeTo's matching, on both branches."""
        D = self.config.d_model
        return 4 * length * self.config.d_inner + 6 * length * D + D * length * length // 2 + 2 * count * D

    def select(self, layer: int, tokens: Tokens) -> Selection:
        score, metric = patches(output_score(tokens), tokens.cls), patches(tokens.x, tokens.cls)
        half = score.shape[1] // 2
        ranked = torch.topk(score, score.shape[1], largest=False).indices
        low, high = ranked[:, :half], ranked[:, half:]
        a, b = best_links(take(metric, low), take(metric, high), self.schedule[layer])
        gone, into = torch.gather(low, 1, a), torch.gather(high, 1, b)
        return Selection(position(gone, tokens.cls), position(into, tokens.cls))

    def shares(self, tokens: Tokens, selection: Selection, sizes: Tensor, taken: Tensor) -> Shares:
        count = taken.shape[2]
        alive = torch.tensor([float(j >= int(self.prune * count)) for j in range(count)], dtype=taken.dtype, device=taken.device)
        return Shares.apart(torch.ones_like(sizes), taken, taken * alive)
