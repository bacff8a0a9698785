"""Methods that look at the image as engines: ViM-Ti, fp16, each on our nodes, and right. `stm bench accuracy --latency` times them.

The rule for right: scores that nearly tie may come out in another order in half precision, and such an image goes another way, in
PyTorch's half precision, too: up to one in seven. So an engine passes if the median image keeps the fp16 tolerance, the 90 % quantile of the
images' errors is within it or within twice PyTorch's own fp16 model's, and not more images leave it than of that model: not more beyond
chance, by McNemar's exact test on the images that only one of the two takes another way. Where one in ten goes another way the quantile is
a matter of chance; 512 images make it a smaller one.
"""

import copy
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from exporter.images import varied_inputs
from exporter.parity import compare_logits
from exporter.passes.tensorrt import plugin_nodes
from exporter.runtimes.pytorch import TorchRunner
from exporter.runtimes.trt import tensorrt_runner
from exporter.tolerances import tolerance
from stm.reduction import list_reductions

from .conftest import written_once
from .test_engine_parity import logits

MODEL, PRESET, IMAGES, BATCHES, CHANCE = "vim-t", "tl-792", 512, (1, 64, 128), 0.01
PART, PARTS = map(int, os.environ.get("STM_GPU_REDUCTIONS_PART", "0/1").split("/"))
METHODS = os.environ.get("STM_GPU_REDUCTIONS", " ".join(list_reductions())).split()[PART::PARTS]


def _export(folder, method):
    import torch

    import stm
    from exporter.onnx_export import export_onnx
    from stm.reduction import parse_reduction, with_reduction

    torch.set_num_threads(2)
    model = stm.create_model(MODEL)
    return written_once(
        Path(folder) / f"{MODEL}-{method}-{PRESET}.onnx",
        lambda: export_onnx(with_reduction(model, parse_reduction(f"{method}:{PRESET}", model.config))).SerializeToString(),
    )


@pytest.fixture(scope="module")
def exported(portable_folder):
    """exported(method) -> portable ONNX file; all are exported in parallel at the start."""
    with ProcessPoolExecutor(min(len(METHODS), max(1, (os.cpu_count() or 2) // 2)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {method: pool.submit(_export, str(portable_folder), method) for method in METHODS}
        made = {method: Path(future.result()) for method, future in futures.items()}
    return made.__getitem__


@pytest.mark.parametrize("method", METHODS)
def test_engine_of_a_method(method, exported, work, record):
    import onnx

    import stm
    from exporter.engine import BatchProfile, BuildOptions, build_engine, deserialize, lower_for_engine, process
    from stm.reduction import parse_reduction, with_reduction

    options = BuildOptions(batch=BatchProfile(*BATCHES), timing_cache=work / "timing.cache", opt_level=1)
    lowered = lower_for_engine(onnx.load(str(exported(method))), "fp16", options)
    blob, info = build_engine(lowered, options)
    assert sorted(info.plugin_layers) == sorted(plugin_nodes(lowered))
    engine = deserialize(process(), blob)

    base = stm.create_model(MODEL).cuda()
    model = with_reduction(base, parse_reduction(f"{method}:{PRESET}", base.config).cuda())
    config = model.config
    feeds = list(varied_inputs(config.image_size, config.mean, config.std, IMAGES).reshape(-1, 64, 3, *config.image_size))
    want = logits(TorchRunner(model), feeds)
    got = logits(tensorrt_runner(engine), feeds)
    half = logits(TorchRunner(copy.deepcopy(model).half()), feeds)
    allowed = tolerance("fp16")
    spread = np.concatenate(want).std()
    ours, theirs = (np.abs(np.concatenate(x).astype(np.float64) - np.concatenate(want)).max(1) / spread for x in (got, half))
    metrics, failures = compare_logits(got, want, allowed)
    quantiles = {f"q{int(100 * q)}": (float(np.quantile(ours, q)), float(np.quantile(theirs, q))) for q in (0.5, 0.9)}
    away, torchs_away = (errors > allowed.max_error for errors in (ours, theirs))
    only_ours, only_torchs = int((away & ~torchs_away).sum()), int((torchs_away & ~away).sum())
    chance = sum(math.comb(only_ours + only_torchs, k) for k in range(only_ours, only_ours + only_torchs + 1)) / 2 ** (only_ours + only_torchs)
    row = {"method": method, "preset": PRESET, "seconds": info.seconds, "metrics": metrics, "within_tolerance": not failures}
    record("reduction", **row, quantiles=quantiles, away=float(away.mean()), torchs_away=float(torchs_away.mean()), chance=chance)
    assert np.isfinite(np.concatenate(got)).all()
    assert quantiles["q50"][0] <= allowed.max_error, failures
    if failures:
        for name, (mine, torchs) in quantiles.items():
            assert mine <= max(2 * torchs, allowed.max_error), f"{name}: {mine:.3g}, PyTorch's fp16 {torchs:.3g}; {failures}"
    assert chance >= CHANCE, f"{away.mean():.1%} of the images went another way, {torchs_away.mean():.1%} in PyTorch's fp16"
