"""Sets of cases that belong together; `performance` is what docs/performance.md shows."""

from __future__ import annotations

from dataclasses import dataclass

from stm.errors import ConfigError


@dataclass(frozen=True)
class Sweep:
    """model x rates x image sizes x precisions x batches, all combinations."""

    models: tuple[str, ...]
    rates: tuple[str, ...] = ("0",)
    image_sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    precisions: tuple[str, ...] = ("fp16",)
    batches: tuple[int, ...] = (1, 128)


SUITES: dict[str, tuple[Sweep, ...]] = {
    "headline": (Sweep(("vim-t", "vim-s", "vim-b")),),
    "rate": (Sweep(("vim-s",), ("0", "stm-20", "stm-40")),),
    "resolution": (Sweep(("vim-s",), ("0", "0.2"), ((224, 224), (512, 512), (1024, 1024)), batches=(16,)),),
    "batch": (Sweep(("vim-s",), batches=(1, 8, 32, 128)),),
}
SUITES["performance"] = tuple(sweep for name in ("headline", "rate", "resolution", "batch") for sweep in SUITES[name])


def suite(name: str) -> tuple[Sweep, ...]:
    if name not in SUITES:
        raise ConfigError(f"no suite {name!r}; choose from {', '.join(SUITES)}")
    return SUITES[name]
