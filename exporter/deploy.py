"""export: from a model name to a verified file, in one call; what `stm-export` runs."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import stm
from stm import ConfigError, MergePlan, MissingDependencyError, VisionMamba, make_plan, model_config, plan_summary
from stm.config import ImageSize
from stm.plan import resolve_plan

from .errors import ParityError
from .files import written_aside
from .onnx_export import export_onnx
from .parity import ParityReport, verify, write_report
from .progress import Steps

WEIGHTS = ("pretrained", "random")


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

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["parity"] = self.parity.to_dict() if self.parity else None
        return data


def choose_plan(
    name: str,
    image_size: ImageSize,
    *,
    rate: float | None = None,
    plan: MergePlan | str | os.PathLike[str] | None = None,
    merge_weights: str | None = None,
    rule: str | None = None,
    proportional_decay: bool = False,
) -> MergePlan | None:
    """A plan from a rate, a preset, a file or a MergePlan; None where nothing merges.

    Raises:
        PlanError: both given, or the plan does not fit the model.
    """
    config = model_config(name, image_size)
    if rate is not None and plan is not None:
        raise stm.PlanError("give --rate or --plan, not both")
    if isinstance(plan, str) and plan in stm.PRESETS:
        made = make_plan(config, preset=plan, weights=merge_weights or "hsp", rule=rule or "edge", proportional_decay=proportional_decay)
    elif plan is not None:
        if rule or proportional_decay:
            raise stm.PlanError("--rule and --proportional-decay make a plan from --rate or a preset; a plan file holds its own")
        loaded = resolve_plan(config, plan)
        assert loaded is not None
        made = loaded.with_weights(merge_weights) if merge_weights else loaded
    else:
        made = make_plan(config, rate=rate or 0.0, weights=merge_weights or "hsp", rule=rule or "edge", proportional_decay=proportional_decay)
    return made if made.merges else None


def load_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str = "pretrained",
    ema: bool = False,
    plan: MergePlan | None = None,
    image_size: ImageSize = 224,
    num_classes: int = 1000,
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
    image_size: ImageSize = 224,
    num_classes: int = 1000,
    classes: list[str] | None = None,
    precision: str = "fp32",
    opset: int = 18,
    seed: int = 0,
    pos_embed_resize: str = "correct",
    verify_output: bool = True,
    bisect: bool = False,
    show_progress: bool = False,
) -> ExportResult:
    """Weights + plan -> a verified file; the suffix of `output` says which.

    `.onnx` makes a portable ONNX file and, beside it, `NAME.reference/` with inputs and PyTorch's outputs in
    Polygraphy's format. A path without suffix is a directory that gets everything: model.onnx, plan.json, plan.png,
    reference/, parity.json.

    Nothing existing is overwritten unless everything succeeded. If parity fails, the suspect file is kept as
    `OUTPUT.failed`.

    Raises:
        StmError: see the kinds in `stm.errors` and `exporter.errors`; `exit_code` is the command line's.
    """
    output = Path(output)
    whole = output.suffix == ""
    if not whole and output.suffix != ".onnx":
        if output.suffix in (".engine", ".plan"):
            raise MissingDependencyError(f"{output}: engines need TensorRT and are not part of this version; export to .onnx")
        raise ConfigError(f"output is {output}; its suffix must be .onnx, or none for a directory with everything")
    if precision != "fp32":
        raise ConfigError(f"precision is {precision!r}; a portable .onnx is fp32")
    target = output / "model.onnx" if whole else output
    seconds: dict[str, float] = {}

    def timed(key: str, since: float) -> float:
        now = time.perf_counter()
        seconds[key] = round(now - since, 3)
        return now

    with Steps(4 if verify_output else 3, show_progress) as steps:
        clock = time.perf_counter()
        with steps.step("loading weights"):
            chosen = choose_plan(
                name, image_size, rate=rate, plan=plan, merge_weights=merge_weights, rule=rule, proportional_decay=proportional_decay
            )
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
            summary=plan_summary(model.config, model.plan),
            seconds=seconds,
        )
        with written_aside(target) as aside:
            with steps.step("writing"):
                aside.write_bytes(proto.SerializeToString())
                result.bytes = aside.stat().st_size
                del proto
                clock = timed("write", clock)
            if verify_output:
                with steps.step("verifying"):
                    report = verify(aside, model, precision=precision, bisect=bisect)
                    result.parity = report
                    timed("verify", clock)
                    if not report:
                        failed = target.with_name(target.name + ".failed")
                        os.replace(aside, failed)
                        try:
                            report.check()
                        except ParityError as error:
                            raise ParityError(f"{error}. The file is kept as {failed}") from None
        if result.parity is not None:
            result.outputs += result.parity.save_reference(output / "reference" if whole else output.with_suffix(".reference"))
        if whole:
            result.outputs += _write_companions(output, model, result)
    return result


def _write_companions(folder: Path, model: VisionMamba, result: ExportResult) -> list[str]:
    from .drawing import draw_plan

    plan = model.plan or make_plan(model.config)
    plan.save(folder / "plan.json")
    draw_plan(model.config, plan, folder / "plan.png")
    made = [str(folder / "plan.json"), str(folder / "plan.png")]
    if result.parity is not None:
        write_report(folder / "parity.json", result.parity)
        made.append(str(folder / "parity.json"))
    return made
