"""All CUDA for all GPU architectures, compiled as users do (CMake, pip's nvcc), with warnings as errors; no GPU needed.

With TENSORRT_INCLUDE_DIR (several folders separated by ':') the plugins too, and their life cycle where a runtime of that
TensorRT is at hand: STM_TENSORRT_RUNTIME (also several), or pip's tensorrt-lean. Nothing here skips.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter import libraries
from exporter.op_schema import FUSED_OPS
from exporter.plugin_build import MIN_CMAKE, find_headers, find_nvcc, find_tool

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {80, 86, 89, 90, 100, 120}
HEADERS = find_headers() if os.environ.get("TENSORRT_INCLUDE_DIR") else {}

# Kernels that decide the speed (the `simple` ones and the merge weights do not) must not spill on sm_90, where they are
# tuned and measured. Elsewhere a few registers outside the loops may: the bound is bytes a thread, stores or loads.
FAST = re.compile(r"walk|segments|mma|few_kernel|many_kernel|linear_kernel|warp_norm|vector_patch_rows")
MAX_SPILL_BYTES = {90: 0}
MAX_SPILL_BYTES_ELSEWHERE = 64


@dataclass(frozen=True)
class Kernel:
    """ptxas on one kernel for one architecture."""

    name: str
    sm: int
    registers: int
    spill_bytes: int


def run(command, **options):
    ran = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert ran.returncode == 0, ran.stdout[-6000:]
    return ran.stdout


def build(folder, *options, target=None):
    """Configure and build; the compilers' output."""
    nvcc, cmake, ninja = find_nvcc(), find_tool("cmake", MIN_CMAKE), find_tool("ninja")
    assert nvcc, "no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-runtime (they are in the `test` extra)"
    assert cmake, "no cmake: pip install cmake"
    assert ninja, "no ninja: pip install ninja"
    # The architectures are CMakeLists.txt's own: a list here would hide that one is lost there.
    run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CUDA_COMPILER={nvcc}", *options])
    return run([cmake, "--build", folder, *(["--target", target] if target else [])])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(build folder, compilers' output); one or two minutes of two cores."""
    folder = tmp_path_factory.mktemp("kernels")
    return folder, build(folder, "-DSTM_PTXAS_VERBOSE=ON")


def compiled(output):
    """Every kernel that ptxas reports."""
    report = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'\n.*Function properties.*\n"
        r"\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return [Kernel(name, int(sm), int(used), max(int(stores), int(loads))) for name, sm, stores, loads, used in report.findall(output)]


def test_no_compiler_warns(kernels):
    assert not [line for line in kernels[1].splitlines() if re.search(r"\bwarning\b", line, re.I)]


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    found = compiled(kernels[1])
    assert len(found) == kernels[1].count("Compiling entry function"), "the report of ptxas has changed its form"
    per_architecture = Counter(kernel.sm for kernel in found)
    assert set(per_architecture) == ARCHITECTURES
    assert len(set(per_architecture.values())) == 1
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "plugins" / "kernels").glob("*.cu"))
    names = set(re.findall(r"\b(\w+_kernel)\(", sources))
    assert names
    assert not [name for name in names if not any(name in kernel.name for kernel in found)]


def test_fast_kernels_do_not_spill(kernels):
    fast = [kernel for kernel in compiled(kernels[1]) if FAST.search(kernel.name)]
    assert len(fast) >= 2 * len(ARCHITECTURES)
    assert not [kernel for kernel in fast if kernel.spill_bytes > MAX_SPILL_BYTES.get(kernel.sm, MAX_SPILL_BYTES_ELSEWHERE)]


def test_hoppers_sources_compile_for_another_gpu_alone(tmp_path):
    """Without sm_90 in the list their kernels are empty; seconds, since only they are compiled."""
    build(tmp_path, "-DSTM_CUDA_ARCHITECTURES=89-real", target="stm_kernels_wgmma")
    assert len(list(tmp_path.rglob("*_wgmma.cu.o"))) == len(list((ROOT / "plugins" / "kernels").glob("*_wgmma.cu"))) > 1


def test_kernel_library_and_its_test_are_there(kernels):
    folder = kernels[0]
    assert (folder / "lib" / "libstm_kernels.a").is_file()
    assert list(folder.glob("**/stm_kernel_test"))


# --- with TensorRT's headers only: a test that cannot run here is not there, rather than skipped


