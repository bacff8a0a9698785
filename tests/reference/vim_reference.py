"""Vision Mamba's forward pass in numpy float64, transcribed literally.

Channel-first scan and explicit flips, as published (Zhu et al. 2024, with the class token in
the middle and the sum of the two directions halved), so that its structure differs from the
token-major, flip-free model under test. Takes a dict of arrays with the official names.

``trap`` builds one known mistake into the pass; a parity test that does not fail against it
guards nothing. ``TRAPS`` lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .scan_reference import selective_scan, silu, softplus

Array = NDArray[np.float64]

TRAPS: dict[str, str] = {
    "no_backward": "backward direction and halving dropped, as the official slow path does",
    "cls_not_middle": "class token first instead of in the middle",
    "cls_last": "class token last",
    "pos_embed_class_slot": "slot 0 of pos_embed taken for the class token",
    "pos_embed_before_insertion": "pos_embed added to the patches alone, class slot skipped",
    "no_final_add": "final norm of the residual alone: the last mixer's output is lost",
    "final_hidden_only": "final norm of the last mixer's output alone",
    "norm_before_add": "each layer norms the residual before adding the last mixer's output",
    "no_halving": "sum of the two directions not halved",
    "b_mixed": "backward direction runs with all of the forward parameters",
    "b_mixed_A": "backward direction with the forward A",
    "b_mixed_D": "backward direction with the forward D",
    "b_mixed_conv": "backward direction with the forward convolution",
    "b_mixed_x_proj": "backward direction with the forward x_proj",
    "b_mixed_dt_weight": "backward direction with the forward dt_proj weight",
    "b_mixed_dt_bias": "backward direction with the forward dt_proj bias",
    "directions_swapped": "the two parameter sets exchanged",
    "z_order": "first half of in_proj taken for z",
    "z_not_flipped": "z not reversed for the backward direction",
    "no_z": "gate left out",
    "conv_taps_reversed": "convolution instead of cross-correlation",
    "conv_before_flip": "backward direction convolves causally before the reversal",
    "no_conv_bias": "convolution without its bias",
    "no_conv_silu": "no SiLU after the convolution",
    "swap_BC": "B and C exchanged",
    "dt_last_in_x_proj": "x_proj rows read as B, C, dt",
    "dt_bias_twice": "dt bias added in the projection and again in the scan",
    "no_dt_bias": "dt bias left out",
    "softplus_before_bias": "softplus before the bias",
    "no_softplus": "no softplus",
    "no_D": "skip term D u left out",
    "exact_zoh_B": "exact zero-order hold for B instead of delta * B",
    "flip_patches_only": "class token kept out of the reversal's place in the scan",
    "patches_column_major": "patches flattened column by column",
    "eps_1e-6": "norm eps 1e-6 instead of 1e-5",
    "no_norm_weight": "layer norms without their weight",
    "no_norm_f_weight": "final norm without its weight",
    "no_patch_bias": "patch embedding without its bias",
    "mean_pooling": "mean of all tokens instead of the class token",
    "mean_pooling_patches": "mean of the patch tokens instead of the class token",
    "no_head_bias": "head without its bias",
}


def embed_patches(image: Array, weight: Array, bias: Array, stride: int) -> Array:
    """Cut the image into patches, project each: (batch, grid_h, grid_w, d_model)."""
    kernel = weight.shape[-1]
    height, width = image.shape[-2:]
    grid_h, grid_w = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    out = np.full((image.shape[0], grid_h, grid_w, weight.shape[0]), np.nan)
    for i in range(grid_h):
        for j in range(grid_w):
            top, left = i * stride, j * stride
            patch = image[:, :, top : top + kernel, left : left + kernel]
            out[:, i, j] = np.einsum("bcij,dcij->bd", patch, weight) + bias
    return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def causal_conv(x: Array, weight: Array, bias: Array | None) -> Array:
    """Depthwise: the last tap multiplies the current token. x (batch, E, L), weight (E, K)."""
    taps, seqlen = weight.shape[1], x.shape[2]
    padded = np.concatenate([np.zeros((*x.shape[:2], taps - 1)), x], axis=2)
    out = np.zeros_like(x)
    for tap in range(taps):
        out += weight[None, :, tap, None] * padded[:, :, tap : tap + seqlen]
    return out if bias is None else out + bias[None, :, None]


def scan_direction(params: Mapping[str, Array], mixer: str, x: Array, z: Array, backward: bool, trap: str | None) -> Array:
    """One direction on x, z (batch, E, L), already in the order this direction reads."""

    def get(stem: str, suffix: str, mixed_by: str) -> Array:
        own = backward
        if trap == "directions_swapped":
            own = not backward
        elif trap in ("b_mixed", mixed_by):
            own = False
        if stem == "A":
            return params[mixer + ("A_b_log" if own else "A_log")]
        return params[mixer + stem + ("_b" if own else "") + suffix]

    conv_weight = get("conv1d", ".weight", "b_mixed_conv")[:, 0, :]
    conv_bias: Array | None = get("conv1d", ".bias", "b_mixed_conv")
    x_proj = get("x_proj", ".weight", "b_mixed_x_proj")
    dt_weight = get("dt_proj", ".weight", "b_mixed_dt_weight")
    dt_bias: Array | None = get("dt_proj", ".bias", "b_mixed_dt_bias")
    A = -np.exp(get("A", "", "b_mixed_A"))
    D: Array | None = get("D", "", "b_mixed_D")

    if trap == "conv_taps_reversed":
        conv_weight = conv_weight[:, ::-1]
    if trap == "no_conv_bias":
        conv_bias = None
    if trap == "conv_before_flip" and backward:
        u = causal_conv(x[:, :, ::-1], conv_weight, conv_bias)[:, :, ::-1]
    else:
        u = causal_conv(x, conv_weight, conv_bias)
    if trap != "no_conv_silu":
        u = silu(u)

    rank, d_state = dt_weight.shape[1], A.shape[1]
    x_dbl = np.einsum("re,bel->brl", x_proj, u)
    dt, B, C = np.split(x_dbl, [rank, rank + d_state], axis=1)
    if trap == "dt_last_in_x_proj":
        B, C, dt = np.split(x_dbl, [d_state, 2 * d_state], axis=1)
    if trap == "swap_BC":
        B, C = C, B
    delta = np.einsum("er,brl->bel", dt_weight, dt)
    use_softplus = trap != "no_softplus"
    if trap == "dt_bias_twice":
        delta = delta + dt_bias[None, :, None]
    if trap == "no_dt_bias":
        dt_bias = None
    if trap == "softplus_before_bias":
        delta, use_softplus = softplus(delta), False
    if trap == "no_D":
        D = None
    if trap == "exact_zoh_B":
        # B (exp(d A) - 1) / A depends on the channel: fold it into u with one group per channel.
        step = softplus(delta + dt_bias[None, :, None])[:, :, None]
        dA = step * A[None, :, :, None]
        B = B[:, None] * np.expm1(dA) / dA
    gate = None if trap == "no_z" else z
    y, _ = selective_scan(u, delta, A, B, C, D, gate, dt_bias, use_softplus)
    return y


def mix(params: Mapping[str, Array], mixer: str, hidden: Array, trap: str | None, cls: int) -> Array:
    """The bidirectional mixer: (batch, L, d_model) to (batch, L, d_model)."""
    xz = np.einsum("ed,bld->bel", params[mixer + "in_proj.weight"], hidden)
    x, z = np.split(xz, 2, axis=1)
    if trap == "z_order":
        x, z = z, x
    y = scan_direction(params, mixer, x, z, False, trap)
    if trap != "no_backward":
        order = np.arange(hidden.shape[1])[::-1]
        if trap == "flip_patches_only":
            # Reverse the patches around a class token that keeps its place.
            patches = np.delete(np.arange(hidden.shape[1]), cls)
            order = np.insert(patches[::-1], cls, cls)
        z_b = z if trap == "z_not_flipped" else z[:, :, order]
        y_b = scan_direction(params, mixer, x[:, :, order], z_b, True, trap)
        y = y + y_b[:, :, np.argsort(order)]
        if trap != "no_halving":
            y = y / 2
    return np.einsum("de,bel->bld", params[mixer + "out_proj.weight"], y)


def vim_reference(
    params: Mapping[str, Array],
    image: Array,
    *,
    stride: int = 16,
    trap: str | None = None,
    trace: list[Array] | None = None,
) -> Array:
    """Classify images with the official forward pass.

    Args:
        params: official name -> array; sizes and depth are read from the shapes.
        image: (batch, 3, height, width), normalised.
        stride: of the patch embedding, not visible in the parameters.
        trap: a key of ``TRAPS``.
        trace: gets residual + hidden as each layer enters its norm, then before the final norm.

    Returns:
        (batch, num_classes) logits, float64.
    """
    if trap is not None and trap not in TRAPS:
        raise ValueError(f"unknown trap {trap!r}; known: {', '.join(TRAPS)}")
    params = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    image = np.asarray(image, dtype=np.float64)
    eps = 1e-6 if trap == "eps_1e-6" else 1e-5
    depth = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("layers."))

    bias = params["patch_embed.proj.bias"]
    if trap == "no_patch_bias":
        bias = np.zeros_like(bias)
    grid = embed_patches(image, params["patch_embed.proj.weight"], bias, stride)
    if trap == "patches_column_major":
        grid = grid.transpose(0, 2, 1, 3)
    batch, d_model = grid.shape[0], grid.shape[-1]
    patches = grid.reshape(batch, -1, d_model)
    count = patches.shape[1]
    cls = {"cls_not_middle": 0, "cls_last": count}.get(trap or "", count // 2)
    cls_token = np.broadcast_to(params["cls_token"], (batch, 1, d_model))
    tokens = np.concatenate([patches[:, :cls], cls_token, patches[:, cls:]], axis=1)
    pos_embed = params["pos_embed"][0]
    if pos_embed.shape[0] != count + 1:
        raise ValueError(f"pos_embed has {pos_embed.shape[0]} slots, the image {count} patches + 1")
    if trap == "pos_embed_class_slot":
        pos_embed = np.insert(pos_embed[1:], cls, pos_embed[0], axis=0)
    elif trap == "pos_embed_before_insertion":
        pos_embed = np.insert(pos_embed[:-1], cls, 0.0, axis=0)
    tokens = tokens + pos_embed

    hidden, residual = tokens, None
    for index in range(depth):
        layer = f"layers.{index}."
        before = residual
        residual = hidden if residual is None else residual + hidden
        if trace is not None:
            trace.append(residual)
        weight = params[layer + "norm.weight"]
        if trap == "no_norm_weight":
            weight = np.ones_like(weight)
        source = before if trap == "norm_before_add" and before is not None else residual
        hidden = mix(params, layer + "mixer.", rms_norm(source, weight, eps), trap, cls)
    assert residual is not None
    final = residual + hidden
    if trace is not None:
        trace.append(final)
    if trap == "no_final_add":
        final = residual
    elif trap == "final_hidden_only":
        final = hidden
    weight = params["norm_f.weight"]
    if trap == "no_norm_f_weight":
        weight = np.ones_like(weight)
    features = rms_norm(final, weight, eps)
    feature = features[:, cls]
    if trap == "mean_pooling":
        feature = features.mean(axis=1)
    elif trap == "mean_pooling_patches":
        feature = np.delete(features, cls, axis=1).mean(axis=1)
    logits = np.einsum("kd,bd->bk", params["head.weight"], feature)
    return logits if trap == "no_head_bias" else logits + params["head.bias"]
