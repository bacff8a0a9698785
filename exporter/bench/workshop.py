"""Makes what a benchmark needs: models, ONNX files, engines, rivals; each once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import stm
from stm import MergePlan, VisionMamba, model_config
from stm.errors import ConfigError, MissingDependencyError

from ..deploy import choose_plan
from ..engine import (
    BatchProfile,
    BuildOptions,
    adds_up_in_fp16,
    build_engine,
    default_timing_cache,
    deserialize,
    gpu,
    load_engine,
    lower_for_engine,
    process,
)
from ..errors import ArtefactError
from ..files import written_aside
from .backends import DTYPES, Backend, EngineBackend, OnnxBackend, TorchBackend, release, require_cuda
from .results import Case

KINDS = ("eager", "compile", "mamba_ssm", "onnx", "onnx-cpu", "deit", "unmerged", "fp16-accumulation")
FILE_SUFFIXES = (".engine", ".plan", ".onnx")
EXPORTERS = 4
"""Processes that export at once, at most: one of vim-b takes 4 GB."""


def piece_of(kind: str) -> int | None:
    """32 of the rival "engine@32", our engine on pieces of 32 images; None for another name."""
    name, at, piece = kind.partition("@")
    return int(piece) if name == "engine" and at and piece.isdecimal() and int(piece) > 0 else None


@dataclass(frozen=True)
class Spec:
    """What a case's artefacts are made from. `rate` labels the plan; `fp16_accumulation`: engines whose GEMMs may add up in fp16."""

    model: str
    rate: str
    image_size: tuple[int, int]
    precision: str
    num_classes: int = 1000
    seed: int = 0
    plan: MergePlan | None = field(default=None, compare=False)
    fp16_accumulation: bool = False

    @classmethod
    def of(cls, model: str, rate: str, image_size: tuple[int, int], precision: str) -> Spec:
        """`rate` is a share of tokens ("0.2"), a preset ("stm-20") or a plan file.

        Raises:
            ConfigError, PlanError: no such model, or the plan does not fit it.
        """
        try:
            share: float | None = float(rate)
        except ValueError:
            share = None
        plan = choose_plan(model, image_size, rate=share) if share is not None else choose_plan(model, image_size, plan=rate)
        return cls(model_config(model, image_size).name, rate, image_size, precision, plan=plan)

    @classmethod
    def from_metadata(cls, meta: dict[str, Any], label: str) -> Spec:
        """From an engine's sidecar or an ONNX file's metadata."""
        size = (int(meta["image_size"][0]), int(meta["image_size"][1]))
        plan = MergePlan.from_dict(meta["plan"]) if meta["plan"] else None
        seed = int(meta.get("seed") or 0)
        model, rate, precision, classes = str(meta["model"]), label if plan else "0", str(meta["precision"]), int(meta["num_classes"])
        return cls(model, rate, size, precision, classes, seed, plan, adds_up_in_fp16(meta))

    def unmerged(self) -> Spec:
        """The same without its plan."""
        return replace(self, rate="0", plan=None)

    def case(self, batch: int) -> Case:
        seqlen = model_config(self.model, self.image_size).seqlen
        return Case(self.model, self.rate, self.image_size, self.precision, batch, seqlen, self.plan.tokens_left if self.plan else seqlen)


def _stem(spec: Spec) -> str:
    return f"{spec.model}-{Path(spec.rate).name.removesuffix('.json')}-{spec.case(1).pixels}"


