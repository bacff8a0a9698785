"""ONNX -> TensorRT engine on our plugin, strongly typed; and the sidecar that says what belongs to it.

TensorRT is imported inside the functions: everything else of the package works without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from stm.errors import ConfigError, MissingDependencyError

from .errors import ArtefactError, BuildError, ExportError, PluginError
from .files import check_writable, written_aside
from .gpus import Gpu, driver
from .libraries import GET_TENSORRT, PluginLibrary, SmCoverage, check_gpu_covered, load_plugin, tensorrt_module, tensorrt_too_old
from .op_schema import INPUT, OUTPUT
from .passes.fuse_linear import HOPPER
from .passes.tensorrt import lower_tensorrt, plugin_nodes
from .tolerances import TOLERANCES

SIDECAR_SCHEMA = 1
_WITHOUT = "What works here: `stm-export -o vim.onnx` (portable ONNX, verified on the CPU), `stm plan`, `stm inspect`."


@dataclass(frozen=True)
class BatchProfile:
    """Batch sizes of an optimisation profile: the least, the one to tune for, the most."""

    min: int = 1
    opt: int = 8
    max: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(f"batch {self.min}:{self.opt}:{self.max}: give min:opt:max with 1 <= min <= opt <= max")

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """`8` (fixed), `1:8:128`, or trtexec's `images:1x3x224x224` triple joined by commas is read by `from_shapes`."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"batch {text!r}: give N or MIN:OPT:MAX, for example 1:8:128")
        numbers = [int(part) for part in parts]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))

    @classmethod
    def from_shapes(cls, low: str | None, best: str | None, high: str | None, image_size: tuple[int, int]) -> BatchProfile:
        """From trtexec's --minShapes, --optShapes, --maxShapes: `images:8x3x224x224`; an absent one follows its neighbour."""
        if high is None and best is None and low is None:
            return cls()
        batches = [None if text is None else _shape_batch(text, image_size) for text in (low, best, high)]
        known = [batch for batch in batches if batch is not None]
        least, best_batch, most = batches
        least, most = min(known) if least is None else least, max(known) if most is None else most
        return cls(least, most if best_batch is None else best_batch, most)


def _shape_batch(text: str, image_size: tuple[int, int]) -> int:
    name, _, shape = text.rpartition(":")
    dims = shape.split("x")
    if name not in ("", INPUT) or len(dims) != 4 or not all(dim.isdecimal() for dim in dims):
        raise ConfigError(f"shape {text!r}: give {INPUT}:Nx3x{image_size[0]}x{image_size[1]}, as trtexec does")
    if [int(dim) for dim in dims[1:]] != [3, *image_size]:
        raise ConfigError(f"shape {text!r}: only the batch is dynamic; the rest is 3x{image_size[0]}x{image_size[1]}, fixed at export")
    return int(dims[0])


