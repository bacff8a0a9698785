"""export: from a model name to a verified file, in one call; what `stm-export` runs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import stm
from stm import ConfigError, MergePlan, VisionMamba, make_plan, model_config
from stm.config import ImageSize
from stm.plan import resolve_plan
from stm.reduction import ReducedVim, Reduction, parse_reduction, with_reduction

from .engine import (
    BuildOptions,
    build_engine,
    deserialize,
    lower_for_engine,
    make_sidecar,
    process,
    require_gpu,
    require_tensorrt,
    require_torch_gpu,
    sidecar_path,
)
from .engine_parity import engine_latency, verify_engine
from .errors import ParityError
from .files import Staging, check_writable
from .libraries import load_plugin
from .onnx_export import export_onnx, summary_of
from .parity import ParityReport, verify, write_report
from .passes.cast_precision import PRECISIONS
from .progress import Steps

WEIGHTS = ("pretrained", "random")
ENGINE_SUFFIXES = (".engine", ".plan")


@dataclass
class ExportResult:
    """What was made. `summary` holds the plan's figures (DESIGN section 3)."""

    model: str
    weights: str
    weights_random: bool
    precision: str
    outputs: list[str]
    bytes: int
    summary: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    parity: ParityReport | None = None
    build: dict[str, Any] | None = None
    timing: list[dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"parity": self.parity.to_dict() if self.parity else None}


def choose_plan(
    name: str,
    image_size: ImageSize,
    *,
    rate: float | None = None,
    plan: MergePlan | str | os.PathLike[str] | None = None,
    merge_weights: str | None = None,
    rule: str | None = None,
    proportional_decay: bool = False,
    align: int | None = None,
) -> MergePlan | None:
    """A plan from a rate, a preset, a file or a MergePlan; None where nothing merges.

    Raises:
        PlanError: both given, or the plan does not fit the model.
    """
    config = model_config(name, image_size)
    if rate is not None and plan is not None:
        raise stm.PlanError("give --rate or --plan, not both")
    how: dict[str, Any] = {
        "weights": merge_weights or "hsp",
        "rule": rule or "edge",
        "proportional_decay": proportional_decay,
        "align": 1 if align is None else align,
    }
    if isinstance(plan, str) and plan in stm.PRESETS:
        made = make_plan(config, preset=plan, **how)
    elif plan is not None:
        if rule or proportional_decay or align is not None:
            raise stm.PlanError("--rule, --proportional-decay and --align make a plan from --rate or a preset; a plan file holds its own")
        loaded = resolve_plan(config, plan)
        assert loaded is not None
        made = loaded.with_weights(merge_weights) if merge_weights else loaded
    elif not rate:
        if merge_weights or rule or proportional_decay or align is not None:
            raise stm.PlanError("--merge-weights, --rule, --proportional-decay and --align say how to merge; say how much, too: --rate or --plan")
        return None
    else:
        made = make_plan(config, rate=rate, **how)
    return made if made.merges else None


def choose_reduction(name: str, image_size: ImageSize, reduction: Reduction | str | None, **plan_options: Any) -> Reduction | None:
    """A method that looks at the image, from its name (`stm.reduction.parse_reduction`) or ready-made.

    Raises:
        PlanError: a plan is asked for, too, or the method does not fit the model.
    """
    if reduction is None:
        return None
    if given := [option for option, value in plan_options.items() if value not in (None, False)]:
        flags = ", ".join("--" + option.replace("_", "-") for option in given)
        raise stm.PlanError(f"--reduction and {flags}: a method that looks at the image has no merge plan; give one of them")
    return reduction if isinstance(reduction, Reduction) else parse_reduction(reduction, model_config(name, image_size))


