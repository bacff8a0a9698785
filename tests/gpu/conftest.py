"""Fixtures of the GPU tests: portable models exported once (in parallel, before anything is timed), engines built through one
process and one timing cache.

On a GPU machine, which tests/gpu.sh says by STM_GPU=1, a skip is a failure.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

MODELS = ("vim-t", "vim-s", "vim-b")
RATES = (0.0, 0.2, 0.4)
PRECISIONS = ("fp32", "fp16", "bf16")
SIZES = ((224, 224), (384, 384), (192, 256))


def has_gpu():
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in str(item.fspath):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def needs_gpu():
    if os.environ.get("STM_GPU") != "1":
        pytest.skip("needs an NVIDIA GPU, TensorRT and our plugin: run tests/gpu.sh on such a machine")
    assert has_gpu(), "STM_GPU=1, but libcuda finds no GPU"


def cases():
    """(model, rate, size): all models and rates at 224, all models and one rate at the other sizes."""
    rows = [(model, rate, SIZES[0]) for model in MODELS for rate in RATES]
    rows += [(model, 0.2, size) for model in MODELS for size in SIZES[1:]]
    models = os.environ.get("STM_GPU_MODELS", " ".join(MODELS)).split()  # tests/gpu.sh spreads models and rates over processes
    rates = [float(rate) for rate in os.environ.get("STM_GPU_RATES", " ".join(map(str, RATES))).split()]
    return [row for row in rows if row[0] in models and row[1] in rates]


def written_once(path, make):
    """make() -> bytes, written to `path` unless another process has done so."""
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_bytes(make())
        os.replace(aside, path)
    return str(path)


def _export(folder, model, rate, size):
    import torch

    import stm
    from exporter.onnx_export import export_onnx

    torch.set_num_threads(2)
    plan = stm.make_plan(stm.model_config(model, size), rate=rate)
    return written_once(
        Path(folder) / f"{model}-{rate}-{size[0]}x{size[1]}.onnx",
        lambda: export_onnx(stm.create_model(model, plan=plan, image_size=size)).SerializeToString(),
    )


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="session")
def portable_folder(work):
    """Where portable models lie: STM_GPU_PORTABLES, which the processes of tests/gpu.sh share, or this session's own."""
    folder = Path(os.environ.get("STM_GPU_PORTABLES") or work)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def portables(portable_folder):
    """portables(case) -> portable ONNX file; the cases of this process are exported in parallel at the start."""
    with ProcessPoolExecutor(min(8, len(cases())), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {case: pool.submit(_export, str(portable_folder), *case) for case in cases()}
        made = {case: Path(future.result()) for case, future in futures.items()}
    return made.__getitem__


@pytest.fixture(scope="session")
def builder(work, portables):
    """build(case, precision, **options) -> (engine, lowered, BuildInfo, blob); built once each."""
    import onnx

    from exporter.engine import BatchProfile, BuildOptions, build_engine, deserialize, lower_for_engine, process

    made = {}

    def build(case, precision, batch=(1, 8, 64), **options):
        key = (case, precision, batch, tuple(sorted(options.items())))
        if key not in made:
            chosen = BuildOptions(batch=BatchProfile(*batch), timing_cache=work / "timing.cache", **({"opt_level": 1} | options))
            lowered = lower_for_engine(onnx.load(str(portables(case))), precision, chosen)
            blob, info = build_engine(lowered, chosen)
            made[key] = (deserialize(process(), blob), lowered, info, blob, chosen)
        return made[key]

    return build


@pytest.fixture(scope="session")
def torch_model():
    """(model, rate, size) -> the reference on the GPU, float32, TF32 off."""
    import stm

    kept = {}

    def get(case):
        model, rate, size = case
        if (model, size) not in kept:
            kept.clear()
            kept[(model, size)] = stm.create_model(model, image_size=size).cuda()
        base = kept[(model, size)]
        return stm.with_plan(base, stm.make_plan(base.config, rate=rate))

    return get


@pytest.fixture(scope="session")
def record():
    """record(kind, **row): rows of the tables that tests/gpu.sh prints last, written at once."""

    def add(kind, **row):
        row = {"kind": kind, **{k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in row.items()}}
        if folder := os.environ.get("STM_GPU_OUT"):
            with open(Path(folder) / "rows.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return add
