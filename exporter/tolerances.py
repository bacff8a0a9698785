"""How far a runtime may be from PyTorch in float32: one table, by precision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on logits against the float32 reference. Errors are in units of the logits' spread, their standard
    deviation over all images and classes; agreement is the share of images."""

    max_error: float
    mean_error: float
    cosine: float
    top1: float
    top5: float
    tensor_error: float  # for bisection: a tensor inside the network, in units of its root mean square
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 2e-5, 0.999999, 1.0, 0.99, 5e-4, "other order of float32 sums over 24 layers; measured 1e-6 to 1e-5"),
    "fp16": Tolerance(3e-2, 5e-3, 0.9998, 0.99, 0.95, 1e-1, "fp16 operands of GEMMs and activations, fp32 residual and state"),
    "bf16": Tolerance(2e-1, 4e-2, 0.995, 0.9, 0.85, 6e-1, "bf16 has 8 bits of mantissa, an eighth of fp16's precision"),
}


def tolerance(precision: str) -> Tolerance:
    return TOLERANCES[precision]
