"""The network as training wants it: stm.VisionMamba's arithmetic, parameters of all layers in one tensor each.

Stacked parameters make optimiser, averaging and casts a few launches instead of hundreds; `to_state_dict` and
`load_state_dict_of` translate to and from the published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stm.config import VimConfig
from stm.ops import causal_conv_silu
from stm.scan import selective_scan

BACKENDS = ("triton", "torch")
DECAYED = ("patch_weight", "in_proj", "x_proj", "dt_weight", "out_proj", "head_weight")
"""Matrices, which weight decay applies to; A, D, norms, biases, conv taps and embeddings go without, as published."""

_PAIRS = {  # our name: the published ones of the two directions
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj": ("x_proj.weight", "x_proj_b.weight"),
    "dt_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}
_SINGLES = {"norm": "norm.weight", "in_proj": "mixer.in_proj.weight", "out_proj": "mixer.out_proj.weight"}
_TOP = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_weight": "patch_embed.proj.weight",
    "patch_bias": "patch_embed.proj.bias",
    "norm_f": "norm_f.weight",
    "head_weight": "head.weight",
    "head_bias": "head.bias",
}


class TrainingVim(nn.Module):
    """Vision Mamba without a plan, for training.

    Args:
        config: sizes; patches must not overlap.
        seed: of the initialisation.
        backend: "triton" runs tools.training.kernels (a GPU, or TRITON_INTERPRET=1), "torch" stm's own ops.
        dtype: of activations and of the weights in matrix products; parameters, residual stream and scan state are float32.
    """

    def __init__(self, config: VimConfig, seed: int = 0, backend: str = "torch", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; choose from {', '.join(BACKENDS)}")
        if config.stride != config.patch_size:
            raise ValueError(f"{config.name}: patches of {config.patch_size} at stride {config.stride} overlap; training covers those that do not")
        self.config, self.backend, self.dtype = config, backend, dtype
        d, inner, state, rank, depth = config.d_model, config.d_inner, config.d_state, config.dt_rank, config.depth

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.cls_token, self.pos_embed = parameter(1, 1, d), parameter(1, config.seqlen, d)
        self.patch_weight, self.patch_bias = parameter(d, 3, config.patch_size, config.patch_size), parameter(d)
        self.norm, self.in_proj, self.out_proj = parameter(depth, d), parameter(depth, 2 * inner, d), parameter(depth, d, inner)
        self.conv_weight, self.conv_bias = parameter(depth, 2, inner, config.d_conv), parameter(depth, 2, inner)
        self.x_proj = parameter(depth, 2, rank + 2 * state, inner)
        self.dt_weight, self.dt_bias = parameter(depth, 2, inner, rank), parameter(depth, 2, inner)
        self.A_log, self.D = parameter(depth, 2, inner, state), parameter(depth, 2, inner)
        self.norm_f, self.head_weight, self.head_bias = parameter(d), parameter(config.num_classes, d), parameter(config.num_classes)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The published initialisation, but both directions get the special one of dt (the published code forgets the backward one)."""
        g = torch.Generator().manual_seed(seed)
        config = self.config

        def uniform(p: Tensor, bound: float) -> None:
            p.copy_(bound * (2 * torch.rand(p.shape, generator=g) - 1))

        def normal(p: Tensor, std: float) -> None:
            p.copy_((std * torch.randn(p.shape, generator=g)).clamp(-2, 2))

        for p in (self.cls_token, self.pos_embed, self.head_weight):
            normal(p, 0.02)
        normal(self.patch_weight, 1 / math.sqrt(3 * config.patch_size**2))
        for p in (self.patch_bias, self.head_bias):
            p.zero_()
        for p in (self.norm, self.norm_f, self.D):
            p.fill_(1)
        uniform(self.in_proj, 1 / math.sqrt(config.d_model))
        uniform(self.out_proj, 1 / math.sqrt(config.d_inner * config.depth))
        uniform(self.x_proj, 1 / math.sqrt(config.d_inner))
        uniform(self.conv_weight, 1 / math.sqrt(config.d_conv))
        uniform(self.conv_bias, 1 / math.sqrt(config.d_conv))
        uniform(self.dt_weight, 1 / math.sqrt(config.dt_rank))
        delta = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(self.dt_bias.shape, generator=g)).clamp_min(1e-4)
        self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse softplus
        self.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.A_log))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes), float32, of normalised images (batch, 3, height, width)."""
        config, dtype = self.config, self.dtype
        batch, p, side = len(images), config.cls_index, config.patch_size
        rows, columns = config.grid
        tiles = images.to(dtype).reshape(batch, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        patches = F.linear(tiles, self.patch_weight.flatten(1).to(dtype), self.patch_bias.to(dtype))
        cls = self.cls_token.to(dtype).expand(batch, -1, -1)
        residual = torch.cat([patches[:, :p], cls, patches[:, p:]], 1).float() + self.pos_embed
        names = ("norm", "in_proj", "conv_weight", "conv_bias", "x_proj", "dt_weight", "dt_bias", "A", "D", "out_proj")
        stacks = {name: getattr(self, name) for name in names if name != "A"} | {"A": -torch.exp(self.A_log)}
        for name in ("in_proj", "out_proj", "x_proj", "dt_weight"):
            stacks[name] = stacks[name].to(dtype)
        run: Callable[..., tuple[Tensor, Tensor]] = layer
        if self.backend == "triton":
            from . import kernels

            run = kernels.layer
            stacks["x_proj"] = kernels.pack_x_proj(stacks["x_proj"], config.dt_rank)
            stacks["A"] = stacks["A"].transpose(2, 3).contiguous()
        update: Tensor | None = None
        for weights in zip(*(stacks[name].unbind(0) for name in names), strict=True):
            residual, update = run(residual, update, *weights, config.norm_eps)
        total = residual[:, p] if update is None else residual[:, p] + update[:, p]
        final = F.rms_norm(total, (config.d_model,), self.norm_f, config.norm_eps)
        return F.linear(final, self.head_weight, self.head_bias)


def layer(
    residual: Tensor, update: Tensor | None, norm: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What kernels.layer computes, in stm's own ops: residual + update, and what the layer adds to it.

    Args:
        residual: (batch, seqlen, d_model); update: the layer before's, none for the first.
        x_proj: (2, dt_rank + 2 d_state, d_inner); A: (2, d_inner, d_state); the others as the model holds them, of one layer.
    """
    if update is not None:
        residual = residual + update
    normed = F.rms_norm(residual, residual.shape[-1:], norm, eps).to(in_proj.dtype)
    x, z = F.linear(normed, in_proj).chunk(2, -1)
    both = []
    for k in range(2):
        u = causal_conv_silu(x, conv_weight[k], conv_bias[k], bool(k))
        dt, B, C = F.linear(u, x_proj[k]).split([dt_weight.shape[2], A.shape[2], A.shape[2]], -1)
        delta = F.linear(dt, dt_weight[k])
        both.append(selective_scan(u, delta, A[k], B, C, D[k], delta_bias=dt_bias[k], delta_softplus=True, reverse=bool(k)))
    return residual, F.linear((both[0] + both[1]) * (F.silu(z) * 0.5), out_proj)


def to_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacked weights (a TrainingVim's state dict, or their average) under the published names."""
    state = {name: weights[ours].detach().clone() for ours, name in _TOP.items()}
    for layer in range(len(weights["norm"])):
        prefix = f"layers.{layer}."
        for ours, name in _SINGLES.items():
            state[prefix + name] = weights[ours][layer].detach().clone()
        for ours, names in _PAIRS.items():
            for direction, name in enumerate(names):
                value = weights[ours][layer, direction].detach().clone()
                state[f"{prefix}mixer.{name}"] = value.unsqueeze(1) if ours == "conv_weight" else value
    return state


def from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_state_dict`."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    weights = {ours: state[name] for ours, name in _TOP.items()}
    for ours, name in _SINGLES.items():
        weights[ours] = torch.stack([state[f"layers.{layer}.{name}"] for layer in range(depth)])
    for ours, names in _PAIRS.items():
        both = [torch.stack([state[f"layers.{layer}.mixer.{name}"] for name in names]) for layer in range(depth)]
        stacked = torch.stack(both)
        weights[ours] = stacked.squeeze(3) if ours == "conv_weight" else stacked
    return weights
