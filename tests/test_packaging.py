"""What gets installed: wheels without and with the plugin libraries. nvcc and cmake are stand-ins here (shell scripts); the
real ones compile in tests/plugins/test_cuda_build.py."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from exporter import plugin_build
from exporter.plugin_build import PluginBuildError

ROOT = Path(__file__).parents[1]
SHIPPED = ("stm", "exporter", "plugins", "pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE")
NVCC = '#!/bin/sh\necho "Cuda compilation tools, release 13.2, V13.2.0"\n'
# Answers --version, configures, builds and installs as far as plugin_build looks.
CMAKE = """#!/bin/sh
case "$1" in
--version) echo "cmake version 3.30.0"; exit ;;
-S) mkdir -p "$4"; echo "STM_CUDA_ARCHITECTURES:STRING=80-real;90" > "$4/CMakeCache.txt"; echo "$@" >> "$STM_TEST_LOG" ;;
--build) if [ -n "$STM_TEST_FAIL" ]; then echo "x.cu(3): error: identifier \\"half9\\" is undefined"; exit 1; fi
  mkdir -p "$2/lib"; touch "$2/lib/libstm_kernels.a" ;;
--install) major=$(basename "$2"); major=${major#trt}; major=${major%%-*}
  mkdir -p "$4/lib/include"
  for file in libstm_trt$major.so libstm_trt${major}_static.so include/stm_plugins.h; do echo $major > "$4/lib/$file"; done ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is shipped, so that building leaves nothing in the tree."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=lambda folder, names: ["lib"] if Path(folder) == ROOT / "exporter" else ["__pycache__"])
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def headers(folder, version):
    folder.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (folder / "NvInferVersion.h").write_text("".join(f"#define NV_TENSORRT_{name} {part}\n" for name, part in parts))
    (folder / "NvInferRuntime.h").touch()
    return folder


@pytest.fixture
def toolchain(tmp_path):
    """Environment with stand-ins for nvcc and cmake, and headers of TensorRT 10 and 11."""
    for name, text in {"nvcc": NVCC, "cmake": CMAKE, "ninja": "#!/bin/sh\necho 1.13.0\n"}.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    both = [headers(tmp_path / "trt10", "10.6.0"), headers(tmp_path / "trt11", "11.1.0")]
    clean = {name: value for name, value in os.environ.items() if not re.match(r"STM_|CUDA|TensorRT_|TENSORRT_|MAX_JOBS", name)}
    return clean | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "STM_NVCC": str(tmp_path / "bin" / "nvcc"),
        "TENSORRT_INCLUDE_DIR": ":".join(map(str, both)),
        "STM_TEST_LOG": str(tmp_path / "cmake.log"),
    }


