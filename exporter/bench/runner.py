"""bench: one call from a file or a set of models to a BenchResult; what `stm bench` runs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stm.config import ImageSize, image_size_pair
from stm.errors import ConfigError, MissingDependencyError, StmError

from ..errors import ArtefactError, ParityError, PluginError
from ..progress import Steps
from .environment import environment, gpu_state
from .results import BenchResult, Case, Comparison, Measurement, Skipped
from .statistics import Summary, paired_ratio
from .suites import Sweep, suite
from .timing import Method, Prepared, Timed, interleave

LAUNCHES = ("graph", "plain", "both")
RUNTIMES = ("engine", "onnx", "eager")
WITHOUT_GPU = "On the CPU, `stm bench FILE.onnx --vs eager` and `stm bench --model NAME --runtime onnx --vs eager` work."


def compare(
    case: Case,
    entries: Sequence[tuple[str, Prepared]],
    method: Method,
    *,
    state: Callable[[], dict[str, Any] | None] = gpu_state,
    step: Callable[[], None] = lambda: None,
) -> tuple[list[Measurement], list[Comparison]]:
    """Time backends that are ready, in the same rounds; the first is the subject of every ratio."""
    states: dict[int, dict[str, Any] | None] = {}

    def remember(index: int) -> None:
        states[index] = state() if entries[index][1].device == "cuda" else None

    timed = interleave([prepared for _, prepared in entries], method, step=step, last=remember)
    measured = [
        _measurement(case, name, prepared, found, states.get(index))
        for index, ((name, prepared), found) in enumerate(zip(entries, timed, strict=True))
    ]
    subject = entries[0][1]
    reference = subject.logits() if subject.logits and subject.weights else None
    for index, (_, prepared) in enumerate(entries[1:], 1):
        if reference is not None and prepared.logits is not None and prepared.weights == subject.weights:
            measured[index] = _with_difference(measured[index], reference, prepared.logits())
    first = measured[0]
    comparisons = []
    for other in measured[1:]:
        launch = first.launch if first.launch == other.launch else f"{first.launch} / {other.launch}"
        comparisons.append(Comparison(case, first.backend, other.backend, launch, paired_ratio(first.rounds_ms, other.rounds_ms)))
    return measured, comparisons


def _measurement(case: Case, name: str, prepared: Prepared, found: Timed, state: dict[str, Any] | None) -> Measurement:
    rounds = Summary.of(found.rounds_ms)
    return Measurement(
        case=case,
        backend=name,
        device=prepared.device,
        launch=prepared.launch,
        precision=prepared.precision,
        rounds_ms=tuple(round(value, 6) for value in found.rounds_ms),
        median_ms=rounds.p50,
        spread=rounds.spread,
        latency=Summary.of(found.latencies_ms),
        images_per_second=case.batch / rounds.p50 * 1e3 if rounds.p50 else 0.0,
        memory=dict(prepared.memory),
        notes=(*prepared.notes, f"{found.burst} inferences a round"),
        gpu_state=state,
    )


def _with_difference(measured: Measurement, reference: Any, got: Any) -> Measurement:
    from dataclasses import replace

    import numpy as np

    reference, got = np.asarray(reference, dtype=np.float64), np.asarray(got, dtype=np.float64)
    norm = float(np.linalg.norm(reference))
    if got.shape != reference.shape or not norm:
        return measured
    return replace(measured, difference=float(np.linalg.norm(got - reference)) / norm)


def check_output(name: str, prepared: Prepared) -> None:
    """One inference, looked at: outputs start as NaN, so that what was not written shows.

    Raises:
        ParityError: it is not finite; timing a wrong computation says nothing.
    """
    import numpy as np

    prepared.clock.burst(prepared.run, 1)
    if prepared.logits is not None and not np.isfinite(prepared.logits()).all():
        raise ParityError(f"{name}: the logits are not finite; what computes nothing right is not timed")


def _device(asked: str | None, needs_gpu: bool, onnx_subject: bool) -> str:
    from ..gpus import driver

    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(f"device is {asked!r}; choose from cpu, cuda")
    if asked is not None:
        return asked
    if needs_gpu:
        return "cuda"
    there = bool(driver().gpus)
    if there and onnx_subject:
        import onnxruntime

        there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "cuda" if there else "cpu"


def _unique(names: Iterable[str]) -> list[str]:
    """eager, eager -> eager, eager #2: timing the same thing twice shows what a difference is worth."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return out


