"""Token Recognition: EViT (arXiv 2202.07800) on ViM, as ToP-ViM and STM compare with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stm.config import VimConfig

from .base import Reduction, Selection, Tokens, check_choice, output_score, patches, position

BRANCHES = ("both", "forward", "backward")


def keep_schedule(config: VimConfig, rate: float, after: tuple[int, ...]) -> dict[int, int]:
    """Keep floor(rate N) tokens, made odd, after each of these layers (0-based): layer -> tokens removed before it."""
    schedule, length = {}, config.seqlen
    for layer in after:
        kept = int(length * rate)
        kept += 1 - kept % 2
        schedule[layer + 1] = length - kept
        length = kept
    return schedule


class TokenRecognition(Reduction):
    """Drop the r patches with the lowest score; what stays keeps its order.

    ViM has no class attention, so the score is ToP-ViM's: mean over channels of max(0, y), y the scan output.

    Args:
        branch: whose y: "both" directions (their sum), "forward" or "backward" (ToP-ViM's public code).
        cls_position: "true" keeps the class token's place; "middle" puts it in the middle (ToP-ViM's public code), so
            that patches may change side.
    """

    name = "token-recognition"
    merges = False

    def __init__(self, config: VimConfig, schedule: Mapping[int, int], branch: str = "both", cls_position: str = "true") -> None:
        super().__init__(config, schedule)
        self.branch = check_choice(self.name, "branch", branch, BRANCHES)
        self.cls_position = check_choice(self.name, "cls_position", cls_position, ("true", "middle"))

    def matching_flops(self, length: int, count: int) -> int:
        """Ours: one max and one sum a channel and direction."""
        return 2 * length * self.config.d_inner * (2 if self.branch == "both" else 1)

    def select(self, layer: int, tokens: Tokens) -> Selection:
        score = patches(output_score(tokens, self.branch), tokens.cls)
        gone = torch.topk(score, self.schedule[layer], largest=False).indices
        return Selection(position(gone, tokens.cls), None)

    def cls_place(self, layer: int, tokens: Tokens) -> int | None:
        return None if self.cls_position == "true" else (tokens.x.shape[1] - self.schedule[layer]) // 2
