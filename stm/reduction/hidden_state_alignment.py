"""Hidden State Alignment (ToP-ViM, arXiv 2409.18962): pruning with the scan's decay kept at pruned positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stm.config import VimConfig

from .base import Reduced, ScanState, take, values_at
from .token_recognition import TokenRecognition


class HiddenStateAlignment(TokenRecognition):
    """Token Recognition's score and pruning; the scan of later layers still walks the whole sequence, and where a token
    was pruned the state decays (with the Delta that the token had in the layer after which it went) but takes no input.

    Convolution and projections run on kept tokens alone. The public code has no such scan; this is the paper's text.

    Args:
        align: False prunes without it (then this is `TokenRecognition`).
    """

    name = "hsa"

    def __init__(self, config: VimConfig, schedule: Mapping[int, int], branch: str = "both", cls_position: str = "true", align: bool = True) -> None:
        super().__init__(config, schedule, branch, "middle" if cls_position == "middle" and not align else "true")
        self.aligned = align


@dataclass(frozen=True)
class Alignment:
    """Where kept tokens lie in the whole sequence.

    Args:
        where: (batch or 1, seqlen_now), the place of each kept token.
        source: (batch or 1, seqlen_full), which kept token lies at a place; any where one was pruned.
        kept: (batch or 1, seqlen_full), 1 where a token is, 0 where one was pruned.
        forward_time, backward_time: (batch, seqlen_full, d_inner), the time steps of pruned tokens.
    """

    where: Tensor
    source: Tensor
    kept: Tensor
    forward_time: Tensor
    backward_time: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(batch, seqlen_now, d) -> (batch, seqlen_full, d), 0 at pruned positions."""
        return take(values, self.source) * self.kept.unsqueeze(-1).to(values.dtype)

    def times(self, state_time: Tensor, backward: bool) -> Tensor:
        """Time steps of all positions: the layer's own where a token is, else the pruned token's."""
        stale = self.backward_time if backward else self.forward_time
        return self.spread(state_time) + (1 - self.kept).unsqueeze(-1).to(stale.dtype) * stale


def align(before: Alignment | None, reduced: Reduced, forward: ScanState, backward: ScanState) -> Alignment:
    """The alignment after a step; the states are those of the layer before it."""
    if before is None:
        where, times, length = reduced.keep, (forward.time, backward.time), reduced.seqlen_in
    else:
        where = values_at(before.where, reduced.keep)
        times, length = (before.times(forward.time, False), before.times(backward.time, True)), before.kept.shape[1]
    places = torch.arange(length, device=where.device)
    found = (where.unsqueeze(1) == places.unsqueeze(1)).to(torch.float32)  # (batch or 1, seqlen_full, seqlen_now)
    source = (found * torch.arange(where.shape[1], device=where.device)).sum(2).to(torch.int64)
    return Alignment(where, source, found.sum(2), *times)
