"""Progress on stderr: a bar of named steps on a terminal, nothing otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm


class Steps:
    """A bar over `total` steps; entering a step names it."""

    def __init__(self, total: int, enabled: bool = True) -> None:
        quiet = not enabled or not sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=quiet, leave=False, bar_format="{desc:<28} {bar:24} {n_fmt}/{total_fmt} [{elapsed}]", file=sys.stderr)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._bar.set_description_str(name)
        yield
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
