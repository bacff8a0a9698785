"""doctor: what is here, what is wrong, what to do, and what works on this machine.

Starts no CUDA and makes no trt.Builder (without a driver that aborts the process).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stm.errors import StmError
from stm.version import __version__

from . import gpus, libraries, plugin_build

OK, MISSING, PROBLEM = "ok", "missing", "problem"
EXPORT_NEEDS = ("torch", "onnx", "onnxscript", "onnxruntime", "polygraphy")
_DRIVER = "Engines need an NVIDIA driver and GPU; in a container: `docker run --gpus all`."
_TORCH = "torch on the GPU"
_LOW_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Row:
    """One finding: `status` is "ok", "missing" or "problem"; `todo` says what to do if it is not ok."""

    name: str
    status: str
    value: str
    todo: str = ""


@dataclass(frozen=True)
class Ability:
    """Something that works here, or why it does not."""

    name: str
    works: bool
    why_not: str = ""


@dataclass
class Report:
    """What `stm doctor` found."""

    rows: list[Row] = field(default_factory=list)
    abilities: list[Ability] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    plugin: dict[str, Any] | None = None

    def works(self, name: str) -> bool:
        return any(ability.name == name and ability.works for ability in self.abilities)

    def exit_code(self, require_gpu: bool = False) -> int:
        """0 if export to .onnx works, and with `require_gpu` building engines too; else 3."""
        return 0 if self.works("export .onnx") and (not require_gpu or self.works("build engine")) else 3

    def to_dict(self) -> dict[str, Any]:
        works = {ability.name: ability.works for ability in self.abilities}
        why_not = {ability.name: ability.why_not for ability in self.abilities if not ability.works}
        return {"rows": [asdict(row) for row in self.rows], "works": works, "why_not": why_not, "gpus": self.gpus, "plugin": self.plugin}

    def lines(self) -> list[str]:
        wide = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"  {row.status:<8} {row.name:<{wide}}  {row.value}")
            if row.todo:
                lines.append(f"  {'':<8} {'':<{wide}}  -> {row.todo}")
        lines.append("what works here:")
        wide = max(len(ability.name) for ability in self.abilities)
        lines += [f"  {'yes' if ability.works else 'no':<4} {ability.name:<{wide}}  {ability.why_not}".rstrip() for ability in self.abilities]
        return lines


def doctor() -> Report:
    """Look at this machine; never raises for something that is absent or broken."""
    report = Report()
    rows = report.rows
    rows.append(Row("Python", OK, f"{platform.python_version()} ({sys.executable})"))
    rows.append(Row("stm-vim", OK, f"{__version__} ({Path(__file__).resolve().parent})"))
    rows += _packages()
    trt, tensorrt_rows = _tensorrt()
    rows += tensorrt_rows
    machine = gpus.driver()
    rows += _gpu_rows(machine)
    rows += _torch_rows(machine)
    report.gpus = [{**asdict(gpu), "sm": gpu.sm} for gpu in machine.gpus]
    library, plugin_rows = _plugin(trt)
    rows += plugin_rows
    if library is not None:
        report.plugin = {"path": str(library.path), "tensorrt_major": library.major, "kernel_version": library.kernel_version}
        report.plugin |= {"sha256": library.sha256, "coverage": str(library.coverage), "build_info": library.build_info}
        rows += [_coverage_row(library, gpu) for gpu in machine.gpus]
    rows += _build_tools()
    rows += _folders()
    report.abilities = _abilities(rows, trt, machine)
    return report


def _try(name: str) -> tuple[Any, str]:
    """The module, or (None, why): a broken package raises whatever it likes."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name.split(".")[0] else f"{error}"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _version(module: Any, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown version"))


def _packages() -> list[Row]:
    details: dict[str, Callable[[Any], str]] = {
        "torch": lambda torch: f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build",
        "onnxruntime": lambda ort: ", ".join(provider.removesuffix("ExecutionProvider") for provider in ort.get_available_providers()),
    }
    rows = []
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "onnx-graphsurgeon", "polygraphy"):
        module, problem = _try(package.replace("-", "_"))
        if module is None:
            status, value = (MISSING, "not installed") if problem == "not installed" else (PROBLEM, problem)
            rows.append(Row(package, status, value, f"pip install --force-reinstall {package}" if status == PROBLEM else f"pip install {package}"))
            continue
        value = _version(module, package)
        if package in details:
            try:
                value += f", {details[package](module)}"
            except Exception as error:
                rows.append(Row(package, PROBLEM, f"{value}: {error}", f"pip install --force-reinstall {package}"))
                continue
        rows.append(Row(package, OK, value))
    return rows