def default_timing_cache() -> Path | None:
    """One timing cache a user, TensorRT version and GPU; XDG_CACHE_HOME is honoured. None, with a warning, where it cannot be
    written: a container's user often has no home, and a build needs no cache."""
    name = f"timing-trt{require_tensorrt().__version__}-sm{gpu()['sm']}.cache"
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stm" / name
        check_writable(path)
    except (ExportError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(f"no timing cache ({error}): later builds will not be faster. Name a file: --timing-cache FILE", stacklevel=2)
        return None
    return path


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `workspace_bytes` None leaves it to TensorRT; `max_threads` 0 means all CPUs; `fp16_accumulation` says how
    the model given was lowered (`lower_for_engine`) and goes into the sidecar."""

    batch: BatchProfile = BatchProfile()
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    opt_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False
    embed_plugins: bool = False
    refit: bool = False
    tf32: bool = False
    fp16_accumulation: bool = False
    max_threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.opt_level <= 5:
            raise ConfigError(f"opt level is {self.opt_level}; TensorRT has 0 to 5")


@dataclass
class BuildInfo:
    """What a build took and gave. `layers` maps each plugin node to the layer that runs it."""

    seconds: float
    builder_seconds: float
    cache_hits: bool
    plugin_layers: list[str]
    layers: int
    device_memory_bytes: int
    messages: list[str] = field(default_factory=list)


def require_tensorrt() -> Any:
    """Import tensorrt.

    Raises:
        MissingDependencyError: it is not installed, too old, or its library does not load; says what still works.
    """
    try:
        trt = tensorrt_module()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error} {_WITHOUT}") from None
    if old := tensorrt_too_old(trt):
        raise MissingDependencyError(f"{old}. {GET_TENSORRT} {_WITHOUT}")
    return trt


def require_gpu() -> Gpu:
    """The first GPU. Ask before a Builder is made: without a driver, TensorRT ends the process instead of raising.

    Raises:
        MissingDependencyError: no NVIDIA driver or no GPU.
    """
    found = driver(with_version=False)
    if not found.gpus:
        raise MissingDependencyError(f"engines are built and run on a GPU: {found.problem}. {_WITHOUT}")
    return found.gpus[0]


def lower_for_engine(model: onnx.ModelProto, precision: str, options: BuildOptions, plugin_library: str | Path | None = None) -> onnx.ModelProto:
    """`lower_tensorrt` for the engine that `options` ask for, for this machine's first GPU as far as the plugin library has kernels of
    its own for it; a hardware-compatible engine counts on no GPU."""
    found = () if options.hardware_compatible else driver(with_version=False).gpus
    sm = found[0].sm if found else None
    if sm == HOPPER:
        coverage = load_plugin(plugin_library).coverage
        if HOPPER not in coverage.cubins | coverage.exact:  # compiled for another GPU, or it does not say
            sm = None
    return lower_tensorrt(model, precision, options.fp16_accumulation, options.batch.max, sm)


def require_torch_gpu() -> None:
    """Ask before a build whether torch can use the GPU: parity against PyTorch and the timing of an engine need it.

    Raises:
        MissingDependencyError: torch is a CPU build, or built for a newer CUDA than the driver runs; names both.
    """
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise MissingDependencyError(
            f"PyTorch, the reference of parity, cannot use the GPU: torch {torch.__version__} is {built}, the driver runs CUDA up to "
            f"{driver(with_version=False).cuda or 'unknown'}. Install a torch for this driver (pytorch.org/get-started/locally), or a newer driver. "
            f"An engine that exists runs without: `stm verify x.engine --reference DIR`."
        )


def _plugin_for(device: Gpu, path: str | Path | None) -> PluginLibrary:
    """`load_plugin`, and refuse a library without code for this GPU; one that does not say what it has is believed."""
    library = load_plugin(path)
    if library.coverage != SmCoverage(frozenset(), frozenset()):
        check_gpu_covered(library, device.compute_capability, device.name)
    return library


def gpu() -> dict[str, str]:
    """Name and compute capability of the first GPU, as the sidecar has them."""
    first = require_gpu()
    return {"name": first.name, "sm": ".".join(map(str, first.compute_capability))}


class _Process:
    """One Builder and one logger for the life of the process: a second Builder beside a living one costs nothing, the
    first loads gigabytes of kernels."""

    def __init__(self) -> None:
        trt = require_tensorrt()

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, text: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    self.lines.append(f"[{str(severity).rpartition('.')[2]}] {text}")

        self.trt, self.logger = trt, Logger()
        self._builder: Any = None

    @property
    def builder(self) -> Any:
        if self._builder is None:
            require_gpu()
            self._builder = self.trt.Builder(self.logger)
        return self._builder


_process: _Process | None = None


def process() -> _Process:
    """The TensorRT objects of this process, made on first use."""
    global _process
    if _process is None:
        _process = _Process()
    return _process


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C during a build cannot raise inside TensorRT: note it, let the monitor stop the build, raise afterwards."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt


def _monitor(trt: Any, show: bool, stopped: Callable[[], bool]) -> Any:
    """TensorRT's IProgressMonitor as nested tqdm bars on stderr (a terminal only), and as the way to stop a build."""
    from tqdm import tqdm

    quiet = not show or not sys.stderr.isatty()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, Any] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.bars[name] = tqdm(total=steps, desc=name[:40], leave=False, disable=quiet, position=len(self.bars), file=sys.stderr)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.bars:
                self.bars[name].update(1)
            return not stopped()

        def phase_finish(self, name: str) -> None:
            if name in self.bars:
                self.bars.pop(name).close()

    return Monitor()