def runtime(major):
    """A library with TensorRT's plugin registry, of that major version, or None."""
    given = [Path(part) for part in os.environ.get("STM_TENSORRT_RUNTIME", "").split(":") if part]
    lean = importlib.util.find_spec("tensorrt_lean_libs")
    folders = [Path(folder) for folder in (lean.submodule_search_locations or [])] if lean else []
    found = [path for path in given if path.name.endswith(f".so.{major}")]
    found += [path for folder in folders if (path := folder / f"libnvinfer_lean.so.{major}").is_file()]
    return found[0] if found else None


LOAD = """
import importlib, json, sys
from exporter.libraries import CREATORS, load_plugin
trt = importlib.import_module("tensorrt_lean")
library = load_plugin(sys.argv[1], tensorrt=trt)
assert load_plugin(sys.argv[1], tensorrt=trt) == library
names = {creator.name for creator in trt.get_plugin_registry().all_creators}
print(json.dumps({"major": library.major, "ours": sorted(names & set(CREATORS))}))
"""

if HEADERS:

    @pytest.fixture(scope="module", params=sorted(HEADERS))
    def plugins(request, kernels, tmp_path_factory):
        """(TensorRT major, build folder, compilers' output), on the kernels compiled above."""
        folder = tmp_path_factory.mktemp(f"trt{request.param}")
        options = [f"-DTensorRT_INCLUDE_DIR={HEADERS[request.param][1]}", f"-DSTM_KERNELS_LIBRARY={kernels[0] / 'lib' / 'libstm_kernels.a'}"]
        found = runtime(request.param)
        return request.param, folder, build(folder, *options, *([f"-DSTM_TENSORRT_RUNTIME={found}"] if found else []))

    def test_plugins_compile_without_a_warning(plugins):
        major, folder, output = plugins
        assert not re.search(r"\bwarning\b", output, re.I)
        library = libraries.read_plugin(folder / "lib" / f"libstm_trt{major}.so")
        assert (library.major, library.abi_version) == (major, libraries.ABI_VERSION)
        assert set(library.coverage.cubins) == ARCHITECTURES
        assert library.coverage.ptx == {max(ARCHITECTURES)}

    def test_only_our_entry_points_are_exported(plugins):
        major, folder, _ = plugins
        for name in (f"libstm_trt{major}.so", f"libstm_trt{major}_static.so"):
            symbols = [line.split()[-1] for line in run(["nm", "-D", "--defined-only", folder / "lib" / name]).splitlines()]
            assert symbols
            assert not [symbol for symbol in symbols if not re.fullmatch(r"(getCreators|setLoggerFinder|stm_\w+)(@@\w+)?", symbol)]
            assert "libnvinfer" not in run(["readelf", "-d", folder / "lib" / name])

    def test_op_schema_is_json(plugins):
        import ctypes

        major, folder, _ = plugins
        library = ctypes.CDLL(str(folder / "lib" / f"libstm_trt{major}.so"))
        library.stm_plugin_op_schema.restype = ctypes.c_char_p
        ops = {op["op"]: op for op in json.loads(library.stm_plugin_op_schema())["ops"]}
        assert set(ops) == set(libraries.CREATORS) == {spec.name for spec in FUSED_OPS}
        for spec in FUSED_OPS:
            op = ops[spec.name]
            for tensors, theirs in ((spec.inputs, op["inputs"]), (spec.outputs, op["outputs"])):
                read = [(t["name"], t["type"], t["when"], t["rank"]) for t in theirs]
                assert [(t.name, t.type, t.when, t.axes.count(",") + 1) for t in tensors] == read
            assert [(a.name, a.type) for a in spec.attributes] == [(a["name"], a["type"]) for a in op["attributes"]]
            assert all(t["required"] or t["default"] == a.default for a, t in zip(spec.attributes, op["attributes"], strict=True))

    def test_life_cycle(plugins):
        """Register, create, serialise, clone, through TensorRT's own registry; built in any case."""
        major, folder, _ = plugins
        assert list(folder.glob("**/stm_trt_lifecycle"))
        if runtime(major):
            ctest = find_tool("cmake", MIN_CMAKE).parent / "ctest"
            assert "100% tests passed" in run([ctest, "--test-dir", folder, "--output-on-failure", "-R", "trt_"])

    def test_our_loader_registers_them_in_python(plugins):
        major, folder, _ = plugins
        lean = importlib.util.find_spec("tensorrt_lean")
        if lean and f"libnvinfer_lean.so.{major}" in str(runtime(major)):
            answer = json.loads(run([sys.executable, "-c", LOAD, folder / "lib"], cwd=ROOT).splitlines()[-1])
            assert answer == {"major": major, "ours": sorted(libraries.CREATORS)}
