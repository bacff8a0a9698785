"""Clocks and the interleaved rounds: A B A B, so that drift meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Clock(Protocol):
    """Times inferences; `run` enqueues one."""

    def burst(self, run: Callable[[], object], count: int) -> float:
        """Milliseconds an inference over `count` back to back."""

    def each(self, run: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of each of `count` inferences, each begun when the one before has ended."""


class HostClock:
    """The host's clock, for what is finished when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def burst(self, run: Callable[[], object], count: int) -> float:
        start = self._now()
        for _ in range(count):
            run()
        return (self._now() - start) * 1e3 / count

    def each(self, run: Callable[[], object], count: int) -> list[float]:
        return [self.burst(run, 1) for _ in range(count)]


class CudaClock:
    """CUDA events on one stream, which is current while it runs."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def _event(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return event

    def burst(self, run: Callable[[], object], count: int) -> float:
        import torch

        first, last = self._event(), self._event()
        with torch.cuda.stream(self._stream):
            first.record(self._stream)
            for _ in range(count):
                run()
            last.record(self._stream)
        last.synchronize()
        return float(first.elapsed_time(last)) / count

    def each(self, run: Callable[[], object], count: int) -> list[float]:
        return [self.burst(run, 1) for _ in range(count)]


@dataclass
class Prepared:
    """A backend ready to run one case: `run` enqueues one inference on buffers that are there, `clock` times it.

    `logits` returns the last output as a float array on the host; `weights` says which weights made it, "" if none of ours.
    """

    run: Callable[[], object]
    clock: Clock
    device: str
    launch: str
    precision: str
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    logits: Callable[[], Any] | None = None
    weights: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    """How long to measure. A round of one backend lasts about `round_ms`; warm-up at least `warmup_ms` and two inferences."""

    rounds: int = 15
    round_ms: float = 60.0
    warmup_ms: float = 250.0
    max_burst: int = 400
    latencies: int = 20


@dataclass
class Timed:
    rounds_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    burst: int = 1


def warm_up(prepared: Prepared, method: Method) -> float:
    """Run until warm; milliseconds an inference by the last look."""
    spent = once = prepared.clock.burst(prepared.run, 1)
    runs = 1
    while runs < 2 or (spent < method.warmup_ms and runs < method.max_burst):
        count = max(1, min(method.max_burst - runs, int((method.warmup_ms - spent) / 4 / max(once, 1e-4))))
        once = prepared.clock.burst(prepared.run, count)
        spent += once * count
        runs += count
    return once


def interleave(
    prepared: Sequence[Prepared], method: Method, *, step: Callable[[], None] = lambda: None, last: Callable[[int], None] = lambda index: None
) -> list[Timed]:
    """Time all of `prepared` in the same rounds: A B C, A B C, ...

    Each turn begins with an untimed inference, because the turn before left its own data in the caches. Single inferences for
    the percentiles come after the burst of the same turn.

    Args:
        step: called after every round.
        last: called with a backend's index right after its last turn, while the GPU is still warm.
    """
    timed = []
    for one in prepared:
        once = warm_up(one, method)
        timed.append(Timed(burst=max(1, min(method.max_burst, round(method.round_ms / max(once, 1e-4))))))
    for number in range(method.rounds):
        for index, (one, found) in enumerate(zip(prepared, timed, strict=True)):
            one.clock.burst(one.run, 1)
            found.rounds_ms.append(one.clock.burst(one.run, found.burst))
            if found.burst == 1:
                found.latencies_ms.append(found.rounds_ms[-1])
            else:
                found.latencies_ms += one.clock.each(one.run, min(found.burst, method.latencies))
            if number == method.rounds - 1:
                last(index)
        step()
    return timed
