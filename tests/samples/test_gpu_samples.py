"""The samples on a GPU, against saved reference outputs. tests/gpu.sh sets:

STM_GPU_ENGINE     an engine made by stm-export, its .json beside it
STM_GPU_REFERENCE  folder with its inputs.json and outputs.json (Polygraphy's format)
STM_GPU_BUILD      CMake build folder of this checkout
and where TensorRT is not on LD_LIBRARY_PATH: TensorRT_LIBRARY_DIR.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.images import DATA, preprocess
from exporter.parity import compare_logits, load_reference
from exporter.tolerances import TOLERANCES

# STM_GPU=1 is tests/gpu.sh: there nothing may skip, least of all because torch cannot use the GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(os.environ.get("STM_GPU") != "1", reason="needs a GPU, TensorRT and our plugin: run tests/gpu.sh")]

SAMPLES = Path(__file__).parents[2] / "samples"
GRAPH = pytest.mark.parametrize("graph", [[], ["--graph"]], ids=["plain", "graph"])
PHOTO = DATA / "photos" / "chelsea.jpg"


def setting(name: str) -> Path:
    if not os.environ.get(name):
        pytest.fail(f"{name} is not set: run tests/gpu.sh")  # a gpu test may not skip on a GPU machine
    return Path(os.environ[name]).resolve()


def checked(*command) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran


@pytest.fixture(scope="module")
def engine() -> Path:
    return setting("STM_GPU_ENGINE")


@pytest.fixture(scope="module")
def meta(engine) -> dict:
    return json.loads(Path(f"{engine}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference(meta) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, logits), those that the engine's batch range takes."""
    batch = meta["batch"]
    pairs = [pair for pair in zip(*load_reference(setting("STM_GPU_REFERENCE")), strict=True) if batch["min"] <= len(pair[0]) <= batch["max"]]
    assert pairs, f"no reference input has a batch size from {batch['min']} to {batch['max']}"
    return pairs


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    checked("cmake", "--install", setting("STM_GPU_BUILD"), "--prefix", prefix)
    return prefix


@pytest.fixture(scope="module")
def plugin(installed) -> Path:
    (found,) = (path for path in installed.glob("lib*/libstm_trt*.so") if not path.stem.endswith("_static"))
    return found


@pytest.fixture(scope="module")
def classify(installed, tmp_path_factory) -> Path:
    """samples/cpp, built as its README says; TensorRT's headers and the CUDA runtime are those of our own build."""
    cache = dict(re.findall(r"^([\w-]+):[A-Z]+=(.*)$", (setting("STM_GPU_BUILD") / "CMakeCache.txt").read_text(), re.MULTILINE))
    options = {
        "CMAKE_PREFIX_PATH": installed,
        "TensorRT_INCLUDE_DIR": cache["TensorRT_INCLUDE_DIR"],
        "TensorRT_LIBRARY_DIR": os.environ.get("TensorRT_LIBRARY_DIR", ""),  # noqa: SIM112 (CMake's spelling)
        "CUDA_INCLUDE_DIR": cache["STM_CUDA_INCLUDE_DIRS"],
        "CUDA_RUNTIME_LIBRARY": cache["STM_CUDART_STATIC"],
    }
    build = tmp_path_factory.mktemp("classify")
    checked("cmake", "-S", SAMPLES / "cpp", "-B", build, *(f"-D{name}={value}" for name, value in options.items() if value))
    checked("cmake", "--build", build)
    return build / "classify"


@pytest.fixture(params=["cpp", "python"])
def program(request):
    """(command, how it stores an array, how it loads one)."""
    if request.param == "cpp":
        binary = request.getfixturevalue("classify")
        return [binary], ".bin", lambda path, array: array.tofile(path), lambda path: np.fromfile(path, np.float32)
    script = [sys.executable, SAMPLES / "python" / "classify_engine.py", "--plugin", request.getfixturevalue("plugin")]
    return script, ".npy", np.save, np.load


def judge(got: list[np.ndarray], want: list[np.ndarray], precision: str) -> None:
    metrics, failures = compare_logits(got, want, TOLERANCES[precision])
    assert not failures, f"{failures}\n{metrics}"


@GRAPH
def test_logits_are_the_references(program, engine, meta, reference, tmp_path, graph):
    command, suffix, save, load = program
    got = []
    for images, want in reference:
        save(tmp_path / f"images{suffix}", np.ascontiguousarray(images, dtype=np.float32))
        checked(*command, engine, "--input", tmp_path / f"images{suffix}", "--dump", tmp_path / f"logits{suffix}", *graph)
        got.append(load(tmp_path / f"logits{suffix}").reshape(want.shape))
    judge(got, [want for _, want in reference], meta["precision"])


