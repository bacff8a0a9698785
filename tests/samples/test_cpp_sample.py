"""The C++ sample without a GPU: its parts against Pillow and Python's json, and the whole program on a TensorRT that `fakes/` plays."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from exporter.images import photos
from exporter.images import preprocess as reference_preprocess

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "samples" / "cpp"
PYTHON_SAMPLE = HERE.parents[1] / "samples" / "python" / "classify_engine.py"
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MEAN, STD = 0.485, 0.229

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_cpp(source: Path, binary: Path, *flags: str) -> Path:
    ran = subprocess.run(["g++", *WARNINGS, *flags, f"-I{SAMPLE}", str(source), "-o", str(binary)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return binary


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return compile_cpp(HERE / "parts.cpp", tmp_path_factory.mktemp("parts") / "parts", *SANITIZERS)


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    return compile_cpp(SAMPLE / "classify.cpp", tmp_path_factory.mktemp("classify") / "classify", *SANITIZERS, f"-I{HERE / 'fakes'}")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Half photograph, half noise: smooth areas, edges, and values that overshoot."""
    pixels = np.array(photos()[1].resize((width, height)))
    noise = np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    pixels[:, width // 2 :] = np.where(noise > 127, 255, 0)[:, width // 2 :] if seed % 2 else noise[:, width // 2 :]
    return Image.fromarray(pixels)


# --- preprocessing -------------------------------------------------------------------------------------------------------

RESIZES = [
    ((288, 288), (256, 256)),
    ((640, 480), (341, 256)),  # down
    ((100, 75), (341, 256)),  # up
    ((60, 900), (256, 300)),  # up across, down along
    ((900, 60), (256, 300)),
    ((300, 700), (256, 597)),  # tall
    ((178, 43), (176, 34)),
    ((176, 43), (172, 34)),
    ((256, 512), (256, 300)),  # one axis only
    ((512, 300), (256, 300)),
    ((300, 200), (300, 200)),
    ((1999, 1333), (384, 256)),
    ((1, 1), (7, 5)),
    ((2, 3), (1, 1)),
]


@pytest.mark.parametrize(("source", "target"), RESIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_resize_is_pillows(parts, tmp_path, source, target, seed):
    down = [a - b for a, b in zip(source, target, strict=True)]
    if down[1] > max(0, 2 * down[0]) and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 resizes tall images in another order, with other rounding")
    image = picture(*source, seed=seed)
    image.save(tmp_path / "in.ppm")
    subprocess.run([parts, "resize", tmp_path / "in.ppm", *map(str, target), tmp_path / "out"], check=True)
    got = np.fromfile(tmp_path / "out", np.uint8).reshape(target[1], target[0], 3).astype(int)
    want = np.asarray(image.resize(target, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 1e-3


PREPROCESSED = [
    ((640, 480), (224, 224), 0.875),
    ((480, 641), (224, 224), 0.875),
    ((100, 75), (224, 224), 0.875),  # up
    ((500, 375), (192, 320), 0.875),  # not square
    ((333, 777), (384, 384), 1.0),
    ((257, 255), (224, 224), 0.9),
    ((225, 225), (224, 223), 0.7),  # odd margins: halves are rounded to even
]


@pytest.mark.parametrize(("source", "size", "ratio"), PREPROCESSED)
@pytest.mark.parametrize("suffix", ["ppm", "bmp"])
def test_preprocess_is_the_exporters(parts, tmp_path, source, size, ratio, suffix):
    image = picture(*source)
    image.save(tmp_path / f"in.{suffix}")
    arguments = [*map(str, size), str(MEAN), str(STD), str(ratio)]
    subprocess.run([parts, "preprocess", tmp_path / f"in.{suffix}", *arguments, tmp_path / "out"], check=True)
    got = np.fromfile(tmp_path / "out", np.float32).reshape(3, *size)
    want = reference_preprocess(image, size, [MEAN] * 3, [STD] * 3, ratio)
    assert np.abs(got - want).max() * STD <= 1 / 255 + 1e-6
    assert (np.abs(got - want) * STD > 1e-6).mean() < 1e-3


@pytest.fixture(scope="module")
def python_sample():
    spec = importlib.util.spec_from_file_location("classify_engine", PYTHON_SAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("source", "size", "ratio"), PREPROCESSED)
def test_python_preprocess_is_the_exporters(python_sample, source, size, ratio):
    image = picture(*source)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    got = python_sample.preprocess(image, size, {"crop_ratio": ratio, "mean": mean, "std": std})
    want = torch.from_numpy(reference_preprocess(image, size, mean, std, ratio))[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# --- JSON and the sidecar ------------------------------------------------------------------------------------------------


def plain(value) -> str:
    """As parts.cpp prints JSON."""
    if isinstance(value, dict):
        return "{" + "".join(f"{key}={plain(value[key])} " for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + "".join(plain(item) + " " for item in value) + "]"
    if isinstance(value, str):
        return value.encode().hex()
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else f"{value:.17g}"


GOOD_JSON = [
    "null",
    " [ ] ",
    "{}",
    '{"a": [1, -0.5, 1e3, 2E-2, 0], "b": {"c": true, "d": false}}',
    r'"\u00e9\ud83d\ude00 \"\\\/\b\f\n\r\t é"',
    "[[[[[]]]]]",
]
BAD_JSON = {
    "empty": "",
    "space": "  ",
    "cut object": '{"a": 1',
    "cut array": "[1, ",
    "cut string": '{"a": "b',
    "cut escape": '"\\',
    "cut unicode": '"\\u12',
    "comma": "[1,]",
    "comma in object": '{"a": 1,}',
    "no colon": '{"a" 1}',
    "key": "{a: 1}",
    "twice": '{"a": 1, "a": 2}',
    "trailing": "{} {}",
    "leading zero": "[01]",
    "plus": "[+1]",
    "point": "[1.]",
    "exponent": "[1e]",
    "minus": "[-]",
    "nan": "[NaN]",
    "huge": "[1e999]",
    "word": "[tru]",
    "single quotes": "['a']",
    "escape": r'["\x"]',
    "surrogate": r'["\ud800"]',
    "low surrogate": r'["\udc00"]',
    "bad pair": r'["\ud800\u0041"]',
    "control": '["\n"]',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "nul": "[1\0]",
    "not utf-8 outside a string": b"\xff\xfe[]",
    "binary": bytes(range(256)),
}


def outcomes(parts, verb, files) -> list[str]:
    ran = subprocess.run([parts, verb, *files], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout.decode(errors="replace").splitlines()


def test_json_reads_what_python_reads(parts, tmp_path):
    files = []
    for index, text in enumerate(GOOD_JSON):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(text, encoding="utf-8")
    assert outcomes(parts, "json", files) == [f"ok {plain(json.loads(text))}" for text in GOOD_JSON]


def test_malformed_json_is_an_error(parts, tmp_path):
    files = []
    for name, text in BAD_JSON.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = outcomes(parts, "json", files)
    for file, line in zip(files, lines, strict=True):
        assert line.startswith(f"error 9 {file} is not valid JSON: line "), line


SIDECAR = {
    "schema": 1,
    "kind": "engine",
    "model": "vim-t",
    "weights": "random (seed 0)",
    "weights_random": True,
    "weights_sha256": "00",
    "plan": None,
    "seqlen": [197, 195],
    "precision": "fp16",
    "image_size": [32, 48],
    "normalization": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": "0..1", "crop_ratio": 0.875, "resize": "bicubic"},
    "num_classes": 7,
    "classes": ["tench", "é", "c", "d", "e", "f", "g"],
    "input": "images",
    "output": "logits",
    "batch": {"min": 1, "opt": 2, "max": 4},
    "tensorrt": "10.6.0.26",
    "gpu": {"name": "NVIDIA H100", "sm": "9.0"},
    "plugin": {"library": "libstm_trt10.so", "sha256": "00", "kernel_version": 3},
    "engine_sha256": "00",
    "parity": None,
    "timing": None,
}


def changed(**fields) -> dict:
    """SIDECAR with fields replaced; `a__b` is b within a, a value of ... removes the field."""
    out = json.loads(json.dumps(SIDECAR))
    for name, value in fields.items():
        *path, last = name.split("__")
        at = out
        for key in path:
            at = at[key]
        at.pop(last) if value is ... else at.__setitem__(last, value)
    return out


BAD_SIDECARS = [
    ([], "the file is an array, needs an object"),
    (changed(schema=2), "has schema 2, kind 'engine'"),
    (changed(kind="onnx"), "kind 'onnx'"),
    (changed(normalization=...), "has no 'normalization'"),
    (changed(normalization__mean=[1, 2]), "mean has 2 numbers, needs 3"),
    (changed(normalization__std=[1, 0, 1]), "std is 0, needs 1e-06 to 1e+06"),
    (changed(normalization__scale="0..255"), "asks for scale '0..255'"),
    (changed(normalization__crop_ratio=0), "crop_ratio is 0"),
    (changed(image_size=[224]), "image_size has 1 numbers"),
    (changed(image_size=[224, 0]), "image_size[1] is 0, needs 1 to 16384"),
    (changed(image_size=[224, 1.5]), "image_size[1] is not a whole number"),
    (changed(image_size="224"), "image_size is a string, needs an array"),
    (changed(num_classes=8), "names 7 classes, num_classes is 8"),
    (changed(classes=[1] * 7), "a class is a number, needs a string"),
    (changed(classes="x"), "classes is a string"),
    (changed(weights_random="no"), "weights_random is a string, needs a boolean"),
    (changed(gpu="H100"), "gpu is a string, needs an object"),
    (changed(plugin__kernel_version=...), "has no 'kernel_version'"),
]


def test_sidecar(parts, tmp_path):
    cases = [(SIDECAR, "ok vim-t"), (changed(classes=None, plugin=None, parity={"x": [1]}), "ok vim-t"), *BAD_SIDECARS]
    files = []
    for index, (content, _) in enumerate(cases):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    lines = outcomes(parts, "sidecar", [*files, tmp_path / "missing"])
    for line, (_, wanted) in zip(lines, [*cases, (None, "cannot open")], strict=True):
        assert wanted in line, line


# --- the program, on fakes -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "vim.engine").write_text("FAKE 1 4 32 48 7")
    (tmp_path / "vim.engine.json").write_text(json.dumps(SIDECAR), encoding="utf-8")
    return tmp_path / "vim.engine"


def run(program, *arguments, **environment):
    return subprocess.run(
        [str(word) for word in (program, *arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )


def fake_logits(images: np.ndarray, classes: int = 7) -> np.ndarray:
    flat = images.reshape(len(images), -1)
    return flat[:, 7 * np.arange(classes) % flat.shape[1]]


@pytest.mark.parametrize("graph", [[], ["--graph"]], ids=["plain", "graph"])
@pytest.mark.parametrize("count", [3, 8], ids=["one-piece", "two-pieces"])
def test_logits_of_an_input_file(classify, engine, tmp_path, graph, count):
    images = np.random.default_rng(0).standard_normal((count, 3, 32, 48), dtype=np.float32)
    images.tofile(tmp_path / "images.bin")
    ran = run(classify, engine, "--input", tmp_path / "images.bin", "--dump", tmp_path / "logits.bin", *graph)
    assert ran.returncode == 0, ran.stderr
    logits = np.fromfile(tmp_path / "logits.bin", np.float32).reshape(count, 7)
    np.testing.assert_array_equal(logits, fake_logits(images))
    best = logits.argmax(1)
    assert [line.split("%  ")[1] for line in ran.stdout.splitlines()] == [SIDECAR["classes"][i] for i in best]
    assert "WARNING: random (seed 0)" in ran.stderr


@pytest.mark.parametrize("graph", [[], ["--graph"]], ids=["plain", "graph"])
def test_image_to_top_five(classify, engine, tmp_path, graph):
    image = picture(90, 70)
    image.save(tmp_path / "cat.ppm")
    ran = run(classify, engine, tmp_path / "cat.ppm", "--batch", 4, "--benchmark", 20, "--dump", tmp_path / "logits.bin", *graph)
    assert ran.returncode == 0, ran.stderr
    logits = np.fromfile(tmp_path / "logits.bin", np.float32).reshape(4, 7)
    normal = SIDECAR["normalization"]
    want = fake_logits(reference_preprocess(image, (32, 48), normal["mean"], normal["std"])[None])
    np.testing.assert_allclose(logits, np.repeat(want, 4, axis=0), atol=1 / 255 / 0.2)
    *top, latency = ran.stdout.splitlines()
    chances = torch.from_numpy(logits[0]).softmax(0)
    assert top == [f"{100 * chances[i]:6.2f}%  {SIDECAR['classes'][i]}" for i in chances.argsort(descending=True)[:5]]
    assert latency.startswith("latency: median 1.5000 ms, p95 1.5000 ms (20 runs, batch 4, ")
    assert ("no CUDA graph" in latency) == (not graph)


def spoiled(tmp_path, name, data) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


PPM = b"P6\n# a comment\n4 3\n255\n" + bytes(36)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "cannot read image"),
        (b"\xff\xd8\xff\xe0", "neither PPM (P6) nor BMP"),
        (PPM[:-1], "cut off: 35 of 36 bytes"),
        (b"P6 4 3 65535 ", "65535 as its largest value"),
        (b"P6 0 3 255 ", "says it has 0x3 pixels"),
        (b"P6 99999999 99999999 255 ", "says it has 99999999x99999999 pixels"),
        (b"P6 99999999999999999999 1 255 ", "damaged PPM header"),
        (b"P6 4 -3 255 ", "damaged PPM header"),
        (b"P6 # no end", "damaged PPM header"),
        (b"BM" + bytes(10), "damaged BMP header"),
        (b"BM" + bytes(200), "BMP with 0 bits"),
        (b"BM" + bytes(16) + b"\x00\x00\x00\x80\x00\x00\x00\x80\x01\x00\x18" + bytes(60), "pixels; 1 to 100 million are read"),
    ],
)
def test_spoiled_image_is_an_error(classify, engine, tmp_path, data, wanted):
    ran = run(classify, engine, spoiled(tmp_path, "image", data))
    assert ran.returncode == 2
    assert wanted in ran.stderr


def test_whole_image_with_a_comment(classify, engine, tmp_path):
    assert run(classify, engine, spoiled(tmp_path, "image", PPM)).returncode == 0


ARGUMENTS = [
    ([], "give an engine, and IMAGE or --input"),
    (["vim.engine"], "give an engine, and IMAGE or --input"),
    (["vim.engine", "cat.ppm", "--input", "x"], "give an engine, and IMAGE or --input"),
    (["vim.engine", "cat.ppm", "dog.ppm"], "one image only"),
    (["vim.engine", "cat.ppm", "--fast"], "unknown option --fast"),
    (["vim.engine", "cat.ppm", "--batch"], "--batch needs a value"),
    (["vim.engine", "cat.ppm", "--batch", "0"], "--batch is '0'"),
    (["vim.engine", "cat.ppm", "--batch", "2x"], "--batch is '2x'"),
    (["vim.engine", "cat.ppm", "--batch", "9" * 30], "needs a whole number from 1 to 1000000"),
    (["vim.engine", "--input", "x", "--batch", "2"], "--batch repeats IMAGE"),
]


@pytest.mark.parametrize(("arguments", "wanted"), ARGUMENTS)
def test_wrong_arguments(classify, arguments, wanted):
    ran = run(classify, *arguments)
    assert ran.returncode == 2
    assert wanted in ran.stderr


def test_help(classify):
    ran = run(classify, "--help")
    assert ran.returncode == 0
    assert ran.stdout.startswith("usage: classify ENGINE [IMAGE]")


def refusals(engine, image):
    """What is wrong -> (arguments, environment, exit code, message)."""
    return {
        "batch": ([engine, image, "--batch", 5], {}, 2, "batch is 5, the engine takes 1 to 4, or multiples of the latter"),
        "input size": ([engine, "--input", image], {}, 2, "needs a multiple of 18432, an image's"),
        "gpu": ([engine, image], {"FAKE_GPUS": 0}, 3, "no usable GPU: no CUDA-capable device is detected"),
        "plugin for another TensorRT": ([engine, image], {"FAKE_REGISTER": 1}, 6, "serve TensorRT 10, this app has 10.6.0"),
        "plugin refused": ([engine, image], {"FAKE_REGISTER": 2}, 6, "another library has plugins of the same name"),
        "no sidecar": ([image, image], {}, 9, ".json"),
        "dump": ([engine, image, "--dump", engine / "x"], {}, 1, "cannot write"),
    }


@pytest.mark.parametrize("case", refusals(Path(), Path()))
def test_refusals(classify, engine, tmp_path, case):
    arguments, environment, code, wanted = refusals(engine, spoiled(tmp_path, "image.ppm", PPM))[case]
    ran = run(classify, *arguments, **environment)
    assert (ran.returncode, wanted in ran.stderr) == (code, True), ran.stderr


@pytest.mark.parametrize(
    ("plan", "sidecar", "wanted"),
    [
        ("damaged", {}, "Is it a TensorRT engine, and whole?\n  TensorRT: the fake magic tag does not match"),
        ("damaged", {"tensorrt": "10.60.0.1"}, "it was built with TensorRT 10.60.0.1, this is 10.6.0. Build it on this machine"),
        ("damaged", {"gpu__sm": "8.9"}, "it was built for a GPU of compute capability 8.9 (NVIDIA H100), this is 9.0 (Fake GPU)"),
        ("damaged", {"plugin__kernel_version": 4}, "its plugins were version 4, the library's is 3"),
        ("FAKE 1 4 64 48 7", {}, "'images' has shape (-1,3,64,48), its sidecar says (-1,3,32,48)"),
        ("FAKE 1 4 32 48 8", {}, "'logits' has shape (-1,8), its sidecar says (-1,7)"),
        ("FAKE 1 4 32 48 7", {"input": "pixels"}, "has not just the input 'pixels'"),
    ],
)
def test_engine_that_does_not_fit(classify, engine, tmp_path, plan, sidecar, wanted):
    engine.write_text(plan)
    Path(f"{engine}.json").write_text(json.dumps(changed(**sidecar)), encoding="utf-8")
    ran = run(classify, engine, spoiled(tmp_path, "image.ppm", PPM))
    assert (ran.returncode, wanted in ran.stderr) == (9, True), ran.stderr


@pytest.mark.parametrize(("build", "code"), [({"version_compatible": True}, 0), ({"version_compatible": False}, 9), (None, 9)])
def test_version_compatible_engine_may_bring_its_runtime(classify, engine, tmp_path, build, code):
    engine.write_text("CODE FAKE 1 4 32 48 7")
    Path(f"{engine}.json").write_text(json.dumps(SIDECAR | {"build": build}), encoding="utf-8")
    ran = run(classify, engine, spoiled(tmp_path, "image.ppm", PPM))
    assert ran.returncode == code, ran.stderr


# --- with the real headers -----------------------------------------------------------------------------------------------


def cuda_include() -> Path | None:
    """CUDA's headers: CUDA_INCLUDE_DIR, a toolkit, or pip's."""
    here = [Path(os.environ["CUDA_INCLUDE_DIR"])] if os.environ.get("CUDA_INCLUDE_DIR") else []
    here += [Path("/usr/local/cuda/include"), *(Path(entry) / "nvidia/cu13/include" for entry in sys.path)]
    return next((folder for folder in here if (folder / "cuda_runtime_api.h").is_file()), None)


def test_compiles_with_tensorrt(tmp_path):
    tensorrt = os.environ.get("TensorRT_INCLUDE_DIR")  # noqa: SIM112 (CMake's spelling)
    if not tensorrt:
        pytest.skip("TensorRT_INCLUDE_DIR is not set: no TensorRT headers to compile with")
    cuda = cuda_include()
    if cuda is None:
        pytest.skip("no CUDA headers (set CUDA_INCLUDE_DIR)")
    plugins = HERE.parents[1] / "plugins" / "include"
    for folder in tensorrt.split(os.pathsep):
        flags = ["-c", "-isystem", folder, "-isystem", str(cuda), f"-I{plugins}"]
        compile_cpp(SAMPLE / "classify.cpp", tmp_path / "classify.o", *flags)


# --- the Python sample's errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sidecar", "code", "wanted"),
    [
        (None, 9, "is not the sidecar of an engine"),
        ("{", 9, "is not the sidecar of an engine"),
        ("[]", 9, "is not the sidecar of an engine"),
        (json.dumps(changed(schema=2)), 9, "has schema 2, kind 'engine'"),
        pytest.param(json.dumps(SIDECAR), 3, "torch finds no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_python_sample_says_what_is_wrong(engine, sidecar, code, wanted):
    beside = Path(f"{engine}.json")
    beside.unlink() if sidecar is None else beside.write_text(sidecar, encoding="utf-8")
    ran = run(sys.executable, PYTHON_SAMPLE, engine, "cat.jpg")
    assert (ran.returncode, wanted in ran.stderr) == (code, True), ran.stderr


@pytest.mark.parametrize(("arguments", "wanted"), [([], "give an image or --input"), (["a", "--batch", "0"], "not a whole number"), (["--x"], "--x")])
def test_python_sample_refuses_wrong_arguments(arguments, wanted):
    ran = run(sys.executable, PYTHON_SAMPLE, "vim.engine", *arguments)
    assert (ran.returncode, wanted in ran.stderr) == (2, True), ran.stderr
