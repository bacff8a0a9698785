"""Constant merge weights by least squares where it counts: in the logits (or the class token), not in the token.

With w the weights of all sources of a plan, the logits are z(w) ~ z(w0) + J (w - w0), and close to the unmerged model's p the KL
divergence is 1/2 dz^T F dz with Fisher's F = diag(p) - p p^T. So the best w near w0 solves a ridge regression (Gauss-Newton):

    (mean_i J_i^T F_i J_i + lambda) (w - w0) = - gradient of the mean divergence at w0.

J_i^T F_i J_i is estimated from rows J_i^T (e_y - p_i) with y drawn from p_i: a backward pass gives such a row for every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stm.errors import ConfigError
from stm.factory import with_plan
from stm.merging import layer_sizes
from stm.plan import MergePlan
from stm.vim import VisionMamba


def ridge(hessian: Tensor, gradient: Tensor, strength: float) -> Tensor:
    """The step -(H + strength mean(diag H) I)^-1 g; with H = A^T A and g = A^T r it is ridge regression of -r on A."""
    size = hessian.shape[0]
    scale = strength * hessian.diagonal().mean().clamp_min(1e-30)
    step: Tensor = torch.linalg.solve(hessian + scale * torch.eye(size, dtype=hessian.dtype, device=hessian.device), gradient)
    return -step


@dataclass(frozen=True)
class Quadratic:
    """Mean divergence near a plan's constants, as a function of their change: value + g^T d + 1/2 d^T H d."""

    value: float
    gradient: Tensor
    hessian: Tensor


def flat_constants(plan: MergePlan) -> Tensor:
    assert plan.constants is not None
    return torch.tensor([value for layer in sorted(plan.constants) for value in plan.constants[layer]], dtype=torch.float64)


def with_constants(plan: MergePlan, values: Tensor) -> MergePlan:
    """The plan with these weights, sources in ascending layer and position."""
    constants, at = {}, 0
    for layer in sorted(layer for layer in plan.layers if plan.removed(layer)):
        constants[layer] = tuple(values[at : at + plan.removed(layer)].tolist())
        at += plan.removed(layer)
    return replace(plan, weights="constant", constants=constants)


def size_constants(plan: MergePlan) -> MergePlan:
    """Constants s_p / s_q: after the norm, which takes the length away, a merge by them is the size-weighted mean."""
    found = {}
    for layer in plan.layers:
        size = layer_sizes(plan, layer)
        found[layer] = tuple(size[p] / size[q] for p, q in plan.pairs(layer))
    return replace(plan, weights="constant", constants=found)


def quadratic(model: VisionMamba, plan: MergePlan, batches: Sequence[Tensor], objective: str = "kl", rows: int = 4, seed: int = 0) -> Quadratic:
    """Value, gradient and Gauss-Newton matrix of the mean divergence in the constants of `plan`.

    Args:
        rows: random rows an image from which the matrix is made.

    Raises:
        ConfigError: the plan has no constants, or there are no images.
    """
    if plan.constants is None or not plan.merges:
        raise ConfigError(f"least squares needs a plan with constants, this one has weights {plan.weights!r}; calibrate it first")
    if not batches:
        raise ConfigError("least squares needs images, and there are none; give at least one batch")
    unmerged, merged = with_plan(model, None), with_plan(model, plan)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    size, count, value = sum(plan.removed(layer) for layer in plan.layers), 0, 0.0
    gradient, hessian = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    merges = [block.merge for block in merged.blocks if block.merge is not None]
    fixed = [merge.fixed for merge in merges]
    for images in batches:
        with torch.no_grad():
            truth = _output(unmerged, images, objective)
        weights = []
        for merge, constant in zip(merges, fixed, strict=True):  # one copy an image, so that gradients come an image
            assert constant is not None
            copy = constant.expand(images.shape[0], -1).clone().requires_grad_(True)
            merge.fixed = copy
            weights.append(copy)
        output = _output(merged, images, objective)

        def row(scalar: Tensor, weights: list[Tensor] = weights, last: bool = False) -> Tensor:
            found = torch.autograd.grad(scalar, weights, retain_graph=not last)
            return torch.cat(found, 1).double().cpu()

        if objective == "kl":
            p = truth.softmax(-1)
            distance = (p * (truth.log_softmax(-1) - output.log_softmax(-1))).sum()
        else:
            length = truth.square().sum(-1, keepdim=True).clamp_min(1e-30)
            distance = ((output - truth).square() / length).sum()
        value += distance.item()
        gradient += row(distance).sum(0)
        for index in range(rows):
            if objective == "kl":
                drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
                direction = torch.zeros_like(p).scatter_(1, drawn, 1.0) - p
            else:
                direction = torch.randn(truth.shape, generator=generator, dtype=truth.dtype).to(truth.device) * (2 / length).sqrt()
            a = row((direction * output).sum(), last=index == rows - 1)
            hessian += a.T @ a / rows
        count += images.shape[0]
    return Quadratic(value / count, gradient / count, hessian / count)


def _output(model: VisionMamba, images: Tensor, objective: str) -> Tensor:
    """Logits, or the class token after the last norm; float64."""
    if objective == "kl":
        return model(images).double()  # type: ignore[no-any-return]
    found: list[Tensor] = []
    hook = model.norm_f.register_forward_hook(lambda module, arguments, output: found.append(output))
    try:
        model(images)
    finally:
        hook.remove()
    return found[0][:, 0].double()
