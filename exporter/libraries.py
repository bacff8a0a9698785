"""Find and load our TensorRT plugin library: the right one for this TensorRT, checked before TensorRT sees it.

`load_plugin()` is all that a program needs before it parses our ONNX nodes or deserialises an engine with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stm.errors import MissingDependencyError

from .errors import PluginError
from .plugin_build import LIBRARY_FOLDER, read_build_info

ABI_VERSION = 2  # STM_PLUGIN_ABI_VERSION of plugins/include/stm_plugins.h, which the lowering writes for
CREATORS = ("StmPatchRows", "StmConvXProj", "StmMambaScan", "StmAddMergeNorm", "StmLinear")
PACKAGE_FOLDER = Path(__file__).resolve().parent / LIBRARY_FOLDER
BUILD_FOLDER = Path(__file__).resolve().parents[1] / "build"  # `cmake -B build` in a checkout
ENVIRONMENT = "STM_PLUGIN_LIBRARY"

MIN_TENSORRT = (10, 6)
GET_TENSORRT = (
    "Get it with `pip install 'tensorrt-cu13>=10.6'` (or tensorrt-cu12), a TensorRT tarball, or NVIDIA's TensorRT container. "
    "Without TensorRT, export to .onnx works: `stm-export ... -o vim.onnx`."
)
_GET_PLUGIN = (
    "Build it with `TENSORRT_INCLUDE_DIR=/path/to/TensorRT/include pip install --no-build-isolation .` in a checkout (needs nvcc), or with CMake "
    f"(plugins/README.md) and {ENVIRONMENT}=/path/to/libstm_trt{{major}}.so. Without it, export to .onnx works."
)
_TEGRA = {62, 72, 87, 101, 110}  # cubins of discrete GPUs are not for them


@dataclass(frozen=True)
class SmCoverage:
    """Which GPUs a library has code for: machine code (`cubins`) and PTX, as numbers such as 90; `exact` holds those
    such as 90a that run on that GPU only."""

    cubins: frozenset[int]
    ptx: frozenset[int]
    exact: frozenset[int] = frozenset()

    def covers(self, sm: int) -> str:
        """How a GPU is served: "cubin", "PTX" (compiled by the driver at the first run), or "" if it is not."""
        if sm in self.cubins or sm in self.exact:
            return "cubin"
        if sm not in _TEGRA and any(cubin // 10 == sm // 10 and cubin < sm and cubin not in _TEGRA for cubin in self.cubins):
            return "cubin"
        return "PTX" if any(ptx <= sm for ptx in self.ptx) else ""

    def __str__(self) -> str:
        text = " ".join(f"sm_{sm}" for sm in sorted(self.cubins))
        text += "".join(f" sm_{sm}a" for sm in sorted(self.exact))
        text += "".join(f" + PTX {sm}" for sm in sorted(self.ptx))
        return text.strip() or "no GPU code"


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library as it describes itself. `major` is the TensorRT that it is for."""

    path: Path
    major: int
    kernel_version: int
    abi_version: int
    sha256: str
    build_info: dict[str, Any]

    @property
    def coverage(self) -> SmCoverage:
        return _coverage(str(self.build_info.get("archs", "")))


def library_name(major: int) -> str:
    """The file name of the library for a major version of TensorRT."""
    return f"libstm_trt{major}.so"


# --- finding -------------------------------------------------------------------------------------------------------------


def find_plugin(major: int, path: str | os.PathLike[str] | None = None) -> Path:
    """The plugin library for TensorRT `major`.

    Looks at `path`, the environment's STM_PLUGIN_LIBRARY (either may be a folder; whichever is given decides), the installed
    package, and a CMake build folder `build/` of the checkout.

    Raises:
        PluginError: there is none; says where it looked, how to get it and what works without.
    """
    name = library_name(major)
    for given, source in ((path, "the path given"), (os.environ.get(ENVIRONMENT), ENVIRONMENT)):
        if given:
            found = Path(given) / name if Path(given).is_dir() else Path(given)
            if not found.is_file():
                raise PluginError(f"no plugin library {found} ({source}). " + _GET_PLUGIN.format(major=major))
            return found.resolve()
    folders = (PACKAGE_FOLDER, BUILD_FOLDER / "lib", BUILD_FOLDER)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    others = sorted({file.name for folder in folders for file in folder.glob("libstm_trt*[0-9].so")})
    has = f"; there is {', '.join(others)} for another TensorRT" if others else ""
    built = read_build_info(PACKAGE_FOLDER)
    why = f" When this package was installed: {built.line}." if built is not None and built.status != "built" else ""
    raise PluginError(
        f"no plugin library {name} for TensorRT {major} (looked in {ENVIRONMENT}, {PACKAGE_FOLDER}, {BUILD_FOLDER}){has}.{why} "
        + _GET_PLUGIN.format(major=major)
    )


