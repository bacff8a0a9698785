"""The interface of token reduction that looks at the image: scores, a constant count, positions, rows moved and averaged.

A method says before a layer l >= 1 which tokens go (`select`); the rest is common to all and made of ops with static
shapes (TopK with constant k, comparisons, row gathers, small products), so that one exporter covers every method:

    keep_i = i + (how many of the r that go lie before it)          comparisons, nothing is sorted
    T_ij   = 1 where gone token j joins kept token i                (N_out x r)
    x_i    = (s_i x_keep_i + sum_j T_ij s_j x_gone_j) / (s_i + sum_j T_ij s_j)

The stream is residual + hidden, hidden the part that the layer before added. Kept rows of both are moved as they are and
added last, so that add and norm stay one step in an engine, and a token that takes nothing in stays exact.

Re-implemented from published descriptions; each method's file says how it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from stm.config import VimConfig
from stm.errors import PlanError
from stm.merging import DirectionState

ClsIndex = int | Tensor
"""Position of the class token: a number where it is known beforehand, else (batch or 1, 1) int64, one an image."""


@dataclass(frozen=True)
class ScanState(DirectionState):
    """What a direction leaves for the reduction after it: also C (batch, seqlen, d_state) and the scan's output y
    (batch, seqlen, d_inner), D skip included, before the gate."""

    C: Tensor
    y: Tensor

    @property
    def time(self) -> Tensor:
        """softplus(delta + bias) in float32 or wider: the time step that a token takes."""
        wide = torch.float64 if self.A.dtype == torch.float64 else torch.float32
        return nn.functional.softplus(self.delta.to(wide) + self.delta_bias.to(wide))


@dataclass(frozen=True)
class Tokens:
    """What a method sees before a layer; positions are those of the layer before.

    Args:
        residual: (batch, seqlen, d_model), the residual stream before the add, float32 or wider.
        hidden: (batch, seqlen, d_model), what the layer before adds to it.
        forward_state, backward_state: of the layer before.
        sizes: (batch or 1, seqlen), originals that each token stands for.
        cls: position of the class token.

    Attributes:
        x: residual + hidden.
    """

    residual: Tensor
    hidden: Tensor
    forward_state: ScanState
    backward_state: ScanState
    sizes: Tensor
    cls: ClsIndex
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", self.residual + self.hidden)


@dataclass(frozen=True)
class Selection:
    """Positions (batch or 1, r) that go, and for each the position (a kept one) that takes it in; None: dropped."""

    gone: Tensor
    into: Tensor | None


@dataclass(frozen=True)
class Reduced:
    """Tokens after a reduction.

    Args:
        x: (batch, seqlen_out, d_model).
        sizes: (batch or 1, seqlen_out).
        cls: position of the class token now.
        keep: (batch or 1, seqlen_out), the position that each token had before.
        selection: what went, and into what.
        seqlen_in: tokens before the step.
    """

    x: Tensor
    sizes: Tensor
    cls: ClsIndex
    keep: Tensor
    selection: Selection
    seqlen_in: int

    @property
    def assignment(self) -> Tensor:
        """(batch or 1, seqlen_out, seqlen_in), 1 where an input is part of an output; an empty column is a dropped token."""
        kept = one_hot(self.keep, self.seqlen_in, self.x)
        if self.selection.into is None:
            return kept
        return kept + torch.matmul(joins(self.keep, self.selection.into, self.x), one_hot(self.selection.gone, self.seqlen_in, self.x))


class Reduction(nn.Module):
    """A method with its schedule for one model.

    Args:
        config: the model's sizes.
        schedule: layer -> tokens removed before it, layers 1..depth-1.

    Attributes:
        merges: removed tokens are merged into others (False: dropped, and sizes stay 1).
        aligned: the scan goes on at the removed positions (decay kept, no input); see `hidden_state_alignment`.
        side_counts: (left, right) removed before a layer where that is known beforehand, so that the class token's
            position is a number.
        options: what `create_reduction` made it with beside the schedule; None where it did not.
        method: its name there.

    Raises:
        PlanError: a layer or count that does not fit; names both values.
    """

    name = ""
    merges = True
    aligned = False

    def __init__(self, config: VimConfig, schedule: Mapping[int, int]) -> None:
        super().__init__()
        self.config = config
        self.method, self.options = self.name, cast("dict[str, Any] | None", None)
        self.schedule = {layer: int(count) for layer, count in sorted(schedule.items()) if count}
        length = config.seqlen
        for layer, count in self.schedule.items():
            if not 1 <= layer < config.depth:
                raise PlanError(f"{self.name}: removes tokens before layer {layer}; {config.name!r} allows layers 1..{config.depth - 1}")
            most = self.most(length)
            if not 0 < count <= most:
                raise PlanError(
                    f"{self.name}: layer {layer} removes {count} of {length} tokens; 1..{most} are possible, spread them over more layers"
                )
            length -= count

    def most(self, length: int) -> int:
        """Most tokens that one step can remove from `length`."""
        return length - 3

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer computes on."""
        lengths, left = [], self.config.seqlen
        for layer in range(self.config.depth):
            left -= self.schedule.get(layer, 0)
            lengths.append(left)
        return lengths

    @property
    def token_layers_removed(self) -> int:
        """Sum over layers of the tokens that are missing there."""
        return sum(self.config.seqlen - length for length in self.lengths)

    def matching_flops(self, length: int, count: int) -> int:
        """Cost of one step on `length` tokens, in the convention of `stm.flops`; 0 where nobody publishes one."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What makes it again (`stm.reduction.from_description`), as JSON has it; options are None where nobody noted them."""
        return {"method": self.method, "schedule": {str(layer): count for layer, count in self.schedule.items()}, "options": self.options}

    def select(self, layer: int, tokens: Tokens) -> Selection:
        """Which tokens go before `layer`, `schedule[layer]` of them, never the class token."""
        raise NotImplementedError

    def side_counts(self, layer: int) -> tuple[int, int] | None:
        """(left, right) of the class token removed before `layer`, None where the image decides."""
        return None

    def cls_place(self, layer: int, tokens: Tokens) -> int | None:
        """Where the class token is put after the step; None: it keeps its place among its neighbours."""
        return None

    def order(self, length: int) -> list[int]:
        """Key by which kept tokens (class token apart where `cls_place` says so) are lined up: position, i.e. order kept."""
        return list(range(length))

    def shares(self, tokens: Tokens, selection: Selection, sizes: Tensor, taken: Tensor) -> Shares:
        """How residual and hidden rows are averaged where tokens merge: here by size.

        Args:
            sizes: (batch or 1, seqlen_out), of the kept tokens before the step.
            taken: (batch or 1, seqlen_out, r), 1 where a token that goes joins a kept one.
        """
        added = taken * values_at(tokens.sizes, selection.gone).unsqueeze(1)
        return Shares.mean(sizes, added)

    def forward(self, layer: int, tokens: Tokens) -> Reduced:
        """Reduce the tokens before `layer`; without an entry in the schedule there is nothing to call this for."""
        selection = self.select(layer, tokens)
        keep, cls = self._line_up(layer, tokens, selection)
        sizes = values_at(tokens.sizes, keep)
        residual, hidden = take(tokens.residual, keep), take(tokens.hidden, keep)
        if selection.into is not None:
            taken = joins(keep, selection.into, tokens.residual)
            shares = self.shares(tokens, selection, sizes, taken)
            gone = (take(tokens.residual, selection.gone), take(tokens.hidden, selection.gone))
            if shares.hidden_own is shares.own:
                joined = torch.matmul(shares.joined, gone[0] + gone[1])
            else:
                joined = torch.matmul(shares.joined, gone[0]) + torch.matmul(shares.hidden_joined, gone[1])
            residual, hidden = residual * shares.own + joined, hidden * shares.hidden_own
            sizes = sizes + (taken * values_at(tokens.sizes, selection.gone).unsqueeze(1)).sum(-1)
        return Reduced(residual + hidden, sizes, cls, keep, selection, tokens.residual.shape[1])

    def _line_up(self, layer: int, tokens: Tokens, selection: Selection) -> tuple[Tensor, ClsIndex]:
        """Kept positions in their new order (batch or 1, seqlen_out), and the class token's place among them."""
        length = tokens.residual.shape[1]
        stay = length - selection.gone.shape[1]
        place, cls, order = self.cls_place(layer, tokens), tokens.cls, self.order(length)
        gone = selection.gone
        if place is None:
            keep = _others(gone, stay, order)
            counts = self.side_counts(layer)
            if counts is not None and isinstance(cls, int):
                return keep, cls - counts[0]
            return keep, cls - number_of((gone < cls).unsqueeze(1))
        assert isinstance(cls, int), "a class token that is put somewhere has a known place"
        middle = torch.full_like(gone[:, :1], cls)
        rest = _others(torch.cat([gone, middle], 1), stay - 1, order)
        return torch.cat([rest[:, :place], middle, rest[:, place:]], 1), place


