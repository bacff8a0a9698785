"""Vision Mamba (ViM, arXiv 2401.09417) with a middle class token, token-major, with an optional merge plan.

Parameter names are those of the published checkpoints. The arithmetic is the published one: bimamba v2, RMSNorm,
residual stream in float32, the two directions' sum halved, the head on the class token alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Provenance
from .config import VimConfig
from .errors import ShapeError
from .merging import DirectionState, Float32Buffers, MergeLayer
from .ops import causal_conv_silu, rms_norm
from .plan import MergePlan
from .scan import selective_scan


class RMSNorm(nn.Module):
    """x rsqrt(mean(x^2) + eps) weight in float32; the result has the weight's dtype."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = rms_norm(x, self.weight, self.eps)
        return normed


class CausalConvSilu(nn.Module):
    """Causal depthwise conv + SiLU over tokens; weight (d_inner, 1, d_conv) as nn.Conv1d stores it."""

    def __init__(self, d_inner: int, d_conv: int, reverse: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, 1, d_conv))
        self.bias = nn.Parameter(torch.empty(d_inner))
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        u: Tensor = causal_conv_silu(x, self.weight.squeeze(1), self.bias, self.reverse)
        return u


class DeltaProjection(nn.Linear):
    """dt_proj without its bias: the scan adds that before softplus."""

    def forward(self, dt: Tensor) -> Tensor:
        return F.linear(dt, self.weight)


class SelectiveScan(nn.Module):
    """One direction's scan; a module so that its output has a name."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(self, u: Tensor, state: DirectionState, C: Tensor, D: Tensor, decay_scale: Tensor | None) -> Tensor:
        return selective_scan(
            u,
            state.delta,
            state.A,
            state.B,
            C,
            D,
            delta_bias=state.delta_bias,
            delta_softplus=True,
            reverse=self.reverse,
            decay_scale=decay_scale,
        )


@dataclass(frozen=True)
class MixerOutput:
    hidden: Tensor
    forward_state: DirectionState
    backward_state: DirectionState


class Mixer(nn.Module):
    """Bidirectional Mamba block, variant v2: shared in_proj and out_proj, all else once a direction (`_b`: backward)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        inner, state, rank = config.d_inner, config.d_state, config.dt_rank
        self.d_state, self.dt_rank = state, rank
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = CausalConvSilu(inner, config.d_conv, reverse=False)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = DeltaProjection(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.conv1d_b = CausalConvSilu(inner, config.d_conv, reverse=True)
        self.x_proj_b = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj_b = DeltaProjection(rank, inner)
        self.A_b_log = nn.Parameter(torch.empty(inner, state))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.scan = SelectiveScan(reverse=False)
        self.scan_b = SelectiveScan(reverse=True)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)

    def _direction(self, x: Tensor, decay_scale: Tensor | None, backward: bool) -> tuple[Tensor, DirectionState]:
        names = ("conv1d", "x_proj", "dt_proj", "scan")
        conv, x_proj, dt_proj, scan = (getattr(self, name + "_b" if backward else name) for name in names)
        A_log, D = (self.A_b_log, self.D_b) if backward else (self.A_log, self.D)
        u = conv(x)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # A, D and the delta bias stay in float32 or wider whatever the model's dtype, as published.
        wide_A_log, wide_D, bias = (p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in (A_log, D, dt_proj.bias))
        state = DirectionState(dt_proj(dt), bias, -torch.exp(wide_A_log), B)
        return scan(u, state, C, wide_D, decay_scale), state

    def forward(self, hidden: Tensor, cls_index: int | None = None, decay_scale: Tensor | None = None) -> MixerOutput:
        """Mix tokens (batch, seqlen, d_model).

        With `cls_index` only that token is computed, exactly: the forward scan over 0..cls_index, the backward scan
        over cls_index..end; `hidden` of the result is then (batch, 1, d_model).
        """
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        if cls_index is None:
            y, forward_state = self._direction(x, decay_scale, backward=False)
            y_b, backward_state = self._direction(x, decay_scale, backward=True)
        else:
            scales = (None, None) if decay_scale is None else (decay_scale[: cls_index + 1], decay_scale[cls_index:])
            y, forward_state = self._direction(x[:, : cls_index + 1], scales[0], backward=False)
            y_b, backward_state = self._direction(x[:, cls_index:], scales[1], backward=True)
            y, y_b, z = y[:, cls_index:], y_b[:, :1], z[:, cls_index : cls_index + 1]
        gated = (y + y_b) * (F.silu(z) * 0.5)
        return MixerOutput(self.out_proj(gated), forward_state, backward_state)


class Block(Float32Buffers):
    """Norm and mixer of one layer, and the merge before it if the plan has one."""

    decay_scale: Tensor | None

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)
        self.merge: MergeLayer | None = None
        self.register_buffer("decay_scale", None, persistent=False)

    def forward(self, residual: Tensor, before: MixerOutput | None, cls_index: int | None) -> tuple[Tensor, MixerOutput]:
        """Add the layer before's output, merge, normalise, mix. Returns the residual and this mixer's output."""
        if before is not None:
            residual = residual + before.hidden.to(residual.dtype)
            if self.merge is not None:
                residual = self.merge(residual, before.forward_state, before.backward_state)
        return residual, self.mixer(self.norm(residual), cls_index, self.decay_scale)