@functools.cache
def _code_sha256() -> str:
    """Of our Python code and the packages that write ONNX: a file that other code exported is not used again."""
    import onnx
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {onnx.__version__}".encode())
    for package in (Path(stm.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def export_pool(workers: int) -> Executor:
    """Processes for exports; each starts anew, since a forked one could not use torch."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def export_one(folder: Path, spec: Spec) -> None:
    """Leave the ONNX file in the folder that `Workshop.portable` looks for there."""
    import torch

    torch.set_num_threads(2)
    Workshop("cpu", folder=folder).portable(spec)


class Workshop:
    """Keeps the last model, its ONNX and its modules on the device; engines lie in `folder`, under a hash of all that made them.

    Args:
        device: "cuda" or "cpu".
        folder: where to keep ONNX files and engines; None makes them anew in every run.
    """

    def __init__(
        self,
        device: str,
        *,
        folder: Path | None = None,
        plugin_library: str | Path | None = None,
        opt_level: int = 3,
        timing_cache: Path | None = None,
        show_progress: bool = False,
    ) -> None:
        self.device, self.folder, self.plugin_library = device, folder, plugin_library
        self.opt_level, self.timing_cache, self.show_progress = opt_level, timing_cache, show_progress
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._deit: dict[tuple[Any, ...], EngineBackend] = {}  # outlives clear(): the same for every rate

    def clear(self) -> None:
        """Forget models and engines, before the next spec."""
        self._kept.clear()
        release()

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def model(self, spec: Spec) -> VisionMamba:
        """Random weights (speed does not depend on them), float32, on the CPU."""

        def make() -> VisionMamba:
            model = stm.create_model(spec.model, plan=spec.plan, image_size=spec.image_size, num_classes=spec.num_classes, seed=spec.seed)
            return model.requires_grad_(False)

        made: VisionMamba = self._once(("model", spec.model, spec.rate, spec.image_size), make)
        return made

    def weights(self, spec: Spec) -> str:
        digest: str = self._once(("weights", spec.model, spec.rate, spec.image_size), lambda: stm.state_dict_sha256(self.model(spec).state_dict()))
        return digest

    def _on_device(self, spec: Spec, device: str, precision: str) -> VisionMamba:
        import copy

        made: VisionMamba = self._once(
            ("device", spec.model, spec.rate, spec.image_size, device, precision),
            lambda: copy.deepcopy(self.model(spec)).to(device).to(DTYPES[precision]),
        )
        return made

    def _channel_first(self, spec: Spec, precision: str) -> nn.Module:
        from .channel_first import ChannelFirstVim, mamba_ssm_ops

        require_cuda("mamba_ssm")
        made: nn.Module = self._once(
            ("mamba_ssm", spec.model, spec.rate, spec.image_size, precision),
            lambda: ChannelFirstVim(self._on_device(spec, "cuda", precision), mamba_ssm_ops()),
        )
        return made

    def portable(self, spec: Spec) -> Any:
        """The portable ONNX model; with a folder, kept there under a hash of the weights, the plan and the code that exports."""

        def make() -> Any:
            import onnx

            from ..onnx_export import export_onnx

            if self.folder is None:
                return export_onnx(self.model(spec))
            made_from = [self.weights(spec), spec.plan.to_dict() if spec.plan else None, spec.image_size, _code_sha256()]
            key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{_stem(spec)}-{key}.onnx"
            if path.is_file():
                return onnx.load(str(path))
            model = export_onnx(self.model(spec))
            with written_aside(path) as aside:
                onnx.save(model, str(aside))
            return model

        return self._once(("onnx", spec.model, spec.rate, spec.image_size), make)

    def export_ahead(self, specs: Iterable[Spec]) -> None:
        """Leave the ONNX files of several specs in the folder, some at once: an export is some ten seconds of one core, and a GPU idles
        meanwhile. Nothing without a folder, for one spec, or with few cores. What fails here is exported again where it is needed, and says
        why there."""
        todo = list(dict.fromkeys(specs))
        workers = min(len(todo), EXPORTERS, (os.cpu_count() or 2) // 2)
        if self.folder is None or workers < 2:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BrokenExecutor), export_pool(workers) as pool:
            wait([pool.submit(export_one, self.folder, spec) for spec in todo])

    # --- engines ---------------------------------------------------------------------------------------------------------

    def _built(self, lowered: Any, name: str, batch: BatchProfile) -> tuple[Any, int, str]:
        """(engine, bytes of its plan, where it came from)."""
        from ..libraries import load_plugin

        library = load_plugin(self.plugin_library)
        options = BuildOptions(batch=batch, opt_level=self.opt_level, timing_cache=self.timing_cache or default_timing_cache())
        made_from = [process().trt.__version__, gpu(), library.sha256, asdict(batch), self.opt_level]
        key = hashlib.sha256(lowered.SerializeToString(deterministic=True) + json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{key}.engine" if self.folder is not None else None
        if path is not None and path.is_file():
            blob = path.read_bytes()
            return deserialize(process(), blob), len(blob), f"engine from {path.name}"
        blob, info = build_engine(lowered, options, plugin_library=self.plugin_library, show_progress=self.show_progress)
        if path is not None:
            with written_aside(path) as aside:
                aside.write_bytes(blob)
        built = f"built in {info.seconds:.0f} s{' with a warm timing cache' if info.cache_hits else ''}, Builder {info.builder_seconds:.0f} s apart"
        return deserialize(process(), blob), len(blob), built

    def engine(self, spec: Spec, batch: int, name: str = "engine", piece: int | None = None) -> EngineBackend:
        """Our engine, built for exactly this batch, or for pieces of it."""

        def make() -> EngineBackend:
            each = piece or batch
            profile = BatchProfile(each, each, each)
            options = BuildOptions(profile, fp16_accumulation=spec.fp16_accumulation)
            lowered = lower_for_engine(self.portable(spec), spec.precision, options, self.plugin_library)
            engine, size, origin = self._built(lowered, f"{_stem(spec)}-{spec.precision}-b{each}", profile)
            weights = self.weights(spec)
            return EngineBackend(name, engine, spec.image_size, spec.precision, weights=weights, engine_bytes=size, notes=(origin,), piece=piece)

        made: EngineBackend = self._once(("engine", spec, batch, piece), make)
        return made

    def deit(self, spec: Spec, batch: int) -> EngineBackend:
        """DeiT of the same width, image size and precision, in TensorRT; no node of it is ours."""
        from .deit import DeitConfig, deit_onnx

        config = DeitConfig.like(model_config(spec.model, spec.image_size, spec.num_classes))

        def make() -> EngineBackend:
            name = f"{config.name}-{spec.case(batch).pixels}-{spec.precision}-b{batch}"
            lowered = deit_onnx(config, spec.precision, batch)
            engine, size, origin = self._built(lowered, name, BatchProfile(batch, batch, batch))
            text = str(engine.create_engine_inspector().get_engine_information(process().trt.LayerInformationFormat.JSON))
            fused = "attention fused" if "mha" in text.lower() else "attention NOT fused by TensorRT"
            sums = "GEMMs add up as TensorRT likes" if spec.precision == "fp16" else "GEMMs add up in float32"
            return EngineBackend("deit", engine, spec.image_size, spec.precision, engine_bytes=size, notes=(config.name, fused, sums, origin))

        key = (config, spec.precision, batch)
        if key not in self._deit:
            self._deit[key] = make()
        return self._deit[key]

    def unmerged(self, spec: Spec, batch: int) -> Backend:
        """The same model without its merge plan, as an engine or on a CPU in ONNX Runtime: what merging gains."""
        whole = spec.unmerged()
        if self.device != "cuda":
            return OnnxBackend("unmerged", lambda: self.portable(whole).SerializeToString(), spec.image_size, self.device)
        made = self.engine(whole, batch)
        return EngineBackend("unmerged", made.engine, spec.image_size, spec.precision, engine_bytes=made.engine_bytes, notes=made.notes)

    def file(self, path: Path) -> tuple[Backend, Spec]:
        """A file as a backend, and what it was made from.

        Raises:
            ArtefactError: not ours, or of another machine.
            MissingDependencyError: an engine, and no TensorRT or GPU here.
        """
        if path.suffix == ".onnx":
            from ..file_metadata import read_metadata

            meta = read_metadata(path)
            spec = Spec.from_metadata(meta, path.stem)
            return OnnxBackend(path.name, path, spec.image_size, self.device, str(meta["weights_sha256"])), spec
        if path.suffix not in FILE_SUFFIXES:
            raise ConfigError(f"{path}: bench times .engine, .plan and .onnx files")
        engine, meta = self._once(("file", path), lambda: load_engine(path, self.plugin_library))
        spec = Spec.from_metadata(meta, path.stem)
        size = int(meta.get("engine_bytes", path.stat().st_size))
        return EngineBackend(path.name, engine, spec.image_size, spec.precision, weights=str(meta["weights_sha256"]), engine_bytes=size), spec

    # --- rivals ----------------------------------------------------------------------------------------------------------

    def rival(self, kind: str, spec: Spec, batch: int) -> Backend:
        """A backend by its name on the command line, for the same case.

        Raises:
            ConfigError: no such rival. MissingDependencyError: not here. ArtefactError: a file of another image size.
        """
        size, device = spec.image_size, self.device
        precision = spec.precision if device == "cuda" else "fp32"
        if kind in ("eager", "compile"):
            return TorchBackend(
                kind, lambda: self._on_device(spec, device, precision), size, device, precision, self.weights(spec), compiled=kind == "compile"
            )
        if kind == "mamba_ssm":
            return TorchBackend(kind, lambda: self._channel_first(spec, precision), size, "cuda", precision, self.weights(spec))
        if kind in ("onnx", "onnx-cpu"):
            where = "cpu" if kind == "onnx-cpu" else device
            return OnnxBackend(kind, lambda: self.portable(spec).SerializeToString(), size, where, self.weights(spec))
        if kind == "unmerged":
            return self.unmerged(spec, batch)
        if kind == "fp16-accumulation":
            if device != "cuda" or precision != "fp16":
                raise ConfigError(f"fp16-accumulation is an fp16 engine on a GPU, not {precision} on {device}")
            return self.engine(replace(spec, fp16_accumulation=True), batch, kind)
        if kind == "deit":
            if device != "cuda":
                raise MissingDependencyError("DeiT is timed as a TensorRT engine, which needs an NVIDIA GPU")
            return self.deit(spec, batch)
        if (piece := piece_of(kind)) is not None:
            return self.engine(spec, batch, kind, piece)
        if kind.endswith(FILE_SUFFIXES):
            backend, other = self.file(Path(kind))
            if other.image_size != size:
                raise ArtefactError(f"{kind} is for images of {other.case(1).pixels} pixels, the subject for {spec.case(1).pixels}")
            return backend
        raise ConfigError(f"no rival {kind!r}; choose from {', '.join(KINDS)}, or name an .engine or .onnx file")

    def subject(self, runtime: str, spec: Spec, batch: int) -> Backend:
        if runtime == "engine":
            return self.engine(spec, batch)
        if runtime in ("onnx", "eager"):
            return self.rival(runtime, spec, batch)
        raise ConfigError(f"runtime is {runtime!r}; choose from engine, onnx, eager")
