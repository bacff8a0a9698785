"""Selective scan: the torch custom op (token-major), its reference, and mamba_ssm's function under its own layout.

    d_t = softplus(delta_t + delta_bias),  h_t = exp(s_t d_t A) h_{t-1} + d_t B_t u_t,  y_t = C_t h_t + D u_t

(Mamba, Gu & Dao 2023, sec. 2, recurrent form; Euler step for B, as the published kernels run it). State and sums
are float32, or float64 where any input is. s_t = 1 unless `decay_scale` is given.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ShapeError

_CHUNK_ELEMENTS = 1_000_000
"""Bound on (tokens x batch x d_inner x d_state) held at once; 4 MB in float32, of which several must stay in a CPU's cache."""


def _check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], axes: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected} = ({axes})")


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _softplus_gradient(x: Tensor) -> Tensor:
    """d softplus(x) / dx with torch's threshold: the identity above 20."""
    return torch.where(x > 20, torch.ones_like(x), torch.sigmoid(x))


class _Walk:
    """Tokens in scan order, cut into chunks that bound the memory of (tokens, batch, d_inner, d_state) tensors."""

    def __init__(self, batch: int, seqlen: int, d_inner: int, d_state: int, reverse: bool) -> None:
        step = max(1, min(seqlen, _CHUNK_ELEMENTS // max(1, batch * d_inner * d_state)))
        starts = range(0, seqlen, step)
        spans = [(start, min(start + step, seqlen)) for start in starts]
        self.reverse = reverse
        self.spans = spans[::-1] if reverse else spans

    def order(self, start: int, stop: int) -> range:
        return range(stop - start - 1, -1, -1) if self.reverse else range(stop - start)


def _decay_and_input(u: Tensor, d: Tensor, A: Tensor, B: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(s d A) and d B u of one chunk, both (tokens, batch, d_inner, d_state); arguments time-major."""
    timed = d if scale is None else d * scale[:, None, None]
    decay = (timed.unsqueeze(-1) * A).exp_()
    return decay, (d * u).unsqueeze(-1) * B.unsqueeze(-2)


def _states(decay: Tensor, fed: Tensor, h: Tensor, order: range) -> Tensor:
    """Run the recurrence in place: `fed` becomes the states. Returns the last one."""
    for t in order:
        h = fed[t].addcmul_(decay[t], h)
    return h


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    decay_scale: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    wide = _wide(u, delta, A, B, C)
    batch, seqlen, d_inner = u.shape
    # Time-major, so that every token's slab is contiguous.
    u, delta, B, C = (t.to(wide).transpose(0, 1) for t in (u, delta, B, C))
    A, D = A.to(wide), D.to(wide)
    d = delta + delta_bias.to(wide)
    if softplus:
        d = F.softplus(d)
    scale = None if decay_scale is None else decay_scale.to(wide)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    h = u.new_zeros(batch, d_inner, A.shape[1])
    walk = _Walk(batch, seqlen, d_inner, A.shape[1], reverse)
    for start, stop in walk.spans:
        part = slice(start, stop)
        decay, states = _decay_and_input(u[part], d[part], A, B[part], None if scale is None else scale[part])
        h = _states(decay, states, h, walk.order(start, stop)).clone()
        y[part] = torch.matmul(states, C[part].unsqueeze(-1)).squeeze(-1)
    y.addcmul_(u, D)
    return y.transpose(0, 1).contiguous(), h


@torch.library.custom_op("stm::selective_scan", mutates_args=())
def _scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    decay_scale: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> Tensor:
    return _forward(u, delta, A, B, C, D, delta_bias, decay_scale, softplus, reverse)[0]


@_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    decay_scale: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> Tensor:
    return u.new_empty(u.shape, dtype=_wide(u, delta, A, B, C))


@torch.library.custom_op("stm::selective_scan_with_state", mutates_args=())
def _scan_state_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    decay_scale: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(u, delta, A, B, C, D, delta_bias, decay_scale, softplus, reverse)


@_scan_state_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    decay_scale: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    wide = _wide(u, delta, A, B, C)
    return u.new_empty(u.shape, dtype=wide), u.new_empty((u.shape[0], u.shape[2], A.shape[1]), dtype=wide)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y: Tensor, grad_state: Tensor | None = None):  # type: ignore[no-untyped-def]
    """Adjoint of the recurrence; the last state's gradient is ignored, as mamba_ssm does."""
    u0, delta0, A0, B0, C0, D0, bias0, scale0 = ctx.saved_tensors
    wide = _wide(u0, delta0, A0, B0, C0)
    u, delta, B, C, gy = (t.to(wide).transpose(0, 1) for t in (u0, delta0, B0, C0, grad_y))
    A, D, bias = A0.to(wide), D0.to(wide), bias0.to(wide)
    scale = None if scale0 is None else scale0.to(wide)
    raw = delta + bias
    d = F.softplus(raw) if ctx.softplus else raw
    seqlen, batch, d_inner = u.shape
    walk = _Walk(batch, seqlen, d_inner, A.shape[1], ctx.reverse)
    starts, h = [], u.new_zeros(batch, d_inner, A.shape[1])
    for start, stop in walk.spans:  # states at the chunk borders; the rest is computed again below
        starts.append(h)
        part = slice(start, stop)
        decay, states = _decay_and_input(u[part], d[part], A, B[part], None if scale is None else scale[part])
        h = _states(decay, states, h, walk.order(start, stop)).clone()
    gu, gd, gB, gC, gA = gy * D, torch.zeros_like(d), torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(A)
    carried = torch.zeros_like(h)  # gradient of the state after this chunk, already times its decay
    for (start, stop), before in zip(reversed(walk.spans), reversed(starts), strict=True):
        part = slice(start, stop)
        decay, states = _decay_and_input(u[part], d[part], A, B[part], None if scale is None else scale[part])
        order = walk.order(start, stop)
        _states(decay, states, before, order)
        gC[part] = torch.einsum("tbe,tben->tbn", gy[part], states)
        g = gy[part].unsqueeze(-1) * C[part].unsqueeze(-2)
        for t in reversed(order):
            g[t] += carried
            carried = g[t] * decay[t]
        previous = torch.empty_like(states)
        first = order[0]
        previous[first] = before
        if ctx.reverse:
            previous[:-1] = states[1:]
        else:
            previous[1:] = states[:-1]
        exponent = g * previous * decay  # gradient of s d A
        timed = exponent if scale is None else exponent * scale[part, None, None, None]
        gA += torch.einsum("tben,tbe->en", timed, d[part])
        fed = torch.einsum("tben,tbn->tbe", g, B[part])
        gd[part] = torch.einsum("tben,en->tbe", timed, A) + fed * u[part]
        gu[part] += fed * d[part]
        gB[part] = torch.einsum("tben,tbe->tbn", g, d[part] * u[part])
    if ctx.softplus:
        gd = gd * _softplus_gradient(raw)
    major = [t.transpose(0, 1) for t in (gu, gd, gB, gC)]
    return (
        major[0].to(u0.dtype),
        major[1].to(delta0.dtype),
        gA.to(A0.dtype),
        major[2].to(B0.dtype),
        major[3].to(C0.dtype),
        (gy * u).sum((0, 1)).to(D0.dtype),
        gd.sum((0, 1)).to(bias0.dtype),
        None,
        None,
        None,
    )


_scan_op.register_autograd(_backward, setup_context=_save_for_backward)
_scan_state_op.register_autograd(_backward, setup_context=_save_for_backward)


def selective_scan(
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
    """Selective scan of one direction, token-major; exported to ONNX as one node.

    The recurrence is this module's; with `z` the result is multiplied by silu(z) before the cast to u's dtype.

    Args:
        u, delta, z: (batch, seqlen, d_inner).
        A: (d_inner, d_state), real and negative.
        B, C: (batch, seqlen, d_state).
        D, delta_bias: (d_inner).
        delta_softplus: apply softplus (threshold 20) to delta + delta_bias.
        reverse: walk from the last token to the first; no flips needed.
        decay_scale: (seqlen), s_t above; no gradient.

    Returns:
        (batch, seqlen, d_inner), in u's dtype; computed in float32, or float64 if an input is.

    Raises:
        ShapeError: an extent differs; names it and both values.
    """
    op = "selective_scan"
    if u.dim() != 3 or not u.is_floating_point():
        raise ShapeError(f"{op}: u has shape {tuple(u.shape)} ({u.dtype}), expected floating point (batch, seqlen, d_inner)")
    if A.dim() != 2 or A.is_complex():
        raise ShapeError(f"{op}: A has shape {tuple(A.shape)} ({A.dtype}), expected real (d_inner, d_state)")
    batch, seqlen, d_inner = u.shape
    _check_shape(op, "delta", delta, (batch, seqlen, d_inner), "batch, seqlen, d_inner")
    _check_shape(op, "A", A, (d_inner, A.shape[1]), "d_inner, d_state")
    for name, tensor in (("B", B), ("C", C)):
        _check_shape(op, name, tensor, (batch, seqlen, A.shape[1]), "batch, seqlen, d_state")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _check_shape(op, name, vector, (d_inner,), "d_inner")
    if z is not None:
        _check_shape(op, "z", z, (batch, seqlen, d_inner), "batch, seqlen, d_inner")
    if decay_scale is not None:
        _check_shape(op, "decay_scale", decay_scale, (seqlen,), "seqlen")
    D = A.new_zeros(d_inner) if D is None else D
    delta_bias = A.new_zeros(d_inner) if delta_bias is None else delta_bias
    y: Tensor = _scan_op(u, delta, A, B, C, D, delta_bias, decay_scale, delta_softplus, reverse)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def _composite(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence from differentiable torch ops, for what the op does not cover: complex A, constant B or C.

    u, delta: (batch, d_inner, seqlen), wide; A: (d_inner, d_state); B, C: (d_inner, d_state) or (batch, d_inner, d_state, seqlen).
    """
    state = torch.promote_types(A.dtype, u.dtype)
    h = torch.zeros(u.shape[0], *A.shape, dtype=state, device=u.device)
    outputs = []
    for t in range(u.shape[2]):
        d = delta[:, :, t, None]
        h = torch.exp(d * A) * h + d * u[:, :, t, None] * (B if B.dim() == 2 else B[..., t])
        outputs.append((h * (C if C.dim() == 2 else C[..., t])).sum(-1))
    y = torch.stack(outputs, 2)
    if y.is_complex():
        y = 2 * y.real
    return (y if D is None else y + u * D.to(u.dtype)[:, None]), h


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Drop-in for `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`: same signature, layouts and dtypes.

    Runs on any device and, with real A and variable B and C, exports to ONNX as one node a group.

    Args:
        u, delta, z: (batch, dim, seqlen).
        A: (dim, dstate), real or complex.
        B, C: (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen); with complex A the variable
            forms are real with 2 seqlen entries, (real, imaginary) pairs along the last axis.
        D, delta_bias: (dim).

    Returns:
        (batch, dim, seqlen) in u's dtype; with `return_last_state` also (batch, dim, dstate), float32 (or float64,
        complex64), which carries no gradient.

    Raises:
        ShapeError: an extent differs; names it and both values.
    """
    op = "selective_scan_fn"
    if u.dim() != 3 or A.dim() != 2:
        raise ShapeError(f"{op}: u has shape {tuple(u.shape)} and A {tuple(A.shape)}, expected (batch, dim, seqlen) and (dim, dstate)")
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    _check_shape(op, "delta", delta, (batch, dim, seqlen), "batch, dim, seqlen")
    _check_shape(op, "A", A, (dim, dstate), "dim, dstate")
    if z is not None:
        _check_shape(op, "z", z, (batch, dim, seqlen), "batch, dim, seqlen")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _check_shape(op, name, vector, (dim,), "dim")
    pair = 2 if A.is_complex() else 1
    for name, matrix in (("B", B), ("C", C)):
        if matrix.dim() == 2:
            _check_shape(op, name, matrix, (dim, dstate), "dim, dstate")
        elif matrix.dim() == 3:
            _check_shape(op, name, matrix, (batch, dstate, pair * seqlen), "batch, dstate, seqlen")
        elif matrix.dim() == 4 and matrix.shape[1] and dim % matrix.shape[1] == 0:
            _check_shape(op, name, matrix, (batch, matrix.shape[1], dstate, pair * seqlen), "batch, groups, dstate, seqlen")
        else:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(matrix.shape)}, expected (dim, dstate), (batch, dstate, seqlen) or 4 axes, groups dividing dim {dim}"
            )
    if not A.is_complex() and B.dim() > 2 and C.dim() > 2:
        y, state = _grouped(u, delta, A, B, C, D, delta_bias, delta_softplus, return_last_state)
    else:
        y, state = _general(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    if not return_last_state:
        return y
    assert state is not None
    return y, state.detach()


def _grouped(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, with_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Real A, variable B and C: the custom op, once a group of consecutive channels."""
    B, C = (m if m.dim() == 4 else m.unsqueeze(1) for m in (B, C))
    groups = math.lcm(B.shape[1], C.shape[1])
    width = A.shape[0] // groups
    D = A.new_zeros(A.shape[0]) if D is None else D
    bias = A.new_zeros(A.shape[0]) if bias is None else bias
    ys, states = [], []
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        b, c = (m[:, g * m.shape[1] // groups].transpose(1, 2) for m in (B, C))
        arguments = (u[:, part].transpose(1, 2), delta[:, part].transpose(1, 2), A[part], b, c, D[part], bias[part], None, softplus, False)
        if with_state:
            y, state = _scan_state_op(*arguments)
            states.append(state)
        else:
            y = _scan_op(*arguments)
        ys.append(y.transpose(1, 2))
    y = ys[0] if groups == 1 else torch.cat(ys, 1)
    return y, (torch.cat(states, 1) if with_state else None)


def _general(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(u, delta)
    u, delta = u.to(wide), delta.to(wide)
    if bias is not None:
        delta = delta + bias.to(wide)[:, None]
    if softplus:
        delta = F.softplus(delta)

    def widen(matrix: Tensor) -> Tensor:
        if matrix.dim() == 2:
            return matrix.to(torch.promote_types(matrix.dtype, wide))
        matrix = matrix.to(wide)
        if A.is_complex():
            matrix = torch.view_as_complex(matrix.reshape(*matrix.shape[:-1], -1, 2).contiguous())
        matrix = matrix if matrix.dim() == 4 else matrix.unsqueeze(1)
        return matrix.repeat_interleave(A.shape[0] // matrix.shape[1], 1)

    return _composite(u, delta, A, widen(B), widen(C), D)


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, decay_scale: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Run the selective scan step by step, in float32 or wider; every backend is compared with this function.

    Args:
        u, delta: (batch, seqlen, d_inner); delta after bias and softplus.
        A: (d_inner, d_state), negative.
        B, C: (batch, seqlen, d_state).

    Returns:
        (batch, seqlen, d_inner), in the computing dtype.
    """
    wide = _wide(u, delta, A, B, C)
    u, delta, A, B, C = (t.to(wide) for t in (u, delta, A, B, C))
    h = torch.zeros(u.shape[0], *A.shape, dtype=wide, device=u.device)
    outputs: dict[int, Tensor] = {}
    for t in range(u.shape[1])[:: -1 if reverse else 1]:
        d = delta[:, t, :, None]
        timed = d if decay_scale is None else d * decay_scale[t]
        h = torch.exp(timed * A) * h + d * B[:, t, None] * u[:, t, :, None]
        outputs[t] = (h * C[:, t, None]).sum(-1)
    y = torch.stack([outputs[t] for t in range(u.shape[1])], 1)
    return y if D is None else y + D.to(wide) * u
