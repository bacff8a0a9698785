"""Triton kernels of a training step: conv + SiLU, selective scan and gate, for both directions at once, with their gradients.

Token-major throughout, a leading axis of 2 for the directions; direction 1 walks from the last token to the first by index, nothing
is flipped. State, sums and parameters are float32 (float64 where the inputs are, for gradient checks under TRITON_INTERPRET=1),
activations any type. Nothing is added atomically, so results repeat bit for bit.

The scan: a program owns BLOCK channels of one image and direction and walks its tokens with the (BLOCK, d_state) state in
registers. The forward walk stores the state before every STEP tokens; the backward walk goes through these stretches from the
last to the first, computes each one's states again in registers, and then their adjoint:

    h_t = a_t h_{t-1} + d_t B_t u_t,  a_t = exp(d_t A),  y_t = C_t h_t + D u_t,   d_t = softplus(delta_t + bias)
    g_t = dy_t C_t + a_{t+1} g_{t+1}   (g = dloss/dh)
    du = d (g B) + dy D,  dB = sum_e g d u,  dC = sum_e dy h,  dd = (g (h - d B u)) A + u (g B),  dA = sum g (h - d B u) d

(h - d B u is a h_{t-1}, so the state before need not be kept.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 4
"""Tokens between stored states. The kernels unroll this number; it is no tuning knob."""
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact to rounding for small e^x too; the identity above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, x, tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - 0.25 * e))), tl.log(1.0 + e)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# --- selective scan --------------------------------------------------------------------------------------------------------


@triton.jit
def _place(i, direction, seqlen):
    """Position of the i-th token in scan order; past the end the last one's, so that every load is inside."""
    i = tl.minimum(i, seqlen - 1)
    return tl.where(direction == 0, i, seqlen - 1 - i)


@triton.jit
def _token(i, u_ptr, delta_ptr, x_ptr, row, seqlen, e, n, bias, RANK: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr):
    """Inputs of one token (row = its index among all rows): u, softplus argument, d, B, C; past the end d is 0, so the state stays."""
    u = tl.load(u_ptr + row * E + e).to(ACC)
    raw = tl.load(delta_ptr + row * E + e).to(ACC) + bias
    d = tl.where(i + 0 * e < seqlen, _softplus(raw), 0.0)
    x_row = x_ptr + row * (RANK + 2 * N) + RANK
    return u, raw, d, tl.load(x_row + n).to(ACC), tl.load(x_row + N + n).to(ACC)


@triton.jit
def _scan_forward_kernel(
    u_ptr, delta_ptr, x_ptr, A_ptr, D_ptr, bias_ptr, y_ptr, state_ptr, batch, seqlen, chunks,
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = (direction * batch + image) * seqlen
    states = state_ptr + ((direction * batch + image) * chunks) * E * N + e[:, None] * N + n[None, :]
    A = tl.load(A_ptr + (direction * E + e[:, None]) * N + n[None, :]).to(ACC) * _LOG2E
    D = tl.load(D_ptr + direction * E + e).to(ACC)
    bias = tl.load(bias_ptr + direction * E + e).to(ACC)
    h = tl.zeros((BLOCK, N), ACC)
    for chunk in range(chunks):
        if KEEP:
            tl.store(states, h)
            states += E * N
        for j in tl.static_range(4):
            i = chunk * 4 + j
            row = first + _place(i, direction, seqlen)
            u, _, d, B, C = _token(i, u_ptr, delta_ptr, x_ptr, row, seqlen, e, n, bias, RANK, N, E, ACC)
            h = tl.exp2(d[:, None] * A) * h + (d * u)[:, None] * B[None, :]
            y = tl.sum(h * C[None, :], 1) + D * u
            tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=i + 0 * e < seqlen)


