"""Parity and first latency figures of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from stm import VisionMamba
from stm.reduction import ReducedVim

from .engine import BatchProfile, BuildOptions
from .engine_bisect import first_deviation_on_engine
from .images import parity_inputs
from .parity import Floats, ParityReport, judge, tolerance_of_method
from .runtimes.trt import graph_latency_ms, tensorrt_runner


def profile_batches(batch: BatchProfile, wanted: tuple[int, ...] = (1, 5)) -> list[int]:
    """Batch sizes to verify at: those wanted, moved into the profile, without repeats."""
    return sorted({min(max(size, batch.min), batch.max) for size in wanted})


def engine_feeds(model: VisionMamba, batch: BatchProfile) -> list[Floats]:
    config = model.config
    return parity_inputs(config.image_size, config.mean, config.std, profile_batches(batch))


def verify_engine(
    engine: Any,
    lowered: onnx.ModelProto,
    model: VisionMamba,
    precision: str,
    options: BuildOptions,
    *,
    feeds: list[Floats] | None = None,
    bisect: bool = False,
    plugin_library: str | Path | None = None,
) -> ParityReport:
    """Run a loaded engine and the model in PyTorch (float32, on the GPU) on photographs and noise, and judge.

    Args:
        lowered: the graph it was built from; with `bisect` it is built once more with its inner tensors as outputs.
    """
    on_gpu = model.to("cuda")
    try:
        feeds = feeds if feeds is not None else engine_feeds(model, options.batch)
        allowed = tolerance_of_method(on_gpu, precision, feeds) if isinstance(model, ReducedVim) and precision != "fp32" else None
        report = judge(tensorrt_runner(engine), on_gpu, precision, feeds, allowed)
        if bisect and not report:
            report.bisected = True
            report.deviates_at = first_deviation_on_engine(lowered, on_gpu, feeds[:1], precision, options, plugin_library)
    finally:
        model.to("cpu")
    return report


def engine_latency(engine: Any, batch: BatchProfile, image_size: tuple[int, int]) -> list[dict[str, float]]:
    """Median latency in a CUDA graph at the profile's least, best and most images (`stm bench` measures in full)."""
    return [graph_latency_ms(engine, size, image_size) for size in sorted({batch.min, batch.opt, batch.max})]