def build(checkout, environ, *arguments):
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(checkout.parent / "dist"),
        *(arguments or ("--wheel",)),
        str(checkout),
    ]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def wheel(checkout, environ):
    ran = build(checkout, environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = (checkout.parent / "dist").glob("*.whl")
    return path, zipfile.ZipFile(path), ran.stdout + ran.stderr


def said(output):
    """The one line about the plugins."""
    (line,) = [line for line in output.splitlines() if line.startswith("stm: ")]
    return line


def test_wheel_without_plugins_is_pure_and_complete(checkout, toolchain):
    (checkout / "build" / "lib").mkdir(parents=True)
    (checkout / "build" / "lib" / "libstm_trt10.so").touch()  # CMake's; setuptools would take build/lib for its own
    (checkout / "exporter" / "lib").mkdir()
    (checkout / "exporter" / "lib" / "libstm_trt10.so").touch()  # of an editable install
    path, archive, output = wheel(checkout, {**toolchain, "STM_BUILD_PLUGINS": "0"})
    assert path.name.endswith("-py3-none-any.whl")
    assert "TensorRT plugins skipped: STM_BUILD_PLUGINS=0" in said(output)
    names = set(archive.namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert {"stm/py.typed", "exporter/py.typed", "exporter/data/imagenet_classes.txt", "exporter/data/README.md"} <= names
    assert {f"{path.relative_to(ROOT)}" for folder in ("data", "weights") for path in (ROOT / "stm" / folder).iterdir() if path.is_file()} <= names
    assert {name.split("/")[-1] for name in names if name.startswith("exporter/data/photos/")} == {
        path.name for path in (ROOT / "exporter/data/photos").iterdir()
    }
    assert {f"{path.relative_to(ROOT)}" for package in ("stm", "exporter") for path in (ROOT / package).rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"stm", "exporter"}
    assert json.loads(archive.read("exporter/lib/BUILD_INFO.json"))["status"] == "skipped"
    scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "stm = exporter.cli:main" in scripts
    assert "stm-export = exporter.cli:main_export" in scripts
    assert "would be ignored" not in output  # setuptools on data folders


def test_wheel_with_plugins_is_for_one_platform_and_any_python(checkout, toolchain):
    path, archive, output = wheel(checkout, toolchain)
    assert re.search(r"-py3-none-linux_\w+\.whl$", path.name)
    assert "built: libstm_trt10.so (TensorRT 10.6.0), libstm_trt11.so (TensorRT 11.1.0); CUDA 13.2, 80-real 90," in said(output)
    names = set(archive.namelist())
    for name in (
        "libstm_trt10.so",
        "libstm_trt10_static.so",
        "libstm_trt11.so",
        "libstm_trt11_static.so",
        "include/stm_plugins.h",
        "BUILD_INFO.json",
    ):
        assert f"exporter/lib/{name}" in names
    assert archive.read("exporter/lib/libstm_trt11.so") == b"11\n"
    assert "stm/vim.py" in names
    metadata = archive.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in metadata
    info = json.loads(archive.read("exporter/lib/BUILD_INFO.json"))
    assert (info["status"], info["cuda"], info["archs"]) == ("built", "13.2", "80-real 90")
    assert info["libraries"]["libstm_trt10.so"]["tensorrt"] == "10.6.0"
    first, second = Path(toolchain["STM_TEST_LOG"]).read_text().splitlines()
    assert re.search(r"STM_KERNELS_LIBRARY=$", first)
    assert re.search(r"STM_KERNELS_LIBRARY=.*/libstm_kernels\.a$", second)  # CUDA is compiled once


def test_editable_install_builds_into_the_checkout(checkout, toolchain):
    code = "import setuptools.build_meta as backend, sys; print(backend.build_editable(sys.argv[1]))"
    for change, status in (({}, "built"), ({"STM_BUILD_PLUGINS": "0"}, "skipped")):
        command = [sys.executable, "-c", code, str(checkout.parent)]
        ran = subprocess.run(command, cwd=checkout, env={**toolchain, **change}, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert json.loads((checkout / "exporter/lib/BUILD_INFO.json").read_text())["status"] == status
        assert (checkout / "exporter/lib/libstm_trt10.so").is_file()  # a build that is skipped takes nothing away
    assert "an earlier build's libstm_trt10.so" in said(ran.stdout + ran.stderr)


def test_sdist_can_build_the_plugins(checkout, toolchain):
    ran = build(checkout, toolchain, "--sdist")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = (checkout.parent / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(checkout)) for path in (checkout / "plugins").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "CMakeLists.txt", "exporter/plugin_build.py", "exporter/data/imagenet_classes.txt"} <= names


@pytest.mark.parametrize("required", [False, True])
def test_compile_error_is_one_line_and_fails_only_if_asked(checkout, toolchain, required):
    ran = build(checkout, {**toolchain, "STM_TEST_FAIL": "1", "STM_BUILD_PLUGINS": "1" if required else ""})
    line = said(ran.stdout + ran.stderr)
    assert 'failed: x.cu(3): error: identifier "half9" is undefined; all of it in ' in line
    assert "export to .onnx works without" in line
    assert (ran.returncode != 0) == required


# --- the parts


def lacking(tmp_path, monkeypatch, toolchain, **change):
    """The line of a build in a changed environment, on a machine with nothing of its own."""
    monkeypatch.setattr(plugin_build, "site_folders", lambda environ: [])
    monkeypatch.setattr(plugin_build, "HEADER_FOLDERS", ())
    monkeypatch.setattr(plugin_build.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    environ = {name: value for name, value in {**toolchain, **change}.items() if value is not None}
    info = plugin_build.build_plugins(ROOT, tmp_path / "out", tmp_path / "work", environ=environ)
    assert plugin_build.read_build_info(tmp_path / "out") == info
    assert "\n" not in info.line
    return info


def test_says_what_is_lacking(tmp_path, monkeypatch, toolchain):
    empty = tmp_path / "empty"
    empty.mkdir()
    info = lacking(tmp_path, monkeypatch, toolchain, TENSORRT_INCLUDE_DIR=None)
    assert info.status == "skipped"
    assert "no TensorRT headers: set TENSORRT_INCLUDE_DIR" in info.line
    info = lacking(tmp_path, monkeypatch, toolchain, PATH=str(empty))
    assert "no cmake of 3.24 or later: `pip install cmake`; neither ninja nor make" in info.line
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        info = lacking(tmp_path, monkeypatch, toolchain, STM_NVCC=None, PATH=str(empty))
        assert "no nvcc: install the CUDA toolkit" in info.line


@pytest.mark.parametrize(("name", "words"), [("STM_NVCC", "which is no program"), ("TENSORRT_INCLUDE_DIR", "which has no NvInferRuntime.h")])
def test_a_setting_that_points_nowhere_is_told(tmp_path, monkeypatch, toolchain, name, words):
    info = lacking(tmp_path, monkeypatch, toolchain, **{name: str(tmp_path / "none")})
    assert info.status == "failed"
    assert f"{name} " in info.line
    assert words in info.line


def test_required_but_lacking_is_an_error(tmp_path, monkeypatch, toolchain):
    with pytest.raises(PluginBuildError, match="no TensorRT headers"):
        lacking(tmp_path, monkeypatch, toolchain, TENSORRT_INCLUDE_DIR=None, STM_BUILD_PLUGINS="1")


def test_unknown_mode_is_an_error():
    with pytest.raises(PluginBuildError, match="'maybe': 0 skips"):
        plugin_build.build_mode({"STM_BUILD_PLUGINS": "maybe"})


def test_nvcc_of_pip_is_found_in_the_environment(tmp_path):
    nvcc = tmp_path / "lib/python3.11/site-packages/nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    assert nvcc.parents[3] in plugin_build.site_folders({"VIRTUAL_ENV": str(tmp_path)})
    assert plugin_build.nvcc_version(nvcc) == "13.2"
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    shutil.copy2(nvcc, home / "bin" / "nvcc")
    assert plugin_build.find_nvcc({"CUDA_HOME": str(home), "VIRTUAL_ENV": str(tmp_path)}) == home / "bin" / "nvcc"


def test_first_headers_of_a_major_count(tmp_path):
    folders = [headers(tmp_path / name, version) for name, version in (("a", "10.9.0"), ("b", "11.1.0"), ("c", "10.6.0"))]
    found = plugin_build.find_headers({"TensorRT_INCLUDE_DIR": ":".join(map(str, folders))})
    assert {major: version for major, (version, _) in found.items()} == {10: "10.9.0", 11: "11.1.0"}


def test_first_error_is_what_tells_most():
    cmake = "-- ok\nCMake Error at StmCuda.cmake:12 (message):\n  No CUDA compiler: nvcc is\n  not there.\n\n\n-- Configuring incomplete\n"
    assert plugin_build._first_error(cmake) == "CMake Error at StmCuda.cmake:12 (message): No CUDA compiler: nvcc is not there."
    assert plugin_build._first_error("a\nb.cpp:3:1: error: no\nc.cpp:1:1: error: later") == "b.cpp:3:1: error: no"
