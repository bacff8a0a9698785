"""Freeze a method that looks at the image into a MergePlan: the most frequent assignment of calibration images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stm.errors import PlanError
from stm.merging import MergeLayer
from stm.plan import Group, MergePlan
from stm.vim import MixerOutput, VisionMamba

from .base import Reduced, Reduction
from .model import ReducedVim, with_reduction


@torch.no_grad()
def freeze(model: VisionMamba, method: Reduction, images: Iterable[Tensor]) -> MergePlan:
    """Run `method` on batches (batch, 3, height, width) and return the plan of what it does most often.

    Layer by layer: the method chooses on the stream that the plan so far leaves, so that positions mean the same in
    every image; how often position p went to q is counted; the most frequent pairs that keep the plan's rules, as many
    as the method removes (a side, where it has counts a side), become the layer's groups; of pairs seen equally often the
    lowest positions come first. The plan needs no TopK, so it runs on the same engine as ours.

    What freezing loses:
    * the image: every image gets the same assignment;
    * pairs across the class token, which a plan does not know: they count for nobody;
    * the place of a merged token: the innermost member's, since sources lie on the outer side (a method puts it where
      its target is, on either side);
    * where too few pairs were seen that keep the rules, the outermost free token joins the next one inward;
    * the way of averaging: merges become size-weighted means (`weights="mean"`; MTR's and UTR's plain average differs
      from the second merge of a token on; UTR's pruning on the hidden branch is a merge);
    * dropping: a dropped token joins the next kept one inward with constant weight 0, which is the same, except that
      the innermost token of a side cannot go; sizes of a plan then count dropped tokens;
    * a class token put at a guessed place (R-MeeTo's compatible form): the plan's place is the true one;
    * alignment: the aligned scan becomes `proportional_decay`: a token decays once for every token that it stands
      for, with its own Delta.

    Raises:
        PlanError: the method does not fit the model, or asks for more than a side holds.
        ValueError: no images.
    """
    reduced = with_reduction(model, method)
    config = model.config
    runs = [_Run(reduced.embed(batch)) for batch in images if batch.shape[0]]
    if not runs:
        raise ValueError("freeze: no images; give at least one batch")
    layers: dict[int, tuple[Group, ...]] = {}

    def plan_so_far() -> MergePlan:
        pairs = {layer: sum(len(group.sources) for group in groups) for layer, groups in layers.items()}
        return MergePlan.of(
            config,
            layers,
            weights="mean" if method.merges else "constant",
            constants=None if method.merges else {layer: (0.0,) * count for layer, count in pairs.items()},
            proportional_decay=method.aligned,
        )

    plan = plan_so_far()
    last = max(method.schedule, default=0)
    for index in range(last + 1):
        if index in method.schedule:
            cls, length = plan.cls_positions[index - 1], plan.lengths[index - 1]
            sizes = torch.tensor([plan.sizes()[index - 1] if method.merges else [1] * length], dtype=runs[0].x.dtype, device=runs[0].x.device)
            seen: Counter[tuple[int, int]] = Counter()
            for run in runs:
                seen.update(_seen(run.reduce(reduced, index, sizes, cls), cls, method.merges))
            layers[index] = _choose(seen, method.schedule[index], length, cls, method, index)
            plan = plan_so_far()
            merge = MergeLayer(plan, index).to(runs[0].x.device)
        else:
            merge = None
        if index == last:
            break
        scale = None
        if plan.proportional_decay and plan.merges:
            scale = torch.tensor(plan.sizes()[index], dtype=torch.float32, device=runs[0].x.device)
        for run in runs:
            run.step(reduced, index, merge, scale)
    return plan


@dataclass
class _Run:
    """One calibration batch on its way through the layers."""

    x: Tensor
    output: MixerOutput | None = None

    def reduce(self, model: ReducedVim, layer: int, sizes: Tensor, cls: int) -> Reduced:
        assert self.output is not None
        hidden = self.output.hidden.to(self.x.dtype)
        return model.reduce(layer, self.x, hidden, self.output, sizes, cls)

    def step(self, model: ReducedVim, layer: int, merge: MergeLayer | None, scale: Tensor | None) -> None:
        block = model.blocks[layer]
        if self.output is not None:
            self.x = self.x + self.output.hidden.to(self.x.dtype)
            if merge is not None:
                self.x = merge(self.x, self.output.forward_state, self.output.backward_state)
        self.output = block.mixer(block.norm(self.x), None, scale)


_DROPPED = -1


def _seen(reduced: Reduced, cls: int, merges: bool) -> Counter[tuple[int, int]]:
    """(source, target) of every image, the innermost member of a group on each side its target; (p, -1): p was dropped."""
    pairs: Counter[tuple[int, int]] = Counter()
    for assignment in (reduced.assignment > 0).expand(reduced.x.shape[0], -1, -1).cpu():
        if not merges:
            pairs.update((p, _DROPPED) for p in (~assignment.any(0)).nonzero()[:, 0].tolist())
            continue
        for row in (assignment.sum(1) > 1).nonzero()[:, 0].tolist():
            members = assignment[row].nonzero()[:, 0].tolist()
            left, right = [p for p in members if p < cls], [p for p in members if p > cls]
            pairs.update((p, left[-1]) for p in left[:-1])
            pairs.update((p, right[0]) for p in right[1:])
    return pairs


def _choose(seen: Counter[tuple[int, int]], count: int, length: int, cls: int, method: Reduction, layer: int) -> tuple[Group, ...]:
    """The `count` most frequent pairs that make a layer of a plan; where the method's counts a side are known, these."""
    room = list(method.side_counts(layer) or (cls - 1, length - 2 - cls))
    target_of: dict[int, int] = {}
    targets: set[int] = set()

    def add(p: int, q: int) -> None:
        side = int(p > cls)
        free = p not in target_of and p not in targets and q not in target_of
        if free and room[side] and len(target_of) < count and (q != _DROPPED or p not in (cls - 1, cls + 1)):
            room[side] -= 1
            target_of[p] = q
            if q != _DROPPED:
                targets.add(q)

    def inward(p: int) -> int:
        """The next token towards the class token that stays, or the class token."""
        step = 1 if p < cls else -1
        q = p + step
        while q in target_of:
            q += step
        return q

    for (p, q), _ in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
        add(p, q)
    for p in sorted((p for p in range(length) if p != cls), key=lambda p: (min(p, length - 1 - p), p)):  # too few were seen
        if inward(p) != cls:
            add(p, inward(p) if method.merges else _DROPPED)
    if len(target_of) < count:
        raise PlanError(f"{method.name}: layer {layer} removes {count} of {length} tokens, a plan can only remove {len(target_of)} there; lower it")
    groups: dict[int, list[int]] = {}
    for p in sorted(target_of):
        groups.setdefault(inward(p) if target_of[p] == _DROPPED else target_of[p], []).append(p)
    return tuple(Group(tuple(sources), q) for q, sources in sorted(groups.items()))
