"""What is evaluated: a model under plans and rivals in PyTorch, ONNX files, engines; each with its figures and its identity."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import stm
from stm import MergePlan, VimConfig, VisionMamba, make_plan, model_config, plan_summary, state_dict_sha256, with_plan
from stm.checkpoint import file_sha256
from stm.errors import ConfigError, MissingDependencyError, PlanError
from stm.plan import resolve_plan
from stm.reduction import METHODS, Reduction, create_reduction, reduction_summary, with_reduction

from ..deploy import ENGINE_SUFFIXES, load_model
from ..engine import load_engine
from ..errors import ArtefactError
from ..file_metadata import load_onnx, parse_metadata
from ..images import class_names
from ..passes.cast_precision import PRECISIONS
from ..runtimes.ort import onnxruntime_session
from ..runtimes.pytorch import TorchRunner
from ..runtimes.trt import tensorrt_runner
from .preprocessing import Preprocessing
from .published import Published, published_plan, published_rival

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FLOAT32_NAMES = (".A_log", ".A_b_log", ".D", ".D_b", ".dt_proj.bias", ".dt_proj_b.bias")
_NOTHING = ("none", "0")
_MAX_BATCH = 1 << 16


@dataclass
class Subject:
    """One column of predictions.

    Args:
        runner: a Polygraphy runner.
        identity: what a resumed run must have in common with the one before.
        figures: tokens and GFLOPs, as `plan_summary` names them.
        batches: fewest and most images that it takes at once.
        merges: False for the baseline.
    """

    name: str
    runner: Any
    identity: dict[str, Any]
    figures: dict[str, Any]
    published: tuple[Published, ...] = ()
    batches: tuple[int, int, int] = (1, 0, _MAX_BATCH)
    merges: bool = True


@dataclass
class Subjects:
    """All subjects of a run and what they share.

    Args:
        classes: class names of the model where it has them.
    """

    members: list[Subject]
    config: VimConfig
    preprocessing: Preprocessing
    weights: str
    weights_random: bool
    weights_sha256: str
    device: str
    precision: str
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Subject | None:
        return next((subject for subject in self.members if not subject.merges), None)

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.config.name,
            "num_classes": self.config.num_classes,
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "device": self.device,
            "preprocessing": self.preprocessing.identity(),
            "subjects": {subject.name: subject.identity for subject in self.members},
        }

    def batch(self, asked: int | None) -> int:
        """Images a batch: what was asked, else the engines' best, else 64 on a GPU and 16 on a CPU.

        Raises:
            ConfigError: an engine does not take so many.
        """
        most = min(subject.batches[2] for subject in self.members)
        if asked is not None:
            for subject in self.members:
                if asked > subject.batches[2]:
                    low, _, high = subject.batches
                    raise ConfigError(
                        f"{subject.name} takes batches {low} to {high}, asked {asked}; build it for that: stm-export --batch MIN:OPT:MAX"
                    )
            return asked
        best = max(subject.batches[1] for subject in self.members)
        return min(most, best or (64 if self.device == "cuda" else 16))


def require_device(device: str | None, local_rank: int = 0) -> str:
    """ "cuda" where there is a GPU and nothing else was asked for; makes this rank's GPU the current one.

    Raises:
        MissingDependencyError: no GPU, or fewer than ranks on this machine.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; choose from cpu, cuda")
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"device cuda needs an NVIDIA GPU and a torch that can use it; torch {torch.__version__} sees none")
    if local_rank >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return "cuda"


# --- a model in PyTorch ----------------------------------------------------------------------------------------------------


def in_precision(model: VisionMamba, precision: str) -> VisionMamba:
    """Convert in place: A, D and the bias of delta stay in float32, as published and as in our engines."""
    dtype = DTYPES[precision]
    for name, parameter in model.named_parameters():
        if not name.endswith(_FLOAT32_NAMES) or dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    return model


PlanSpec = str | MergePlan | Reduction | None


