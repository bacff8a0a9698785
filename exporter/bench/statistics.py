"""Medians, percentiles and paired ratios of timings; numbers in, numbers out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between order statistics (numpy's default).

    Raises:
        ValueError: no values, or q outside 0..1.
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"quantile {q} of {len(values)} values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


@dataclass(frozen=True)
class Summary:
    """Milliseconds. `spread` is the 10th to 90th percentile range over the median, as in every table of ours."""

    samples: int
    p10: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        p10, p50, p90, p99 = (quantile(values, q) for q in (0.1, 0.5, 0.9, 0.99))
        return cls(len(values), p10, p50, p90, p99, min(values), max(values), (p90 - p10) / p50 if p50 else 0.0)


@dataclass(frozen=True)
class Ratio:
    """a / b of rounds timed next to each other: under 1, a is faster. `low`..`high` is the bootstrap 95 % interval of the
    median, p10 and p90 are over the rounds."""

    median: float
    p10: float
    p90: float
    low: float
    high: float
    rounds: int


def paired_ratio(a: Sequence[float], b: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Ratio of two things timed in the same rounds: dividing round by round cancels what drifts (clock, heat, other users).

    Raises:
        ValueError: different numbers of rounds, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} rounds cannot be paired")
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    draw = random.Random(seed)
    medians = [median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples)] if len(ratios) > 1 else ratios
    return Ratio(median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9), quantile(medians, 0.025), quantile(medians, 0.975), len(ratios))
