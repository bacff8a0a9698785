"""ReducedVim: Vision Mamba under a method that looks at the image."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stm.config import VimConfig
from stm.errors import PlanError
from stm.merging import DirectionState
from stm.scan import selective_scan
from stm.vim import Mixer, MixerOutput, SelectiveScan, VisionMamba

from .base import ClsIndex, Reduced, Reduction, ScanState, Tokens, take
from .hidden_state_alignment import Alignment, align


class AlignedScan(SelectiveScan):
    """A scan that can go on at pruned positions."""

    def forward(
        self, u: Tensor, state: DirectionState, C: Tensor, D: Tensor, decay_scale: Tensor | None, alignment: Alignment | None = None
    ) -> Tensor:
        if alignment is None:
            return super().forward(u, state, C, D, decay_scale)
        times = alignment.times(cast(ScanState, state).time, self.reverse)
        y = selective_scan(
            alignment.spread(u).to(times.dtype), times, state.A, alignment.spread(state.B), alignment.spread(C), D, reverse=self.reverse
        )
        return take(y, alignment.where).to(u.dtype)


class ReducedMixer(Mixer):
    """A mixer that also leaves C and the scan outputs to the method after it."""

    def _run(self, x: Tensor, decay_scale: Tensor | None, backward: bool, alignment: Alignment | None) -> tuple[Tensor, ScanState]:
        names = ("conv1d", "x_proj", "dt_proj", "scan")
        conv, x_proj, dt_proj, scan = (getattr(self, name + "_b" if backward else name) for name in names)
        A_log, D = (self.A_b_log, self.D_b) if backward else (self.A_log, self.D)
        u = conv(x)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        wide_A_log, wide_D, bias = (p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in (A_log, D, dt_proj.bias))
        # y is not known before the scan, which wants the rest.
        state = ScanState(dt_proj(dt), bias, -torch.exp(wide_A_log), B, C, u)
        y = scan(u, state, C, wide_D, decay_scale, alignment)
        return y, ScanState(state.delta, bias, state.A, B, C, y)

    def _direction(self, x: Tensor, decay_scale: Tensor | None, backward: bool) -> tuple[Tensor, DirectionState]:
        return self._run(x, decay_scale, backward, None)

    def forward(
        self, hidden: Tensor, cls_index: ClsIndex | None = None, decay_scale: Tensor | None = None, alignment: Alignment | None = None
    ) -> MixerOutput:
        """As `Mixer.forward`; with `alignment` the scans walk the whole sequence, and a class token whose place the image
        decides is picked after them, before out_proj."""
        if alignment is None and not isinstance(cls_index, Tensor):
            return super().forward(hidden, cls_index, decay_scale)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, forward_state = self._run(x, decay_scale, False, alignment)
        y_b, backward_state = self._run(x, decay_scale, True, alignment)
        gated = (y + y_b) * (F.silu(z) * 0.5)
        return MixerOutput(self.out_proj(gated if cls_index is None else pick(gated, cls_index)), forward_state, backward_state)


class ReducedVim(VisionMamba):
    """Vision Mamba whose tokens a method reduces before layers l >= 1, on the residual stream after the add.

    Parameters and their names are VisionMamba's. `cls_only_last` cuts the last layer's scans where the class token's place
    is known beforehand; where the image decides it, or an alignment asks for the whole scan, only out_proj is left to it alone.

    Args:
        config: sizes.
        reduction: a method made for these sizes, e.g. by `create_reduction`.

    Raises:
        PlanError: the method was made for another sequence.
    """

    def __init__(self, config: VimConfig, reduction: Reduction, cls_only_last: bool = True) -> None:
        super().__init__(config, None, cls_only_last)
        made = reduction.config
        if (made.seqlen, made.cls_index, made.depth) != (config.seqlen, config.cls_index, config.depth):
            raise PlanError(
                f"{reduction.name} was made for {made.seqlen} tokens and {made.depth} layers, "
                f"{config.name!r} has {config.seqlen} and {config.depth}; make it from the model's config"
            )
        self.reduction = reduction
        for block in self.blocks:  # the same parameters; only what they compute beside the output differs
            block.mixer.__class__ = ReducedMixer
            block.mixer.scan.__class__ = AlignedScan
            block.mixer.scan_b.__class__ = AlignedScan

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of normalised images (batch, 3, height, width)."""
        residual = self.embed(images)
        before: MixerOutput | None = None
        alignment: Alignment | None = None
        cls: ClsIndex = self.config.cls_index
        sizes = torch.ones(1, residual.shape[1], dtype=residual.dtype, device=residual.device)
        for index, block in enumerate(self.blocks):
            if before is not None:
                hidden = before.hidden.to(residual.dtype)
                if index not in self.reduction.schedule:
                    residual = residual + hidden
                else:
                    reduced = self.reduce(index, residual, hidden, before, sizes, cls)
                    if self.reduction.aligned:
                        states = (cast(ScanState, before.forward_state), cast(ScanState, before.backward_state))
                        alignment = align(alignment, reduced, *states)
                    residual, cls = reduced.x, reduced.cls
                    sizes = reduced.sizes if self.reduction.merges else torch.ones_like(reduced.sizes)
            only = cls if index == self.config.depth - 1 and self.cls_only_last else None
            before = cast(ReducedMixer, block.mixer)(block.norm(residual), only, None, alignment)
        assert before is not None
        hidden = before.hidden.to(residual.dtype)
        token = pick(residual, cls) + (hidden if self.cls_only_last else pick(hidden, cls))
        logits: Tensor = self.head(self.norm_f(token)[:, 0])
        return logits

    def reduce(self, layer: int, residual: Tensor, hidden: Tensor, before: MixerOutput, sizes: Tensor, cls: ClsIndex) -> Reduced:
        """What the method makes of the tokens before `layer`."""
        forward, backward = cast(ScanState, before.forward_state), cast(ScanState, before.backward_state)
        reduced: Reduced = self.reduction(layer, Tokens(residual, hidden, forward, backward, sizes, cls))
        return reduced


def pick(x: Tensor, cls: ClsIndex) -> Tensor:
    """The class token of x (batch, seqlen, d): (batch, 1, d)."""
    if isinstance(cls, int):
        return x[:, cls : cls + 1]
    return torch.gather(x, 1, cls.unsqueeze(-1).expand(x.shape[0], -1, x.shape[2]))


def with_reduction(model: VisionMamba, reduction: Reduction) -> ReducedVim:
    """The same weights (shared, not copied) under a method; a merge plan of `model` is not taken over."""
    parameter = next(model.parameters())
    with torch.device("meta"):
        other = ReducedVim(model.config, reduction, model.cls_only_last)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, mine in other.named_parameters():
        mine.requires_grad_(model.get_parameter(name).requires_grad)
    other.provenance = model.provenance
    return other.to(parameter.device).train(model.training)