def _require_engines(plugin_library: str | Path | None) -> None:
    from ..engine import require_gpu, require_tensorrt
    from ..libraries import load_plugin

    try:
        require_tensorrt()
        require_gpu()
        load_plugin(plugin_library)
    except (MissingDependencyError, PluginError) as error:
        raise type(error)(f"{str(error).rstrip('.')}. {WITHOUT_GPU}") from None


def bench(
    subject: str | os.PathLike[str] | None = None,
    *,
    models: Sequence[str] = (),
    rates: Sequence[str | float] = ("0",),
    image_sizes: Sequence[ImageSize] = (224,),
    precisions: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    suite_name: str | None = None,
    runtime: str = "engine",
    vs: Sequence[str] = (),
    launch: str = "graph",
    device: str | None = None,
    method: Method | None = None,
    profile: bool = False,
    max_ratio: float | None = None,
    output: str | os.PathLike[str] | None = None,
    plugin_library: str | Path | None = None,
    opt_level: int = 3,
    timing_cache: Path | None = None,
    show_progress: bool = False,
) -> BenchResult:
    """Time a file, or models built for the purpose, against rivals in the same interleaved rounds.

    Args:
        subject: an .engine or .onnx of ours. Without it: `models` x `rates` x `image_sizes` x `precisions` x `batches`, or a
            named set of such cases (`suites.SUITES`).
        rates: shares of tokens ("0.2"), presets ("stm-20") or plan files.
        precisions: default fp16 for engines, fp32 otherwise.
        batches: default: an engine file's profile (least, best, most); 1 and 128 for engines to build; 1 otherwise.
        runtime: what runs a model to build: engine, onnx or eager.
        vs: rivals: eager, compile, mamba_ssm, onnx, onnx-cpu, deit, unmerged (ours without the plan), fp16-accumulation (our engine with
            GEMMs added up in fp16), engine@N (our engine on pieces of N images; for batches larger than N), or .engine/.onnx files.
            One that cannot run here is skipped with its reason.
        launch: on a GPU in a CUDA graph, as plain launches, or both.
        profile: time of each node of an engine, grouped by torch module, with floors.
        max_ratio: gate: subject / rival at most this, for every rival and case. Look at `result.failures`, or call `result.check()`.
        output: folder for bench.json (written after every case), bench.md, plots, and the engines built (reused by later runs).

    Raises:
        MissingDependencyError: engines and no GPU; says what works. ConfigError, ArtefactError, BuildError: as their texts say.
    """
    if (subject is not None) + bool(models) + (suite_name is not None) != 1:
        raise ConfigError("give one of: a file, --model, --suite")
    if launch not in LAUNCHES:
        raise ConfigError(f"launch is {launch!r}; choose from {', '.join(LAUNCHES)}")
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime is {runtime!r}; choose from {', '.join(RUNTIMES)}")
    if max_ratio is not None and not (max_ratio > 0 and math.isfinite(max_ratio)):
        raise ConfigError(f"max ratio is {max_ratio}; give a number above 0, for example 1 (no slower than any rival)")
    path = Path(subject) if subject is not None else None
    if path is not None and not path.is_file():
        raise ArtefactError(f"no file {path}")
    for rival in vs:
        if rival.endswith((".engine", ".plan", ".onnx")) and not Path(rival).is_file():
            raise ArtefactError(f"no file {rival}")
    engine = path.suffix in (".engine", ".plan") if path is not None else runtime == "engine"
    if profile and not engine:
        raise ConfigError("--profile looks into TensorRT engines; give an .engine, or --model with --runtime engine")
    if engine and device == "cpu":
        raise ConfigError("engines run on a GPU; drop --device cpu, or take --runtime onnx")
    if engine:
        if path is not None:
            from ..engine import read_sidecar

            read_sidecar(path)  # what is wrong with the file is said before what is missing here
        _require_engines(plugin_library)
    elif path is not None and path.suffix != ".onnx":
        raise ConfigError(f"{path}: bench times .engine, .plan and .onnx files")
    if not engine and precisions is not None and set(precisions) - {"fp32"} and runtime == "onnx":
        raise ConfigError(f"precision is {', '.join(precisions)}; a portable .onnx is fp32. Engines take fp16 and bf16")

    from .workshop import KINDS, Workshop, piece_of

    for rival in vs:
        if rival not in KINDS and piece_of(rival) is None and not rival.endswith((".engine", ".plan", ".onnx")):
            raise ConfigError(f"no rival {rival!r}; choose from {', '.join(KINDS)}, engine@N, or name an .engine or .onnx file")
    chosen = _device(device, engine, path is not None or runtime == "onnx")
    folder = Path(output) if output is not None else None
    workshop = Workshop(
        chosen,
        folder=folder / "engines" if folder is not None else None,
        plugin_library=plugin_library,
        opt_level=opt_level,
        timing_cache=timing_cache,
        show_progress=show_progress,
    )
    if path is not None:
        plan = _file_cases(workshop, path, batches)
    else:
        sweeps = (
            suite(suite_name)
            if suite_name is not None
            else (
                Sweep(
                    tuple(models),
                    tuple(str(rate) for rate in rates),
                    tuple(image_size_pair(size) for size in image_sizes),
                    tuple(precisions or ("fp16" if engine else "fp32",)),
                    tuple(batches or ((1, 128) if engine else (1,))),
                ),
            )
        )
        plan = _sweep_cases(workshop, sweeps, runtime)
        if engine:  # before anything is timed
            specs = [spec for spec, _, _ in plan]
            workshop.export_ahead([*specs, *(spec.unmerged() for spec in specs if "unmerged" in vs)])
    return _run(workshop, plan, list(vs), launch, method or Method(), profile, max_ratio, folder, show_progress)


