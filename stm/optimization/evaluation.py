"""How far a plan's model is from the unmerged one on given images, image by image; layers before the first change run once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stm.errors import ConfigError
from stm.factory import with_plan
from stm.plan import MergePlan
from stm.vim import MixerOutput, VisionMamba

OBJECTIVES = ("kl", "state")
RACE_IMAGES = 32


@dataclass
class _Point:
    """What enters a block: the residual stream and the output of the block before."""

    residual: Tensor
    before: MixerOutput | None


class Divergence:
    """Divergence of a plan from the unmerged model, a number an image.

    `kl`: KL(unmerged || merged) of the predicted classes, in nats: 0 where nothing changes, and what a user of the logits sees.
    `state`: squared distance of the final class token (after the last norm) over its squared length: the paper's loss (eq. 9) in
    relative form; for models whose head means nothing on these images.

    The states that enter each layer under the plan of the last `keep` are kept (as many as `cache_bytes` allow), so that a plan
    that differs from layer l on costs depth - l layers.

    Args:
        model: the model; its plan is ignored, its weights are shared.
        batches: normalised images (batch, 3, height, width), on the model's device.

    Raises:
        ConfigError: no images, or no such objective.
    """

    def __init__(self, model: VisionMamba, batches: Sequence[Tensor], objective: str = "kl", cache_bytes: int = 2 << 30) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(f"objective is {objective!r}; choose from {', '.join(OBJECTIVES)}")
        batches = [batch for batch in batches if batch.shape[0]]
        if not batches:
            raise ConfigError("a plan's divergence needs images, and there are none; give at least one")
        self.model, self.objective, self.cache_bytes = with_plan(model, None), objective, cache_bytes
        self.device = next(model.parameters()).device
        self.forwards = 0.0  # whole forwards of all images, the measure of cost
        self.count = sum(batch.shape[0] for batch in batches)
        with torch.inference_mode():
            self._embedded = [self.model.embed(batch) for batch in batches]
        self._kept: list[dict[int, _Point]] = [{} for _ in batches]
        self._plan: MergePlan | None = None
        outputs: list[tuple[Tensor, Tensor]] = []
        began = time.monotonic()
        self._run(None, True, lambda batch, logits, state: outputs.append((logits, state)))
        self.seconds = time.monotonic() - began  # of a whole forward of all images
        self._truth = [torch.log_softmax(logits.double(), -1) if objective == "kl" else state.double() for logits, state in outputs]

    def __call__(self, plan: MergePlan | None, *, keep: bool = False, rival: Tensor | None = None) -> Tensor:
        """(images), float64, on the CPU.

        Args:
            keep: this plan becomes the one that later plans share layers with.
            rival: divergences of a plan to be beaten, (images). As soon as this plan cannot beat it any more (its sum so far is
                larger), or surely will not (after `RACE_IMAGES`, three standard errors worse in paired differences), the
                rest of the images is left out, and the result is shorter.
        """
        assert rival is None or not keep
        found: list[Tensor] = []

        def enough(batch: int, logits: Tensor, state: Tensor) -> bool:
            found.append(self._distance(self._truth[batch], logits, state).cpu())
            return rival is not None and beaten(torch.cat(found), rival)

        self._run(plan, keep, enough)
        return torch.cat(found)

    def _distance(self, truth: Tensor, logits: Tensor, state: Tensor) -> Tensor:
        if self.objective == "kl":
            return (truth.exp() * (truth - torch.log_softmax(logits.double(), -1))).sum(-1).clamp_min(0)
        return (state.double() - truth).square().sum(-1) / truth.square().sum(-1).clamp_min(1e-30)

    @torch.inference_mode()
    def _run(self, plan: MergePlan | None, keep: bool, enough: Callable[[int, Tensor, Tensor], bool | None]) -> None:
        """enough(batch, logits, final class token) of each batch until it says so."""
        model, depth = self.model, self.model.config.depth
        model.set_plan(plan)
        model.to(self.device)
        shared = first_difference(plan, self._plan, depth)
        for index, embedded in enumerate(self._embedded):
            kept = self._kept[index]
            start = max((layer for layer in kept if layer <= shared), default=0)
            point = kept[start] if start else _Point(embedded, None)
            if keep:
                self._kept[index] = kept = {layer: kept[layer] for layer in kept if layer <= shared}
            for layer in range(start, depth):
                if keep and layer and layer not in kept and self._keeps(layer, point):
                    kept[layer] = point
                last = layer == depth - 1
                cls_index = model.cls_positions[layer] if model.cls_only_last and last else None
                residual, before = model.blocks[layer](point.residual, point.before, cls_index)
                point = _Point(residual, before)
                self.forwards += embedded.shape[0] / self.count / depth
            c = model.cls_positions[depth - 1]
            assert point.before is not None
            hidden = point.before.hidden if model.cls_only_last else point.before.hidden[:, c : c + 1]
            state = model.norm_f(point.residual[:, c : c + 1] + hidden.to(point.residual.dtype))[:, 0]
            if enough(index, model.head(state), state):
                break
        if keep:
            self._plan = plan

    def _keeps(self, layer: int, point: _Point) -> bool:
        """Every layer if they fit into `cache_bytes`, else every n-th."""
        assert point.before is not None
        state = point.before.forward_state
        an_image = point.residual[0].nbytes + point.before.hidden[0].nbytes + 2 * (state.delta[0].nbytes + state.B[0].nbytes)
        stride = -(-an_image * self.count * self.model.config.depth // self.cache_bytes)
        return layer % stride == 0


def beaten(values: Tensor, rival: Tensor) -> bool:
    """Whether a candidate with these first values cannot, or surely will not, beat one that has `rival`."""
    count = len(values)
    if values.sum() > rival.sum():
        return True
    difference = values - rival[:count]
    return count >= RACE_IMAGES and float(difference.mean()) > 3 * float(difference.std()) / count**0.5


def first_difference(plan: MergePlan | None, other: MergePlan | None, depth: int) -> int:
    """The first layer before which two plans do not do the same; depth where they never differ."""

    def before(plan: MergePlan | None, layer: int) -> object:
        if plan is None or not plan.groups(layer):
            return None
        return plan.groups(layer), plan.weights, plan.constants and plan.constants.get(layer), plan.proportional_decay

    return next((layer for layer in range(depth) if before(plan, layer) != before(other, layer)), depth)
