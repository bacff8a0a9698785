"""ViM as its users run it today: the channel-first flow of hustvl/Vim over mamba_ssm's and causal_conv1d's kernels.

The weights are those of a `VisionMamba`; layout, flips, fused add + norm and the order of the kernels are theirs. Merging, which
that code does not have, is added with our own torch operations on the few tokens it touches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stm import VisionMamba
from stm.errors import MissingDependencyError
from stm.merging import MergeLayer
from stm.ops import merge_tokens, merge_weights
from stm.vim import Mixer


@dataclass(frozen=True)
class ChannelFirstOps:
    """scan: `selective_scan_fn`; conv: `causal_conv1d_fn`; norm: `rms_norm_fn`. Signatures are those of the two packages."""

    scan: Callable[..., Any]
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    source: str


def reference_norm(
    x: Tensor, weight: Tensor, bias: None, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = True, eps: float = 1e-5
) -> Any:
    """`rms_norm_fn` in plain torch; stands in where Triton's cannot run."""
    wide = x.float() if residual is None else x + residual.float()
    wide = wide.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return (normed, wide) if prenorm else normed


def reference_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "silu") -> Tensor:
    """`causal_conv1d_fn` in plain torch."""
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])[..., : x.shape[-1]])


def mamba_ssm_ops() -> ChannelFirstOps:
    """The two packages' kernels. They are rivals, not dependencies: asked for by name, at run time, here only.

    Raises:
        MissingDependencyError: one is not installed or does not load.
    """
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingDependencyError(
            f"mamba_ssm and causal_conv1d do not import here ({type(error).__name__}: {str(error)[:200]}); install both on a GPU machine to compare"
        ) from None
    try:
        norm = importlib.import_module("mamba_ssm.ops.triton.layer_norm").rms_norm_fn
        source = "mamba_ssm's scan and norm, causal_conv1d"
    except (ImportError, OSError, RuntimeError, AttributeError):
        norm, source = reference_norm, "mamba_ssm's scan, causal_conv1d, norm in plain torch"
    return ChannelFirstOps(scan, conv, norm, source)


@dataclass
class _Walked:
    """One direction's output (batch, d_inner, seqlen) and what a merge reads; tokens are in walking order."""

    y: Tensor
    delta: Tensor  # (batch, d_inner, seqlen), before bias
    B: Tensor  # (batch, 1, d_state, seqlen)


class _Direction(nn.Module):
    """A and the weights in the shapes that the kernels take, made once: that favours the rival."""

    def __init__(self, mixer: Mixer, backward: bool, ops: ChannelFirstOps) -> None:
        super().__init__()
        suffix = "_b" if backward else ""
        self.ops, self.rank, self.state = ops, mixer.dt_rank, mixer.d_state
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log, D = (mixer.A_b_log, mixer.D_b) if backward else (mixer.A_log, mixer.D)
        self.conv_weight, self.conv_bias = conv.weight.detach()[:, 0].contiguous(), conv.bias.detach()
        self.x_proj, self.dt_proj = x_proj.weight.detach(), dt_proj.weight.detach()
        self.A, self.D, self.bias = -torch.exp(A_log.detach().float()), D.detach().float(), dt_proj.bias.detach().float()

    def forward(self, xz: Tensor) -> _Walked:
        batch, _, seqlen = xz.shape
        x, z = xz.chunk(2, 1)
        x = self.ops.conv(x, self.conv_weight, self.conv_bias, activation="silu")
        p = F.linear(x.transpose(1, 2).reshape(batch * seqlen, -1), self.x_proj)
        delta = (self.dt_proj @ p[:, : self.rank].t()).view(-1, batch, seqlen).transpose(0, 1)
        B, C = (t.reshape(batch, seqlen, self.state).transpose(1, 2)[:, None].contiguous() for t in p[:, self.rank :].chunk(2, -1))
        return _Walked(self.ops.scan(x, delta, self.A, B, C, self.D, z, self.bias, True), delta, B)


def _side(side: Any, walk: _Direction, walked: _Walked, backward: bool) -> Tensor:
    """Merge weights of one side; of the backward walk only the tokens it reads are turned round."""
    seqlen = walked.delta.shape[-1]
    part = slice(seqlen - side.high, seqlen - side.low) if backward else slice(side.low, side.high)
    delta, B = walked.delta[..., part], walked.B[:, 0, :, part]
    if backward:
        delta, B = delta.flip(-1), B.flip(-1)
    weights: Tensor = merge_weights(delta.transpose(1, 2), walk.bias, walk.A, B.transpose(1, 2), side.span, side.sources, side.targets, side.mode)
    return weights


class ChannelFirstVim(nn.Module):
    """A ViM in the published code's layout and kernels, over the weights of `model` (already on its device and in its dtype)."""

    def __init__(self, model: VisionMamba, ops: ChannelFirstOps) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.walks = nn.ModuleList(_Direction(block.mixer, backward, ops) for block in model.blocks for backward in (False, True))

    def _merge(self, merge: MergeLayer, layer: int, residual: Tensor, before: tuple[_Walked, _Walked]) -> Tensor:
        weights = merge.fixed
        if weights is None:
            parts = []
            for side, backward in ((merge.left, False), (merge.right, True)):
                if side is not None:
                    walk = self.walks[2 * (layer - 1) + backward]
                    assert isinstance(walk, _Direction)
                    parts.append(_side(side, walk, before[backward], backward))
            weights = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        merged: Tensor = merge_tokens(residual, weights, merge.keep, merge.sources, merge.targets)
        return merged

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        dtype = model.head.weight.dtype
        hidden, residual = model.embed(images).to(dtype), None
        walked: tuple[_Walked, _Walked] | None = None
        for layer, block in enumerate(model.blocks):
            if block.merge is not None and residual is not None and walked is not None:
                residual = self._merge(block.merge, layer, residual + hidden, walked)
                x = self.ops.norm(residual, block.norm.weight, None, prenorm=False, eps=block.norm.eps).to(dtype)
            else:
                x, residual = self.ops.norm(
                    hidden, block.norm.weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=block.norm.eps
                )
            batch, seqlen, d_model = x.shape
            xz = (block.mixer.in_proj.weight @ x.reshape(batch * seqlen, d_model).t()).view(-1, batch, seqlen).transpose(0, 1)
            forward, backward = self.walks[2 * layer](xz), self.walks[2 * layer + 1](xz.flip(-1))
            hidden = F.linear((forward.y + backward.y.flip(-1)).transpose(1, 2) / 2, block.mixer.out_proj.weight)
            walked = (forward, backward)
        x = self.ops.norm(hidden, model.norm_f.weight, None, residual=residual, prenorm=False, residual_in_fp32=True, eps=model.norm_f.eps)
        logits: Tensor = model.head(x[:, model.cls_positions[-1]].to(dtype))
        return logits.float()
