"""Build the TensorRT plugin libraries into the package, if this machine can; else say in one line why not.

`setup.py` runs this file by its path before anything is installed, so it imports the standard library only and nothing of
this package. What happened is kept in `lib/BUILD_INFO.json`, because pip hides what a build prints; `stm doctor` shows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LIBRARY_FOLDER = "lib"  # in the exporter package
BUILD_INFO = "BUILD_INFO.json"
MIN_CMAKE = (3, 24)
HEADER_FOLDERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")
GET_NVCC = "install the CUDA toolkit 12.8 or later, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-runtime`, or set STM_NVCC"
GET_HEADERS = "set TENSORRT_INCLUDE_DIR to TensorRT's include folder (tarball, libnvinfer-headers-dev, or github.com/NVIDIA/TensorRT)"


class PluginBuildError(RuntimeError):
    """STM_BUILD_PLUGINS=1 and the libraries could not be built, or a setting that means nothing."""


@dataclass
class PluginBuild:
    """What a build left; `line` is the sentence that is printed."""

    status: str  # "built", "skipped", "failed"
    line: str
    version: str = ""
    cuda: str = ""
    archs: str = ""
    libraries: dict[str, dict[str, str]] = field(default_factory=dict)  # file name -> {"tensorrt", "sha256"}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BUILD_INFO).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_build_info(folder: Path) -> PluginBuild | None:
    """What the last build said, or None: never built, or the file is not ours."""
    try:
        return PluginBuild(**json.loads((folder / BUILD_INFO).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


# --- what the machine has ------------------------------------------------------------------------------------------------


def site_folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where packages of this environment lie, also when pip's build isolation takes them off `sys.path`: the interpreter is
    still the environment's. (`python -m build` and uv isolate with an interpreter of their own: only $VIRTUAL_ENV helps.)"""
    found = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    if environ.get("VIRTUAL_ENV"):
        found += sorted(Path(environ["VIRTUAL_ENV"]).glob("lib/python3*/site-packages"))
    if site.ENABLE_USER_SITE:
        found.append(Path(site.getusersitepackages()))
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The CUDA compiler: STM_NVCC, CUDACXX, CUDA_HOME, CUDA_PATH, the PATH, /usr/local/cuda, or pip's.

    Raises:
        PluginBuildError: STM_NVCC names no file.
    """
    if environ.get("STM_NVCC"):
        given = shutil.which(environ["STM_NVCC"])
        if given is None:
            raise PluginBuildError(f"STM_NVCC is {environ['STM_NVCC']!r}, which is no program: give the path of nvcc")
        return Path(given)
    tries = [environ.get("CUDACXX")]
    tries += [os.path.join(environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    tries += [shutil.which("nvcc", path=environ.get("PATH", "")), "/usr/local/cuda/bin/nvcc"]
    tries += [str(nvcc) for folder in site_folders(environ) for nvcc in sorted(folder.glob("nvidia/cu1*/bin/nvcc"), reverse=True)]
    for name in tries:
        path = shutil.which(name) if name else None
        if path:
            return Path(path)
    return None


def nvcc_version(nvcc: Path) -> str:
    """For example "13.2"; "" if it does not answer."""
    found = re.search(r"release (\d+\.\d+)", _answer([str(nvcc), "--version"]))
    return found.group(1) if found else ""


def tensorrt_version(headers: Path) -> str:
    """The version that a folder's NvInferVersion.h names, for example "10.6.0"; "" if the folder has none."""
    try:
        text = (headers / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    parts = [re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) for part in parts if part) if all(parts) and (headers / "NvInferRuntime.h").is_file() else ""


def find_headers(environ: Mapping[str, str] = os.environ) -> dict[int, tuple[str, Path]]:
    """TensorRT major version -> (version, include folder), the first folder of each major, in the order given.

    Raises:
        PluginBuildError: a folder given by TENSORRT_INCLUDE_DIR or TensorRT_INCLUDE_DIR has no headers of TensorRT.
    """
    name = next((name for name in ("TENSORRT_INCLUDE_DIR", "TensorRT_INCLUDE_DIR") if environ.get(name)), None)
    given = [part for part in environ[name].split(":") if part] if name else []
    found: dict[int, tuple[str, Path]] = {}
    for folder in given or HEADER_FOLDERS:
        version = tensorrt_version(Path(folder))
        if version:
            found.setdefault(int(version.split(".")[0]), (version, Path(folder).resolve()))
        elif given:
            raise PluginBuildError(f"{name} names {folder}, which has no NvInferRuntime.h and NvInferVersion.h: give TensorRT's include folder")
    return found