def tensorrt_module(name: str = "tensorrt") -> Any:
    """The tensorrt package.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise MissingDependencyError(f"{name} is installed but cannot be imported: {error}. {GET_TENSORRT}") from None
        raise MissingDependencyError(f"TensorRT is not installed: no module {name}. {GET_TENSORRT}") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(f"{name} is installed but cannot be loaded: {error}. {GET_TENSORRT}") from None


def tensorrt_too_old(trt: Any) -> str:
    """Says so of a TensorRT before MIN_TENSORRT; else an empty string."""
    found = tuple(int(part) for part in str(trt.__version__).split(".")[:2] if part.isdigit())
    return f"TensorRT {trt.__version__} is too old; we need {'.'.join(map(str, MIN_TENSORRT))} or later" if found < MIN_TENSORRT else ""


def tensorrt_major(trt: Any) -> int:
    """10 for version "10.6.0"."""
    return int(str(trt.__version__).split(".")[0])


# --- reading -------------------------------------------------------------------------------------------------------------


def read_plugin(path: str | os.PathLike[str]) -> PluginLibrary:
    """What a library says of itself. Opens it, which registers nothing and needs neither TensorRT nor a GPU.

    Raises:
        PluginError: no such file, not a core plugin library of ours (the shim among others), or not loadable here.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read the plugin library {path}: {error.strerror or error}") from None
    # Judged by the file's bytes before it is opened: opening the shim registers, and opening a stranger runs its code.
    if b"stm_register_plugins" in data:
        core = path.name.replace("_static", "")
        raise PluginError(
            f"{path} is the shim that registers when it is opened; TensorRT's registry would crash on it. Give the core library {core} beside it."
        )
    if data[:4] != b"\x7fELF" or b"stm_plugin_tensorrt_major" not in data:
        raise PluginError(f"{path} is not one of our plugin libraries (it has no stm_plugin_tensorrt_major). Give libstm_trt<MAJOR>.so.")
    if _elf_bytes(data) > len(data):  # opening half a library is a bus error
        raise PluginError(f"{path} has {len(data)} bytes of {_elf_bytes(data)}: it was cut off. Copy or build it again.")
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.stm_plugin_build_info.restype = ctypes.c_char_p
        info = json.loads(library.stm_plugin_build_info() or b"{}")
        versions = library.stm_plugin_tensorrt_major(), library.stm_plugin_kernel_version(), library.stm_plugin_abi_version()
    except (OSError, AttributeError, ValueError) as error:
        raise PluginError(f"{path} cannot be opened: {error}. Build it again on this machine (plugins/README.md).") from None
    return PluginLibrary(path.resolve(), versions[0], versions[1], versions[2], hashlib.sha256(data).hexdigest(), info)


def _elf_bytes(data: bytes) -> int:
    """How long a 64-bit ELF file must be: its table of sections lies at the end."""
    if len(data) < 64:
        return 64
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    return int(table + size * count)


def sm_coverage(path: str | os.PathLike[str]) -> SmCoverage:
    """Which GPUs the library at `path` has code for, as its build information says.

    Raises:
        PluginError: as `read_plugin`.
    """
    return read_plugin(path).coverage


def _coverage(archs: str) -> SmCoverage:
    """CMake's list, for example "80-real 90a-real 100-virtual 120": without a suffix, machine code and PTX."""
    cubins, ptx, exact = set(), set(), set()
    for number, special, kind in re.findall(r"\b(\d+)([af]?)(-real|-virtual)?(?=[\s;]|$)", archs):
        sm = int(number)
        if special == "a":  # neither its machine code nor its PTX runs elsewhere
            exact.add(sm)
            continue
        if kind != "-virtual":
            cubins.add(sm)
        if kind != "-real" and not special:
            ptx.add(sm)
    return SmCoverage(frozenset(cubins), frozenset(ptx), frozenset(exact))


