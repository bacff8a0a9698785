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
    "fp32": Tolerance(
        1e-4, 2e-5, 0.999999, 1.0, 0.99, 5e-4, "other order of float32 sums over 24 layers; measured up to 1.2e-5 (max), 1.9e-6 (mean)"
    ),
    "fp16": Tolerance(
        4e-2, 6e-3, 0.9999, 0.99, 0.95, 1e-1, "fp16 GEMM operands and activations; measured up to 9.0e-3, 1.2e-3; added up in fp16: 2.7e-2, 4.4e-3"
    ),
    "bf16": Tolerance(1e-1, 1.5e-2, 0.9995, 0.97, 0.92, 3e-1, "8 bits of mantissa, an eighth of fp16's; measured up to 6.4e-2, 9.2e-3, 0.99985"),
}


def tolerance(precision: str) -> Tolerance:
    return TOLERANCES[precision]
