"""The selective scan as one Triton kernel, forward only, float32: for many images through PyTorch on a GPU.

A program owns BLOCK channels of an image and walks its tokens with the (BLOCK, d_state) state in registers; the arithmetic is that of
`stm.scan`. Needs triton, which comes with torch on Linux; `fast_scan.py` decides whether it is used.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _scan_kernel(  # type: ignore[no-untyped-def]
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, scale_ptr, y_ptr, seqlen,
    E: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    first = tl.program_id(1).to(tl.int64) * seqlen
    A = tl.load(A_ptr + e[:, None] * N + n[None, :]) * _LOG2E
    D = tl.load(D_ptr + e)
    bias = tl.load(bias_ptr + e)
    h = tl.zeros((BLOCK, N), tl.float32)
    for i in range(seqlen):
        place = seqlen - 1 - i if REVERSE else i
        row = first + place
        u = tl.load(u_ptr + row * E + e)
        d = tl.load(delta_ptr + row * E + e) + bias
        if SOFTPLUS:
            x = tl.exp(tl.minimum(d, 20.0))
            small = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - 0.25 * x)))
            d = tl.where(d > 20.0, d, tl.where(x < 0.01, small, tl.log(1.0 + x)))
        timed = d * tl.load(scale_ptr + place) if SCALED else d
        B = tl.load(B_ptr + row * N + n)
        C = tl.load(C_ptr + row * N + n)
        h = tl.exp2(timed[:, None] * A) * h + (d * u)[:, None] * B[None, :]
        tl.store(y_ptr + row * E + e, tl.sum(h * C[None, :], 1) + D * u)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, scale: Tensor | None, softplus: bool, reverse: bool
) -> Tensor:
    """As `stm.scan.selective_scan`, all float32; d_inner a multiple of 8, d_state a power of 2."""
    batch, seqlen, d_inner = u.shape
    u, delta, A, B, C, D, bias = (t.contiguous() for t in (u, delta, A, B, C, D, bias))
    scales = D if scale is None else scale.to(torch.float32).contiguous()
    y = torch.empty_like(u)
    block = next(size for size in (32, 16, 8) if d_inner % size == 0)
    _scan_kernel[(d_inner // block, batch)](
        u, delta, A, B, C, D, bias, scales, y, seqlen,
        E=d_inner, N=A.shape[1], BLOCK=block, SOFTPLUS=softplus, REVERSE=reverse, SCALED=scale is not None, num_warps=1,
    )  # fmt: skip
    return y
