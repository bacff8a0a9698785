"""First latency figures: fp16, CUDA graph, t/s/b, batch 1, 64, 128, rates 0, 0.2, 0.4 (recorded; the gate is the next issue's)."""

import pytest

from exporter.runtimes.trt import graph_latency_ms

from .conftest import MODELS, RATES

BATCHES = (1, 64, 128)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rate", RATES)
def test_latency(model, rate, builder, record):
    case = (model, rate, (224, 224))
    for batch in BATCHES:
        engine, _, info, _, _ = builder(case, "fp16", batch=(batch, batch, batch), opt_level=3)
        figures = graph_latency_ms(engine, batch, (224, 224), replays=20 if batch > 1 else 100)
        record("latency", model=model, rate=rate, build_seconds=info.seconds, memory_mib=info.device_memory_bytes / 2**20, **figures)
        assert figures["p90_ms"] < 1.2 * figures["median_ms"]