# (spec, batch, how to get the subject)
_Plan = list[tuple[Any, int, Callable[[], Any]]]


def _file_cases(workshop: Any, path: Path, batches: Sequence[int] | None) -> _Plan:
    backend, spec = workshop.file(path)
    if batches is None:
        from .backends import EngineBackend

        profile = backend.engine.get_tensor_profile_shape("images", 0) if isinstance(backend, EngineBackend) else ((1,),)
        batches = sorted({int(shape[0]) for shape in profile})
    return [(spec, batch, lambda: workshop.file(path)[0]) for batch in batches]


def _sweep_cases(workshop: Any, sweeps: Iterable[Sweep], runtime: str) -> _Plan:
    from .workshop import Spec

    plan: _Plan = []
    seen = set()
    for sweep in sweeps:
        for model in sweep.models:
            for size in sweep.image_sizes:
                for rate in sweep.rates:
                    for precision in sweep.precisions:
                        spec = Spec.of(model, rate, size, precision)
                        for batch in sweep.batches:
                            if (spec, batch) not in seen:
                                seen.add((spec, batch))
                                plan.append((spec, batch, functools.partial(workshop.subject, runtime, spec, batch)))
    # What shares a model and its ONNX file stands together.
    order = {key: index for index, key in enumerate(dict.fromkeys((s.model, s.image_size, s.rate) for s, _, _ in plan))}
    return sorted(plan, key=lambda row: order[(row[0].model, row[0].image_size, row[0].rate)])