@triton.jit
def _adjoint(
    i, h, carry, dA, dD, dbias, u_ptr, delta_ptr, x_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, first, dy_first, direction, seqlen, e, n, A, D, bias,
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of token i (in scan order) given its state h and a_{i+1} g_{i+1}; returns the latter for i and the sums."""
    place = _place(i, direction, seqlen)
    row = first + place
    u, raw, d, B, C = _token(i, u_ptr, delta_ptr, x_ptr, row, seqlen, e, n, bias, RANK, N, E, ACC)
    valid = i + 0 * e < seqlen
    dy = tl.where(valid, tl.load(dy_ptr + (dy_first + place) * E + e).to(ACC), 0.0)
    g = carry + dy[:, None] * C[None, :]
    fed = (d * u)[:, None] * B[None, :]
    kept = g * (h - fed)
    weight = tl.sum(g * B[None, :], 1)
    dd = tl.sum(kept * A, 1) * _LN2 + weight * u
    draw = tl.where(valid, dd * tl.where(raw > 20.0, 1.0, _sigmoid(raw)), 0.0)
    tl.store(du_ptr + row * E + e, (weight * d + dy * D).to(du_ptr.dtype.element_ty), mask=valid)
    tl.store(ddelta_ptr + row * E + e, draw.to(ddelta_ptr.dtype.element_ty), mask=valid)
    at = dx_ptr + place * (2 * N) + n
    tl.store(at, tl.sum(g * (d * u)[:, None], 0), mask=i + 0 * n < seqlen)
    tl.store(at + N, tl.sum(h * dy[:, None], 0), mask=i + 0 * n < seqlen)
    carry = g * tl.exp2(d[:, None] * A)
    return carry, dA + kept * d[:, None], dD + dy * u, dbias + draw


@triton.jit
def _scan_backward_kernel(
    u_ptr, delta_ptr, x_ptr, A_ptr, D_ptr, bias_ptr, state_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, dA_ptr, dD_ptr, dbias_ptr,
    batch, seqlen, chunks, dy_direction_stride,
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = direction * batch + image
    first = pair * seqlen
    dy_first = image * seqlen
    dy_ptr += direction * dy_direction_stride
    dx_ptr += (pair * tl.num_programs(0) + tl.program_id(0)) * seqlen * (2 * N)
    states = state_ptr + (pair * chunks + chunks - 1) * E * N + e[:, None] * N + n[None, :]
    A = tl.load(A_ptr + (direction * E + e[:, None]) * N + n[None, :]).to(ACC) * _LOG2E
    D = tl.load(D_ptr + direction * E + e).to(ACC)
    bias = tl.load(bias_ptr + direction * E + e).to(ACC)
    carry = tl.zeros((BLOCK, N), ACC)
    dA = tl.zeros((BLOCK, N), ACC)
    dD = tl.zeros((BLOCK,), ACC)
    dbias = tl.zeros((BLOCK,), ACC)
    for back in range(chunks):
        i = (chunks - 1 - back) * 4
        h = tl.load(states)
        states -= E * N
        h0 = _advance(i, h, u_ptr, delta_ptr, x_ptr, first, direction, seqlen, e, n, A, bias, E, N, RANK, ACC)
        h1 = _advance(i + 1, h0, u_ptr, delta_ptr, x_ptr, first, direction, seqlen, e, n, A, bias, E, N, RANK, ACC)
        h2 = _advance(i + 2, h1, u_ptr, delta_ptr, x_ptr, first, direction, seqlen, e, n, A, bias, E, N, RANK, ACC)
        h3 = _advance(i + 3, h2, u_ptr, delta_ptr, x_ptr, first, direction, seqlen, e, n, A, bias, E, N, RANK, ACC)
        carry, dA, dD, dbias = _adjoint(
            i + 3, h3, carry, dA, dD, dbias, u_ptr, delta_ptr, x_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, first, dy_first, direction, seqlen,
            e, n, A, D, bias, E, N, RANK, ACC,
        )  # fmt: skip
        carry, dA, dD, dbias = _adjoint(
            i + 2, h2, carry, dA, dD, dbias, u_ptr, delta_ptr, x_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, first, dy_first, direction, seqlen,
            e, n, A, D, bias, E, N, RANK, ACC,
        )  # fmt: skip
        carry, dA, dD, dbias = _adjoint(
            i + 1, h1, carry, dA, dD, dbias, u_ptr, delta_ptr, x_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, first, dy_first, direction, seqlen,
            e, n, A, D, bias, E, N, RANK, ACC,
        )  # fmt: skip
        carry, dA, dD, dbias = _adjoint(
            i, h0, carry, dA, dD, dbias, u_ptr, delta_ptr, x_ptr, dy_ptr, du_ptr, ddelta_ptr, dx_ptr, first, dy_first, direction, seqlen,
            e, n, A, D, bias, E, N, RANK, ACC,
        )  # fmt: skip
    tl.store(dA_ptr + (pair * E + e[:, None]) * N + n[None, :], dA)
    tl.store(dD_ptr + pair * E + e, dD)
    tl.store(dbias_ptr + pair * E + e, dbias)


@triton.jit
def _advance(
    i, h, u_ptr, delta_ptr, x_ptr, first, direction, seqlen, e, n, A, bias,
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = first + _place(i, direction, seqlen)
    u, _, d, B, _ = _token(i, u_ptr, delta_ptr, x_ptr, row, seqlen, e, n, bias, RANK, N, E, ACC)
    return tl.exp2(d[:, None] * A) * h + (d * u)[:, None] * B[None, :]


def _wide(tensor: Tensor) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def _block(channels: int, most: int) -> int:
    """Channels a program: a power of two that divides them."""
    return min(most, channels & -channels)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, x_dbl: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        two, batch, seqlen, channels = u.shape
        d_state = A.shape[2]
        rank = x_dbl.shape[3] - 2 * d_state
        u, delta, x_dbl, A, D, bias = (t.contiguous() for t in (u, delta, x_dbl, A, D, bias))
        wide, acc = _wide(u)
        chunks = triton.cdiv(seqlen, STEP)
        y = torch.empty_like(u)
        keep = any(ctx.needs_input_grad)
        # In float32 not for accuracy alone: 16-byte loads then hold 4 states, not 8, and the sums over channels need half the shuffles.
        states = u.new_empty((two, batch, chunks, channels, d_state) if keep else (1,), dtype=wide)
        block = _block(channels, 32)
        _scan_forward_kernel[(channels // block, batch, 2)](
            u, delta, x_dbl, A, D, bias, y, states, batch, seqlen, chunks,
            E=channels, N=d_state, RANK=rank, BLOCK=block, ACC=acc, KEEP=keep, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(u, delta, x_dbl, A, D, bias, states)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        u, delta, x_dbl, A, D, bias, states = ctx.saved_tensors
        two, batch, seqlen, channels = u.shape
        d_state = A.shape[2]
        rank = x_dbl.shape[3] - 2 * d_state
        wide, acc = _wide(u)
        chunks = triton.cdiv(seqlen, STEP)
        if dy.stride(0) != 0 or not dy[0].is_contiguous():  # the gate sends one gradient for both directions
            dy = dy.contiguous()
        block = _block(channels, 32)
        blocks = channels // block
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        dx = u.new_empty((two, batch, blocks, seqlen, 2 * d_state), dtype=wide)
        dA = u.new_empty((two, batch, channels, d_state), dtype=wide)
        dD, dbias = (u.new_empty((two, batch, channels), dtype=wide) for _ in range(2))
        _scan_backward_kernel[(blocks, batch, 2)](
            u, delta, x_dbl, A, D, bias, states, dy, du, ddelta, dx, dA, dD, dbias, batch, seqlen, chunks, dy.stride(0),
            E=channels, N=d_state, RANK=rank, BLOCK=block, ACC=acc, num_warps=1,
        )  # fmt: skip
        dx_dbl = torch.empty_like(x_dbl)
        dx_dbl[..., :rank] = 0
        torch.sum(dx, 2, out=dx_dbl[..., rank:]) if dx_dbl.dtype == wide else dx_dbl[..., rank:].copy_(dx.sum(2))
        return du, ddelta, dx_dbl, dA.sum(1).to(A.dtype), dD.sum(1).to(D.dtype), dbias.sum(1).to(bias.dtype)


def scan_pair(u: Tensor, delta: Tensor, x_dbl: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """Selective scan of both directions, with D and softplus, without gate.

    Args:
        u, delta: (2, batch, seqlen, d_inner); delta before bias and softplus. Direction 1 walks backwards.
        x_dbl: (2, batch, seqlen, dt_rank + 2 d_state), as x_proj leaves it: dt (not read), B, C. Its gradient is zero in dt.
        A: (2, d_inner, d_state), negative; D, bias: (2, d_inner).

    Returns:
        (2, batch, seqlen, d_inner), in u's dtype.
    """
    y: Tensor = _Scan.apply(u, delta, x_dbl, A, D, bias)
    return y


# --- conv + SiLU -----------------------------------------------------------------------------------------------------------


@triton.jit
def _taps(x_ptr, base, t, e, seqlen, row_stride, weight_ptr, bias_ptr, E: tl.constexpr, DIRECTION: tl.constexpr, ACC: tl.constexpr):
    """What SiLU gets: bias + sum_j w_j x_{t - 3 + j}, or x_{t + 3 - j} in direction 1, of tokens t; (tokens, channels)."""
    total = tl.load(bias_ptr + DIRECTION * E + e).to(ACC)[None, :]
    for j in tl.static_range(4):
        at = t + ((3 - j) if DIRECTION == 1 else (j - 3))
        inside = (at >= 0) & (at < seqlen)
        x = tl.load(x_ptr + base + at[:, None] * row_stride + e[None, :], mask=inside[:, None], other=0.0).to(ACC)
        total += tl.load(weight_ptr + (DIRECTION * E + e) * 4 + j).to(ACC)[None, :] * x
    return total


@triton.jit
def _conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, u_ptr, batch, seqlen, row_stride, image_stride,
    E: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2).to(tl.int64)
    for direction in tl.static_range(2):
        total = _taps(x_ptr, image * image_stride, t, e, seqlen, row_stride, weight_ptr, bias_ptr, E, direction, ACC)
        u = total * _sigmoid(total)
        at = ((direction * batch + image) * seqlen + t[:, None]) * E + e[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=(t < seqlen)[:, None])


@triton.jit
def _conv_gradient_kernel(
    x_ptr, weight_ptr, bias_ptr, du_ptr, dpre_ptr, dweight_ptr, dbias_ptr, batch, seqlen, row_stride, image_stride,
    E: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Through SiLU: dpre; and one image's share of the weights' gradients."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = direction.to(tl.int64) * batch + image
    dw0 = tl.zeros((BLOCK_L, BLOCK), ACC)
    dw1 = tl.zeros((BLOCK_L, BLOCK), ACC)
    dw2 = tl.zeros((BLOCK_L, BLOCK), ACC)
    dw3 = tl.zeros((BLOCK_L, BLOCK), ACC)
    db = tl.zeros((BLOCK_L, BLOCK), ACC)
    bias = tl.load(bias_ptr + direction * E + e).to(ACC)[None, :]
    w0 = tl.load(weight_ptr + (direction * E + e) * 4).to(ACC)[None, :]
    w1 = tl.load(weight_ptr + (direction * E + e) * 4 + 1).to(ACC)[None, :]
    w2 = tl.load(weight_ptr + (direction * E + e) * 4 + 2).to(ACC)[None, :]
    w3 = tl.load(weight_ptr + (direction * E + e) * 4 + 3).to(ACC)[None, :]
    sign = 1 - 2 * direction  # tap j lies 3 - j tokens before, in scan order
    for start in range(0, seqlen, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        x0 = _shifted(x_ptr, image * image_stride, t - 3 * sign, e, seqlen, row_stride, ACC)
        x1 = _shifted(x_ptr, image * image_stride, t - 2 * sign, e, seqlen, row_stride, ACC)
        x2 = _shifted(x_ptr, image * image_stride, t - sign, e, seqlen, row_stride, ACC)
        x3 = _shifted(x_ptr, image * image_stride, t, e, seqlen, row_stride, ACC)
        total = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        gate = _sigmoid(total)
        at = (pair * seqlen + t[:, None]) * E + e[None, :]
        inside = (t < seqlen)[:, None]
        du = tl.load(du_ptr + at, mask=inside, other=0.0).to(ACC)
        dpre = du * gate * (1.0 + total * (1.0 - gate))
        tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        dw0 += dpre * x0
        dw1 += dpre * x1
        dw2 += dpre * x2
        dw3 += dpre * x3
        db += dpre
    out = dweight_ptr + (pair * E + e) * 4
    tl.store(out, tl.sum(dw0, 0))
    tl.store(out + 1, tl.sum(dw1, 0))
    tl.store(out + 2, tl.sum(dw2, 0))
    tl.store(out + 3, tl.sum(dw3, 0))
    tl.store(dbias_ptr + pair * E + e, tl.sum(db, 0))


@triton.jit
def _shifted(x_ptr, base, at, e, seqlen, row_stride, ACC: tl.constexpr):
    inside = (at >= 0) & (at < seqlen)
    return tl.load(x_ptr + base + at[:, None] * row_stride + e[None, :], mask=inside[:, None], other=0.0).to(ACC)


@triton.jit
def _conv_input_kernel(
    dpre_ptr, weight_ptr, dx_ptr, batch, seqlen,
    E: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_j w_j dpre_{t + 3 - j} of direction 0 and dpre_{t - 3 + j} of direction 1."""
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_L, BLOCK), ACC)
    for direction in tl.static_range(2):
        base = (direction * batch + image) * seqlen * E
        for j in tl.static_range(4):
            weight = tl.load(weight_ptr + (direction * E + e) * 4 + j).to(ACC)[None, :]
            total += weight * _shifted(dpre_ptr, base, t + ((j - 3) if direction == 1 else (3 - j)), e, seqlen, E, ACC)
    tl.store(dx_ptr + (image * seqlen + t[:, None]) * E + e[None, :], total.to(dx_ptr.dtype.element_ty), mask=(t < seqlen)[:, None])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, seqlen, channels = x.shape
        if x.stride(2) != 1:
            x = x.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        u = x.new_empty((2, batch, seqlen, channels))
        block = _block(channels, 128)
        _conv_forward_kernel[(triton.cdiv(seqlen, 32), channels // block, batch)](
            x, weight, bias, u, batch, seqlen, x.stride(1), x.stride(0),
            E=channels, BLOCK_L=32, BLOCK=block, ACC=_wide(x)[1], num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias)
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        batch, seqlen, channels = x.shape
        du = du.contiguous()
        wide, acc = _wide(x)
        dpre = torch.empty_like(du)
        dweight = x.new_empty((2, batch, channels, 4), dtype=wide)
        dbias = x.new_empty((2, batch, channels), dtype=wide)
        block = _block(channels, 64)
        _conv_gradient_kernel[(channels // block, batch, 2)](
            x, weight, bias, du, dpre, dweight, dbias, batch, seqlen, x.stride(1), x.stride(0),
            E=channels, BLOCK_L=16, BLOCK=block, ACC=acc, num_warps=4,
        )  # fmt: skip
        dx = x.new_empty((batch, seqlen, channels))
        block = _block(channels, 128)
        _conv_input_kernel[(triton.cdiv(seqlen, 32), channels // block, batch)](
            dpre, weight, dx, batch, seqlen, E=channels, BLOCK_L=32, BLOCK=block, ACC=acc, num_warps=4
        )
        return dx, dweight.sum(1).to(weight.dtype), dbias.sum(1).to(bias.dtype)


def conv_pair(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of the causal depthwise convolution of both directions; direction 1 is causal in reversed order.

    Args:
        x: (batch, seqlen, d_inner), its last axis contiguous.
        weight: (2, d_inner, 4), the last tap for the current token; bias: (2, d_inner).

    Returns:
        (2, batch, seqlen, d_inner).
    """
    u: Tensor = _Conv.apply(x, weight, bias)
    return u


# --- gate ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gate_kernel(y_ptr, z_ptr, out_ptr, rows, z_stride, E: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (e < E)[None, :]
    at = row[:, None] * E + e[None, :]
    half = tl.full((1, 1), E, tl.int64) * rows  # where direction 1 begins
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(ACC) + tl.load(y_ptr + half + at, mask=inside, other=0.0).to(ACC)
    z = tl.load(z_ptr + row[:, None] * z_stride + e[None, :], mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + at, (0.5 * y * z * _sigmoid(z)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    y_ptr, z_ptr, dout_ptr, dy_ptr, dz_ptr, rows, z_stride, E: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (e < E)[None, :]
    at = row[:, None] * E + e[None, :]
    half = tl.full((1, 1), E, tl.int64) * rows  # where direction 1 begins
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(ACC) + tl.load(y_ptr + half + at, mask=inside, other=0.0).to(ACC)
    z = tl.load(z_ptr + row[:, None] * z_stride + e[None, :], mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(ACC) * 0.5
    gate = _sigmoid(z)
    tl.store(dy_ptr + at, (dout * z * gate).to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dz_ptr + at, (dout * y * gate * (1.0 + z * (1.0 - gate))).to(dz_ptr.dtype.element_ty), mask=inside)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        _, batch, seqlen, channels = y.shape
        y = y.contiguous()
        if z.stride(2) != 1 or z.stride(0) != seqlen * z.stride(1):
            z = z.contiguous()
        out = y.new_empty((batch, seqlen, channels))
        rows, width = batch * seqlen, triton.next_power_of_2(channels)
        block = max(1, 4096 // width)
        _gate_kernel[(triton.cdiv(rows, block),)](y, z, out, rows, z.stride(1), E=channels, ROWS=block, WIDTH=width, ACC=_wide(y)[1], num_warps=4)
        ctx.save_for_backward(y, z)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, z = ctx.saved_tensors
        _, batch, seqlen, channels = y.shape
        dy, dz = (y.new_empty((batch, seqlen, channels)) for _ in range(2))
        rows, width = batch * seqlen, triton.next_power_of_2(channels)
        block = max(1, 4096 // width)
        _gate_backward_kernel[(triton.cdiv(rows, block),)](
            y, z, dout.contiguous(), dy, dz, rows, z.stride(1), E=channels, ROWS=block, WIDTH=width, ACC=_wide(y)[1], num_warps=4
        )
        return dy.expand_as(y), dz


def gate_pair(y: Tensor, z: Tensor) -> Tensor:
    """(y_0 + y_1) silu(z) / 2. y: (2, batch, seqlen, d_inner); z: (batch, seqlen, d_inner)."""
    out: Tensor = _Gate.apply(y, z)
    return out
