"""One layer of a training step with its gradients, in Triton kernels and torch's matrix products; both directions at once.

Token-major throughout, a leading axis of 2 for the directions; direction 1 walks from the last token to the first by index, nothing
is flipped. State, sums and parameters are float32 (float64 where the inputs are, for gradient checks under TRITON_INTERPRET=1),
activations any type. Nothing is added atomically, so results repeat bit for bit.

The whole layer is one autograd.Function, so that no gradient takes a pass through memory of its own: both halves of xz's gradient are
written where they belong, du is added to by the matrix product that follows, the residual's gradient leaves in both types.

The scan: a program owns BLOCK channels of one image and direction and walks its tokens with the (d_state, BLOCK) state in
registers. The forward walk stores the state before every second token, in the activations' type; the backward walk starts each pair
of tokens there:

    h_t = a_t h_{t-1} + d_t B_t u_t,  a_t = exp(d_t A),  y_t = C_t h_t + D u_t,   d_t = softplus(delta_t + bias)
    g_t = dy_t C_t + a_{t+1} g_{t+1}   (g = dloss/dh),   p_t = a_t h_{t-1}
    du = d (g B) + dy D,  dB = sum_e g d u,  dC = sum_e dy h,  dd = (g p) A + u (g B),  dA = sum g p d,  ddelta = dd (1 - e^-d)

Softplus belongs to the kernel that makes delta. What decided the layouts: docs/training.md, "Kernels".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SEGMENT = 100
"""Tokens that one program of the convolution walks, at most."""


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact to rounding for small e^x too; the identity above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, x, tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * (0.25 - 0.2 * e)))), tl.log(1.0 + e)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# --- residual and norm -----------------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    residual_ptr, update_ptr, weight_ptr, sum_ptr, normed_ptr, scale_ptr, rows, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (e < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + e[None, :]
    r = tl.load(residual_ptr + at, mask=inside, other=0.0).to(ACC)
    if ADD:
        r += tl.load(update_ptr + at, mask=inside, other=0.0).to(ACC)
        tl.store(sum_ptr + at, r, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, 1) / D + eps)
    weight = tl.load(weight_ptr + e, mask=e < D, other=0.0).to(ACC)
    tl.store(normed_ptr + at, (r * scale[:, None] * weight[None, :]).to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _norm_backward_kernel(
    residual_ptr, scale_ptr, weight_ptr, dnormed_ptr, dsum_ptr, dresidual_ptr, dupdate_ptr, dweight_ptr, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + e, mask=e < D, other=0.0).to(ACC)
    dweight = tl.zeros((ROWS, WIDTH), ACC)
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (e < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + e[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        x = tl.load(residual_ptr + at, mask=inside, other=0.0).to(ACC) * scale[:, None]
        dnormed = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(ACC)
        dsum = tl.load(dsum_ptr + at, mask=inside, other=0.0).to(ACC)
        dx = dnormed * weight[None, :]
        total = dsum + scale[:, None] * (dx - x * (tl.sum(x * dx, 1) / D)[:, None])
        dweight += dnormed * x
        tl.store(dresidual_ptr + at, total, mask=inside)
        if HALF:
            tl.store(dupdate_ptr + at, total.to(dupdate_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * D + e, tl.sum(dweight, 0), mask=e < D)


def add_norm(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """residual + update, its RMS norm times weight in dtype, and one over the root of its mean square."""
    rows, d = residual.numel() // residual.shape[-1], residual.shape[-1]
    width = triton.next_power_of_2(d)
    block = max(1, 2048 // width)
    total = residual if update is None else torch.empty_like(residual)
    normed, scale = torch.empty_like(residual, dtype=dtype), residual.new_empty(rows)
    _norm_kernel[(triton.cdiv(rows, block),)](
        residual, residual if update is None else update, weight, total, normed, scale, rows, eps,
        D=d, WIDTH=width, ROWS=block, ACC=_wide(residual)[1], ADD=update is not None, num_warps=4,
    )  # fmt: skip
    return total, normed, scale


def add_norm_backward(residual: Tensor, scale: Tensor, weight: Tensor, dnormed: Tensor, dsum: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, of update (in dnormed's type; empty without `half`) and of weight. residual: the sum."""
    rows, d = scale.numel(), residual.shape[-1]
    width = triton.next_power_of_2(d)
    block, tiles = max(1, 1024 // width), 16
    programs = triton.cdiv(rows, block * tiles)
    dresidual = torch.empty_like(residual)
    dupdate = torch.empty_like(dnormed) if half else dnormed.new_empty(0)
    dweight = residual.new_empty((programs, d))
    _norm_backward_kernel[(programs,)](
        residual, scale, weight, dnormed, dsum, dresidual, dupdate, dweight, rows,
        D=d, WIDTH=width, ROWS=block, TILES=tiles, ACC=_wide(residual)[1], HALF=half, num_warps=4,
    )  # fmt: skip
    return dresidual, dupdate, dweight.sum(0)


# --- conv + SiLU -----------------------------------------------------------------------------------------------------------
# A program walks the tokens of a segment with the last four inputs in registers. At token t direction 0 sees the inputs t - 3 .. t,
# and direction 1, at t - 3, the same four in reverse.


@triton.jit
def _token(ptr, t, seqlen, row_stride, e, ACC: tl.constexpr):
    """One token's channels; nothing outside the sequence."""
    return tl.load(ptr + t * row_stride + e, mask=_within(t + 0 * e, 0, seqlen), other=0.0).to(ACC)


@triton.jit
def _within(t, begin, end):
    return (t >= begin) & (t < end)


@triton.jit
def _taps(weight_ptr, bias_ptr, direction, e, E: tl.constexpr, ACC: tl.constexpr):
    at = weight_ptr + (direction * E + e) * 4
    return (
        tl.load(at).to(ACC), tl.load(at + 1).to(ACC), tl.load(at + 2).to(ACC), tl.load(at + 3).to(ACC),
        tl.load(bias_ptr + direction * E + e).to(ACC),
    )  # fmt: skip


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, u_ptr, batch, seqlen, segment, row_stride, image_stride,
    E: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * segment
    end = tl.minimum(begin + segment, seqlen)
    x_ptr += image * image_stride
    there_ptr = u_ptr + image * seqlen * E
    back_ptr = u_ptr + (batch + image) * seqlen * E
    v0, v1, v2, v3, b = _taps(weight_ptr, bias_ptr, 0, e, E, ACC)
    w0, w1, w2, w3, c = _taps(weight_ptr, bias_ptr, 1, e, E, ACC)
    x0 = _token(x_ptr, begin - 3, seqlen, row_stride, e, ACC)
    x1 = _token(x_ptr, begin - 2, seqlen, row_stride, e, ACC)
    x2 = _token(x_ptr, begin - 1, seqlen, row_stride, e, ACC)
    for start in range(begin, end + 3, 4):
        x3 = _token(x_ptr, start, seqlen, row_stride, e, ACC)
        x4 = _token(x_ptr, start + 1, seqlen, row_stride, e, ACC)
        x5 = _token(x_ptr, start + 2, seqlen, row_stride, e, ACC)
        x6 = _token(x_ptr, start + 3, seqlen, row_stride, e, ACC)
        for j in tl.static_range(4):
            there = b + v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3
            back = c + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3
            t = start + j
            tl.store(there_ptr + t * E + e, (there * _sigmoid(there)).to(u_ptr.dtype.element_ty), mask=t + 0 * e < end)
            s = t - 3
            tl.store(back_ptr + s * E + e, (back * _sigmoid(back)).to(u_ptr.dtype.element_ty), mask=_within(s + 0 * e, begin, end))
            x0, x1, x2, x3, x4, x5 = x1, x2, x3, x4, x5, x6


@triton.jit
def _through_silu(total, du):
    gate = _sigmoid(total)
    return du * gate * (1.0 + total * (1.0 - gate))


@triton.jit
def _conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, du_ptr, dx_ptr, dweight_ptr, dbias_ptr, batch, seqlen, segment, row_stride, image_stride, dx_row, dx_image,
    E: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_j w_j q_{t + 3 - j} of direction 0 and q_{t - 3 + j} of direction 1, q the gradient at SiLU; a segment's share of the weights'."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * segment
    end = tl.minimum(begin + segment, seqlen)
    x_ptr += image * image_stride
    dx_ptr += image * dx_image
    there_ptr = du_ptr + image * seqlen * E
    back_ptr = du_ptr + (batch + image) * seqlen * E
    v0, v1, v2, v3, b = _taps(weight_ptr, bias_ptr, 0, e, E, ACC)
    w0, w1, w2, w3, c = _taps(weight_ptr, bias_ptr, 1, e, E, ACC)
    x0 = _token(x_ptr, begin - 3, seqlen, row_stride, e, ACC)
    x1 = _token(x_ptr, begin - 2, seqlen, row_stride, e, ACC)
    x2 = _token(x_ptr, begin - 1, seqlen, row_stride, e, ACC)
    zero = tl.zeros((BLOCK,), ACC)
    p0, p1, p2, q0, q1, q2 = zero, zero, zero, zero, zero, zero
    dv0, dv1, dv2, dv3, db = zero, zero, zero, zero, zero
    dw0, dw1, dw2, dw3, dc = zero, zero, zero, zero, zero
    for start in range(begin, end + 3, 4):
        x3 = _token(x_ptr, start, seqlen, row_stride, e, ACC)
        x4 = _token(x_ptr, start + 1, seqlen, row_stride, e, ACC)
        x5 = _token(x_ptr, start + 2, seqlen, row_stride, e, ACC)
        x6 = _token(x_ptr, start + 3, seqlen, row_stride, e, ACC)
        f0 = _token(there_ptr, start, seqlen, E, e, ACC)
        f1 = _token(there_ptr, start + 1, seqlen, E, e, ACC)
        f2 = _token(there_ptr, start + 2, seqlen, E, e, ACC)
        f3 = _token(there_ptr, start + 3, seqlen, E, e, ACC)
        g0 = _token(back_ptr, start - 3, seqlen, E, e, ACC)
        g1 = _token(back_ptr, start - 2, seqlen, E, e, ACC)
        g2 = _token(back_ptr, start - 1, seqlen, E, e, ACC)
        g3 = _token(back_ptr, start, seqlen, E, e, ACC)
        for j in tl.static_range(4):
            t = start + j
            s = t - 3
            p3 = _through_silu(b + v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3, f0)
            q3 = _through_silu(c + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3, g0)
            dx = v3 * p0 + v2 * p1 + v1 * p2 + v0 * p3 + w0 * q0 + w1 * q1 + w2 * q2 + w3 * q3
            tl.store(dx_ptr + s * dx_row + e, dx.to(dx_ptr.dtype.element_ty), mask=_within(s + 0 * e, begin, end))
            p = tl.where(t + 0 * e < end, p3, 0.0)  # the neighbours' tokens count there
            q = tl.where(_within(s + 0 * e, begin, end), q3, 0.0)
            dv0, dv1, dv2, dv3, db = dv0 + p * x0, dv1 + p * x1, dv2 + p * x2, dv3 + p * x3, db + p
            dw0, dw1, dw2, dw3, dc = dw0 + q * x3, dw1 + q * x2, dw2 + q * x1, dw3 + q * x0, dc + q
            p0, p1, p2, q0, q1, q2 = p1, p2, p3, q1, q2, q3
            x0, x1, x2, x3, x4, x5 = x1, x2, x3, x4, x5, x6
            f0, f1, f2, g0, g1, g2 = f1, f2, f3, g1, g2, g3
    part = image * tl.num_programs(2) + tl.program_id(2)
    parts = batch * tl.num_programs(2)
    out = dweight_ptr + (part * E + e) * 4
    tl.store(out, dv0)
    tl.store(out + 1, dv1)
    tl.store(out + 2, dv2)
    tl.store(out + 3, dv3)
    tl.store(dbias_ptr + part * E + e, db)
    out += parts * E * 4
    tl.store(out, dw0)
    tl.store(out + 1, dw1)
    tl.store(out + 2, dw2)
    tl.store(out + 3, dw3)
    tl.store(dbias_ptr + (parts + part) * E + e, dc)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of the causal depthwise convolution of both directions; direction 1 is causal in reversed order.

    Args:
        x: (batch, seqlen, d_inner), its last axis contiguous.
        weight: (2, d_inner, 4), the last tap for the current token; bias: (2, d_inner).

    Returns:
        (2, batch, seqlen, d_inner).
    """
    batch, seqlen, channels = x.shape
    u = x.new_empty((2, batch, seqlen, channels))
    block, segments = _block(channels, 64), triton.cdiv(seqlen, _SEGMENT)
    _conv_kernel[(channels // block, batch, segments)](
        x, weight, bias, u, batch, seqlen, triton.cdiv(seqlen, segments), x.stride(1), x.stride(0),
        E=channels, BLOCK=block, ACC=_wide(x)[1], num_warps=1,
    )  # fmt: skip
    return u


def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; x's goes into dx, (batch, seqlen, d_inner) with the last axis contiguous."""
    batch, seqlen, channels = x.shape
    wide, acc = _wide(x)
    block, segments = _block(channels, 64), triton.cdiv(seqlen, _SEGMENT)
    dweight = x.new_empty((2, batch * segments, channels, 4), dtype=wide)
    dbias = x.new_empty((2, batch * segments, channels), dtype=wide)
    _conv_backward_kernel[(channels // block, batch, segments)](
        x, weight, bias, du, dx, dweight, dbias, batch, seqlen, triton.cdiv(seqlen, segments),
        x.stride(1), x.stride(0), dx.stride(1), dx.stride(0), E=channels, BLOCK=block, ACC=acc, num_warps=1,
    )  # fmt: skip
    return dweight.sum(1), dbias.sum(1)


# --- delta -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _delta_kernel(
    x_ptr, weight_ptr, bias_ptr, d_ptr, bc_ptr, rows,
    E: tl.constexpr, N2: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softplus(dt W' + bias) in the activations' type; B and C in the sums', so that the scan need not convert them for every channel."""
    direction = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K)
    line = direction.to(tl.int64) * rows + row
    x_row = x_ptr + line[:, None] * WIDTH
    dt = tl.load(x_row + N2 + k[None, :], mask=(row < rows)[:, None] & (k < RANK)[None, :], other=0.0)
    weight = tl.load(weight_ptr + (direction * E + e)[None, :] * RANK + k[:, None], mask=(k < RANK)[:, None], other=0.0)
    raw = tl.dot(dt.to(ACC), weight.to(ACC), input_precision=PRECISION).to(ACC) + tl.load(bias_ptr + direction * E + e).to(ACC)[None, :]
    tl.store(d_ptr + line[:, None] * E + e[None, :], _softplus(raw).to(d_ptr.dtype.element_ty), mask=(row < rows)[:, None])
    if tl.program_id(1) == 0:
        n = tl.arange(0, N2)
        bc = tl.load(x_row + n[None, :], mask=(row < rows)[:, None], other=0.0)
        tl.store(bc_ptr + line[:, None] * N2 + n[None, :], bc.to(ACC), mask=(row < rows)[:, None])


@triton.jit
def _delta_backward_kernel(
    ddelta_ptr, weight_ptr, parts_ptr, dx_ptr, rows, blocks,
    E: tl.constexpr, N2: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_dbl's gradient: the scan's parts of B's and C's added, dt's from delta's, zeros in the padding."""
    direction = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    k, n = tl.arange(0, K), tl.arange(0, N2)
    line = direction * rows + row
    ddt = tl.zeros((ROWS, K), ACC)
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        ddelta = tl.load(ddelta_ptr + line[:, None] * E + e[None, :], mask=inside, other=0.0)
        weight = tl.load(weight_ptr + (direction * E + e)[:, None] * RANK + k[None, :], mask=(k < RANK)[None, :], other=0.0)
        ddt += tl.dot(ddelta.to(ACC), weight.to(ACC), input_precision=PRECISION).to(ACC)
    total = tl.zeros((ROWS, N2), ACC)
    for block in range(blocks):
        total += tl.load(parts_ptr + ((direction * blocks + block) * rows + row)[:, None] * N2 + n[None, :], mask=inside, other=0.0).to(ACC)
    out = dx_ptr + line[:, None] * WIDTH
    tl.store(out + n[None, :], total.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(out + N2 + k[None, :], ddt.to(dx_ptr.dtype.element_ty), mask=inside & (k < WIDTH - N2)[None, :])


def delta(x_dbl: Tensor, weight: Tensor, bias: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """d = softplus(dt_proj + bias) of both directions, and B and C as the scan takes them.

    Args:
        x_dbl: (2, rows, 2 d_state + dt_rank, padded): B, C, dt.
        weight: (2, d_inner, dt_rank), in x_dbl's type; bias: (2, d_inner).
        states: d_state.
    """
    _, rows, width = x_dbl.shape
    channels, rank = weight.shape[1:]
    wide, acc = _wide(x_dbl)
    d, bc = x_dbl.new_empty((2, rows, channels)), x_dbl.new_empty((2, rows, 2 * states), dtype=wide)
    block = _block(channels, 128)
    _delta_kernel[(triton.cdiv(rows, 64), channels // block, 2)](
        x_dbl, weight, bias, d, bc, rows,
        E=channels, N2=2 * states, RANK=rank, WIDTH=width, K=max(16, triton.next_power_of_2(rank)), ROWS=64, BLOCK=block, ACC=acc,
        PRECISION=_precision(x_dbl), num_warps=4,
    )  # fmt: skip
    return d, bc


def delta_backward(ddelta: Tensor, weight: Tensor, parts: Tensor, width: int) -> Tensor:
    """x_dbl's gradient (2, rows, width). ddelta: before softplus; parts: (2, blocks, rows, 2 d_state)."""
    _, blocks, rows, n2 = parts.shape
    channels, rank = weight.shape[1:]
    dx_dbl = ddelta.new_empty((2, rows, width))
    _delta_backward_kernel[(triton.cdiv(rows, 64), 2)](
        ddelta, weight, parts, dx_dbl, rows, blocks,
        E=channels, N2=n2, RANK=rank, WIDTH=width, K=max(16, triton.next_power_of_2(rank)), ROWS=64, BLOCK=_block(channels, 64),
        ACC=_wide(ddelta)[1], PRECISION=_precision(ddelta), num_warps=4,
    )  # fmt: skip
    return dx_dbl


# --- selective scan --------------------------------------------------------------------------------------------------------


@triton.jit
def _step(h, u, d, x_ptr, n, A, D, N: tl.constexpr, ACC: tl.constexpr):
    u, d = u.to(ACC), d.to(ACC)
    h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * tl.load(x_ptr + n)[:, None]
    return h, tl.sum(h * tl.load(x_ptr + N + n)[:, None], 0) + D * u


@triton.jit(do_not_specialize_on_alignment=["A_ptr", "state_ptr"])  # else a thread gets 4 or 8 channels and a part of their states
def _scan_kernel(
    u_ptr, d_ptr, x_ptr, A_ptr, D_ptr, y_ptr, state_ptr, batch, seqlen,
    E: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A thread owns one channel with all its states: nothing passes between threads."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = direction * batch + image
    u_ptr += pair * seqlen * E
    d_ptr += pair * seqlen * E
    y_ptr += pair * seqlen * E
    x_ptr += pair * seqlen * (2 * N)
    states = (state_ptr + pair * ((seqlen + 1) // 2) * (E * N) + e)[None, :] + (n * E)[:, None]
    A = tl.load((A_ptr + direction * (E * N) + e)[None, :] + (n * E)[:, None]).to(ACC) * _LOG2E
    D = tl.load(D_ptr + direction * E + e).to(ACC)
    h = tl.zeros((N, BLOCK), ACC)
    sign = 1 - 2 * direction
    at = direction * (seqlen - 1)
    for _ in range(seqlen // 2):
        u0 = tl.load(u_ptr + at * E + e)
        d0 = tl.load(d_ptr + at * E + e)
        u1 = tl.load(u_ptr + (at + sign) * E + e)
        d1 = tl.load(d_ptr + (at + sign) * E + e)
        if KEEP:
            tl.store(states, h.to(state_ptr.dtype.element_ty))
            states += E * N
        h, y = _step(h, u0, d0, x_ptr + at * (2 * N), n, A, D, N, ACC)
        tl.store(y_ptr + at * E + e, y.to(y_ptr.dtype.element_ty))
        at += sign
        h, y = _step(h, u1, d1, x_ptr + at * (2 * N), n, A, D, N, ACC)
        tl.store(y_ptr + at * E + e, y.to(y_ptr.dtype.element_ty))
        at += sign
    if seqlen % 2 == 1:
        if KEEP:
            tl.store(states, h.to(state_ptr.dtype.element_ty))
        h, y = _step(h, tl.load(u_ptr + at * E + e), tl.load(d_ptr + at * E + e), x_ptr + at * (2 * N), n, A, D, N, ACC)
        tl.store(y_ptr + at * E + e, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _adjoint(
    at, dy, u, d, B, C, a, p, carry, dA, dD, dbias, A, D, du_ptr, ddelta_ptr, parts_ptr, e, n, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of the token at `at`, given a_{i+1} g_{i+1} in carry and p = a h before; returns carry for the token before, and the sums."""
    fed = d * u
    out = parts_ptr + at * (2 * N) + n
    tl.store(out + N, tl.sum((p + fed[None, :] * B[:, None]) * dy[None, :], 1).to(parts_ptr.dtype.element_ty))
    g = carry + dy[None, :] * C[:, None]
    tl.store(out, tl.sum(g * fed[None, :], 1).to(parts_ptr.dtype.element_ty))
    weight = tl.sum(g * B[:, None], 0)
    kept = g * p
    dd = tl.sum(kept * A, 0) * _LN2 + weight * u
    # sigmoid of what softplus got is 1 - e^-d
    slope = tl.where(d < 0.02, d * (1.0 - d * 0.5 * (1.0 - d * (1.0 / 3.0) * (1.0 - d * 0.25 * (1.0 - d * 0.2)))), 1.0 - tl.exp(-d))
    tl.store(du_ptr + at * E + e, (weight * d + dy * D).to(du_ptr.dtype.element_ty))
    tl.store(ddelta_ptr + at * E + e, (dd * slope).to(ddelta_ptr.dtype.element_ty))
    return g * a, dA + kept * d[None, :], dD + dy * u, dbias + dd * slope


@triton.jit
def _channels(d_ptr, u_ptr, dy_ptr, at):
    return tl.load(d_ptr + at), tl.load(u_ptr + at), tl.load(dy_ptr + at)


@triton.jit
def _scan_backward_kernel(
    u_ptr, d_ptr, x_ptr, A_ptr, D_ptr, state_ptr, dy_ptr, du_ptr, ddelta_ptr, parts_ptr, dA_ptr, dD_ptr, dbias_ptr, batch, seqlen,
    E: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A thread owns 4 channels and 4 states, for the sums run both ways. Two tokens at a time; the next two's inputs are on their way."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    by_fours = tl.program_id(0) * BLOCK + (tl.arange(0, BLOCK) // 4) * 4 + tl.arange(0, BLOCK) % 4  # e; written so, no thread gets 8
    n = tl.arange(0, N)
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = direction * batch + image
    u_ptr += pair * seqlen * E
    d_ptr += pair * seqlen * E
    du_ptr += pair * seqlen * E
    ddelta_ptr += pair * seqlen * E
    dy_ptr += image * seqlen * E
    x_ptr += pair * seqlen * (2 * N)
    parts_ptr += ((direction * tl.num_programs(0) + tl.program_id(0)) * batch + image) * seqlen * (2 * N)
    cell = (n * E)[:, None] + by_fours[None, :]
    states = state_ptr + (pair + 1) * ((seqlen + 1) // 2) * (E * N) - E * N
    A = tl.load(A_ptr + direction * (E * N) + cell).to(ACC) * _LOG2E
    D = tl.load(D_ptr + direction * E + e).to(ACC)
    carry = tl.zeros((N, BLOCK), ACC)
    dA = tl.zeros((N, BLOCK), ACC)
    dD = tl.zeros((BLOCK,), ACC)
    dbias = tl.zeros((BLOCK,), ACC)
    sign = 1 - 2 * direction
    at = (1 - direction) * (seqlen - 1)
    h = tl.load(states + cell)
    d1, u1, dy1 = _channels(d_ptr, u_ptr, dy_ptr, at * E + e)
    if seqlen % 2 == 1:
        B1 = tl.load(x_ptr + at * (2 * N) + n)
        C1 = tl.load(x_ptr + at * (2 * N) + N + n)
        f1 = d1.to(ACC)
        a1 = tl.exp2(f1[None, :] * A)
        carry, dA, dD, dbias = _adjoint(
            at, dy1.to(ACC), u1.to(ACC), f1, B1, C1, a1, a1 * h.to(ACC), carry, dA, dD, dbias, A, D, du_ptr, ddelta_ptr, parts_ptr, e, n, E, N,
        )  # fmt: skip
        more = tl.minimum(seqlen - 1, 1)
        at -= sign * more
        states -= more * (E * N)
        h = tl.load(states + cell)
        d1, u1, dy1 = _channels(d_ptr, u_ptr, dy_ptr, at * E + e)
    before = at - sign * tl.minimum(seqlen - 1, 1)
    d0, u0, dy0 = _channels(d_ptr, u_ptr, dy_ptr, before * E + e)
    for back in range(seqlen // 2):
        B0 = tl.load(x_ptr + before * (2 * N) + n)
        B1 = tl.load(x_ptr + at * (2 * N) + n)
        C0 = tl.load(x_ptr + before * (2 * N) + N + n)
        C1 = tl.load(x_ptr + at * (2 * N) + N + n)
        more = tl.where(back < seqlen // 2 - 1, 1, 0)
        states -= more * (E * N)
        next_at = at - 2 * more * sign
        next_before = before - 2 * more * sign
        next_h = tl.load(states + cell)
        next_d0, next_u0, next_dy0 = _channels(d_ptr, u_ptr, dy_ptr, next_before * E + e)
        next_d1, next_u1, next_dy1 = _channels(d_ptr, u_ptr, dy_ptr, next_at * E + e)
        f0, f1 = d0.to(ACC), d1.to(ACC)
        v0, v1 = u0.to(ACC), u1.to(ACC)
        a0 = tl.exp2(f0[None, :] * A)
        p0 = a0 * h.to(ACC)
        a1 = tl.exp2(f1[None, :] * A)
        p1 = a1 * (p0 + (f0 * v0)[None, :] * B0[:, None])
        carry, dA, dD, dbias = _adjoint(
            at, dy1.to(ACC), v1, f1, B1, C1, a1, p1, carry, dA, dD, dbias, A, D, du_ptr, ddelta_ptr, parts_ptr, e, n, E, N
        )
        carry, dA, dD, dbias = _adjoint(
            before, dy0.to(ACC), v0, f0, B0, C0, a0, p0, carry, dA, dD, dbias, A, D, du_ptr, ddelta_ptr, parts_ptr, e, n, E, N
        )
        h, at, before = next_h, next_at, next_before
        d0, u0, dy0, d1, u1, dy1 = next_d0, next_u0, next_dy0, next_d1, next_u1, next_dy1
    tl.store(dA_ptr + pair * (E * N) + cell, dA)
    tl.store(dD_ptr + pair * E + e, dD)
    tl.store(dbias_ptr + pair * E + e, dbias)


def scan(u: Tensor, d: Tensor, bc: Tensor, A: Tensor, D: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Selective scan of both directions, with D, without gate.

    Args:
        u: (2, batch, seqlen, d_inner); direction 1 walks backwards. d: the same, after softplus.
        bc: (2, rows, 2 d_state): B, C. A: (2, d_state, d_inner), negative; D: (2, d_inner).
        keep: for a gradient.

    Returns:
        (2, batch, seqlen, d_inner) in u's dtype; the states before tokens 0, 2, .. of each walk.
    """
    _, batch, seqlen, channels = u.shape
    states = A.shape[1]
    y = torch.empty_like(u)
    # In the activations' type: they are no finer than what they were made of, and twice the bytes would set the speed of both walks.
    kept = u.new_empty(
        (2, batch, (seqlen + 1) // 2, states, channels) if keep else (1,), dtype=torch.bfloat16 if u.dtype == torch.float16 else u.dtype
    )
    block = _block(channels, 32)
    _scan_kernel[(channels // block, batch, 2)](
        u, d, bc, A, D, y, kept, batch, seqlen, E=channels, N=states, BLOCK=block, ACC=_wide(u)[1], KEEP=keep, num_warps=1
    )
    return y, kept


def scan_backward(u: Tensor, d: Tensor, bc: Tensor, A: Tensor, D: Tensor, kept: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, of delta before softplus, of B and C in parts (2, blocks, rows, 2 d_state), of A, D and delta's bias.

    dy: (batch, seqlen, d_inner), the same for both directions.
    """
    _, batch, seqlen, channels = u.shape
    states = A.shape[1]
    wide, acc = _wide(u)
    block = _block(channels, 32)
    blocks = channels // block
    du, ddelta = torch.empty_like(u), torch.empty_like(d)
    parts = u.new_empty((2, blocks, batch * seqlen, 2 * states))
    dA = u.new_empty((2, batch, states, channels), dtype=wide)
    dD, dbias = (u.new_empty((2, batch, channels), dtype=wide) for _ in range(2))
    # 200 registers let ten warps be on a multiprocessor, not eight; in float32 that spills.
    options = {"maxnreg": 200} if u.dtype.itemsize == 2 and u.device.type == "cuda" else {}
    _scan_backward_kernel[(blocks, batch, 2)](
        u, d, bc, A, D, kept, dy, du, ddelta, parts, dA, dD, dbias, batch, seqlen,
        E=channels, N=states, BLOCK=block, ACC=acc, num_warps=1, **options,
    )  # fmt: skip
    return du, ddelta, parts, dA.sum(1), dD.sum(1), dbias.sum(1)


# --- gate ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gate_kernel(y_ptr, z_ptr, out_ptr, rows, z_stride, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    at = row[:, None] * E + e[None, :]
    half = tl.full((1, 1), E, tl.int64) * rows  # where direction 1 begins
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(ACC) + tl.load(y_ptr + half + at, mask=inside, other=0.0).to(ACC)
    z = tl.load(z_ptr + row[:, None] * z_stride + e[None, :], mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + at, (0.5 * y * z * _sigmoid(z)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    y_ptr, z_ptr, dout_ptr, dy_ptr, dz_ptr, rows, z_stride, dz_stride,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    at = row[:, None] * E + e[None, :]
    half = tl.full((1, 1), E, tl.int64) * rows  # where direction 1 begins
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(ACC) + tl.load(y_ptr + half + at, mask=inside, other=0.0).to(ACC)
    z = tl.load(z_ptr + row[:, None] * z_stride + e[None, :], mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(ACC) * 0.5
    gate = _sigmoid(z)
    tl.store(dy_ptr + at, (dout * z * gate).to(dy_ptr.dtype.element_ty), mask=inside)
    dz = dout * y * gate * (1.0 + z * (1.0 - gate))
    tl.store(dz_ptr + row[:, None] * dz_stride + e[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)


def gate(y: Tensor, z: Tensor) -> Tensor:
    """(y_0 + y_1) silu(z) / 2. y: (2, rows, d_inner); z: (rows, d_inner), its last axis contiguous."""
    rows, channels = z.shape
    out = y.new_empty((rows, channels))
    block = _block(channels, 128)
    _gate_kernel[(triton.cdiv(rows, 2048 // block), channels // block)](
        y, z, out, rows, z.stride(0), E=channels, ROWS=2048 // block, BLOCK=block, ACC=_wide(y)[1], num_warps=4
    )
    return out


def gate_backward(y: Tensor, z: Tensor, dout: Tensor, dz: Tensor) -> Tensor:
    """Gradient of y, the same for both directions; z's goes into dz, its last axis contiguous."""
    rows, channels = z.shape
    dy = y.new_empty((rows, channels))
    block = _block(channels, 128)
    _gate_backward_kernel[(triton.cdiv(rows, 2048 // block), channels // block)](
        y, z, dout, dy, dz, rows, z.stride(0), dz.stride(0), E=channels, ROWS=2048 // block, BLOCK=block, ACC=_wide(y)[1], num_warps=4
    )
    return dy


# --- layer -----------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def _precision(tensor: Tensor) -> str:
    """Of tl.dot after a cast to the sums' type: tf32 holds every bfloat16 and float16 exactly."""
    return "tf32" if tensor.dtype.itemsize == 2 else "ieee"


def _block(channels: int, most: int) -> int:
    """Channels a program: a power of two that divides them."""
    return min(most, channels & -channels)


def weight_gradient(dy: Tensor, x: Tensor, parts: int) -> Tensor:
    """dy' x over the rows of (groups, rows, .), added in the sums' type over that many stretches of rows.

    One product would give a small matrix to few multiprocessors, each with all the rows.
    """
    groups, rows = dy.shape[:2]
    a, b = (t.unflatten(1, (parts, rows // parts)).flatten(0, 1) for t in (dy, x))
    return torch.bmm(a.transpose(1, 2), b).unflatten(0, (groups, parts)).sum(1, dtype=_wide(dy)[0])


def run_stage(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Every piece of a layer goes through here, for tools.training.check to see."""
    return function(*arguments)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor | None, norm: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor,
        x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, seqlen, width = residual.shape
        rows, inner, states = batch * seqlen, out_proj.shape[1], A.shape[1]
        total, normed, scale = run_stage("norm forward", add_norm, residual, update, norm, eps, in_proj.dtype)
        normed = normed.view(rows, width)
        xz = run_stage("in_proj forward", torch.mm, normed, in_proj.t())
        x = xz.view(batch, seqlen, 2 * inner)[..., :inner]
        u = run_stage("conv forward", conv, x, conv_weight, conv_bias)
        x_dbl = run_stage("x_proj forward", torch.bmm, u.view(2, rows, inner), x_proj.transpose(1, 2))
        d, bc = run_stage("delta forward", delta, x_dbl, dt_weight, dt_bias, states)
        y, kept = run_stage("scan forward", scan, u, d, bc, A, D, any(ctx.needs_input_grad))
        out = run_stage("gate forward", gate, y.view(2, rows, inner), xz[:, inner:])
        ctx.save_for_backward(
            total, scale, normed, xz, u, x_dbl, d, bc, y, kept, out,
            norm, in_proj, conv_weight, conv_bias, x_proj, dt_weight, A, D, out_proj,
        )  # fmt: skip
        ctx.added = update is not None
        if update is None:
            total = residual.view_as(residual)
        return total, run_stage("out_proj forward", torch.mm, out, out_proj.t()).view(batch, seqlen, width)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dtotal: Tensor, dupdate: Tensor) -> tuple[Tensor | None, ...]:
        (
            total, scale, normed, xz, u, x_dbl, d, bc, y, kept, out,
            norm, in_proj, conv_weight, conv_bias, x_proj, dt_weight, A, D, out_proj,
        ) = ctx.saved_tensors  # fmt: skip
        batch, seqlen, width = total.shape
        rows, inner, states = batch * seqlen, out_proj.shape[1], A.shape[1]
        rank = dt_weight.shape[2]
        parts = min(32, batch & -batch)
        dupdate = dupdate.contiguous().view(rows, width)
        dtotal = dtotal.contiguous()
        dout = run_stage("out_proj dx", torch.mm, dupdate, out_proj)
        dout_proj = run_stage("out_proj dw", weight_gradient, dupdate[None], out[None], parts)[0]
        dxz = torch.empty_like(xz)
        dy = run_stage("gate backward", gate_backward, y.view(2, rows, inner), xz[:, inner:], dout, dxz[:, inner:])
        du, ddelta, bc_parts, dA, dD, dt_bias = run_stage("scan backward", scan_backward, u, d, bc, A, D, kept, dy)
        du, ddelta = du.view(2, rows, inner), ddelta.view(2, rows, inner)
        dx_dbl = run_stage("delta backward", delta_backward, ddelta, dt_weight, bc_parts, x_dbl.shape[2])
        dt = x_dbl[..., 2 * states : 2 * states + rank]
        ddt_weight = run_stage("dt_proj dw", weight_gradient, ddelta, dt, parts)
        dx_proj = run_stage("x_proj dw", weight_gradient, dx_dbl, u.view(2, rows, inner), parts)
        du = run_stage("x_proj dx", torch.Tensor.baddbmm_, du, dx_dbl, x_proj)
        x, dx = (t.view(batch, seqlen, 2 * inner)[..., :inner] for t in (xz, dxz))
        dconv_weight, dconv_bias = run_stage("conv backward", conv_backward, x, conv_weight, conv_bias, du, dx)
        dnormed = run_stage("in_proj dx", torch.mm, dxz, in_proj)
        din_proj = run_stage("in_proj dw", weight_gradient, dxz[None], normed[None], parts)[0]
        dresidual, dupdate, dnorm = run_stage("norm backward", add_norm_backward, total, scale, norm, dnormed, dtotal, ctx.added)
        gradients = (dnorm, din_proj, dconv_weight, dconv_bias, dx_proj, ddt_weight, dt_bias, dA, dD, dout_proj)
        like = (norm, in_proj, conv_weight, conv_bias, x_proj, dt_weight, D, A, D, out_proj)
        return (
            dresidual, dupdate.view(batch, seqlen, width) if ctx.added else None,
            *(g.to(t.dtype) for g, t in zip(gradients, like, strict=True)), None,
        )  # fmt: skip


def pack_x_proj(x_proj: Tensor, rank: int) -> Tensor:
    """Rows dt, B, C (as published) -> B, C, dt and zeros up to a multiple of 8: rows of x_dbl then begin at 16 bytes, which fast products want."""
    rows = x_proj.shape[-2]
    padding = x_proj.new_zeros(*x_proj.shape[:-2], -rows % 8, x_proj.shape[-1])
    return torch.cat([x_proj[..., rank:, :], x_proj[..., :rank, :], padding], -2)


def layer(
    residual: Tensor, update: Tensor | None, norm: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Vim layer of both directions: residual + update, and what the layer adds to it.

    Args:
        residual: (batch, seqlen, d_model), float32 (or wider), contiguous; update: the layer before's, in the type of the matrices.
        in_proj, x_proj, dt_weight, out_proj: matrices, whose type is that of all activations; x_proj from `pack_x_proj`.
        A: (2, d_state, d_inner), contiguous: the transpose of the published one.
    """
    found: tuple[Tensor, Tensor] = _Layer.apply(
        residual, update, norm, in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj, eps
    )
    return found
