"""A quicker scan for PyTorch on a GPU while many images go through: one kernel in place of some thousand launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import stm.reduction.model
import stm.vim
from stm.scan import selective_scan

_USERS: tuple[Any, ...] = (stm.vim, stm.reduction.model)


def _fits(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    plain = all(t.dtype == torch.float32 for t in (u, delta, A, B, C))
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C))
    states = A.shape[1]
    return u.is_cuda and plain and not recorded and u.shape[2] % 8 == 0 and states & (states - 1) == 0 and u.numel() > 0


def _quick(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    decay_scale: Tensor | None = None,
) -> Tensor:
    if z is not None or not _fits(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, decay_scale)
    from .fast_scan_kernel import scan

    none = A.new_zeros(u.shape[2])
    D, bias = (none if t is None else t.float() for t in (D, delta_bias))
    return scan(u, delta, A, B, C, D, bias, decay_scale, delta_softplus, reverse)


def agrees(device: torch.device | str, d_inner: int, d_state: int) -> bool:
    """Whether the kernel runs here and gives what the reference gives, both directions, with and without scale; never raises."""
    try:
        from .fast_scan_kernel import scan

        g = torch.Generator().manual_seed(0)
        u, delta = (torch.randn(3, 61, d_inner, generator=g).to(device) for _ in range(2))
        B, C = (torch.randn(3, 61, d_state, generator=g).to(device) for _ in range(2))
        A = -torch.rand(d_inner, d_state, generator=g).mul(8).to(device)
        D, bias = (torch.randn(d_inner, generator=g).to(device) for _ in range(2))
        scales = torch.randint(1, 9, (61,), generator=g).float().to(device)
        for reverse in (False, True):
            for scale, softplus in ((None, True), (scales, True), (None, False)):
                step = delta if softplus else torch.nn.functional.softplus(delta)
                wanted = selective_scan(u, step, A, B, C, D, None, bias if softplus else None, softplus, reverse, scale)
                found = scan(u, step, A, B, C, D, bias if softplus else torch.zeros_like(bias), scale, softplus, reverse)
                if not float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()):
                    return False
        return True
    except Exception:  # no triton, no compiler for it, a GPU that it does not know: the reference does it
        return False


@contextlib.contextmanager
def fast_scan(device: torch.device | str, d_inner: int, d_state: int) -> Iterator[bool]:
    """Models run the Triton kernel inside, where it agrees with the reference here; yields whether they do. Nothing on a CPU."""
    used = torch.device(device).type == "cuda" and agrees(device, d_inner, d_state)
    try:
        if used:
            for user in _USERS:
                user.selective_scan = _quick
        yield used
    finally:
        for user in _USERS:
            user.selective_scan = selective_scan