def check_gpu_covered(library: PluginLibrary, compute_capability: tuple[int, int], gpu: str = "this GPU") -> str:
    """How the library serves a GPU: "cubin" or "PTX".

    Raises:
        PluginError: it has no code for that GPU; names both and the mend.
    """
    sm = compute_capability[0] * 10 + compute_capability[1]
    how = library.coverage.covers(sm)
    if not how:
        raise PluginError(
            f"{library.path} has code for {library.coverage}, but {gpu} is sm_{sm}. Build it again with "
            f"STM_CUDA_ARCHITECTURES={sm} (pip's environment variable, or CMake's -D)."
        )
    return how


# --- loading -------------------------------------------------------------------------------------------------------------

_loaded: dict[int, PluginLibrary] = {}  # by the id of the registry's module


def load_plugin(path: str | os.PathLike[str] | None = None, logger: Any = None, tensorrt: Any = None) -> PluginLibrary:
    """Register our plugins with TensorRT; calling it again changes nothing.

    Args:
        path: the library (or its folder); default: `find_plugin`.
        logger: a trt.ILogger that is told which library was loaded. (TensorRT and the plugins report to the logger of the
            process's first Runtime or Builder.)
        tensorrt: the package to use, for example tensorrt_lean; default: tensorrt.

    Raises:
        MissingDependencyError: no TensorRT (exit code 3).
        PluginError: there is no library, it is for another TensorRT or another version of us, or TensorRT refuses it (exit code 6).
    """
    trt = tensorrt if tensorrt is not None else tensorrt_module()
    major = tensorrt_major(trt)
    found = find_plugin(major, path)
    mapped = _mapped_libraries()  # before this call opens one
    library = read_plugin(found)
    if library.major != major:
        raise PluginError(
            f"{found} is for TensorRT {library.major}, but this process has TensorRT {trt.__version__}: it would die at its first message. "
            f"Give {library_name(major)}, or install TensorRT {library.major}."
        )
    if library.abi_version != ABI_VERSION:
        raise PluginError(
            f"{found} speaks version {library.abi_version} of our ops, this package version {ABI_VERSION}: their inputs differ. "
            "Build the library from the same checkout."
        )
    before = _loaded.get(id(trt))
    if before is not None and before.sha256 != library.sha256:
        raise PluginError(f"this process has loaded {before.path} already and cannot change to {found}. Start a new one.")
    registry = trt.get_plugin_registry()
    missing = _missing_creators(registry)
    if not missing:
        _check_same(library, mapped)
    elif len(missing) < len(CREATORS):
        there = ", ".join(sorted(set(CREATORS) - set(missing)))
        raise PluginError(f"another plugin library has registered {there} but not {', '.join(missing)}. Load only {found}, in a new process.")
    else:
        # None and no exception: refused.
        if registry.load_library(str(library.path)) is None or _missing_creators(registry):
            raise PluginError(
                f"TensorRT {trt.__version__} did not take the plugins of {library.path}"
                f" (built with headers of {library.build_info.get('tensorrt', '?')}). Make a trt.Runtime(trt.Logger()) first and its log says why."
            )
        if logger is not None:
            logger.log(trt.ILogger.INFO, f"stm plugins {library.build_info.get('version', '')} from {library.path}")
    _loaded[id(trt)] = library
    return library


def _missing_creators(registry: Any) -> list[str]:
    """Those of ours that are not registered. Lists them: asking `get_creator` for an absent one logs an error."""
    creators = getattr(registry, "all_creators", None)
    if creators is None:
        creators = registry.plugin_creator_list
    names = {creator.name for creator in creators}
    return [name for name in CREATORS if name not in names]


def _mapped_libraries() -> list[Path]:
    """Core plugin libraries that this process has open."""
    try:
        lines: Iterable[str] = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.partition("/")[2] for line in lines if re.search(r"/libstm_trt\d+\.so$", line)}
    return [Path("/" + path) for path in sorted(paths)]


def _check_same(library: PluginLibrary, mapped: list[Path]) -> None:
    """Plugins that somebody else registered (the shim, say) must come from a copy of this library."""
    for path in mapped:
        if path.name == library.path.name and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == library.sha256:
            return
    if mapped:
        raise PluginError(
            f"the plugins in this process come from {mapped[0]}, which differs from {library.path}. "
            "Load one of them only (the shim takes the core beside it)."
        )
