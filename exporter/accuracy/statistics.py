"""Paired bootstrap over images: the same images went through every method, so differences are taken image by image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
NOISE = "within noise"
Values = Sequence[float] | NDArray[np.floating] | NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A mean over images with its bootstrap 95 % interval (percentiles)."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a difference: "within noise" where the interval holds 0, else "higher" or "lower"."""
        if self.low <= 0 <= self.high:
            return NOISE
        return "higher" if self.low > 0 else "lower"


@functools.lru_cache(maxsize=4)
def _counts(n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, n): how often each image is drawn; the same for every method, so that intervals compare."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def bootstrap_mean(values: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of a figure an image, with the 2.5 and 97.5 % quantiles of its resampled means.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"bootstrap of values with shape {x.shape}")
    sums = _counts(x.size, resamples, seed) @ x  # exact where values are whole: a difference of 0 stays 0
    low, high = np.quantile(sums, (0.025, 0.975)) / x.size
    return Interval(float(x.mean()), float(low), float(high))


def paired_difference(a: Values, b: Values) -> Interval:
    """Mean of a - b, image by image.

    Raises:
        ValueError: different numbers of images, or none.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{x.shape} and {y.shape} cannot be paired")
    return bootstrap_mean(x - y)
