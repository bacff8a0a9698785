"""Weights like a trained model's, so that every parameter has a say in the logits.

A fresh Vision Mamba has norm weights of one, zero biases, equal A, D and dt bias in both
directions: half of the mistakes worth finding leave its logits unchanged.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    noise = rng.standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if name.endswith(("norm.weight", "norm_f.weight")):
        return 1.0 + 0.3 * noise
    if leaf in ("A_log", "A_b_log"):
        return np.log(np.arange(1, shape[1] + 1)) + 0.3 * noise
    if leaf in ("D", "D_b"):
        return 1.0 + 0.5 * noise
    if leaf in ("cls_token", "pos_embed"):
        return 0.5 * noise
    if "dt_proj" in name and leaf == "bias":
        # softplus of it is a step between 0.001 and 0.1, then spread: some steps near 1.
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
        return step + np.log(-np.expm1(-step)) + noise
    if leaf == "bias":
        return 0.2 * noise
    if "conv1d" in name:
        return noise / np.sqrt(shape[-1])
    gain = 2.0 if "x_proj" in name else 1.0  # gives the scan its share beside D u
    return gain * noise / np.sqrt(np.prod(shape[1:]))  # projections keep the variance


def trained_like_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Overwrite every parameter with seeded values like a trained model's; return the model.

    A parameter's values depend on its official name, its shape and the seed alone (drawn in
    float64 and rounded to float32, so that the float32 and the float64 model are the same).
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = _draw(name, tuple(parameter.shape), rng).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    return model


def as_arrays(model: torch.nn.Module) -> dict[str, NDArray[np.float64]]:
    """The state dict as float64 arrays, for ``vim_reference``."""
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
