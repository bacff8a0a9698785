"""The interface of token reduction that looks at the image: scores, a constant count, sorted positions, a merge matrix.

A method says before a layer l >= 1 which tokens go (`select`); the rest is common to all and made of ops with static
shapes (TopK with constant k, comparisons, MatMul), so that one exporter covers every method:

    keep = the positions that stay, in order          (TopK of a key)
    S    = kept + kept into^T gone                    (N_out x N_in, 0/1: who goes where)
    x    = (S weighted, rows summing to 1) x,   sizes = S sizes

Re-implemented from published descriptions; each method's file says how it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

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
        x: (batch, seqlen, d_model), the residual stream after the add, float32 or wider.
        hidden: (batch, seqlen, d_model), the part of x that the layer before added.
        forward_state, backward_state: of the layer before.
        sizes: (batch or 1, seqlen), originals that each token stands for.
        cls: position of the class token.
    """

    x: Tensor
    hidden: Tensor
    forward_state: ScanState
    backward_state: ScanState
    sizes: Tensor
    cls: ClsIndex


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
        assignment: (batch or 1, seqlen_out, seqlen_in), 1 where an input is part of an output; an empty column is a
            dropped token.
    """

    x: Tensor
    sizes: Tensor
    cls: ClsIndex
    keep: Tensor
    assignment: Tensor


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

    Raises:
        PlanError: a layer or count that does not fit; names both values.
    """

    name = ""
    merges = True
    aligned = False

    def __init__(self, config: VimConfig, schedule: Mapping[int, int]) -> None:
        super().__init__()
        self.config = config
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

    def combine(self, tokens: Tokens, selection: Selection, assignment: Tensor) -> Tensor:
        """Merged tokens (batch, seqlen_out, d_model): here the size-weighted mean (of one token: itself)."""
        return mean(tokens.x, assignment, tokens.sizes)

    def forward(self, layer: int, tokens: Tokens) -> Reduced:
        """Reduce the tokens before `layer`; without an entry in the schedule there is nothing to call this for."""
        selection = self.select(layer, tokens)
        keep, cls = self._line_up(layer, tokens, selection)
        length = tokens.x.shape[1]
        kept = one_hot(keep, length, tokens.x)
        assignment = kept
        if selection.into is not None:
            taken = torch.matmul(kept, one_hot(selection.into, length, tokens.x).transpose(1, 2))  # (batch, seqlen_out, r)
            assignment = kept + torch.matmul(taken, one_hot(selection.gone, length, tokens.x))
        sizes = torch.matmul(assignment, tokens.sizes.unsqueeze(-1)).squeeze(-1)
        return Reduced(self.combine(tokens, selection, assignment), sizes, cls, keep, assignment)

    def _line_up(self, layer: int, tokens: Tokens, selection: Selection) -> tuple[Tensor, ClsIndex]:
        """Kept positions in their new order (batch or 1, seqlen_out), and the class token's place among them."""
        length = tokens.x.shape[1]
        stay = length - selection.gone.shape[1]
        place, cls = self.cls_place(layer, tokens), tokens.cls
        # Float32 keys are exact, and TopK on floats runs everywhere.
        key = torch.tensor([-float(k) for k in self.order(length)], device=tokens.x.device)
        away = one_hot(selection.gone, length, key).sum(1)
        if place is None:
            keep = torch.topk(key - 4.0 * length * away, stay).indices
            counts = self.side_counts(layer)
            if counts is not None and isinstance(cls, int):
                return keep, cls - counts[0]
            return keep, cls - (selection.gone < cls).to(torch.int64).sum(1, keepdim=True)
        assert isinstance(cls, int), "a class token that is put somewhere has a known place"
        away = away + one_hot(torch.tensor([[cls]], device=key.device), length, key)[:, 0]
        rest = torch.topk(key - 4.0 * length * away, stay - 1).indices
        middle = torch.full_like(rest[:, :1], cls)
        return torch.cat([rest[:, :place], middle, rest[:, place:]], 1), place


# --- parts of methods ---------------------------------------------------------------------------------------------------


def one_hot(positions: Tensor, length: int, like: Tensor) -> Tensor:
    """(batch, k) int64 -> (batch, k, length) of 0 and 1 in the dtype of `like`."""
    return (positions.unsqueeze(-1) == torch.arange(length, device=positions.device)).to(like.dtype)


def mean(x: Tensor, assignment: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Mean of each output's members, weighted with sizes (batch or 1, seqlen) if given. A token alone stays exact."""
    weighted = assignment if sizes is None else assignment * sizes.unsqueeze(1)
    return torch.matmul(weighted / weighted.sum(-1, keepdim=True), x)


def patches(x: Tensor, cls: ClsIndex) -> Tensor:
    """(batch, seqlen, ...) without the class token: (batch, seqlen - 1, ...)."""
    if isinstance(cls, int):
        return torch.cat([x[:, :cls], x[:, cls + 1 :]], 1)
    index = torch.arange(x.shape[1] - 1, device=x.device)
    index = (index + (index >= cls).to(torch.int64)).expand(x.shape[0], -1)
    return torch.gather(x, 1, index) if x.dim() == 2 else take(x, index)


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
    """Rows of x (batch, n, d) at index (batch, k): (batch, k, d)."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


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