def build_engine(
    model: onnx.ModelProto, options: BuildOptions, *, plugin_library: str | Path | None = None, show_progress: bool = False
) -> tuple[bytes, BuildInfo]:
    """Build a lowered model (`lower_for_engine`) into a plan.

    Returns:
        The serialised engine and what the build took.

    Raises:
        MissingDependencyError: no TensorRT or GPU.
        PluginError: no plugin library, none with code for this GPU, not found by the parser, or a node that is ours is run by
            something else.
        ExportError: the timing cache cannot be written.
        BuildError: TensorRT refuses; its messages are quoted.
    """
    owner = process()
    trt = owner.trt
    library = _plugin_for(require_gpu(), plugin_library)
    if options.timing_cache is not None:
        check_writable(options.timing_cache)  # not after minutes of building
    owner.logger.lines.clear()
    start = time.perf_counter()
    builder = owner.builder
    builder_seconds = time.perf_counter() - start
    builder.max_threads = options.max_threads or max(1, os.cpu_count() or 1)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, owner.logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i).desc().strip() for i in range(parser.num_errors)]
        text = "; ".join([*errors, *owner.logger.lines[-4:]])[:1200]
        if "lugin" in text:
            raise PluginError(f"TensorRT cannot place our nodes on the plugin {library.path}: {text}")
        raise BuildError(f"TensorRT cannot parse the lowered model: {text}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.opt_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.embed_plugins:
        config.plugins_to_serialize = [str(library.path)]
    cached = options.timing_cache.read_bytes() if options.timing_cache is not None and options.timing_cache.is_file() else b""
    cache = config.create_timing_cache(cached)
    if cache is None:
        raise ArtefactError(f"{options.timing_cache} is not a timing cache of TensorRT {trt.__version__}; delete it or name another file")
    config.set_timing_cache(cache, False)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    batch = options.batch
    profile.set_shape(network.get_input(0).name, (batch.min, *shape), (batch.opt, *shape), (batch.max, *shape))
    config.add_optimization_profile(profile)
    with _interruptible() as stopped:
        config.progress_monitor = _monitor(trt, show_progress, stopped)
        start = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - start
    if plan is None:
        raise BuildError(f"TensorRT cannot build the engine: {'; '.join(owner.logger.lines[-6:])[:1500] or 'it gave no reason'}")
    blob = bytes(plan)
    if options.timing_cache is not None:
        with written_aside(options.timing_cache) as aside:
            aside.write_bytes(bytes(cache.serialize()))
    layers, memory = _layers_of(deserialize(owner, blob, options.version_compatible), trt)
    expected = plugin_nodes(model)
    ours = [name for name in expected if any(name == layer["name"] and layer["plugin"] for layer in layers)]
    if missing := sorted(set(expected) - set(ours)):
        raise PluginError(
            f"{len(missing)} of {len(expected)} nodes that are ours are not run by the plugin, first {missing[0]!r}; layers: {len(layers)}"
        )
    return blob, BuildInfo(
        seconds=round(seconds, 2),
        builder_seconds=round(builder_seconds, 2),
        cache_hits=bool(cached),
        plugin_layers=ours,
        layers=len(layers),
        device_memory_bytes=memory,
        messages=[line for line in owner.logger.lines if line.startswith("[ERROR]")],
    )


def _layers_of(engine: Any, trt: Any) -> tuple[list[dict[str, Any]], int]:
    return engine_layers(engine, trt), int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)