def _run(
    workshop: Any, plan: _Plan, vs: list[str], launch: str, method: Method, profile: bool, max_ratio: float | None, folder: Path | None, show: bool
) -> BenchResult:
    import torch

    from .report import write_json

    surroundings = environment()
    surroundings["torch_threads"] = torch.get_num_threads()
    surroundings["gpu_state"] = {"before": gpu_state()}
    result = BenchResult(surroundings, {**asdict(method), "launch": launch, "weights": "random weights and noise images"}, max_ratio=max_ratio)
    launches = ("graph", "plain") if launch == "both" and workshop.device == "cuda" else ("graph",) if launch == "both" else (launch,)
    first_error: Exception | None = None
    before = None
    with Steps(len(plan) * len(launches) * method.rounds, show) as steps:
        for spec, batch, get in plan:
            if before is not None and before != (spec.model, spec.rate, spec.image_size):
                workshop.clear()
            before = (spec.model, spec.rate, spec.image_size)
            case = spec.case(batch)
            for how in launches:
                try:
                    backend = _one_case(workshop, spec, case, get, vs, how, method, result, steps)
                    if profile and how == launches[0]:
                        result.profiles.append(_profile(backend, spec, case))
                except (StmError, RuntimeError, MemoryError) as error:
                    first_error = first_error or error
                    result.skipped.append(Skipped(case, "subject", _reason(error)))
            if folder is not None:
                write_json(result, folder / "bench.json")
    if not result.measurements and first_error is not None:
        raise first_error
    surroundings["gpu_state"]["after"] = gpu_state()
    surroundings["load_average_after"] = list(os.getloadavg())
    if folder is not None:
        result.write(folder)
    return result


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}" if not isinstance(error, StmError) else " ".join(text)[:400]


def _one_case(
    workshop: Any, spec: Any, case: Case, get: Callable[[], Any], vs: list[str], how: str, method: Method, result: BenchResult, steps: Steps
) -> Any:
    """Prepare subject and rivals, time them together, add to `result`; returns the subject's backend."""
    from .backends import release
    from .workshop import piece_of

    ready: list[tuple[str, Prepared]] = []
    with contextlib.ExitStack() as closing:
        closing.callback(release)
        backend = get()
        prepared = backend.prepare(case.batch, how)
        closing.callback(prepared.close)
        check_output(backend.name, prepared)
        ready.append((backend.name, prepared))
        for kind in vs:
            if (piece := piece_of(kind)) is not None and case.batch <= piece:
                continue  # one piece is the engine itself
            if kind == "unmerged" and spec.plan is None:
                continue  # and so is a model that nothing is merged of
            try:
                rival = workshop.rival(kind, spec, case.batch)
                other = rival.prepare(case.batch, how)
                closing.callback(other.close)
                check_output(rival.name, other)
            except Exception as error:  # a rival that breaks, in whatever way, must not end the measurement
                result.skipped.append(Skipped(case, kind, _reason(error)))
                release()
                continue
            ready.append((rival.name, other))
        names = _unique(name for name, _ in ready)

        def one_round() -> None:
            with steps.step(str(case)[:28]):
                pass

        measured, comparisons = compare(case, list(zip(names, (p for _, p in ready), strict=True)), method, step=one_round)
        result.measurements += measured
        result.comparisons += comparisons
        ready.clear()
    return backend


def _profile(backend: Any, spec: Any, case: Case) -> dict[str, Any]:
    from stm import model_config

    from .profile import profile_engine

    config = model_config(spec.model, spec.image_size, spec.num_classes)
    lengths = spec.plan.lengths if spec.plan else [config.seqlen] * config.depth
    cls = (spec.plan.cls_positions if spec.plan else [config.cls_index] * config.depth)[-1]
    return profile_engine(backend, case, config, lengths, cls)
