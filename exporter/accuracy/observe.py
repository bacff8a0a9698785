"""One forward pass seen from the class token: its state in every layer, its place in the residual stream, the logits.

Hooks on the modules that a plain and a reduced model share (norm, mixer, the two scans); nothing in stm knows of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stm import VisionMamba
from stm.merging import DirectionState
from stm.reduction.base import ClsIndex, Reduced
from stm.reduction.hidden_state_alignment import Alignment
from stm.reduction.model import ReducedVim, pick

_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}
"""Bound on (batch x tokens x d_inner x d_state) held at once: 256 MiB, or what a last-level cache holds."""


@dataclass(frozen=True)
class Observation:
    """Of a batch: logits (batch, num_classes); for each layer the class token's hidden state (batch, 2, d_inner, d_state), forward
    and backward, and the class token after the layer (batch, d_model)."""

    logits: Tensor
    states: list[Tensor]
    tokens: list[Tensor]


def class_state(u: Tensor, time: Tensor, A: Tensor, B: Tensor, cls: ClsIndex, *, reverse: bool = False, decay_scale: Tensor | None = None) -> Tensor:
    """The scan's hidden state at the class token, without walking: the recurrence of `stm.scan` unrolled.

    h_c = sum_t exp(A sum_{t < r <= c} s_r d_r) d_t B_t u_t   (backward: c <= r < t)

    Args:
        u, time: (batch, seqlen, d_inner); time is delta after bias and softplus.
        A: (d_inner, d_state). B: (batch, seqlen, d_state).
        cls: position of the class token, one for all or one an image.
        decay_scale: (seqlen), s above.

    Returns:
        (batch, d_inner, d_state), float32 or wider.
    """
    wide = time.dtype
    if isinstance(cls, int):
        part = slice(cls, None) if reverse else slice(None, cls + 1)
        u, time, B = u[:, part], time[:, part], B[:, part]
        decay_scale = None if decay_scale is None else decay_scale[part]
    else:
        positions = torch.arange(u.shape[1], device=u.device)
        time = time * ((positions >= cls) if reverse else (positions <= cls)).unsqueeze(-1).to(wide)
    timed = time if decay_scale is None else time * decay_scale.to(wide)[:, None]
    # Summed from the class token outwards: what lies near it, and so counts, is summed first and stays exact.
    if reverse:
        later = F.pad(timed.cumsum(1)[:, :-1], (0, 0, 1, 0))
    else:
        later = F.pad(timed.flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1))
    fed, A, B = time * u.to(wide), A.to(wide), B.to(wide)
    batch, seqlen, d_inner = fed.shape
    step = max(1, _ELEMENTS["cuda" if u.is_cuda else "cpu"] // (seqlen * d_inner * A.shape[1]))
    parts = []
    for first in range(0, batch, step):
        rows = slice(first, first + step)
        weights = (later[rows].unsqueeze(-1) * A).exp_().mul_(fed[rows].unsqueeze(-1))
        parts.append(weights.mul_(B[rows].unsqueeze(2)).sum(1))
    return torch.cat(parts)


class _Watch:
    """Collects one forward pass."""

    def __init__(self, model: VisionMamba) -> None:
        self.model = model
        self.place: ClsIndex = model.config.cls_index  # of a reduced model, as far as the pass has come
        depth = model.config.depth
        self.halves: list[list[Tensor]] = [[] for _ in range(depth)]
        self.tokens: list[Tensor] = []
        self._residual: Tensor | None = None

    def cls(self, layer: int) -> ClsIndex:
        return self.place if isinstance(self.model, ReducedVim) else self.model.cls_positions[layer]

    def reduced(self, module: Any, arguments: Any, result: Reduced) -> None:
        self.place = result.cls

    def normed(self, layer: int, residual: Tensor) -> None:
        self._residual = pick(residual, self.cls(layer))[:, 0]

    def mixed(self, layer: int, hidden: Tensor) -> None:
        assert self._residual is not None
        self.tokens.append(self._residual + pick(hidden, self.cls(layer))[:, 0].to(self._residual.dtype))

    def scanned(self, layer: int, reverse: bool, u: Tensor, state: DirectionState, decay_scale: Tensor | None, alignment: Alignment | None) -> None:
        wide = torch.float64 if state.A.dtype == torch.float64 else torch.float32
        time, B, cls = F.softplus(state.delta.to(wide) + state.delta_bias.to(wide)), state.B, self.cls(layer)
        if alignment is not None:  # the scan walks the whole sequence
            time, u, B, cls = alignment.times(time, reverse), alignment.spread(u), alignment.spread(B), self.model.config.cls_index
        self.halves[layer].append(class_state(u, time, state.A, B, cls, reverse=reverse, decay_scale=decay_scale))


@contextlib.contextmanager
def _watched(model: VisionMamba) -> Iterator[_Watch]:
    watch = _Watch(model)
    hooks = []
    if isinstance(model, ReducedVim):
        hooks.append(model.reduction.register_forward_hook(watch.reduced))
    for index, block in enumerate(model.blocks):

        def normed(module: Any, arguments: Any, layer: int = index) -> None:
            watch.normed(layer, arguments[0])

        def mixed(module: Any, arguments: Any, result: Any, layer: int = index) -> None:
            watch.mixed(layer, result.hidden)

        def scanned(module: Any, arguments: Any, layer: int = index) -> None:
            u, state, _, _, decay_scale, *rest = arguments
            watch.scanned(layer, module.reverse, u, state, decay_scale, rest[0] if rest else None)

        hooks.append(block.norm.register_forward_pre_hook(normed))
        hooks.append(block.mixer.register_forward_hook(mixed))
        hooks += [scan.register_forward_pre_hook(scanned) for scan in (block.mixer.scan, block.mixer.scan_b)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 off, as in every comparison of ours."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


@torch.no_grad()
def observe(model: VisionMamba, images: Tensor) -> Observation:
    """Run normalised images (batch, 3, height, width) through a plain, merged or reduced model.

    The model must compute all tokens in its last layer (`cls_only_last` False), so that the class token has the same place there
    as in the other layers.
    """
    assert not model.cls_only_last
    with _watched(model) as watch, exact_float32():
        logits = model(images).float()
    states = [torch.stack(halves, 1).float() for halves in watch.halves]
    return Observation(logits, states, [token.float() for token in watch.tokens])
