"""Hidden State Alignment (ToP-ViM, arXiv 2409.18962): pruning with the scan's decay kept at pruned positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stm.config import VimConfig

from .base import Reduced, ScanState
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
        place: (batch or 1, seqlen_now, seqlen_full), one-hot.
        gap: (batch or 1, seqlen_full), 1 where a token was pruned.
        forward_time, backward_time: (batch, seqlen_full, d_inner), the time steps of pruned tokens.
    """

    place: Tensor
    gap: Tensor
    forward_time: Tensor
    backward_time: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(batch, seqlen_now, d) -> (batch, seqlen_full, d), 0 at pruned positions."""
        return torch.matmul(self.place.to(values.dtype).transpose(1, 2), values)

    def times(self, state_time: Tensor, backward: bool) -> Tensor:
        """Time steps of all positions: the layer's own where a token is, else the pruned token's."""
        stale = self.backward_time if backward else self.forward_time
        return self.spread(state_time) + self.gap.unsqueeze(-1).to(stale.dtype) * stale


def align(before: Alignment | None, reduced: Reduced, forward: ScanState, backward: ScanState) -> Alignment:
    """The alignment after a step; the states are those of the layer before it."""
    if before is None:
        place, times = reduced.assignment, (forward.time, backward.time)
    else:
        place = torch.matmul(reduced.assignment, before.place)
        times = (before.times(forward.time, False), before.times(backward.time, True))
    return Alignment(place, 1 - place.sum(1), *times)