def engine_layers(engine: Any, trt: Any) -> list[dict[str, Any]]:
    """Layers of an engine: name, type, whether a plugin of ours runs it, tactic, and the ONNX nodes that it came from, where TensorRT
    says. Tolerant of the inspector's versions."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text).get("Layers", [])
    except json.JSONDecodeError:  # another library's plugin metadata is pasted in unescaped
        pairs = re.findall(r'^ *"Name": "([^"\n]*)",\n *"LayerType": "([^"\n]*)"', text, re.MULTILINE)
        layers = [{"Name": name, "LayerType": kind} for name, kind in pairs]
    found = []
    for layer in layers:
        if isinstance(layer, str):
            found.append({"name": layer, "type": "", "plugin": False, "nodes": []})
            continue
        kind = str(layer.get("LayerType", ""))
        found.append(
            {
                "name": str(layer.get("Name", "")),
                "type": kind,
                "plugin": "plugin" in kind.lower(),
                "tactic": str(layer.get("TacticValue", layer.get("TacticName", ""))),
                "nodes": re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", ""))),
            }
        )
    return found


def deserialize(owner: _Process, blob: bytes, host_code: bool = False) -> Any:
    """Load a plan in a runtime of its own: plugins embedded in a plan stay in its runtime's registry, where a second such plan
    would be refused. `host_code` allows code in the plan (version-compatible ones carry some).

    Raises:
        ArtefactError: this TensorRT or GPU cannot load the plan; quotes its reason.
    """
    require_gpu()
    owner.logger.lines.clear()
    runtime = owner.trt.Runtime(owner.logger)  # the engine keeps it alive
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(blob)
    if engine is None:
        raise ArtefactError(f"TensorRT {owner.trt.__version__} cannot load the engine: {'; '.join(owner.logger.lines[-3:])[:800]}")
    return engine


# --- sidecar ----------------------------------------------------------------------------------------------------------


def adds_up_in_fp16(sidecar: Mapping[str, Any]) -> bool:
    """Whether GEMMs may add up in fp16: by an engine's sidecar, and where that says nothing, as before it did, if it is of fp16. Never
    for a portable file's metadata: it is of fp32."""
    build = sidecar.get("build") or {}
    return bool(build.get("fp16_accumulation", sidecar["precision"] == "fp16"))


def sidecar_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def make_sidecar(model: onnx.ModelProto, blob: bytes, options: BuildOptions, info: BuildInfo, library: Any, precision: str) -> dict[str, Any]:
    """What belongs to an engine and does not fit into a plain plan file."""
    meta = {entry.key.removeprefix("stm."): entry.value for entry in model.metadata_props}
    config = json.loads(meta["config"])
    return {
        "schema": SIDECAR_SCHEMA,
        "kind": "engine",
        "model": meta["model"],
        "config": config,
        "weights": meta["weights"],
        "weights_random": json.loads(meta["weights_random"]),
        "weights_sha256": meta["weights_sha256"],
        "checkpoint_sha256": meta["checkpoint_sha256"],
        "weights_kind": meta["weights_kind"],
        "seed": json.loads(meta["seed"]),
        "ema": json.loads(meta["ema"]),
        "pos_embed_resize": meta["pos_embed_resize"],
        "plan": json.loads(meta["plan"]) if meta["plan"] else None,
        "reduction": json.loads(meta["reduction"]) if meta.get("reduction") else None,
        "seqlen": json.loads(meta["seqlen"]),
        "tokens_left": int(meta["tokens_left"]),
        "token_layers_removed": int(meta["token_layers_removed"]),
        "gflops_paper": float(meta["gflops_paper"]),
        "gflops_true": float(meta["gflops_true"]),
        "precision": precision,
        "image_size": json.loads(meta["image_size"]),
        "normalization": json.loads(meta["normalization"]),
        "num_classes": config["num_classes"],
        "classes": json.loads(meta["classes"]) if meta["classes"] else None,
        "input": INPUT,
        "output": OUTPUT,
        "batch": asdict(options.batch),
        "tensorrt": process().trt.__version__,
        "gpu": gpu(),
        "plugin": {
            "library": library.path.name,
            "sha256": library.sha256,
            "kernel_version": library.kernel_version,
            "embedded": options.embed_plugins,
        },
        "build": {
            "opt_level": options.opt_level,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
            "refit": options.refit,
            "fp16_accumulation": options.fp16_accumulation,
            **{key: value for key, value in asdict(info).items() if key not in ("plugin_layers", "messages")},
            "plugin_layers": len(info.plugin_layers),
        },
        "engine_bytes": len(blob),
        "engine_sha256": hashlib.sha256(blob).hexdigest(),
        "parity": None,
        "timing": None,
    }


_SIDECAR_FIELDS: dict[str, tuple[Any, bool]] = {  # what is read of it: its type, and whether it may be absent
    **dict.fromkeys(("model", "precision", "tensorrt", "engine_sha256", "weights_sha256"), (str, False)),
    **dict.fromkeys(("normalization", "gpu", "batch"), (dict, False)),
    "image_size": (list, False),
    "num_classes": (int, False),
    "plan": ((dict, type(None)), False),
    "weights": (str, True),
    "weights_random": (bool, True),
    "seed": ((int, type(None)), True),
    "build": (dict, True),
    **dict.fromkeys(("plugin", "reduction"), ((dict, type(None)), True)),
    "classes": ((list, type(None)), True),
}


