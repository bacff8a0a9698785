"""Weight mode `constant`: HSP weights averaged over images and frozen into the plan, so that merging costs nothing at run time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .factory import with_plan
from .merging import DirectionState, MergeLayer
from .plan import MergePlan
from .vim import VisionMamba


@torch.no_grad()
def calibrate_constants(model: VisionMamba, plan: MergePlan, batches: Iterable[Tensor]) -> MergePlan:
    """Average the plan's weights over images (batch, 3, height, width) and return it with weights="constant".

    The plan's own mode is averaged; give it with `hsp` for the default.

    Raises:
        PlanError: the plan does not fit the model.
        ValueError: no images.
    """
    merged = with_plan(model, plan)
    sums: dict[int, Tensor] = {}
    count = 0
    hooks = []
    for index, block in enumerate(merged.blocks):
        if block.merge is None:
            continue

        def collect(module: torch.nn.Module, arguments: tuple[Tensor, DirectionState, DirectionState], layer: int = index) -> None:
            weights = cast(MergeLayer, module).weights(arguments[1], arguments[2]).expand(arguments[0].shape[0], -1)
            sums[layer] = sums.get(layer, torch.zeros(())) + weights.double().sum(0)

        hooks.append(block.merge.register_forward_pre_hook(collect))
    try:
        for images in batches:
            merged(images)
            count += images.shape[0]
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ValueError("calibrate_constants: no images; give at least one batch")
    constants = {layer: tuple((total / count).tolist()) for layer, total in sums.items()}
    return replace(plan, weights="constant", constants=constants)