def load_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    plan: MergePlan | None = None,
    image_size: ImageSize = 224,
    num_classes: int | None = None,
    seed: int = 0,
    pos_embed_resize: str = "correct",
) -> VisionMamba:
    """create_model under the command line's rules: published weights unless told otherwise, never a silent fall-back."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights are {weights!r}; choose from {', '.join(WEIGHTS)}, or pass a checkpoint")
    if weights == "random" and (checkpoint is not None or ema):
        raise ConfigError("--weights random excludes --checkpoint and --ema")
    return stm.create_model(
        name,
        pretrained=checkpoint is None and weights == "pretrained",
        checkpoint=checkpoint,
        plan=plan,
        image_size=image_size,
        num_classes=num_classes,
        seed=seed,
        ema=ema,
        pos_embed_resize=pos_embed_resize,
    )


def reference_folder(output: Path) -> Path:
    """Where the inputs and PyTorch's outputs that a file was verified with lie: beside it."""
    return output.with_suffix(".reference")


def check_accumulation(precision: str, fp16_accumulation: bool) -> None:
    """Raises:
    ConfigError: fp16 sums of what is not fp16.
    """
    if fp16_accumulation and precision != "fp16":
        raise ConfigError(f"precision is {precision}; only products in fp16 can be added up in fp16: drop --fp16-accumulation")