class PatchEmbed(nn.Module):
    """Conv2d patches, flattened row-major to (batch, patches, d_model)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.d_model, config.patch_size, config.stride)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class VisionMamba(nn.Module):
    """Vision Mamba classifier; built in eval mode by `stm.create_model`.

    Args:
        config: sizes.
        plan: merge plan, or None for the unmerged model.
        cls_only_last: compute only the class token in the last layer, which is exact because the head reads nothing
            else.

    Weights are random (seed 0) until a state dict is loaded; `create_model` does that.

    Raises:
        PlanError: the plan was made for another model.
    """

    def __init__(self, config: VimConfig, plan: MergePlan | None = None, cls_only_last: bool = True) -> None:
        super().__init__()
        self.config, self.cls_only_last = config, cls_only_last
        self.provenance: Provenance | None = None
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.empty(1, config.seqlen, config.d_model))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.set_plan(plan)
        if not self.cls_token.is_meta:
            self.init_weights(seed=0)

    def set_plan(self, plan: MergePlan | None) -> None:
        """Merge by this plan from now on (None: not at all); weights stay as they are.

        Raises:
            PlanError: the plan was made for another model.
        """
        if plan is not None:
            plan.check_fits(self.config)
            plan = plan if plan.merges else None
        self.plan = plan
        self.cls_positions = plan.cls_positions if plan is not None else [self.config.cls_index] * self.config.depth
        sizes = plan.sizes() if plan is not None and plan.proportional_decay else None
        for index, block in enumerate(self.blocks):
            block.merge = MergeLayer(plan, index) if plan is not None and plan.groups(index) else None
            block.decay_scale = None if sizes is None else torch.tensor(sizes[index], dtype=torch.float32)

    @property
    def blocks(self) -> list[Block]:
        """`layers`, typed."""
        return [cast(Block, layer) for layer in self.layers]

    def embed(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width), normalised -> tokens (batch, seqlen, d_model), float32 or wider."""
        height, width = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ShapeError(
                f"{self.config.name}: images have shape {tuple(images.shape)}, expected (batch, 3, {height}, {width}); "
                f"resize them or create the model with image_size={tuple(images.shape[2:])}"
            )
        patches = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        p = self.config.cls_index
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([patches[:, :p], cls, patches[:, p:]], dim=1) + self.pos_embed
        return tokens if tokens.dtype == torch.float64 else tokens.float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of normalised images (batch, 3, height, width)."""
        residual, output = self.embed(images), None
        last = self.config.depth - 1
        for index, layer in enumerate(self.blocks):
            cls_index = self.cls_positions[index] if self.cls_only_last and index == last else None
            residual, output = layer(residual, output, cls_index)
        assert output is not None
        c = self.cls_positions[last]
        residual = residual[:, c : c + 1]
        hidden = output.hidden if self.cls_only_last else output.hidden[:, c : c + 1]
        logits: Tensor = self.head(self.norm_f(residual + hidden.to(residual.dtype))[:, 0])
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Seeded random weights with a trained model's statistics: the published initialisation (S4D-real A, delta in
        1e-3..1e-1) with noise on every parameter that training moves, in both directions. Not a trained model."""
        g = torch.Generator().manual_seed(seed)

        def normal(p: Tensor, mean: float, std: float) -> None:
            p.copy_(mean + std * torch.randn(p.shape, generator=g, dtype=p.dtype))

        config = self.config
        normal(self.cls_token, 0, 0.5)
        normal(self.pos_embed, 0, 0.3)
        normal(self.patch_embed.proj.weight, 0, 1 / math.sqrt(3 * config.patch_size**2))
        assert self.patch_embed.proj.bias is not None
        normal(self.patch_embed.proj.bias, 0, 0.02)
        for block in self.blocks:
            mixer = block.mixer
            normal(block.norm.weight, 1, 0.1)
            normal(mixer.in_proj.weight, 0, 1 / math.sqrt(config.d_model))
            normal(mixer.out_proj.weight, 0, 1 / math.sqrt(config.d_inner))
            for suffix, A_log, D in (("", mixer.A_log, mixer.D), ("_b", mixer.A_b_log, mixer.D_b)):
                conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
                normal(conv.weight, 0, 0.5)
                normal(conv.bias, 0, 0.1)
                normal(x_proj.weight, 0, 1 / math.sqrt(config.d_inner))
                normal(dt_proj.weight, 0, 0.5 / math.sqrt(config.dt_rank))
                delta = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(config.d_inner, generator=g))
                dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse softplus
                normal(A_log, 0, 0.1)
                A_log.add_(torch.arange(1, config.d_state + 1, dtype=A_log.dtype).log())
                normal(D, 1, 0.1)
        normal(self.norm_f.weight, 1, 0.1)
        normal(self.head.weight, 0, 1 / math.sqrt(config.d_model))
        normal(self.head.bias, 0, 0.01)