@dataclass(frozen=True)
class Shares:
    """Weights of a step that merges: a row of the stream is own x_keep + joined x_gone, for residual and hidden apart.

    Args:
        own, hidden_own: (batch or 1, seqlen_out, 1); the same object where both are averaged alike.
        joined, hidden_joined: (batch or 1, seqlen_out, r).
    """

    own: Tensor
    joined: Tensor
    hidden_own: Tensor
    hidden_joined: Tensor

    @staticmethod
    def mean(own: Tensor, added: Tensor) -> Shares:
        """The mean weighted with own (batch or 1, seqlen_out) and added (batch or 1, seqlen_out, r)."""
        own, joined = _normalized(own, added)
        return Shares(own, joined, own, joined)

    @staticmethod
    def apart(own: Tensor, added: Tensor, hidden_added: Tensor) -> Shares:
        """Means with other weights of what joins on the hidden part."""
        return Shares(*_normalized(own, added), *_normalized(own, hidden_added))


def _normalized(own: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    total = (own + added.sum(-1)).unsqueeze(-1)
    return own.unsqueeze(-1) / total, added / total


def _others(gone: Tensor, stay: int, order: list[int]) -> Tensor:
    """The `stay` positions that are not in `gone` (batch or 1, r, all different), lined up by the key `order`."""
    lined = sorted(range(len(order)), key=order.__getitem__)
    if lined != list(range(len(lined))):
        rank = torch.tensor([sorted(order).index(k) for k in order], device=gone.device)
        kept = _others(rank[gone], stay, list(range(len(order))))
        return torch.tensor(lined, device=gone.device)[kept]
    # What goes, less how many go before it: so many kept tokens lie before it.
    before = gone - number_of(gone.unsqueeze(2) > gone.unsqueeze(1))
    index = torch.arange(stay, device=gone.device)
    return index + number_of(before.unsqueeze(1) <= index.unsqueeze(1))


# --- parts of methods ---------------------------------------------------------------------------------------------------


def one_hot(positions: Tensor, length: int, like: Tensor) -> Tensor:
    """(batch, k) int64 -> (batch, k, length) of 0 and 1 in the dtype of `like`."""
    return (positions.unsqueeze(-1) == torch.arange(length, device=positions.device)).to(like.dtype)


def number_of(true: Tensor) -> Tensor:
    """How many of the last axis are true, int64; added up in float32, which every runtime does well."""
    return true.to(torch.float32).sum(-1).to(torch.int64)


def joins(keep: Tensor, into: Tensor, like: Tensor) -> Tensor:
    """(batch or 1, seqlen_out, r): 1 where a token that goes joins a kept one."""
    return (keep.unsqueeze(2) == into.unsqueeze(1)).to(like.dtype)


def patches(x: Tensor, cls: ClsIndex, first: int = 0, step: int = 1) -> Tensor:
    """(batch, seqlen, ...) without the class token; of the patches every `step`-th from `first`."""
    if isinstance(cls, int):
        return x.index_select(1, torch.tensor([p + (p >= cls) for p in range(first, x.shape[1] - 1, step)], device=x.device))
    index = torch.arange(first, x.shape[1] - 1, step, device=x.device)
    index = (index + (index >= cls).to(torch.int64)).expand(x.shape[0], -1)
    return values_at(x, index) if x.dim() == 2 else take(x, index)


def position(patch: Tensor, cls: ClsIndex) -> Tensor:
    """Index among the patches -> position in the sequence."""
    return patch + (patch >= cls).to(torch.int64)


def normalized(x: Tensor) -> Tensor:
    """Rows of length 1 (0 stays 0)."""
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def similarity(a: Tensor, b: Tensor, distance: str = "cosine") -> Tensor:
    """(batch, n, d), (batch, m, d) -> (batch, n, m): cosine, or minus the l1 or squared l2 distance."""
    if distance == "cosine":
        return torch.matmul(normalized(a), normalized(b).transpose(1, 2))
    if distance == "l1":
        return -(a.unsqueeze(2) - b.unsqueeze(1)).abs().sum(-1)
    return 2 * torch.matmul(a, b.transpose(1, 2)) - (a * a).sum(-1, keepdim=True) - (b * b).sum(-1).unsqueeze(1)


def best_links(a: Tensor, b: Tensor, count: int, distance: str = "cosine") -> tuple[Tensor, Tensor]:
    """The `count` members of a with the most similar partner in b, most similar first: (index in a, index in b)."""
    best = similarity(a, b, distance).max(-1)
    chosen = torch.topk(best.values, count).indices
    return chosen, torch.gather(best.indices, 1, chosen)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (batch, n, d) at index (batch or 1, k): (batch, k, d)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def values_at(x: Tensor, index: Tensor) -> Tensor:
    """Values of x (batch or 1, n) at index (batch or 1, k)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return torch.gather(x.expand(index.shape[0], -1), 1, index)


def output_score(tokens: Tokens, branch: str = "both") -> Tensor:
    """Importance of each token (batch, seqlen): mean over channels of max(0, y), y the scan output of the layer before."""
    states = {"forward": (tokens.forward_state,), "backward": (tokens.backward_state,)}.get(branch, (tokens.forward_state, tokens.backward_state))
    scores = [torch.relu(state.y.to(tokens.x.dtype)).mean(-1) for state in states]
    return scores[0] if len(scores) == 1 else scores[0] + scores[1]


def time_score(tokens: Tokens) -> Tensor:
    """Importance of each token (batch, seqlen): Delta of the layer before, summed over directions, mean over channels."""
    return (tokens.forward_state.time.mean(-1) + tokens.backward_state.time.mean(-1)).to(tokens.x.dtype)


def halves(count: int) -> tuple[int, int]:
    """`count` as (left, right); the odd one comes from the left, as in merge plans."""
    return (count + 1) // 2, count // 2


def sides(x: Tensor, cls: ClsIndex) -> tuple[Tensor, Tensor]:
    """Tokens before and after the class token, whose position is known."""
    cls = cast(int, cls)
    return x[:, :cls], x[:, cls + 1 :]


def check_choice(method: str, option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise PlanError(f"{method}: {option} is {value!r}; choose from {', '.join(choices)}")
    return value
