"""First latency figures: fp16, CUDA graph, one engine a model and rate, profile 1:64:128 (recorded; gates come with `stm bench`)."""

import pytest

from exporter.runtimes.trt import graph_latency_ms

from .conftest import cases


@pytest.mark.parametrize("case", [c for c in cases() if c[1] in (0.0, 0.2) and c[2] == (224, 224)], ids=lambda c: f"{c[0]}-{c[1]}")
def test_latency(case, builder, record):
    engine, _, info, _, _ = builder(case, "fp16", batch=(1, 64, 128), opt_level=3)
    for batch in (1, 64, 128):
        figures = graph_latency_ms(engine, batch, (224, 224), replays=20 if batch > 1 else 100)
        record("latency", model=case[0], rate=case[1], build_seconds=info.seconds, memory_mib=info.device_memory_bytes / 2**20, **figures)
        assert figures["p90_ms"] < 1.2 * figures["median_ms"]