def _tensorrt() -> tuple[Any, list[Row]]:
    try:
        trt = libraries.tensorrt_module()
    except StmError as error:
        status = MISSING if "not installed" in str(error) else PROBLEM
        value, _, todo = str(error).partition(". ")
        return None, [Row("TensorRT", status, value, todo)]
    version = str(trt.__version__)
    where = f"{version}, libnvinfer loads"
    if not hasattr(trt, "Builder"):
        return trt, [Row("TensorRT", PROBLEM, f"{where}; a runtime without a builder", "Install the full package to build engines.")]
    if old := libraries.tensorrt_too_old(trt):
        return trt, [Row("TensorRT", PROBLEM, old, libraries.GET_TENSORRT)]
    return trt, [Row("TensorRT", OK, where)]


def _gpu_rows(machine: gpus.Driver) -> list[Row]:
    if machine.problem:
        return [Row("driver", PROBLEM if machine.version else MISSING, f"{machine.version} {machine.problem}".strip(), _DRIVER)]
    rows = [Row("driver", OK, f"{machine.version or 'version unknown'}, runs CUDA up to {machine.cuda}")]
    return rows + [Row(f"GPU {gpu.index}", OK, str(gpu)) for gpu in machine.gpus]


def _torch_rows(machine: gpus.Driver) -> list[Row]:
    """Can torch use the GPU? Told from versions: asking torch would start CUDA. An engine is compared with PyTorch there."""
    torch, _ = _try("torch")
    if torch is None or not machine.gpus:
        return []
    built = torch.version.cuda
    if built and machine.cuda and int(built.split(".")[0]) <= int(machine.cuda.split(".")[0]):
        return [Row(_TORCH, OK, f"built for CUDA {built}")]
    value = f"built for CUDA {built}, the driver runs CUDA up to {machine.cuda or 'unknown'}" if built else "a CPU build"
    return [Row(_TORCH, PROBLEM, value, "Install a torch for this driver (https://pytorch.org/get-started/locally), or a newer driver.")]


def _plugin(trt: Any) -> tuple[libraries.PluginLibrary | None, list[Row]]:
    """The library for this TensorRT, loaded into it; without TensorRT whichever is there, only read."""
    majors = [libraries.tensorrt_major(trt)] if trt is not None else [11, 10]
    built = plugin_build.read_build_info(libraries.PACKAGE_FOLDER)
    rows = [Row("plugin build", OK if built.status == "built" else MISSING, built.line)] if built is not None else []
    error: StmError | None = None
    for major in majors:
        try:
            library = libraries.load_plugin(tensorrt=trt) if trt is not None else libraries.read_plugin(libraries.find_plugin(major))
        except StmError as raised:
            error = raised
            continue
        loaded = "loaded" if trt is not None else f"readable; needs TensorRT {library.major} to load"
        value = f"{library.path} ({loaded}; kernels {library.kernel_version}, TensorRT {library.build_info.get('tensorrt')}, {library.coverage})"
        return library, [*rows, Row("plugin", OK, value)]
    value, _, todo = str(error).partition(". ")
    return None, [*rows, Row("plugin", MISSING if error is not None and error.exit_code == 3 else PROBLEM, value, todo)]


def _coverage_row(library: libraries.PluginLibrary, gpu: gpus.Gpu) -> Row:
    try:
        how = libraries.check_gpu_covered(library, gpu.compute_capability, gpu.name)
    except StmError as error:
        value, _, todo = str(error).partition(". ")
        return Row(f"plugin on GPU {gpu.index}", PROBLEM, value, todo)
    text = {"cubin": "has machine code for", "PTX": "has PTX for (compiled by the driver at the first run)"}[how]
    return Row(f"plugin on GPU {gpu.index}", OK, f"{text} sm_{gpu.sm}")