def find_tool(name: str, at_least: tuple[int, ...] = (0,), environ: Mapping[str, str] = os.environ) -> Path | None:
    """cmake, ninja or make that runs and is new enough: on the PATH, beside the interpreter, or in pip's cmake package.

    Asked for its version, because pip's `cmake` is a script that build isolation breaks.
    """
    folders = [Path(part) for part in environ.get("PATH", "").split(os.pathsep) if part]
    folders += [Path(sysconfig.get_path("scripts")), *(folder / "cmake" / "data" / "bin" for folder in site_folders(environ))]
    for folder in folders:
        tool = folder / name
        if not os.access(tool, os.X_OK) or tool.is_dir():
            continue
        version = re.search(r"(\d+)\.(\d+)", _answer([str(tool), "--version"]))
        if version and tuple(int(part) for part in version.groups()) >= at_least:
            return tool
    return None


def _answer(command: Sequence[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout if ran.returncode == 0 else ""


# --- building ------------------------------------------------------------------------------------------------------------


def build_mode(environ: Mapping[str, str] = os.environ) -> str:
    """STM_BUILD_PLUGINS: "auto" (default), "0" (skip), "1" (a failure is an error).

    Raises:
        PluginBuildError: another value.
    """
    text = environ.get("STM_BUILD_PLUGINS", "").lower()
    for mode, words in {"auto": ("", "auto"), "0": ("0", "off", "no", "false"), "1": ("1", "on", "yes", "true")}.items():
        if text in words:
            return mode
    raise PluginBuildError(f"STM_BUILD_PLUGINS is {text!r}: 0 skips the plugin libraries, 1 makes a failure an error, unset builds if it can")


def build_plugins(source: Path, output: Path, work: Path, version: str = "", environ: Mapping[str, str] = os.environ) -> PluginBuild:
    """Build a library pair for each major version of TensorRT whose headers are there, and put them into `output`.

    Prints one line, and leaves it with the details in `output`/BUILD_INFO.json. Libraries that an earlier build left there
    are replaced by a whole new set or stay as they are.

    Args:
        source: the checkout.
        output: the package's library folder.
        work: for CMake; kept, so that the next build is a short one.

    Raises:
        PluginBuildError: STM_BUILD_PLUGINS=1 and it did not work; or STM_BUILD_PLUGINS has another meaningless value.
    """
    mode = build_mode(environ)
    info = PluginBuild("skipped", "", version)
    try:
        reason = "STM_BUILD_PLUGINS=0" if mode == "0" else _build(source, output, work, info, environ)
    except PluginBuildError as error:
        info.status, reason = "failed", str(error)
    if info.status != "built":
        kept = ", ".join(sorted(path.name for path in output.glob("libstm_trt*.so")))
        works = f"an earlier build's {kept} stay" if kept else "export to .onnx works without"
        info.line = f"TensorRT plugins {info.status}: {reason} ({works})"
    info.save(output)
    print(f"stm: {info.line}", file=sys.stderr, flush=True)
    if mode == "1" and info.status != "built":
        raise PluginBuildError(info.line)
    return info


def _build(source: Path, output: Path, work: Path, info: PluginBuild, environ: Mapping[str, str]) -> str:
    """Returns why it was skipped, or ""; then `info` is filled in and the libraries are in `output`."""
    if not (source / "plugins" / "trt").is_dir():
        return f"{source} has no plugins folder"
    nvcc, headers, cmake = find_nvcc(environ), find_headers(environ), find_tool("cmake", MIN_CMAKE, environ)
    ninja = find_tool("ninja", environ=environ)
    make = ninja or find_tool("make", environ=environ)
    lacking = []
    if nvcc is None:
        lacking.append(f"no nvcc: {GET_NVCC}")
    if not headers:
        lacking.append(f"no TensorRT headers: {GET_HEADERS}")
    if nvcc is not None and headers and cmake is None:
        lacking.append(f"no cmake of {'.'.join(map(str, MIN_CMAKE))} or later: `pip install cmake`")
    if nvcc is not None and headers and make is None:
        lacking.append("neither ninja nor make: `pip install ninja`")
    if lacking or nvcc is None or cmake is None or make is None:
        return "; ".join(lacking)

    start = time.monotonic()
    archs = re.sub(r"[\s,;]+", ";", environ.get("STM_CUDA_ARCHITECTURES", "").strip())
    jobs = environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    staged = work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    (staged / LIBRARY_FOLDER).mkdir(parents=True)
    log = work / "build.log"
    log.write_text("", encoding="utf-8")
    kernels = None
    for major, (version, folder) in headers.items():
        # The compiler in the name: CMake refuses to change it in a folder that it has configured.
        build = work / f"trt{major}-{hashlib.sha256(f'{nvcc} {folder} {ninja is not None}'.encode()).hexdigest()[:8]}"
        prefix = staged if kernels is None else work / "staged-more"
        configure = [str(cmake), "-S", str(source), "-B", str(build), "-G", "Ninja" if ninja else "Unix Makefiles", f"-DCMAKE_MAKE_PROGRAM={make}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_BUILD_TYPE=Release", "-DSTM_BUILD_TESTS=OFF", f"-DTensorRT_INCLUDE_DIR={folder}"]
        configure += [f"-DCMAKE_INSTALL_LIBDIR={LIBRARY_FOLDER}", f"-DCMAKE_INSTALL_INCLUDEDIR={LIBRARY_FOLDER}/include"]
        # CUDA is compiled once; the plugins of another TensorRT link the same kernels.
        configure += [f"-DSTM_CUDA_ARCHITECTURES={archs}"] if archs else ["-USTM_CUDA_ARCHITECTURES"]
        configure += [f"-DSTM_KERNELS_LIBRARY={kernels or ''}"]
        for command in (
            configure,
            [str(cmake), "--build", str(build), "--parallel", jobs],
            [str(cmake), "--install", str(build), "--prefix", str(prefix), "--strip"],
        ):
            _logged(command, log, environ)
        for name in (f"libstm_trt{major}.so", f"libstm_trt{major}_static.so"):
            if prefix != staged:
                shutil.copy2(prefix / LIBRARY_FOLDER / name, staged / LIBRARY_FOLDER / name)
            sha256 = hashlib.sha256((staged / LIBRARY_FOLDER / name).read_bytes()).hexdigest()
            info.libraries[name] = {"tensorrt": version, "sha256": sha256}
        kernels = kernels or build / "lib" / "libstm_kernels.a"
        cache = (build / "CMakeCache.txt").read_text(encoding="utf-8")
        found = re.search(r"^STM_CUDA_ARCHITECTURES:\w+=(.*)$", cache, re.M)
        info.archs = found.group(1).replace(";", " ") if found else ""
    info.status, info.cuda = "built", nvcc_version(nvcc)
    names = ", ".join(f"libstm_trt{major}.so (TensorRT {version})" for major, (version, _) in headers.items())
    info.line = f"TensorRT plugins built: {names}; CUDA {info.cuda}, {info.archs}, {time.monotonic() - start:.0f} s"
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(staged / LIBRARY_FOLDER, output)
    return ""


def _logged(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
    with log.open("a", encoding="utf-8") as stream:
        print("+", " ".join(command), file=stream, flush=True)
        ran = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environ), check=False)
    if ran.returncode != 0:
        raise PluginBuildError(f"{_first_error(log.read_text(encoding='utf-8', errors='replace'))}; all of it in {log}")


def _first_error(text: str) -> str:
    """The line that tells most: a compiler's or CMake's first error."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            paragraph: list[str] = []
            for more in lines[i + 1 : i + 9]:
                if paragraph and not more.strip():
                    break
                paragraph.append(more.strip())
            return " ".join(part for part in (line.strip(), *paragraph) if part)[:400]
        if re.search(r"\berror\b.*:|: (fatal )?error|^ld: |No such file", line):
            return line.strip()[:400]
    return (lines[-1] if lines else "it ended without a word")[:400]
