"""Selective scan in numpy, one time step after the other, in float64 or complex128.

The recurrence and argument layouts are those of ``mamba_ssm``'s published reference (Mamba,
Gu & Dao 2023, sec. 2; Euler step for B), channel-first: (batch, d_inner, seqlen).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

SOFTPLUS_THRESHOLD = 20.0  # torch's default: the identity above it


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) up to the threshold, x above it."""
    small = np.minimum(x, SOFTPLUS_THRESHOLD)  # keeps exp finite in the branch not taken
    return np.where(x > SOFTPLUS_THRESHOLD, x, np.log1p(np.exp(small)))


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow at either end."""
    decay = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1.0, decay) / (1.0 + decay)


def _per_step(name: str, value: Array, d_inner: int, is_complex: bool) -> tuple[Array, bool]:
    """Bring B or C to (batch or 1, d_inner, d_state, seqlen or 1); say whether it varies in time."""
    if value.ndim == 2:  # (d_inner, d_state), constant
        kind = np.complex128 if is_complex else np.float64
        return value.astype(kind)[None, :, :, None], False
    wide = value.astype(np.float64)
    if is_complex:  # the last axis holds (re, im) pairs: 2 seqlen
        wide = wide[..., 0::2] + 1j * wide[..., 1::2]
    if wide.ndim == 3:
        wide = wide[:, None]
    if wide.ndim != 4 or d_inner % wide.shape[1]:
        raise ValueError(f"{name} has shape {value.shape} with d_inner {d_inner}")
    return np.repeat(wide, d_inner // wide.shape[1], axis=1), True


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    decay_scale: Array | None = None,
) -> tuple[Array, Array]:
    """Run the scan and return the output and the last state.

    d = softplus(delta + delta_bias),  h_t = exp(s_t d_t A) h_{t-1} + d_t B_t u_t,  h_{-1} = 0
    y_t = sum_n C_t h_t (twice the real part if A is complex) + D u_t, times silu(z_t)

    Args:
        u, delta, z: (batch, d_inner, seqlen).
        A: (d_inner, d_state), real or complex.
        B, C: (d_inner, d_state), (batch, d_state, seqlen) or (batch, groups, d_state, seqlen);
            the last two real with 2 seqlen (re, im interleaved) if A is complex.
        D, delta_bias: (d_inner).
        decay_scale: (seqlen), s_t above; ours, not published; 1 where absent.

    Returns:
        y (batch, d_inner, seqlen) float64 and h_{seqlen-1} (batch, d_inner, d_state).
    """
    batch, d_inner, seqlen = u.shape
    is_complex = bool(np.iscomplexobj(A))
    kind = np.complex128 if is_complex else np.float64
    u = u.astype(np.float64)
    A = A.astype(kind)
    d = delta.astype(np.float64)
    if delta_bias is not None:
        d = d + delta_bias.astype(np.float64)[None, :, None]
    if delta_softplus:
        d = softplus(d)
    B_steps, B_varies = _per_step("B", B, d_inner, is_complex)
    C_steps, C_varies = _per_step("C", C, d_inner, is_complex)

    y = np.full((batch, d_inner, seqlen), np.nan)
    h = np.zeros((batch, d_inner, A.shape[1]), dtype=kind)
    for t in range(seqlen):
        d_t = d[:, :, t, None]
        s_t = 1.0 if decay_scale is None else float(decay_scale[t])
        B_t = B_steps[..., t if B_varies else 0]
        C_t = C_steps[..., t if C_varies else 0]
        h = np.exp(s_t * d_t * A) * h + d_t * B_t * u[:, :, t, None]
        out = (C_t * h).sum(axis=-1)
        y[:, :, t] = 2.0 * out.real if is_complex else out
    if D is not None:
        y = y + D.astype(np.float64)[None, :, None] * u
    if z is not None:
        y = y * silu(z.astype(np.float64))
    return y, h