def model_subjects(
    model: str | VisionMamba,
    plans: Sequence[str] | Mapping[str, PlanSpec],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    seed: int = 0,
    image_size: Any = 224,
    num_classes: int | None = None,
    pos_embed_resize: str = "correct",
    merge_weights: str | None = None,
    rule: str | None = None,
    proportional_decay: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    crop_ratio: float | None = None,
) -> Subjects:
    """One model under several plans and rivals, in PyTorch; the weights are in memory once.

    Args:
        plans: specs (see `parse_spec`), or name -> spec, MergePlan, Reduction or None (unmerged).
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose from {', '.join(PRECISIONS)}")
    if isinstance(model, VisionMamba):
        config = model.config
    else:
        config = model_config(model, image_size, num_classes)
    named: Mapping[str, PlanSpec] = plans if isinstance(plans, Mapping) else _named(plans)
    if not named:
        raise ConfigError("nothing to evaluate: give at least one plan (none: the model as it is)")
    options: dict[str, Any] = {"merge_weights": merge_weights, "rule": rule, "proportional_decay": proportional_decay}
    if any(options.values()) and not any(isinstance(spec, str) and _is_generated(spec) for spec in named.values()):
        raise PlanError("--merge-weights, --rule and --proportional-decay make a plan from a preset or a rate; none is among the plans")
    made = {name: parse_spec(config, spec, **options) for name, spec in named.items()}  # before gigabytes are read
    if isinstance(model, VisionMamba):
        base = copy.deepcopy(with_plan(model, None))  # it is converted in place
        source, random = (str(model.provenance), model.provenance.is_random) if model.provenance else ("of the model given", False)
    else:
        base = load_model(
            model,
            checkpoint=checkpoint,
            weights=weights,
            ema=ema,
            image_size=image_size,
            num_classes=num_classes,
            seed=seed,
            pos_embed_resize=pos_embed_resize,
        )
        assert base.provenance is not None
        source, random = str(base.provenance), base.provenance.is_random
    digest = state_dict_sha256(base.state_dict())
    base = in_precision(base, precision).to(device).requires_grad_(False)
    members = []
    for name, plan in made.items():
        if isinstance(plan, _Rival):
            runner = TorchRunner(with_reduction(base, plan.reduction), name=name)
            figures, identity, published = reduction_summary(plan.reduction), plan.identity(), published_rival(config, plan.method, plan.preset)
        else:
            runner = TorchRunner(with_plan(base, plan), name=name)
            figures, identity, published = plan_summary(config, plan), _plan_identity(plan), published_plan(config, plan)
        members.append(Subject(name, runner, identity, figures, () if random else published, merges=plan is not None))
    shape = Preprocessing(config.image_size, config.mean, config.std, **({} if crop_ratio is None else {"crop_ratio": crop_ratio}))
    return Subjects(members, config, shape, source, random, digest, device, precision, class_names(base))


def _named(plans: Sequence[str]) -> dict[str, PlanSpec]:
    for spec in plans:
        if list(plans).count(spec) > 1:
            raise ConfigError(f"plan {spec!r} is given twice")
    return {spec: spec for spec in plans}


@dataclass(frozen=True)
class _Rival:
    method: str
    preset: str
    reduction: Reduction

    def identity(self) -> dict[str, Any]:
        return {"method": self.method, "preset": self.preset, "removed": {str(k): v for k, v in self.reduction.schedule.items()}}


def _is_generated(spec: str) -> bool:
    return spec in stm.PRESETS or (_rate(spec) or 0) > 0


def _rate(spec: str) -> float | None:
    try:
        return float(spec)
    except ValueError:
        return None


def parse_spec(
    config: VimConfig, spec: PlanSpec, merge_weights: str | None = None, rule: str | None = None, proportional_decay: bool = False
) -> MergePlan | _Rival | None:
    """What a name stands for.

    "none"; a preset (stm-15 .. stm-40) or a rate (0.2), made with the options; a plan file; or a rival of `stm.reduction`:
    METHOD:PRESET (tome:tl-792), METHOD alone at the setting of the paper's table 2.

    Raises:
        PlanError: none of these, or it does not fit the model.
    """
    if spec is None or isinstance(spec, MergePlan):
        if spec is not None:
            spec.check_fits(config)
        return spec if spec is not None and spec.merges else None
    if isinstance(spec, Reduction):
        return _Rival(spec.name, "", spec)
    if spec in _NOTHING:
        return None
    if _is_generated(spec):
        how: dict[str, Any] = {"preset": spec} if spec in stm.PRESETS else {"rate": _rate(spec)}
        made = make_plan(config, **how, weights=merge_weights or "hsp", rule=rule or "edge", proportional_decay=proportional_decay)
        return made if made.merges else None
    method, _, preset = spec.partition(":")
    if method in METHODS:
        preset = preset or "table2"
        return _Rival(method, preset, create_reduction(method, config, preset))
    if not Path(spec).exists() and not spec.endswith(".json") and os.sep not in spec:
        raise PlanError(
            f"no plan {spec!r}; give none, a preset ({', '.join(stm.PRESETS)}), a rate such as 0.2, a plan file, or a rival: METHOD:PRESET with "
            f"{', '.join(METHODS)}, and tl-552, tl-792, tl-960, tl-1076 or table2"
        )
    loaded = resolve_plan(config, spec)
    return loaded if loaded is not None and loaded.merges else None


def _plan_identity(plan: MergePlan | None) -> dict[str, Any]:
    if plan is None:
        return {"plan": "none"}
    digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    return {"plan": digest, "weights": plan.weights, "tokens_left": plan.tokens_left, "token_layers_removed": plan.token_layers_removed}


# --- files -----------------------------------------------------------------------------------------------------------------


def file_subjects(
    files: Sequence[str | os.PathLike[str]],
    *,
    device: str | None = None,
    local_rank: int = 0,
    crop_ratio: float | None = None,
    plugin_library: str | Path | None = None,
) -> Subjects:
    """ONNX files on ONNX Runtime (CPU, or CUDA where asked for) and engines on TensorRT, in one pass over the data.

    Raises:
        ArtefactError: a file that is not ours, or files that want different images or classes; names both values.
    """
    paths = [Path(path) for path in files]
    if len(set(paths)) != len(paths):
        raise ConfigError("a file is given twice")
    engines = any(path.suffix in ENGINE_SUFFIXES for path in paths)
    for path in paths:
        if path.suffix not in (".onnx", *ENGINE_SUFFIXES):
            raise ConfigError(f"{path}: give .onnx or .engine files made by stm-export, or --model")
    if engines and device == "cpu":
        raise ConfigError("engines run on a GPU; drop --device cpu")
    if device is None and not engines:
        device = "cuda" if torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    where = require_device(device or "cuda", local_rank)
    opened = [_open_engine(path, plugin_library) if path.suffix in ENGINE_SUFFIXES else _open_onnx(path, where, local_rank) for path in paths]
    first = opened[0][1]
    members, notes = [], []
    for path, (runner, meta, batches) in zip(paths, opened, strict=True):
        for key in ("image_size", "num_classes", "normalization"):
            if meta[key] != first[key]:
                raise ArtefactError(f"{path} wants {key} {meta[key]}, {paths[0]} {first[key]}; evaluate them one by one")
        config = model_config(meta["model"], (int(meta["image_size"][0]), int(meta["image_size"][1])), int(meta["num_classes"]))
        plan = MergePlan.from_dict(meta["plan"]) if meta["plan"] else None
        identity = {"file": file_sha256(path), **_plan_identity(plan)}
        published = () if meta["weights_random"] else published_plan(config, plan)
        name = path.name if [other.name for other in paths].count(path.name) == 1 else str(path)
        merges = plan is not None and plan.merges
        members.append(Subject(name, runner, identity, plan_summary(config, plan), published, batches, merges))
        if meta["weights_sha256"] != first["weights_sha256"]:
            notes.append(f"{name} has other weights than {paths[0].name}: {meta['weights']} and {first['weights']}")
    size = (int(first["image_size"][0]), int(first["image_size"][1]))
    shape = _preprocessing(paths[0], first["normalization"], size, crop_ratio)
    precisions = sorted({str(meta["precision"]) for _, meta, _ in opened})
    return Subjects(
        members,
        model_config(first["model"], size, int(first["num_classes"])),
        shape,
        str(first.get("weights", "")),
        any(bool(meta.get("weights_random")) for _, meta, _ in opened),
        str(first["weights_sha256"]),
        where,
        "+".join(precisions),
        first.get("classes"),
        notes,
    )


def _open_onnx(path: Path, device: str, local_rank: int) -> tuple[Any, dict[str, Any], tuple[int, int, int]]:
    from polygraphy.backend.onnxrt import OnnxrtRunner

    proto = load_onnx(path)
    meta = parse_metadata(path, proto)
    try:
        meta["normalization"] = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "stm.normalization"))
    except (StopIteration, ValueError, RecursionError):
        raise ArtefactError(f"{path} does not say how its images are normalised; export it again") from None
    del proto
    providers: tuple[Any, ...] = ("CPUExecutionProvider",)
    if device == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingDependencyError("this ONNX Runtime has no CUDA provider (pip install onnxruntime-gpu); --device cpu works")
        providers = (("CUDAExecutionProvider", {"device_id": local_rank}), *providers)
    session = onnxruntime_session(path, providers)
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingDependencyError("ONNX Runtime's CUDA provider does not load here (its CUDA or cuDNN libraries are missing); --device cpu works")
    return OnnxrtRunner(session, name=path.name), meta, (1, 0, _MAX_BATCH)


def _open_engine(path: Path, plugin_library: str | Path | None) -> tuple[Any, dict[str, Any], tuple[int, int, int]]:
    engine, meta = load_engine(path, plugin_library)
    try:
        low, best, high = (int(meta["batch"][key]) for key in ("min", "opt", "max"))
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{path}: its sidecar does not say which batches it takes; build it again") from None
    return tensorrt_runner(engine, name=path.name), {"weights_random": False, **meta}, (low, best, high)


def _preprocessing(path: Path, normalization: Any, size: tuple[int, int], crop_ratio: float | None) -> Preprocessing:
    try:
        mean, std = ((float(a), float(b), float(c)) for a, b, c in (normalization["mean"], normalization["std"]))
        ratio = float(normalization["crop_ratio"]) if crop_ratio is None else crop_ratio
        if not all(0 < value < 10 for value in std):
            raise ValueError("std")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path}: its normalisation is damaged ({error}); export it again") from None
    return Preprocessing(size, mean, std, ratio)