def _build_tools() -> list[Row]:
    """Needed to build the plugin or a C++ app, not to use either."""
    rows = []
    try:
        nvcc = plugin_build.find_nvcc()
        text = f"CUDA {plugin_build.nvcc_version(nvcc)} ({nvcc})" if nvcc else "none"
        rows.append(Row("nvcc", OK, text) if nvcc else Row("nvcc", MISSING, "none; only needed to build the plugin", plugin_build.GET_NVCC))
    except plugin_build.PluginBuildError as error:
        rows.append(Row("nvcc", PROBLEM, str(error), plugin_build.GET_NVCC))
    try:
        headers = plugin_build.find_headers()
        text = ", ".join(f"{version} ({folder})" for version, folder in headers.values())
        missing = Row("TensorRT headers", MISSING, "none; only needed to build the plugin or a C++ app", plugin_build.GET_HEADERS)
        rows.append(Row("TensorRT headers", OK, text) if headers else missing)
    except plugin_build.PluginBuildError as error:
        rows.append(Row("TensorRT headers", PROBLEM, str(error), plugin_build.GET_HEADERS))
    cmake = plugin_build.find_tool("cmake", plugin_build.MIN_CMAKE)
    compiler = next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)
    for name, tool, todo in (("cmake", cmake, "pip install cmake"), ("C++ compiler", compiler, "apt-get install g++")):
        rows.append(Row(name, OK, str(tool)) if tool else Row(name, MISSING, "none; only needed to build", todo))
    package = libraries.PACKAGE_FOLDER / "cmake" / "stm_plugins"
    if package.is_dir():
        rows.append(Row("C++ package", OK, f"find_package(stm_plugins) with -DCMAKE_PREFIX_PATH={libraries.PACKAGE_FOLDER.parent}"))
    return rows


def _folders() -> list[Row]:
    """Where downloads and temporary files go."""
    import tempfile

    hub, _ = _try("huggingface_hub.constants")
    folders = {"weights cache": Path(hub.HF_HUB_CACHE)} if hub is not None else {}
    folders["temporary files"] = Path(tempfile.gettempdir())
    rows = []
    for name, folder in folders.items():
        exists = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(exists).free
        value = f"{folder}, {free / 2**30:.0f} GiB free"
        if not os.access(exists, os.W_OK):
            rows.append(Row(name, PROBLEM, f"{folder} cannot be written", "Set HF_HOME (weights) or TMPDIR (temporary files) to a folder that can."))
        elif free < _LOW_DISK_BYTES:
            rows.append(Row(name, PROBLEM, value, "Free some space, or set HF_HOME or TMPDIR to another disk."))
        else:
            rows.append(Row(name, OK, value))
    return rows


def _abilities(rows: list[Row], trt: Any, machine: gpus.Driver) -> list[Ability]:
    status = {row.name: row.status for row in rows}

    def ability(name: str, lacking: list[str]) -> Ability:
        return Ability(name, not lacking, f"needs {', '.join(lacking)}" if lacking else "")

    export = [name for name in EXPORT_NEEDS if status.get(name) != OK]
    plugin = [] if status.get("plugin") == OK and trt is not None else ["the plugin"]
    uncovered = [row.name for row in rows if row.name.startswith("plugin on GPU")]
    if not plugin and machine.gpus and uncovered and all(status[name] != OK for name in uncovered):
        plugin = ["a plugin built for this GPU"]
    gpu = [] if machine.gpus else ["a GPU"]
    run = (["TensorRT"] if trt is None else []) + gpu + plugin
    full = trt is not None and hasattr(trt, "Builder")
    surgery = [] if status.get("onnx-graphsurgeon") == OK else ["onnx-graphsurgeon"]
    torch = [] if status.get(_TORCH, OK) == OK else ["a torch that runs on the GPU"]
    build = ([] if full else ["TensorRT with its builder"]) + gpu + plugin + export + torch + surgery
    torch += [] if status.get("torch") == OK else ["torch"]
    onnx_sample = [name for name in ("onnxruntime",) if status.get(name) != OK]
    tools = [name for name in ("cmake", "C++ compiler", "TensorRT headers") if status.get(name) != OK]
    return [
        ability("export .onnx", export),
        ability("build engine", build),
        ability("run engine", run),
        ability("samples, ONNX", onnx_sample),
        ability("samples, Python engine", run + torch),
        ability("samples, C++ engine", run + tools),
    ]