def read_sidecar(engine: Path) -> dict[str, Any]:
    """Read and check `ENGINE.json`.

    Raises:
        ArtefactError: it is missing, broken, or of another schema.
    """
    path = sidecar_path(engine)
    try:
        if path.stat().st_size > 64 * 1024 * 1024:
            raise ArtefactError(f"{path} has {path.stat().st_size} bytes; a sidecar is small")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(
            f"{engine} has no sidecar {path.name} beside it ({error.strerror}); it was not made by stm-export, or moved without it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SIDECAR_SCHEMA or data.get("kind") != "engine":
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ArtefactError(f"{path}: schema is {found!r}, this version reads {SIDECAR_SCHEMA}; build the engine again")
    if missing := [key for key, (_, optional) in _SIDECAR_FIELDS.items() if key not in data and not optional]:
        raise ArtefactError(f"{path} lacks {', '.join(missing)}; build the engine again")
    for key, (kind, _) in _SIDECAR_FIELDS.items():
        if key in data and not (isinstance(data[key], kind) and (kind is not int or type(data[key]) is int)):
            raise ArtefactError(f"{path}: {key} is {str(data[key])[:40]!r}, which no engine of ours has; build the engine again")
    try:
        numbers, texts = [data["batch"][key] for key in ("min", "opt", "max")], [data["gpu"][key] for key in ("name", "sm")]
        sides = data["image_size"]
        sound = len(sides) == 2 and min(sides) > 0 and all(type(n) is int for n in numbers + sides) and all(isinstance(t, str) for t in texts)
        BatchProfile(*numbers)
    except (TypeError, KeyError, ConfigError):
        sound = False
    if not sound or data["precision"] not in TOLERANCES:
        raise ArtefactError(f"{path}: batch, image_size, gpu or precision is damaged; build the engine again")
    return data


def check_fits_machine(engine: Path, sidecar: dict[str, Any], blob: bytes, tensorrt_version: str, device: dict[str, str]) -> None:
    """Refuse an engine of another file, TensorRT or GPU before TensorRT does so less clearly.

    Raises:
        ArtefactError: names both values and the mend.
    """
    again = "build it here: stm-export"
    digest = hashlib.sha256(blob).hexdigest()
    if digest != sidecar["engine_sha256"]:
        raise ArtefactError(
            f"{engine} has SHA-256 {digest[:16]}.., its sidecar says {str(sidecar['engine_sha256'])[:16]}..: they do not belong together; {again}"
        )
    build = sidecar.get("build") or {}
    if sidecar["tensorrt"] != tensorrt_version and not build.get("version_compatible"):
        raise ArtefactError(
            f"{engine} was built by TensorRT {sidecar['tensorrt']}, this is {tensorrt_version}; {again}, or with --version-compatible there"
        )
    if sidecar["gpu"]["sm"] != device["sm"] and not build.get("hardware_compatible"):
        raise ArtefactError(
            f"{engine} was built on {sidecar['gpu']['name']} (sm {sidecar['gpu']['sm']}), this is {device['name']} (sm {device['sm']}); "
            f"{again}, or with --hardware-compatible there"
        )


def load_engine(engine: str | Path, plugin_library: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """Load an engine made by us, its sidecar checked and the plugin in place.

    Returns:
        The ICudaEngine and the sidecar.

    Raises:
        ArtefactError: file, GPU or TensorRT do not fit; names both values.
        MissingDependencyError: no TensorRT or GPU.
        PluginError: no plugin library, or one that does not fit.
    """
    path = Path(engine)
    if not path.is_file():
        raise ArtefactError(f"no engine {path}")
    sidecar = read_sidecar(path)
    owner = process()
    device = require_gpu()
    blob = path.read_bytes()
    check_fits_machine(path, sidecar, blob, owner.trt.__version__, gpu())
    build = sidecar.get("build") or {}
    if not (sidecar.get("plugin") or {}).get("embedded"):
        _plugin_for(device, plugin_library)
    return deserialize(owner, blob, host_code=bool(build.get("version_compatible"))), sidecar
