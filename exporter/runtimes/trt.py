"""A TensorRT engine as a Polygraphy runner (Polygraphy's own: it needs no torch), and its latency in a CUDA graph."""

from __future__ import annotations

import statistics
from typing import Any


def tensorrt_runner(engine: Any, name: str = "tensorrt") -> Any:
    """A Polygraphy TrtRunner over an engine that is already loaded."""
    from polygraphy.backend.trt import TrtRunner

    return TrtRunner(engine, name=name)


def graph_latency_ms(engine: Any, batch: int, image_size: tuple[int, int], replays: int = 50, rounds: int = 9) -> dict[str, float]:
    """Median latency of one inference inside a replayed CUDA graph, on random images that lie on the GPU.

    Each round times `replays` back-to-back replays between two CUDA events; p10 and p90 are over rounds.

    Returns:
        {"batch", "median_ms", "p10_ms", "p90_ms"}.
    """
    import torch

    context = engine.create_execution_context()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        images = torch.randn(batch, 3, *image_size, device="cuda")
        context.set_input_shape("images", tuple(images.shape))
        logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("logits", logits.data_ptr())

        def enqueue() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("the engine refused to run")

        enqueue()  # a plain run first: shape changes are handled outside the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            enqueue()
        for _ in range(5):
            graph.replay()
        times = []
        for _ in range(rounds):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record(stream)
            for _ in range(replays):
                graph.replay()
            last.record(stream)
            last.synchronize()
            times.append(first.elapsed_time(last) / replays)
    times.sort()
    return {
        "batch": batch,
        "median_ms": round(statistics.median(times), 4),
        "p10_ms": round(times[len(times) // 10], 4),
        "p90_ms": round(times[-1 - len(times) // 10], 4),
    }
