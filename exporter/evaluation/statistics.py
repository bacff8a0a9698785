"""Intervals and tests of accuracies: numbers in, numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson_interval(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share; (0, 1) for n = 0."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test: the discordant pairs are fair coin tosses if nothing changed."""
    n, fewer = lost + gained, min(lost, gained)
    if min(lost, gained) < 0:
        raise ValueError(f"{lost} lost, {gained} gained")
    if lost == gained:
        return 1.0
    total = math.lgamma(n + 1) - n * math.log(2)
    tail = math.fsum(math.exp(total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a subject minus the baseline's on the same images, as shares.

    `lost` images were right before and are wrong now, `gained` the other way round. `low`..`high` is Bonett and Price's 95 %
    interval (2012: the adjusted Wald interval of paired shares; unlike a bootstrap it is honest where no pair is discordant),
    `p` McNemar's exact two-sided test.
    """

    value: float
    low: float
    high: float
    lost: int
    gained: int
    p: float

    @classmethod
    def of(cls, lost: int, gained: int, n: int, z: float = Z95) -> PairedDifference:
        if min(lost, gained) < 0 or n < 1 or lost + gained > n:
            raise ValueError(f"{lost} lost and {gained} gained of {n}")
        up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
        half = z * math.sqrt(max(0.0, (up + down - (up - down) ** 2) / (n + 2)))
        low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
        return cls((gained - lost) / n, low, high, lost, gained, mcnemar_p(lost, gained))

    @property
    def verdict(self) -> str:
        """ "within noise" where the interval holds 0."""
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if self.low > 0 else "worse"
