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
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 2e-5, 0.999999, 1.0, 0.99, "other order of float32 sums over 24 layers; measured 1e-6 to 1e-5"),
}


def tolerance(precision: str) -> Tolerance:
    return TOLERANCES[precision]