def export(
    name: str,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    rate: float | None = None,
    plan: MergePlan | str | os.PathLike[str] | None = None,
    merge_weights: str | None = None,
    rule: str | None = None,
    proportional_decay: bool = False,
    align: int | None = None,
    reduction: Reduction | str | None = None,
    image_size: ImageSize = 224,
    num_classes: int | None = None,
    classes: list[str] | None = None,
    precision: str | None = None,
    opset: int = 18,
    seed: int = 0,
    pos_embed_resize: str = "correct",
    verify_output: bool = True,
    bisect: bool = False,
    build: BuildOptions | None = None,
    plugin_library: str | Path | None = None,
    show_progress: bool = False,
) -> ExportResult:
    """Weights + plan -> a verified file; the suffix of `output` says which.

    `.engine` or `.plan` builds a TensorRT engine on our plugin at `precision` (fp16 unless said otherwise) and writes its
    sidecar `OUTPUT.json`; `build` holds the builder's options.

    `.onnx` makes a portable ONNX file and, beside it, `NAME.reference/` with inputs and PyTorch's outputs in
    Polygraphy's format. A path without suffix, or with a separator at its end, is a directory that gets everything:
    model.onnx, plan.json, plan.png, reference/, parity.json.

    `reduction` takes the plan's place: a method of `stm.reduction` that looks at the image, or its name.

    Nothing existing is overwritten unless everything succeeded. If parity fails, the suspect file is kept as
    `OUTPUT.failed`.

    Raises:
        StmError: see the kinds in `stm.errors` and `exporter.errors`; `exit_code` is the command line's.
    """
    folder_asked = os.fspath(output).endswith(os.sep)
    output = Path(output)
    engine = output.suffix in ENGINE_SUFFIXES and not folder_asked
    whole = folder_asked or (output.is_dir() and not engine and output.suffix != ".onnx") or (output.suffix == "" and output.name[:1] != ".")
    if not whole and not engine and output.suffix != ".onnx":
        raise ConfigError(f"output is {output}; give NAME.onnx, NAME.engine (or .plan), or a directory (no suffix, or a / at its end) for everything")
    precision = precision or ("fp16" if engine else "fp32")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose from {', '.join(PRECISIONS)}")
    if precision != "fp32" and not engine:
        raise ConfigError(f"precision is {precision!r}; a portable .onnx is fp32. Engines (-o x.engine) take fp16 and bf16")
    options = build or BuildOptions()
    check_accumulation(precision, options.fp16_accumulation)
    if engine:
        require_tensorrt()
        require_gpu()
        require_torch_gpu()
        load_plugin(plugin_library)
    target = output / "model.onnx" if whole else output
    reference = output / "reference" if whole else reference_folder(output)
    if classes is not None and len(classes) != (wanted := model_config(name, num_classes=num_classes).num_classes):
        raise ConfigError(f"{len(classes)} class names for {wanted} classes; give one a class, or --num-classes {len(classes)}")
    for path in (target, reference / "inputs.json", *((sidecar_path(target),) if engine else ())):
        check_writable(path)
    seconds: dict[str, float] = {}

    def timed(key: str, since: float) -> float:
        now = time.perf_counter()
        seconds[key] = round(now - since, 3)
        return now

    with Steps(3 + engine * 2 + verify_output, show_progress) as steps:
        clock = time.perf_counter()
        with steps.step("loading weights"):
            how: dict[str, Any] = {"rate": rate, "plan": plan, "merge_weights": merge_weights, "rule": rule}
            how |= {"proportional_decay": proportional_decay, "align": align}
            method = choose_reduction(name, image_size, reduction, **how)
            chosen = choose_plan(name, image_size, **how)
            model = load_model(
                name,
                checkpoint=checkpoint,
                weights=weights,
                ema=ema,
                plan=chosen,
                image_size=image_size,
                num_classes=num_classes,
                seed=seed,
                pos_embed_resize=pos_embed_resize,
            )
            model = model if method is None else with_reduction(model, method)
            clock = timed("load", clock)
        with steps.step("exporting"):
            proto = export_onnx(model, opset=opset, classes=classes)
            clock = timed("export", clock)
        assert model.provenance is not None
        result = ExportResult(
            model=model.config.name,
            weights=str(model.provenance),
            weights_random=model.provenance.is_random,
            precision=precision,
            outputs=[str(target)],
            bytes=0,
            summary=summary_of(model),
            seconds=seconds,
        )
        with Staging(target.parent) as staging:
            aside = staging.path(target)
            sidecar: dict[str, Any] | None = None
            if engine:
                with steps.step("lowering"):
                    lowered = lower_for_engine(proto, precision, options, plugin_library)
                    clock = timed("lower", clock)
                with steps.step("building the engine"):
                    blob, info = build_engine(lowered, options, plugin_library=plugin_library, show_progress=show_progress)
                    sidecar = make_sidecar(lowered, blob, options, info, load_plugin(plugin_library), precision)
                    result.build = sidecar["build"]
                    clock = timed("build", clock)
            with steps.step("writing"):
                aside.write_bytes(blob if engine else proto.SerializeToString())
                result.bytes = aside.stat().st_size
                del proto
                clock = timed("write", clock)
            if engine:
                loaded = deserialize(process(), blob, options.version_compatible)
                result.timing = engine_latency(loaded, options.batch, model.config.image_size)
                clock = timed("time", clock)
            if verify_output:
                with steps.step("verifying"):
                    if engine:
                        report = verify_engine(loaded, lowered, model, precision, options, bisect=bisect, plugin_library=plugin_library)
                    else:
                        report = verify(aside, model, precision=precision, bisect=bisect)
                    result.parity = report
                    timed("verify", clock)
                if not report:
                    failed = target.with_name(target.name + ".failed")
                    staging.keep_as(target, failed)
                    try:
                        report.check()
                    except ParityError as error:
                        raise ParityError(f"{error}. The file is kept as {failed}") from None
                result.outputs += report.stage_reference(reference, staging)
            if sidecar is not None:
                sidecar |= {"parity": result.parity.to_dict() if result.parity else None, "timing": result.timing}
                staging.path(sidecar_path(target)).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
                result.outputs.append(str(sidecar_path(target)))
            if whole:
                result.outputs += _stage_companions(target.parent, staging, model, result)
    return result


def _stage_companions(folder: Path, staging: Staging, model: VisionMamba, result: ExportResult) -> list[str]:
    made = []
    if not isinstance(model, ReducedVim):  # which has no plan
        from .drawing import draw_plan

        plan = model.plan or make_plan(model.config)
        plan.save(staging.path(folder / "plan.json"))
        draw_plan(model.config, plan, staging.path(folder / "plan.png"))
        made = [str(folder / "plan.json"), str(folder / "plan.png")]
    if result.parity is not None:
        write_report(staging.path(folder / "parity.json"), result.parity)
        made.append(str(folder / "parity.json"))
    return made
