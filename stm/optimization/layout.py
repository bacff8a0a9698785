"""When each token leaves: the form of a plan that the search works on.

A static plan whose sources join the next token inward that stays is fully told by one number a token: the layer before which it
leaves (`depth`: never). Every rule of `stm.make_plan` has this form, and many plans that no rule makes. What a plan saves is then
a sum over tokens, depth - leaves, so that a budget is a knapsack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stm.config import VimConfig
from stm.errors import PlanError
from stm.plan import Group, MergePlan

Leaves = tuple[int, ...]
"""For each original token the layer before which it leaves; depth: it stays."""


def fixed_tokens(config: VimConfig) -> frozenset[int]:
    """Tokens that cannot leave: the class token, and the innermost of each side, which have no other token inward."""
    return frozenset({config.cls_index - 1, config.cls_index, config.cls_index + 1})


def groups_of(config: VimConfig, leaves: Sequence[int]) -> dict[int, tuple[Group, ...]]:
    """The groups of each layer: what leaves joins the next token inward that stays.

    Raises:
        PlanError: a token that must stay leaves, or a layer that cannot merge; names it.
    """
    if len(leaves) != config.seqlen:
        raise PlanError(f"{len(leaves)} tokens are told when to leave, {config.name!r} has {config.seqlen}")
    for token, layer in enumerate(leaves):
        if not 1 <= layer <= config.depth:
            raise PlanError(f"token {token} leaves before layer {layer}; it must be 1..{config.depth} ({config.depth}: it stays)")
        if layer < config.depth and token in fixed_tokens(config):
            raise PlanError(f"token {token} cannot leave: the class token is at {config.cls_index} and one token stays on each side of it")
    alive = list(range(config.seqlen))
    layers: dict[int, tuple[Group, ...]] = {}
    for layer in sorted(set(leaves) - {config.depth}):
        cls = alive.index(config.cls_index)
        sources: dict[int, list[int]] = {}
        for side in (range(cls), range(len(alive) - 1, cls, -1)):  # from outside inward
            waiting: list[int] = []
            for position in side:
                if leaves[alive[position]] == layer:
                    waiting.append(position)
                elif waiting:
                    sources[position] = sorted(waiting)
                    waiting = []
        layers[layer] = tuple(Group(tuple(sources[target]), target) for target in sorted(sources))
        alive = [token for token in alive if leaves[token] != layer]
    return layers


def plan_of(
    config: VimConfig,
    leaves: Sequence[int],
    weights: str = "hsp",
    constants: Mapping[int, tuple[float, ...]] | None = None,
    proportional_decay: bool = False,
) -> MergePlan:
    """The merge plan of a layout.

    Raises:
        PlanError: see `groups_of`.
    """
    return MergePlan.of(config, groups_of(config, leaves), weights=weights, constants=constants, proportional_decay=proportional_decay)


def leaves_of(plan: MergePlan) -> Leaves:
    """When each token leaves under a plan, whatever its targets are."""
    leaves = [plan.depth] * plan.seqlen
    alive = list(range(plan.seqlen))
    for layer in range(plan.depth):
        for source, _ in plan.pairs(layer):
            leaves[alive[source]] = layer
        kept = set(plan.keep(layer))
        alive = [token for position, token in enumerate(alive) if position in kept]
    return tuple(leaves)


def saved(leaves: Iterable[int], depth: int) -> int:
    """Token-layers that a layout removes."""
    return sum(depth - layer for layer in leaves)
