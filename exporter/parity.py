"""Does a runtime compute what PyTorch computes? Polygraphy's Comparator underneath, one tolerance table, one verdict."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SimpleCompareFunc
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from .errors import ArtefactError, ParityError
from .files import Staging
from .images import parity_inputs
from .op_schema import INPUT, OUTPUT
from .runtimes.ort import onnxruntime_runner
from .tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    from stm import VisionMamba

Floats = NDArray[np.float32]


@contextlib.contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


@dataclass(frozen=True)
class Metrics:
    """Distance of logits from the reference. Errors in units of `spread`, the reference's standard deviation; top-1
    counts only images whose two best reference logits are further apart than the tolerance (no ties)."""

    images: int
    spread: float
    max_error: float
    mean_error: float
    cosine: float
    top1: float
    top5: float


@dataclass
class ParityReport:
    """Verdict of `verify`. Truthy if every metric is within its tolerance."""

    runtime: str
    reference: str
    precision: str
    batches: list[int]
    metrics: Metrics
    allowed: Tolerance
    failures: list[str]
    deviates_at: str | None = None
    bisected: bool = False
    feeds: list[Floats] = field(default_factory=list, repr=False)
    reference_results: Any = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("feeds", "reference_results")}
        return {"passed": bool(self), **plain, "metrics": asdict(self.metrics), "allowed": asdict(self.allowed)}

    def save_reference(self, folder: Path) -> list[str]:
        """Write inputs.json and outputs.json (the reference's) in Polygraphy's format.

        Replay: `polygraphy run vim.onnx --onnxrt --load-inputs F/inputs.json --load-outputs F/outputs.json`.
        """
        with Staging(folder) as staging:
            return self.stage_reference(folder, staging)

    def stage_reference(self, folder: Path, staging: Staging) -> list[str]:
        """`save_reference` as part of a larger set of files."""
        inputs, outputs = folder / "inputs.json", folder / "outputs.json"
        with _quiet_polygraphy():
            save_json([{INPUT: batch} for batch in self.feeds], str(staging.path(inputs)), description="inputs")
            self.reference_results.save(str(staging.path(outputs)))
        return [str(inputs), str(outputs)]

    def lines(self) -> list[str]:
        """For people: one line a metric, measured and allowed."""
        m, a = self.metrics, self.allowed
        head = f"{self.runtime} against {self.reference}, {self.precision}, {m.images} images in batches of {', '.join(map(str, self.batches))}"
        rows = [
            ("max |error| / spread", m.max_error, "<=", a.max_error, ".2e"),
            ("mean |error| / spread", m.mean_error, "<=", a.mean_error, ".2e"),
            ("cosine", m.cosine, ">=", a.cosine, ".7f"),
            ("top-1 agreement", m.top1, ">=", a.top1, ".4f"),
            ("top-5 overlap", m.top5, ">=", a.top5, ".4f"),
        ]
        body = [f"  {name:<22} {value:{form}} {sign} {bound:{form}}" for name, value, sign, bound, form in rows]
        out = [head, *body, f"  parity {'PASSED' if self else 'FAILED: ' + '; '.join(self.failures)}"]
        if self.bisected:
            out.append(f"  first tensor that deviates: {self.deviates_at or 'none'}")
        return out

    def check(self) -> None:
        """Raises:
        ParityError: a metric is out of tolerance; names measured and allowed.
        """
        if self.failures:
            at = f"; first tensor that deviates: {self.deviates_at}" if self.deviates_at else ""
            raise ParityError(f"{self.runtime} does not compute what {self.reference} computes: {'; '.join(self.failures)}{at}")


def compare_logits(got: Sequence[Floats], want: Sequence[Floats], allowed: Tolerance) -> tuple[Metrics, list[str]]:
    """Metrics over all batches and the list of those out of tolerance.

    Args:
        got, want: (batch, classes) each; `want` is the reference.
    """
    if len(got) != len(want):
        raise ParityError(f"{len(got)} outputs for {len(want)} of the reference")
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            raise ParityError(f"output {index} has shape {a.shape}, the reference {b.shape}")
    g = np.concatenate([np.asarray(a, dtype=np.float64) for a in got])
    w = np.concatenate([np.asarray(b, dtype=np.float64) for b in want])
    if not np.isfinite(w).all() or (spread := float(w.std())) == 0:
        raise ParityError("the reference logits are not finite or all equal; the weights are broken")
    finite = bool(np.isfinite(g).all())
    error = np.abs(g - w) / spread
    norms = np.linalg.norm(g, axis=1) * np.linalg.norm(w, axis=1)
    cosine = float(np.min(np.sum(g * w, axis=1) / norms)) if finite else float("nan")
    order_w, order_g = np.argsort(-w, axis=1, kind="stable"), np.argsort(-g, axis=1, kind="stable")
    best = np.take_along_axis(w, order_w[:, :2], axis=1)
    clear = (best[:, 0] - best[:, -1]) / spread > 2 * allowed.max_error if w.shape[1] > 1 else np.zeros(len(w), bool)
    same = order_w[:, 0] == order_g[:, 0]
    five = min(5, w.shape[1])
    overlap = [len(set(a[:five]) & set(b[:five])) / five for a, b in zip(order_w, order_g, strict=True)]
    metrics = Metrics(
        images=len(w),
        spread=spread,
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        cosine=cosine,
        top1=float(same[clear].mean()) if clear.any() else 1.0,
        top5=float(np.mean(overlap)),
    )
    failures = [] if finite else ["the output has NaN or infinite values"]
    # Written so that NaN fails.
    if not metrics.max_error <= allowed.max_error:
        failures.append(f"max |error| is {metrics.max_error:.2e} of the spread, allowed {allowed.max_error:.0e}")
    if not metrics.mean_error <= allowed.mean_error:
        failures.append(f"mean |error| is {metrics.mean_error:.2e} of the spread, allowed {allowed.mean_error:.0e}")
    if not metrics.cosine >= allowed.cosine:
        failures.append(f"cosine is {metrics.cosine:.7f}, allowed {allowed.cosine}")
    if not metrics.top1 >= allowed.top1:
        failures.append(f"top-1 agreement is {metrics.top1:.4f}, allowed {allowed.top1}")
    if not metrics.top5 >= allowed.top5:
        failures.append(f"top-5 overlap is {metrics.top5:.4f}, allowed {allowed.top5}")
    return metrics, failures


def run(runners: Sequence[Any], inputs: Sequence[Floats]) -> RunResults:
    """Run Polygraphy runners on the same inputs."""
    with _quiet_polygraphy():
        return Comparator.run(list(runners), data_loader=[{INPUT: batch} for batch in inputs])


def load_reference(folder: Path) -> tuple[list[Floats], list[Floats]]:
    """Inputs and reference logits that `ParityReport.save_reference` wrote; needs no torch.

    Raises:
        ArtefactError: a file is missing or not Polygraphy's.
    """
    from polygraphy.json import load_json

    try:
        with _quiet_polygraphy():
            inputs = [batch[INPUT] for batch in load_json(str(folder / "inputs.json"))]
            (_, iterations), *_ = RunResults.load(str(folder / "outputs.json")).items()
            outputs = [np.asarray(iteration[OUTPUT]) for iteration in iterations]
    except Exception as error:
        raise ArtefactError(f"{folder} holds no reference (inputs.json, outputs.json in Polygraphy's format): {error}") from None
    if len(inputs) != len(outputs):
        raise ArtefactError(f"{folder} has {len(inputs)} inputs and {len(outputs)} outputs; make the reference anew: stm export")
    return inputs, outputs


def _polygraphy_verdict(results: RunResults, atol: float, cosine: float) -> bool:
    with _quiet_polygraphy():
        verdicts = Comparator.compare_accuracy(
            results,
            compare_func=[SimpleCompareFunc(atol=atol, rtol=0, check_error_stat="max"), CosineSimilarityCompareFunc(cosine)],
        )
    return all(bool(verdict) for verdict in verdicts)


def verify(
    target: str | Path | bytes,
    model: VisionMamba,
    *,
    precision: str = "fp32",
    batches: Sequence[int] = (1, 5),
    inputs: Sequence[Floats] | None = None,
    bisect: bool = False,
) -> ParityReport:
    """Run an ONNX file on ONNX Runtime (CPU) and the model in PyTorch on photographs and noise, and judge.

    Args:
        target: ONNX file or its bytes.
        model: the reference, with its plan.
        batches: batch sizes; each comes with photographs and with noise.
        inputs: own images instead, (batch, 3, height, width) each, normalised.
        bisect: on failure name the first tensor that leaves the tolerance.

    Returns:
        A report; `report.check()` raises if it failed, `report.save_reference(folder)` keeps inputs and reference.
    """
    config = model.config
    feeds = list(inputs) if inputs is not None else parity_inputs(config.image_size, config.mean, config.std, batches)
    report = judge(onnxruntime_runner(target if isinstance(target, bytes) else Path(target)), model, precision, feeds)
    if bisect and not report:
        report.bisected = True
        report.deviates_at = first_deviation(target, model, feeds[:1], report.allowed.tensor_error)
    return report


def judge_against(runner: Any, feeds: list[Floats], wanted: Sequence[Floats], precision: str, reference: str) -> ParityReport:
    """Run any Polygraphy runner and judge it by reference logits that are there already; needs no torch."""
    allowed = tolerance(precision)
    ((name, got),) = run([runner], feeds).items()
    metrics, failures = compare_logits([iteration[OUTPUT] for iteration in got], wanted, allowed)
    return ParityReport(name, reference, precision, [len(feed) for feed in feeds], metrics, allowed, failures)


def tolerance_of_method(model: VisionMamba, precision: str, feeds: list[Floats]) -> Tolerance:
    """Bounds for a model under a method that looks at the image (stm.reduction) in half precision.

    Rounding turns near ties of scores round, and such an image goes another way, in PyTorch's own half precision, too: twice its
    distance from PyTorch's float32 is allowed, and one image, where that is more than the table has.
    """
    import torch

    from .runtimes.pytorch import TorchRunner

    table = tolerance(precision)
    half = copy.deepcopy(model).to(torch.float16 if precision == "fp16" else torch.bfloat16)
    results = [[iteration[OUTPUT] for iteration in run([TorchRunner(m)], feeds)[0][1]] for m in (half, model)]
    own, _ = compare_logits(results[0], results[1], table)
    return replace(
        table,
        max_error=max(table.max_error, 2 * own.max_error),
        mean_error=max(table.mean_error, 2 * own.mean_error),
        cosine=min(table.cosine, 1 - 2 * (1 - own.cosine)),
        top1=min(table.top1, 1 - 2 * (1 - own.top1) - 1 / own.images),
        top5=min(table.top5, 1 - 2 * (1 - own.top5) - 1 / own.images),
        reason="twice PyTorch's own distance in this precision: near ties of scores fall either way",
    )


def judge(runner: Any, model: VisionMamba, precision: str, feeds: list[Floats], allowed: Tolerance | None = None) -> ParityReport:
    """Run any Polygraphy runner and the model in PyTorch on the same inputs and judge, by the table unless `allowed` is given.

    Raises:
        ParityError: the runner cannot run at all.
    """
    from .runtimes.pytorch import TorchRunner

    allowed = allowed or tolerance(precision)
    try:
        results = run([runner, TorchRunner(model)], feeds)
    except Exception as error:
        raise ParityError(f"{runner.name} cannot run the model: {str(error).strip()[:400]}") from error
    (name, got), (reference_name, want) = results.items()
    metrics, failures = compare_logits([i[OUTPUT] for i in got], [i[OUTPUT] for i in want], allowed)
    if not failures and not _polygraphy_verdict(results, allowed.max_error * metrics.spread, allowed.cosine):
        failures.append("Polygraphy's comparison fails")
    report = ParityReport(name, reference_name, precision, [len(feed) for feed in feeds], metrics, allowed, failures)
    report.feeds, report.reference_results = feeds, RunResults([(reference_name, want)])
    return report


def comparable_tensors(proto: onnx.ModelProto, model: VisionMamba) -> list[str]:
    """Tensors of the graph, in its order, that carry the name of a torch module which returns one tensor."""
    modules = dict(model.named_modules())
    composite = {name for name, module in modules.items() if type(module).__name__ in ("Mixer", "ReducedMixer", "Block") or name == "reduction"}
    return [name for node in proto.graph.node for name in node.output if name in modules and name not in composite]


def first_deviation(target: str | Path | bytes, model: VisionMamba, inputs: Sequence[Floats], allowed: float) -> str | None:
    """Name of the first tensor, in graph order, whose max error exceeds `allowed` times its root mean square; None if none does."""
    proto = onnx.load_from_string(target) if isinstance(target, bytes) else onnx.load(str(target))
    names = comparable_tensors(proto, model)
    graph = gs.import_onnx(proto)
    tensors = graph.tensors()
    present = {output.name for output in graph.outputs}
    graph.outputs.extend(tensors[name] for name in names if name not in present)
    for name in names:
        tensors[name].dtype = tensors[name].dtype or np.float32
    marked = gs.export_onnx(graph)
    marked.ir_version = proto.ir_version
    return deviating_tensor(onnxruntime_runner(marked.SerializeToString()), model, names, {}, inputs, allowed)


def deviating_tensor(
    runner: Any, model: VisionMamba, names: Sequence[str], renamed: dict[str, str], inputs: Sequence[Floats], allowed: float
) -> str | None:
    """The first of `names` (torch module paths; `renamed` says what the runner calls them) out of tolerance, or None."""
    from .runtimes.pytorch import TorchRunner

    results = run([runner, TorchRunner(model, taps=names)], inputs)
    (_, got), (_, want) = results.items()
    for name in [*names, OUTPUT]:
        for a, b in zip(got, want, strict=True):
            reference = np.asarray(b[name], dtype=np.float64)
            error = np.abs(np.asarray(a[renamed.get(name, name)], dtype=np.float64) - reference).max()
            if not error <= allowed * max(float(np.sqrt(np.mean(reference**2))), 1e-12):
                return name
    return None


def write_report(path: Path, report: ParityReport) -> None:
    path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
