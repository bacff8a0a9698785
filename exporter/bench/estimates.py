"""What other cards would take: estimates from a profile measured on one card and the ceilings of both. Nothing here is measured.

For each module the measured time is scaled by floor(other card) / floor(this card): it stays as many times its floor as it was.
Ceilings of other cards are their data sheets' figures times what the measured card reaches of its own; MUFU is 16 operations a
clock and SM on all of them. The scan is bound by instruction issue as much as by MUFU; where an SM has half the FP32 lanes (sm_80)
the upper figure doubles the modules bound by special functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .profile import KNOWN, Ceilings, Work


@dataclass(frozen=True)
class Card:
    """A data sheet: streaming multiprocessors, boost clock in Hz, bytes a second, dense fp16 FLOP a second (fp32 sums)."""

    name: str
    sm: str
    processors: int
    hertz: float
    bytes: float
    tensor: float
    fp32_lanes: int = 128  # of a multiprocessor


# NVIDIA's data sheets. Boost clocks: cards with a low power limit (L4: 72 W) hold less under load.
MEASURED = Card("H100 SXM", "sm_90", 132, 1.98e9, 3.35e12, 989e12)
CARDS = (
    Card("A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2.039e12, 312e12, 64),
    Card("L4", "sm_89", 58, 2.04e9, 0.300e12, 121e12),
    Card("GeForce RTX 4090", "sm_89", 128, 2.52e9, 1.008e12, 165e12),
    Card("Jetson AGX Orin 64 GB", "sm_87", 16, 1.30e9, 0.2048e12, 42.5e12),
    Card("B200", "sm_100", 148, 1.965e9, 8.0e12, 2250e12),
)
_BASE = KNOWN["NVIDIA H100 80GB HBM3"]


def expected_ceilings(card: Card) -> Ceilings:
    """The card's data sheet times the share of its own that the measured H100 reaches."""
    assert _BASE.mufu and _BASE.tensor
    mufu = 16.0 * card.processors * card.hertz * (_BASE.mufu / (16.0 * MEASURED.processors * MEASURED.hertz))
    return Ceilings(card.bytes * _BASE.bytes / MEASURED.bytes, mufu, card.tensor * _BASE.tensor / MEASURED.tensor, _BASE.launch_us, "estimate")


def estimate(profile: dict[str, Any], measured_ms: float, card: Card) -> tuple[float, float] | None:
    """(low, high) milliseconds on `card` of the case of `profile`, which took `measured_ms` in a CUDA graph; None where launches
    bind what was measured (small batches): no ceiling tells those.

    Args:
        profile: one of `BenchResult.profiles`, measured on the H100 of the table.
    """
    known = [row for row in profile["modules"] if row.get("floor_us") and row.get("work")]
    if not known or profile["ceilings"].get("source") != _BASE.source:
        return None
    total = sum(row["us"] for row in profile["modules"])
    if sum(row["us"] for row in known if row["bound"] == "launch") > 0.2 * total:
        return None
    top = expected_ceilings(card)
    low = high = 0.0
    for row in known:
        here, _ = Work(**row["work"]).floor_us(_BASE)
        there, bound = Work(**row["work"]).floor_us(top)
        low += row["us"] * there / here
        high += row["us"] * there / here * (MEASURED.fp32_lanes / card.fp32_lanes if bound == "special functions" else 1)
    # What has no floor (copies, casts) moves bytes.
    rest = (total - sum(row["us"] for row in known)) * _BASE.bytes / top.bytes
    scale = measured_ms / total
    return (low + rest) * scale, (high + rest) * scale


def estimate_rows(profiles: list[dict[str, Any]], medians: dict[str, float]) -> list[list[str]]:
    """A row a case and card: case, card, estimated ms, times the measured card's.

    Args:
        medians: case as text -> the engine's median in a CUDA graph, ms.
    """
    rows = []
    for profile in profiles:
        if (measured := medians.get(profile["case"])) is None:
            continue
        for card in CARDS:
            if (found := estimate(profile, measured, card)) is None:
                continue
            low, high = found
            text = f"{low:.1f}" if high < 1.02 * low else f"{low:.1f} to {high:.1f}"
            rows.append([profile["case"], f"{card.name} ({card.sm})", text, f"{low / measured:.2f}"])
    return rows
