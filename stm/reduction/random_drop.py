"""Random dropping: the control that every score must beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stm.config import VimConfig

from .base import Reduction, Selection, Tokens


class RandomDrop(Reduction):
    """Drop r patches before a layer, drawn once from `seed` and the same for every image, so that it can be exported.

    Its average over seeds is what random dropping an image gives. The class token's position is known.
    """

    name = "random"
    merges = False

    def __init__(self, config: VimConfig, schedule: Mapping[int, int], seed: int = 0) -> None:
        super().__init__(config, schedule)
        generator = torch.Generator().manual_seed(seed)
        cls, length = config.cls_index, config.seqlen
        self._left: dict[int, int] = {}
        for layer, count in self.schedule.items():
            patch = torch.randperm(length - 1, generator=generator)[:count].sort().values
            gone = patch + (patch >= cls)
            self.register_buffer(f"gone_{layer}", gone.unsqueeze(0), persistent=False)
            self._left[layer] = int((gone < cls).sum())
            cls, length = cls - self._left[layer], length - count

    def side_counts(self, layer: int) -> tuple[int, int] | None:
        return self._left[layer], self.schedule[layer] - self._left[layer]

    def select(self, layer: int, tokens: Tokens) -> Selection:
        gone: Tensor = getattr(self, f"gone_{layer}")
        return Selection(gone, None)
