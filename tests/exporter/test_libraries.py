"""Finding, checking and loading the plugin library, with stand-ins compiled by gcc: no TensorRT and no GPU needed."""

import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest

from exporter import libraries, plugin_build
from exporter.errors import PluginError
from stm.errors import MissingDependencyError

ROOT = Path(__file__).parents[2]
SOURCE = """
int stm_plugin_tensorrt_major(void) { return %(major)d; }
int stm_plugin_kernel_version(void) { return 7; }
int stm_plugin_abi_version(void) { return %(abi)d; }
const char* stm_plugin_build_info(void) { return "{\\"tensorrt\\": \\"%(major)d.6.0\\", \\"archs\\": \\"%(archs)s\\"}"; }
void* const* getCreators(int* count) { *count = 0; return 0; }
void setLoggerFinder(void* finder) { (void)finder; }
%(extra)s
"""
ALL_ARCHS = "80-real 86-real 89-real 90-real 100-real 120"


def compile_library(path, major=10, abi=libraries.ABI_VERSION, archs=ALL_ARCHS, extra=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text(SOURCE % {"major": major, "abi": abi, "archs": archs, "extra": extra})
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "these tests need a C compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    """Only what a test puts there can be found."""
    monkeypatch.delenv(libraries.ENVIRONMENT, raising=False)
    monkeypatch.setattr(libraries, "PACKAGE_FOLDER", tmp_path / "package")
    monkeypatch.setattr(libraries, "BUILD_FOLDER", tmp_path / "build")
    monkeypatch.setattr(libraries, "_loaded", {})


class Registry:
    """TensorRT's registry as far as we use it. A refusal is None, with no exception."""

    def __init__(self, refuse=False, registered=()):
        self.refuse, self.calls = refuse, []
        self.all_creators = [types.SimpleNamespace(name=name) for name in registered]

    def load_library(self, path):
        self.calls.append(path)
        if self.refuse:
            return None
        self.all_creators += [types.SimpleNamespace(name=name) for name in libraries.CREATORS]
        return object()

    def get_creator(self, *_):
        raise AssertionError("get_creator logs an error for an absent creator")


def fake_tensorrt(version="10.6.0", **registry):
    one = Registry(**registry)
    return types.SimpleNamespace(__version__=version, get_plugin_registry=lambda: one), one


# --- finding


def test_order_of_search(tmp_path, monkeypatch):
    places = {name: tmp_path / name / "libstm_trt10.so" for name in ("build/lib", "package", "env", "given")}
    for name in ("build/lib", "package", "env", "given"):
        places[name].parent.mkdir(parents=True)
        places[name].touch()
        if name == "env":
            monkeypatch.setenv(libraries.ENVIRONMENT, str(places["env"]))
        given = places["given"] if name == "given" else None
        assert libraries.find_plugin(10, given) == places[name]


@pytest.mark.parametrize("as_folder", [True, False])
def test_environment_names_a_file_or_a_folder(tmp_path, monkeypatch, as_folder):
    file = tmp_path / "here" / "libstm_trt11.so"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setenv(libraries.ENVIRONMENT, str(file.parent if as_folder else file))
    assert libraries.find_plugin(11) == file


def test_a_named_library_that_is_absent_is_not_replaced_by_another(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "libstm_trt10.so").touch()
    monkeypatch.setenv(libraries.ENVIRONMENT, "/nowhere/libstm_trt10.so")
    with pytest.raises(PluginError, match=r"/nowhere/libstm_trt10.so \(STM_PLUGIN_LIBRARY\)"):
        libraries.find_plugin(10)


def test_nothing_found_says_where_why_and_what_works(tmp_path):
    plugin_build.PluginBuild("skipped", "TensorRT plugins skipped: no nvcc").save(tmp_path / "package")
    (tmp_path / "package" / "libstm_trt11.so").touch()
    with pytest.raises(PluginError) as error:
        libraries.find_plugin(10)
    assert error.value.exit_code == 6
    for words in ("libstm_trt10.so", "there is libstm_trt11.so", "skipped: no nvcc", "TENSORRT_INCLUDE_DIR", "export to .onnx works"):
        assert words in str(error.value)


def test_no_tensorrt_says_how_to_get_it_and_what_works():
    with pytest.raises(MissingDependencyError, match=r"not installed.*pip install.*export to \.onnx works") as error:
        libraries.tensorrt_module("tensorrt_that_nobody_has")
    assert error.value.exit_code == 3


def test_tensorrt_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_trt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be loaded: libnvinfer.so.10"):
        libraries.tensorrt_module("broken_trt")


# --- reading


def test_reads_what_a_library_says(tmp_path):
    library = libraries.read_plugin(compile_library(tmp_path / "libstm_trt10.so"))
    assert (library.major, library.kernel_version, library.abi_version) == (10, 7, libraries.ABI_VERSION)
    assert len(library.sha256) == 64
    assert library.coverage == libraries.sm_coverage(library.path)


def test_the_shim_is_refused_before_it_is_opened(tmp_path):
    shim = compile_library(
        tmp_path / "libstm_trt10_static.so",
        extra="#include <stdlib.h>\n__attribute__((constructor)) void boom(void) { abort(); } int stm_register_plugins(void) { return 0; }",
    )
    with pytest.raises(PluginError, match=r"shim.*Give the core library libstm_trt10.so"):
        libraries.read_plugin(shim)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_a_stranger_is_refused_before_it_is_opened(tmp_path, content):
    stranger = tmp_path / "libstm_trt10.so"
    stranger.write_bytes(content)
    with pytest.raises(PluginError, match="not one of our plugin libraries"):
        libraries.read_plugin(stranger)


def test_half_a_library_is_refused_before_it_is_opened(tmp_path):
    whole = compile_library(tmp_path / "libstm_trt10.so").read_bytes()
    cut = tmp_path / "cut.so"
    cut.write_bytes(whole[: whole.index(b"stm_plugin_tensorrt_major") + 100])
    with pytest.raises(PluginError, match=rf"bytes of {len(whole)}: it was cut off"):
        libraries.read_plugin(cut)


def test_a_library_that_does_not_open_says_so(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so", extra="extern int nobody_has_this; int* p(void) { return &nobody_has_this; }")
    with pytest.raises(PluginError, match=r"cannot be opened: .*nobody_has_this.*Build it again"):
        libraries.read_plugin(path)


def test_abi_version_is_the_headers():
    header = (ROOT / "plugins" / "include" / "stm_plugins.h").read_text()
    assert int(re.search(r"#define STM_PLUGIN_ABI_VERSION (\d+)", header).group(1)) == libraries.ABI_VERSION


def test_creators_are_those_of_the_plugins():
    sources = "".join(path.read_text() for path in (ROOT / "plugins" / "trt").glob("*_plugin.cpp"))
    assert set(re.findall(r'"(Stm[A-Z]\w+)"', sources)) == set(libraries.CREATORS)


# --- GPU code


@pytest.mark.parametrize(
    ("archs", "sm", "how"),
    [
        (ALL_ARCHS, 80, "cubin"),
        (ALL_ARCHS, 89, "cubin"),
        (ALL_ARCHS, 90, "cubin"),
        (ALL_ARCHS, 103, "cubin"),  # same major, later minor
        (ALL_ARCHS, 121, "cubin"),
        (ALL_ARCHS, 130, "PTX"),
        (ALL_ARCHS, 75, ""),
        (ALL_ARCHS, 87, ""),  # Tegra
        (ALL_ARCHS, 110, ""),
        ("90-real", 89, ""),
        ("90-real", 100, ""),
        ("90a-real", 90, "cubin"),
        ("90a", 100, ""),
        ("80-virtual", 90, "PTX"),
        ("80", 86, "cubin"),
        ("", 90, ""),
    ],
)
def test_coverage(archs, sm, how):
    assert libraries._coverage(archs).covers(sm) == how


def test_uncovered_gpu_is_named_with_the_mend(tmp_path):
    library = libraries.read_plugin(compile_library(tmp_path / "libstm_trt10.so", archs="90-real"))
    assert libraries.check_gpu_covered(library, (9, 0)) == "cubin"
    with pytest.raises(PluginError, match=r"has code for sm_90, but NVIDIA A10 is sm_86.*STM_CUDA_ARCHITECTURES=86"):
        libraries.check_gpu_covered(library, (8, 6), "NVIDIA A10")


# --- loading


def test_loads_once(tmp_path):
    path = compile_library(tmp_path / "package" / "libstm_trt10.so")
    trt, registry = fake_tensorrt()
    first = libraries.load_plugin(tensorrt=trt)
    assert (first.path, first.major) == (path, 10)
    assert libraries.load_plugin(tensorrt=trt) == first
    assert libraries.load_plugin(path, tensorrt=trt) == first
    assert registry.calls == [str(path)]


def test_tells_the_logger(tmp_path):
    compile_library(tmp_path / "package" / "libstm_trt10.so")
    trt, _ = fake_tensorrt()
    trt.ILogger = types.SimpleNamespace(INFO=3)
    said = []
    libraries.load_plugin(logger=types.SimpleNamespace(log=lambda *words: said.append(words)), tensorrt=trt)
    assert said[0][0] == 3
    assert "libstm_trt10.so" in said[0][1]


def test_library_of_another_tensorrt_never_reaches_the_registry(tmp_path):
    path = compile_library(tmp_path / "libstm_trt11.so", major=11)
    trt, registry = fake_tensorrt("10.6.0")
    with pytest.raises(PluginError, match=r"is for TensorRT 11, but this process has TensorRT 10\.6\.0.*Give libstm_trt10\.so") as error:
        libraries.load_plugin(path, tensorrt=trt)
    assert error.value.exit_code == 6
    assert registry.calls == []


def test_library_of_another_version_of_us_is_refused(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so", abi=99)
    trt, registry = fake_tensorrt()
    with pytest.raises(PluginError, match=rf"version 99 of our ops, this package version {libraries.ABI_VERSION}"):
        libraries.load_plugin(path, tensorrt=trt)
    assert registry.calls == []


def test_refusal_without_an_exception_is_an_error(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so")
    trt, _ = fake_tensorrt(refuse=True)
    with pytest.raises(PluginError, match=r"TensorRT 10\.6\.0 did not take the plugins of .*libstm_trt10\.so"):
        libraries.load_plugin(path, tensorrt=trt)


def test_plugins_registered_by_the_shim_are_left_alone(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so")
    trt, registry = fake_tensorrt(refuse=True, registered=libraries.CREATORS)
    assert libraries.load_plugin(path, tensorrt=trt).path == path
    assert registry.calls == []


def test_plugins_registered_from_another_file_are_told(tmp_path, monkeypatch):
    path = compile_library(tmp_path / "libstm_trt10.so")
    other = compile_library(tmp_path / "other" / "libstm_trt10.so", archs="90-real")
    monkeypatch.setattr(libraries, "_mapped_libraries", lambda: [other])
    trt, _ = fake_tensorrt(registered=libraries.CREATORS)
    with pytest.raises(PluginError, match=rf"come from {other}, which differs from {path}"):
        libraries.load_plugin(path, tensorrt=trt)


def test_some_of_our_plugins_registered_is_told(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so")
    trt, _ = fake_tensorrt(registered=libraries.CREATORS[:1])
    with pytest.raises(PluginError, match=f"has registered {libraries.CREATORS[0]} but not {libraries.CREATORS[1]}"):
        libraries.load_plugin(path, tensorrt=trt)


def test_a_second_library_is_refused(tmp_path):
    first = compile_library(tmp_path / "libstm_trt10.so")
    second = compile_library(tmp_path / "other" / "libstm_trt10.so", archs="90-real")
    trt, _ = fake_tensorrt()
    libraries.load_plugin(first, tensorrt=trt)
    with pytest.raises(PluginError, match=rf"has loaded {first} already and cannot change to {second}"):
        libraries.load_plugin(second, tensorrt=trt)


def test_open_libraries_are_seen(tmp_path):
    path = compile_library(tmp_path / "libstm_trt10.so")
    libraries.read_plugin(path)
    assert path in libraries._mapped_libraries()


def test_the_real_registry_refuses_a_library_without_plugins(tmp_path):
    """TensorRT's own code, no GPU; the real plugins are loaded into it by tests/plugins/test_cuda_build.py."""
    trt = pytest.importorskip("tensorrt_lean", reason="the lean runtime is not installed (pip install tensorrt-lean-cu13)")
    path = compile_library(tmp_path / "libstm_trt.so", major=libraries.tensorrt_major(trt))
    with pytest.raises(PluginError, match="did not take the plugins"):
        libraries.load_plugin(path, tensorrt=trt)
