"""Torch custom ops of the layer besides the scan: conv + SiLU, RMSNorm, merge weights, token merge.

Each is a custom op so that torch.export leaves one node for it; each is made of plain torch ops, from which its
fake version and its gradient derive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HSP_EPSILON = 1e-12
LITERAL_EPSILON = 1e-6


def _differentiable(op: Any, plain: Callable[..., Tensor]) -> None:
    """Register fake and gradient of `op` from the plain function it runs."""
    op.register_fake(plain)

    def setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        saved = iter(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = [next(saved).detach().requires_grad_(ctx.needs_input_grad[i]) if slot is None else slot[0] for i, slot in enumerate(ctx.layout)]
            wanted = [x for i, x in enumerate(inputs) if ctx.layout[i] is None and ctx.needs_input_grad[i]]
            found = iter(torch.autograd.grad(plain(*inputs), wanted, grad, allow_unused=True))
        return tuple(next(found) if ctx.layout[i] is None and ctx.needs_input_grad[i] else None for i in range(len(inputs)))

    op.register_autograd(backward, setup_context=setup)


def _causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    taps = weight.shape[1]
    padded = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    seqlen = x.shape[1]
    y = bias.to(x.dtype).expand(x.shape)
    for tap in range(taps):
        start = taps - 1 - tap if reverse else tap
        y = y + padded[:, start : start + seqlen] * weight[:, tap].to(x.dtype)
    return F.silu(y)


@torch.library.custom_op("stm::causal_conv_silu", mutates_args=())
def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """silu of a causal depthwise convolution, token-major: y_t = silu(b + sum_j w_j x_{t - K + 1 + j}), zeros outside.

    With `reverse` "before" means later tokens, as if the sequence were flipped: x_{t + K - 1 - j}.

    Args:
        x: (batch, seqlen, d_inner).
        weight: (d_inner, K); the last tap multiplies the current token.
        bias: (d_inner).

    Returns:
        (batch, seqlen, d_inner), in x's dtype.
    """
    return _causal_conv_silu(x, weight, bias, reverse)


_differentiable(causal_conv_silu, _causal_conv_silu)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    return (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight.to(wide)).to(weight.dtype)


@torch.library.custom_op("stm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x rsqrt(mean(x^2) + epsilon) weight over the last axis, computed in float32 or wider (Zhang & Sennrich 2019).

    Args:
        x: (batch, seqlen, d_model).
        weight: (d_model); its dtype is the result's.
    """
    return _rms_norm(x, weight, epsilon)


_differentiable(rms_norm, _rms_norm)


def _merge_weights(delta: Tensor, delta_bias: Tensor, A: Tensor, B: Tensor, span: Tensor, sources: Tensor, targets: Tensor, mode: str) -> Tensor:
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    d = F.softplus(delta.to(wide) + delta_bias.to(wide))
    A, B = A.to(wide), B.to(wide)
    decay = torch.exp(torch.matmul(span.to(wide), d).unsqueeze(-1) * A)  # (batch, sources, d_inner, d_state)
    if mode == "decay":
        return decay.mean((2, 3)).clamp(0, 1)
    dp, dq = d.index_select(1, sources), d.index_select(1, targets)
    bp, bq = B.index_select(1, sources), B.index_select(1, targets)
    if mode == "hsp_literal":
        below = dq.unsqueeze(-1) * bq.unsqueeze(2)
        below = below + torch.where(below < 0, -LITERAL_EPSILON, LITERAL_EPSILON).to(wide)
        return (decay * (dp.unsqueeze(-1) * bp.unsqueeze(2)) / below).mean((2, 3))
    if mode != "hsp":
        raise ValueError(f"merge_weights: no mode {mode!r}; hsp, hsp_literal or decay")
    # <Abar Bbar_p, Bbar_q>, with Bbar = delta B of rank one: sum over n inside, over e outside
    inner = torch.matmul(decay, (bp * bq).unsqueeze(-1)).squeeze(-1)
    above = (inner * dp * dq).sum(-1)
    below = (dq * dq).sum(-1) * (bq * bq).sum(-1) + HSP_EPSILON
    return (above / below).clamp(0, 1)


@torch.library.custom_op("stm::merge_weights", mutates_args=())
def merge_weights(delta: Tensor, delta_bias: Tensor, A: Tensor, B: Tensor, span: Tensor, sources: Tensor, targets: Tensor, mode: str) -> Tensor:
    """Weights with which sources join their targets, from one direction of the layer before (STM eq. 11, DESIGN 3).

    With d = softplus(delta + delta_bias), Bbar = d B and Abar = exp(A sum of d over the span) for source p, target q:
    hsp         <Abar Bbar_p, Bbar_q> / (<Bbar_q, Bbar_q> + 1e-12) over d_inner x d_state, clamped to [0, 1]: the least
                squares solution of h* = h;
    hsp_literal mean of the quotients Abar Bbar_p / Bbar_q, the denominator moved away from 0 by 1e-6 (the text's form);
    decay       mean of Abar.

    Args:
        delta: (batch, tokens, d_inner), before bias and softplus.
        delta_bias: (d_inner). A: (d_inner, d_state). B: (batch, tokens, d_state).
        span: (sources, tokens): s_t for the tokens after p up to q in scan order, else 0.
        sources, targets: (sources), int64 positions on the tokens axis.

    Returns:
        (batch, sources), float32 or wider.
    """
    return _merge_weights(delta, delta_bias, A, B, span, sources, targets, mode)


_differentiable(merge_weights, _merge_weights)


def _merge_tokens(x: Tensor, weights: Tensor, keep: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    moved = x.index_select(1, sources) * weights.to(x.dtype).unsqueeze(-1)
    scatter = (keep.unsqueeze(1) == targets).to(x.dtype)  # (seqlen_out, sources): a product repeats bit for bit, index_add may not
    return x.index_select(1, keep) + torch.matmul(scatter, moved)


@torch.library.custom_op("stm::merge_tokens", mutates_args=())
def merge_tokens(x: Tensor, weights: Tensor, keep: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """x_q <- x_q + sum_p w_p x_p, then drop the sources; order is kept (STM eq. 11).

    Args:
        x: (batch, seqlen, d_model).
        weights: (batch or 1, sources).
        keep: (seqlen_out), int64 positions that stay, ascending.
        sources, targets: (sources), int64 positions that move, and where to.

    Returns:
        (batch, seqlen_out, d_model), in x's dtype.
    """
    return _merge_tokens(x, weights, keep, sources, targets)


_differentiable(merge_tokens, _merge_tokens)
