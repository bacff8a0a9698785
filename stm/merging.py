"""Apply a plan's groups to the residual stream: weights from the layer before, values, order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ops import merge_tokens, merge_weights
from .plan import MergePlan


@dataclass(frozen=True)
class DirectionState:
    """What a scan direction of one layer leaves for the merge after it: delta before bias (batch, seqlen, d_inner),
    its bias, A, and B (batch, seqlen, d_state)."""

    delta: Tensor
    delta_bias: Tensor
    A: Tensor
    B: Tensor


def layer_sizes(plan: MergePlan, layer: int) -> list[int]:
    """Originals that each token stands for as it enters the merge before `layer`."""
    return [1] * plan.seqlen if layer == 0 else plan.sizes()[layer - 1]


def merge_table(plan: MergePlan, layer: int) -> tuple[list[tuple[int, int]], list[float] | None]:
    """(source, target) pairs of a layer and, where the plan fixes them, their weights.

    `mean` (size-weighted mean, as ToMe) also moves the target onto itself, with weight s_q / sum - 1.
    """
    pairs = plan.pairs(layer)
    if plan.weights == "sum":
        return pairs, [1.0] * len(pairs)
    if plan.weights == "constant":
        assert plan.constants is not None
        return pairs, list(plan.constants[layer])
    if plan.weights == "mean":
        size = layer_sizes(plan, layer)
        total = {g.target: size[g.target] + sum(size[p] for p in g.sources) for g in plan.groups(layer)}
        moved = sorted(pairs + [(target, target) for target in total])
        return moved, [size[p] / total[q] - (p == q) for p, q in moved]
    return pairs, None


class Float32Buffers(nn.Module):
    """Keeps its float buffers in float32 when the model goes to half precision: they hold plan constants and sizes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self


class _SideWeights(Float32Buffers):
    """Weights of one side's sources from that side's scan direction; looks only at the tokens between them."""

    span: Tensor
    sources: Tensor
    targets: Tensor

    def __init__(self, pairs: list[tuple[int, int]], mode: str, decay_scale: list[int] | None) -> None:
        super().__init__()
        positions = [position for pair in pairs for position in pair]
        self.low, self.high, self.mode = min(positions), max(positions) + 1, mode
        scale = decay_scale or [1] * self.high
        span = torch.zeros(len(pairs), self.high - self.low, dtype=torch.float32)
        for row, (p, q) in enumerate(pairs):
            for t in range(p + 1, q + 1) if p < q else range(q, p):
                span[row, t - self.low] = scale[t]
        self.register_buffer("span", span, persistent=False)
        self.register_buffer("sources", torch.tensor([p - self.low for p, _ in pairs]), persistent=False)
        self.register_buffer("targets", torch.tensor([q - self.low for _, q in pairs]), persistent=False)

    def forward(self, state: DirectionState) -> Tensor:
        part = slice(self.low, self.high)
        weights: Tensor = merge_weights(
            state.delta[:, part], state.delta_bias, state.A, state.B[:, part], self.span, self.sources, self.targets, self.mode
        )
        return weights


class MergeLayer(Float32Buffers):
    """The merge before one layer of a plan.

    The left side's weights come from the forward scan of the layer before, the right side's from its backward scan.
    Holds no parameters and adds nothing to the state dict.
    """

    keep: Tensor
    sources: Tensor
    targets: Tensor
    fixed: Tensor | None

    def __init__(self, plan: MergePlan, layer: int) -> None:
        super().__init__()
        pairs, fixed = merge_table(plan, layer)
        self.register_buffer("keep", torch.tensor(plan.keep(layer)), persistent=False)
        self.register_buffer("sources", torch.tensor([p for p, _ in pairs]), persistent=False)
        self.register_buffer("targets", torch.tensor([q for _, q in pairs]), persistent=False)
        self.register_buffer("fixed", None if fixed is None else torch.tensor([fixed], dtype=torch.float32), persistent=False)
        self.left: _SideWeights | None = None
        self.right: _SideWeights | None = None
        if fixed is None:
            scale = layer_sizes(plan, layer) if plan.proportional_decay else None
            sides = [[pair for pair in pairs if pair[0] < pair[1]], [pair for pair in pairs if pair[0] > pair[1]]]
            self.left, self.right = (_SideWeights(side, plan.weights, scale) if side else None for side in sides)

    def weights(self, forward_state: DirectionState, backward_state: DirectionState) -> Tensor:
        """(batch or 1, sources): ascending by source, so the left side comes first."""
        if self.fixed is not None:
            return self.fixed
        parts = []
        if self.left is not None:
            parts.append(self.left(forward_state))
        if self.right is not None:
            parts.append(self.right(backward_state))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def forward(self, residual: Tensor, forward_state: DirectionState, backward_state: DirectionState) -> Tensor:
        """Merge the residual stream (batch, seqlen, d_model)."""
        merged: Tensor = merge_tokens(residual, self.weights(forward_state, backward_state), self.keep, self.sources, self.targets)
        return merged