@GRAPH
def test_image_to_top_five(program, engine, meta, tmp_path, graph):
    command, suffix, save, load = program
    image = Image.open(PHOTO).convert("RGB")
    image.save(tmp_path / "cat.ppm")
    batch = min(3, meta["batch"]["max"])
    ran = checked(*command, engine, tmp_path / "cat.ppm", "--batch", batch, "--benchmark", 20, "--dump", tmp_path / f"logits{suffix}", *graph)
    *top, latency = ran.stdout.splitlines()
    assert len(top) == min(5, meta["num_classes"])
    assert all(re.fullmatch(r" *\d+\.\d\d%  .+", line) for line in top)
    assert 0 < float(re.match(r"latency: median ([\d.]+) ms", latency)[1]) < 1000

    # The same engine, fed with the exporter's preprocessing.
    logits = load(tmp_path / f"logits{suffix}").reshape(batch, -1)
    normal = meta["normalization"]
    images = preprocess(image, tuple(meta["image_size"]), normal["mean"], normal["std"], normal["crop_ratio"])
    save(tmp_path / f"images{suffix}", np.stack([images] * batch))
    checked(*command, engine, "--input", tmp_path / f"images{suffix}", "--dump", tmp_path / f"again{suffix}", *graph)
    again = load(tmp_path / f"again{suffix}").reshape(batch, -1)
    assert np.abs(logits - again).max() <= 0.05 * again.std()
    assert logits[0].argmax() == again[0].argmax()


def test_batch_out_of_range_is_refused(classify, engine, meta, tmp_path):
    Image.open(PHOTO).save(tmp_path / "cat.ppm")
    too_many = meta["batch"]["max"] + 1
    ran = subprocess.run([classify, engine, tmp_path / "cat.ppm", "--batch", str(too_many)], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"batch is {too_many}, the engine takes {meta['batch']['min']} to {meta['batch']['max']}" in ran.stderr


@GRAPH
def test_a_larger_batch_runs_in_pieces(classify, engine, meta, tmp_path, graph):
    Image.open(PHOTO).save(tmp_path / "cat.ppm")
    for batch in (meta["batch"]["max"], 3 * meta["batch"]["max"]):
        checked(classify, engine, tmp_path / "cat.ppm", "--batch", batch, "--dump", tmp_path / f"{batch}.bin", *graph)
    whole, pieces = (np.fromfile(tmp_path / f"{n * meta['batch']['max']}.bin", np.float32).reshape(-1, meta["num_classes"]) for n in (1, 3))
    assert np.array_equal(np.concatenate([whole] * 3), pieces)


def test_damaged_engine_is_refused(classify, engine, tmp_path):
    Image.open(PHOTO).save(tmp_path / "cat.ppm")
    (tmp_path / "cut.engine").write_bytes(engine.read_bytes()[:10_000])
    (tmp_path / "cut.engine.json").write_bytes(Path(f"{engine}.json").read_bytes())
    ran = subprocess.run([classify, tmp_path / "cut.engine", tmp_path / "cat.ppm"], capture_output=True, text=True, check=False)
    assert ran.returncode == 9, ran.stderr
    assert "cannot load" in ran.stderr


def test_engine_class_follows_the_current_stream(engine, meta, plugin, reference):
    """Torch tensors in and out on a side stream, with batch sizes that change, plain and as graphs: no wait in between."""
    code = f"""
import sys; sys.path.insert(0, {str(SAMPLES / "python")!r})
import torch
from classify_engine import Engine
plain, graph = (Engine({str(engine)!r}, plugin={str(plugin)!r}, use_graph=g) for g in (False, True))
images = torch.randn({2 * meta["batch"]["max"]}, 3, *plain.size, device="cuda")
torch.cuda.synchronize()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    for batch in ({meta["batch"]["min"]}, {meta["batch"]["max"]}, {2 * meta["batch"]["max"]}, {meta["batch"]["min"]}):
        for sign in (1, -1):
            some = (images[:batch] * sign).contiguous()
            first, second = plain(some), graph(some).clone()
            some.fill_(float("nan"))  # queued after both
            assert first.is_cuda and first.shape == second.shape == (batch, plain.num_classes)
            stream.synchronize()
            assert first.isfinite().all() and (first - second).abs().max() <= 0.02 * first.std(), (batch, sign)
print("ok")
"""
    assert checked(sys.executable, "-c", code).stdout.strip().endswith("ok")
