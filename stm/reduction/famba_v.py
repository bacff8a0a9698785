"""Famba-V (arXiv 2409.09808): ToMe's matching in some layers only."""

from __future__ import annotations

from collections.abc import Mapping

from stm.config import VimConfig

from .base import Tokens, check_choice
from .tome import ToMe

STRATEGIES = ("all", "alternate", "lower", "upper")


def strategy_layers(config: VimConfig, strategy: str = "alternate", given: int | None = None) -> tuple[int, ...]:
    """Layers before which a strategy merges; "lower" are those above `given` (4), "upper" those below it (18).

    The names are those of the published block builder (its bidirectional path uses the opposite inequalities).
    """
    check_choice("famba-v", "strategy", strategy, STRATEGIES)
    layers = range(1, config.depth)
    if strategy == "alternate":
        return tuple(layers[::2])
    if strategy == "lower":
        return tuple(layer for layer in layers if layer > (4 if given is None else given))
    if strategy == "upper":
        return tuple(layer for layer in layers if layer < (18 if given is None else given))
    return tuple(layers)


class FambaV(ToMe):
    """ToMe's matching in the layers of a strategy (the schedule's).

    Args:
        order: "restored" keeps the order (else equal to ToMe). "published" leaves ToMe's: unmerged A, then B; the class
            token goes to floor(p (t - r) / t). The publication protects token 0 and reads the result there; here the
            class token is protected and read, or nothing could be compared.
    """

    name = "famba-v"

    def __init__(self, config: VimConfig, schedule: Mapping[int, int], order: str = "restored") -> None:
        super().__init__(config, schedule)
        self.order_name = check_choice(self.name, "order", order, ("restored", "published"))
        # Class token before each length and after each layer's step; known in "published".
        self._cls, self._cls_after = {config.seqlen: config.cls_index}, {}
        cls, length = config.cls_index, config.seqlen
        for layer, count in self.schedule.items():
            cls, length = cls * (length - 1 - count) // (length - 1), length - count
            self._cls[length] = self._cls_after[layer] = cls

    def cls_place(self, layer: int, tokens: Tokens) -> int | None:
        return None if self.order_name == "restored" else self._cls_after[layer]

    def order(self, length: int) -> list[int]:
        if self.order_name == "restored":
            return super().order(length)
        cls = self._cls[length]
        return [p + length * ((p - (p > cls)) % 2) for p in range(length)]
