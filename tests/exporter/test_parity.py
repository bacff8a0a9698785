"""The verdict, the bisection, and the saved reference that Polygraphy replays."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporter import ArtefactError, ParityError, ParityReport, inspect, verify
from exporter.file_metadata import read_metadata
from exporter.images import parity_inputs
from exporter.onnx_export import export_onnx
from exporter.parity import comparable_tensors, compare_logits, first_deviation, load_reference
from exporter.runtimes.pytorch import TorchRunner
from exporter.tolerances import TOLERANCES, tolerance
from exporter.verification import verify_file
from stm import make_plan

from .conftest import Exported, small_model, small_plan

FP32 = tolerance("fp32")


def logits(images: int = 4, classes: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, classes)).astype(np.float32)


def judged(got: np.ndarray, want: np.ndarray, **changes: float) -> tuple[object, list[str]]:
    return compare_logits([got], [want], replace(FP32, **changes))  # type: ignore[arg-type]


# --- compare_logits -------------------------------------------------------------------------------------------------------


def test_equal_logits_pass_exactly() -> None:
    metrics, failures = compare_logits([logits(3), logits(5, seed=1)], [logits(3), logits(5, seed=1)], FP32)
    assert not failures
    assert (metrics.images, metrics.max_error, metrics.mean_error, metrics.top1, metrics.top5) == (8, 0, 0, 1, 1)
    assert metrics.spread == pytest.approx(np.concatenate([logits(3), logits(5, seed=1)]).std(), rel=1e-6)
    assert metrics.cosine == pytest.approx(1)


def test_errors_are_in_units_of_the_spread() -> None:
    want = logits() * 50
    got = want.copy()
    got[1, 3] += 5e-5 * want.std()
    metrics, failures = judged(got, want)
    assert metrics.max_error == pytest.approx(5e-5, rel=0.05)  # type: ignore[attr-defined]
    assert metrics.mean_error == pytest.approx(5e-5 / want.size, rel=0.05)  # type: ignore[attr-defined]
    assert not failures


def changed(kind: str) -> tuple[np.ndarray, np.ndarray]:
    want, step = logits(), np.float32(logits().std())
    got = want.copy()
    if kind == "max":
        got[2, 4] += 2e-4 * step
    elif kind == "mean":
        got += np.float32(5e-5) * step
    elif kind == "cosine":
        got[0] = -want[0]
    elif kind == "swapped images":
        got[[0, 1]] = want[[1, 0]]
    elif kind == "NaN":
        got[3, 7] = np.nan
    elif kind == "infinite":
        got[3, 7] = np.inf
    elif kind == "all NaN":
        got[:] = np.nan
    return got, want


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("max", ["max |error| is 2.00e-04 of the spread, allowed 1e-04"]),
        ("mean", ["mean |error| is 5.00e-05", "allowed 2e-05"]),
        ("cosine", ["cosine is -1.0000000, allowed 0.999999", "top-1", "top-5"]),
        ("swapped images", ["max", "mean", "cosine", "top-1"]),
        ("NaN", ["NaN", "max |error| is nan", "mean |error| is nan", "cosine is nan"]),
        ("infinite", ["NaN or infinite", "max |error| is inf"]),
        ("all NaN", ["NaN", "max |error|"]),
    ],
)
def test_each_metric_can_fail(kind: str, words: list[str]) -> None:
    _, failures = judged(*changed(kind))
    for word in words:
        assert any(word in failure for failure in failures), (word, failures)


def test_top1_ignores_ties_and_counts_the_rest() -> None:
    want = np.zeros((2, 6), np.float32)
    want[0, :2] = 10, 10 - 1e-4  # closer than 2 x 1e-4 of the spread: either may win
    want[1, :2] = 10, 5
    got = want.copy()
    got[0, :2] = want[0, [1, 0]]
    metrics, failures = judged(got, want)
    assert metrics.top1 == 1  # type: ignore[attr-defined]
    assert not failures
    got[1, :2] = want[1, [1, 0]]
    metrics, failures = judged(got, want)
    assert metrics.top1 == 0  # type: ignore[attr-defined]
    assert any("top-1 agreement is 0.0000" in failure for failure in failures)


def test_all_ties_are_no_disagreement() -> None:
    want = np.tile(np.float32([1, 1, 0]), (2, 1))
    assert judged(want, want)[0].top1 == 1  # type: ignore[attr-defined]


def test_top5_is_the_share_of_common_classes() -> None:
    want = np.tile(np.arange(10, dtype=np.float32), (2, 1))
    got = want.copy()
    got[0, [5, 4]] = want[0, [4, 5]]  # fifth and sixth change places
    assert judged(got, want)[0].top5 == pytest.approx((4 / 5 + 1) / 2)  # type: ignore[attr-defined]


def test_few_classes() -> None:
    want = logits(3, 2)
    assert not judged(want, want)[1]
    one = logits(3, 1)
    assert not judged(one, one)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0], ids=["NaN", "infinite", "all equal"])
def test_a_broken_reference_is_an_error(value: float) -> None:
    with pytest.raises(ParityError, match="reference logits are not finite or all equal"):
        judged(logits(), np.full_like(logits(), value))


def test_shapes_must_agree() -> None:
    with pytest.raises(ParityError, match=r"output 0 has shape \(4, 19\), the reference \(4, 20\)"):
        judged(logits(4, 19), logits(4, 20))


def test_every_tolerance_has_a_reason() -> None:
    for allowed in TOLERANCES.values():
        assert allowed.reason
    assert FP32.max_error <= 1e-4


# --- verify ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passed(exported: Exported) -> ParityReport:
    return verify(exported.path, exported.model, batches=(1, 2))


def test_the_exported_file_passes(passed: ParityReport) -> None:
    assert passed
    passed.check()
    assert passed.batches == [1, 1, 2, 2], "photographs and noise for each batch size"
    assert passed.metrics.images == 6
    assert passed.metrics.max_error <= 1e-4
    assert "PASSED" in "\n".join(passed.lines())
    data = passed.to_dict()
    assert data["passed"] is True
    assert data["metrics"]["max_error"] <= data["allowed"]["max_error"]
    assert "feeds" not in data


def test_saved_reference_replays(
    exported: Exported, passed: ParityReport, tmp_path: Path, polygraphy: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    inputs, outputs = passed.save_reference(tmp_path / "reference")
    feeds, wanted = load_reference(tmp_path / "reference")
    for got, want in zip(feeds, passed.feeds, strict=True):
        np.testing.assert_array_equal(got, want)
    assert [w.shape for w in wanted] == [(1, 1000), (1, 1000), (2, 1000), (2, 1000)]
    again = verify_file(exported.path, reference=tmp_path / "reference")
    assert again
    assert again.metrics == passed.metrics
    tolerances = ["--atol", FP32.max_error * passed.metrics.spread, "--rtol", 0]
    replay = polygraphy("run", exported.path, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs, *tolerances)
    assert replay.returncode == 0, replay.stdout[-3000:] + replay.stderr[-3000:]
    assert "PASSED" in replay.stdout


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def sabotaged(model: onnx.ModelProto, name: str) -> bytes:
    """The same file with one number of one weight changed."""
    made = copy(model)
    (tensor,) = [tensor for tensor in made.graph.initializer if tensor.name == name]
    value = numpy_helper.to_array(tensor).copy()
    value.flat[value.size // 2] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return made.SerializeToString()


def test_one_wrong_weight_fails_and_bisection_names_the_first_tensor_from_it(small_exported: Exported) -> None:
    broken = sabotaged(small_exported.proto, "layers.1.mixer.x_proj_b.weight_t")
    report = verify(broken, small_exported.model, batches=(1,), bisect=True)
    assert not report
    assert report.failures
    assert report.deviates_at == "layers.1.mixer.x_proj_b"
    assert "first tensor that deviates: layers.1.mixer.x_proj_b" in "\n".join(report.lines())
    with pytest.raises(ParityError, match=r"onnxruntime-cpu.*pytorch.*layers\.1\.mixer\.x_proj_b"):
        report.check()


def test_bisection_with_one_source_a_side_and_one_image() -> None:
    model = small_model(make_plan(small_model().config, schedule={1: (1, 1)}))
    feeds = parity_inputs((48, 64), (0.5,) * 3, (0.25,) * 3, (1,))
    broken = sabotaged(export_onnx(model), "layers.2.mixer.out_proj.weight_t")
    assert first_deviation(broken, model, feeds, 1e-4) == "layers.2.mixer.out_proj"


@pytest.mark.parametrize(
    ("weight", "tensor"),
    [
        ("patch_embed.proj.bias", "patch_embed.proj"),
        ("layers.0.norm.weight", "layers.0.norm"),
        ("layers.0.mixer.conv1d.weight", "layers.0.mixer.conv1d"),
        ("layers.1.mixer.in_proj.weight_t", "layers.1.mixer.in_proj"),
        ("layers.1.mixer.D_b", "layers.1.mixer.scan_b"),
        ("layers.1.merge.left.span", "layers.1.merge.left"),
        ("layers.2.mixer.out_proj.weight_t", "layers.2.mixer.out_proj"),
        ("norm_f.weight", "norm_f"),
        ("head.weight", "logits"),
    ],
)
def test_bisection_finds_every_kind_of_tensor(small_exported: Exported, weight: str, tensor: str) -> None:
    feeds = parity_inputs((48, 64), (0.5,) * 3, (0.25,) * 3, (1,))
    assert first_deviation(sabotaged(small_exported.proto, weight), small_exported.model, feeds, 1e-4) == tensor


def test_bisection_of_a_good_file_names_nothing(small_exported: Exported) -> None:
    feeds = parity_inputs((48, 64), (0.5,) * 3, (0.25,) * 3, (2,))
    assert first_deviation(small_exported.path, small_exported.model, feeds, 1e-4) is None


def test_bisection_looks_at_tensors_in_graph_order(small_exported: Exported) -> None:
    names = comparable_tensors(small_exported.proto, small_exported.model)
    assert names[0] == "patch_embed.proj"
    assert names[-1] == "norm_f"
    assert [name for name in names if "layers.1.merge" in name] == ["layers.1.merge.left", "layers.1.merge.right", "layers.1.merge"]
    assert len(names) > 30


def test_a_plan_that_is_not_the_file_s_fails(small_exported: Exported) -> None:
    assert not verify(small_exported.path, small_model(small_plan("decay")), batches=(1,))
    assert not verify(small_exported.path, small_model(), batches=(1,))


def test_a_file_that_does_not_run_is_a_parity_error(small_exported: Exported) -> None:
    made = copy(small_exported.proto)
    (tensor,) = [tensor for tensor in made.graph.initializer if tensor.name == "layers.1.merge.sources"]
    tensor.CopyFrom(numpy_helper.from_array(np.array([0, 999]), tensor.name))
    with pytest.raises(ParityError, match="onnxruntime-cpu cannot run the model"):
        verify(made.SerializeToString(), small_exported.model, batches=(1,))


def test_own_inputs(small_exported: Exported) -> None:
    own = [np.random.default_rng(0).standard_normal((3, 3, 48, 64), dtype=np.float32)]
    report = verify(small_exported.path, small_exported.model, inputs=own)
    assert report
    assert (report.batches, report.metrics.images) == ([3], 3)


def test_torch_runner_works_in_the_model_s_dtype_and_puts_tf32_back(small_exported: Exported) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        images = np.zeros((1, 3, 48, 64), np.float32)
        with TorchRunner(small_model().double(), taps=["layers.1.mixer.in_proj"]) as runner:
            got = runner.infer({"images": images})
        assert set(got) == {"logits", "layers.1.mixer.in_proj"}
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


# --- inputs ---------------------------------------------------------------------------------------------------------------


def test_parity_inputs_are_photographs_and_noise_and_no_two_alike() -> None:
    feeds = parity_inputs((48, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (1, 12))
    assert [feed.shape[0] for feed in feeds] == [1, 1, 12, 12]
    assert all(feed.dtype == np.float32 and feed.shape[1:] == (3, 48, 64) for feed in feeds)
    images = [image.tobytes() for image in feeds[2]]
    assert len(set(images)) == 12
    again = parity_inputs((48, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (1, 12))
    assert all(np.array_equal(a, b) for a, b in zip(feeds, again, strict=True))
    assert abs(feeds[3].std() - 1) < 0.02


# --- files ------------------------------------------------------------------------------------------------------------------


def test_reference_errors(tmp_path: Path, exported: Exported) -> None:
    with pytest.raises(ArtefactError, match="holds no reference"):
        verify_file(exported.path, reference=tmp_path)
    (tmp_path / "inputs.json").write_text("{}")
    (tmp_path / "outputs.json").write_text("[]")
    with pytest.raises(ArtefactError, match="holds no reference"):
        load_reference(tmp_path)


def test_read_metadata_errors(tmp_path: Path, small_exported: Exported) -> None:
    with pytest.raises(ArtefactError, match="no file"):
        read_metadata(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ArtefactError, match=r"cannot read|no stm metadata"):
        read_metadata(tmp_path / "text.onnx")
    plain = copy(small_exported.proto)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    with pytest.raises(ArtefactError, match=r"no stm metadata.*export it again"):
        read_metadata(tmp_path / "plain.onnx")
    assert read_metadata(small_exported.path)["model"] == "vim-small-test"


def damaged(model: onnx.ModelProto, path: Path, **values: str | None) -> Path:
    """The file with some stm.* metadata changed or (None) taken away."""
    made = copy(model)
    kept = {entry.key: entry.value for entry in made.metadata_props} | {f"stm.{key}": value for key, value in values.items()}
    del made.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            made.metadata_props.add(key=key, value=value)
    onnx.save(made, path)
    return path


def test_other_weights_than_the_file_s(exported: Exported, tmp_path: Path) -> None:
    path = damaged(exported.proto, tmp_path / "other.onnx", weights_sha256="0" * 64)
    with pytest.raises(ArtefactError, match=r"hash is [0-9a-f]{16}.*made from 0{16}"):
        verify_file(path)
    path = damaged(exported.proto, tmp_path / "trained.onnx", weights_random="false", seed="null", weights="checkpoint weights vim.pth (model)")
    with pytest.raises(ArtefactError, match=r"checkpoint weights vim\.pth.*--checkpoint FILE, or --reference"):
        verify_file(path)
    with pytest.raises(ArtefactError, match="drop --checkpoint"):
        verify_file(exported.path, checkpoint=tmp_path / "any.pth")


DAMAGES = (
    {"precision": None},
    {"precision": "xyz"},
    {"weights_random": "maybe"},
    {"image_size": "7"},
    {"image_size": "[224]"},
    {"image_size": "[224, 1e9]"},
    {"config": '{"num_classes": 1000000000000}'},
    {"config": "[]"},
    {"seed": '"abc"'},
    {"seed": "null"},
    {"classes": "7"},
    {"seqlen": "{"},
    {"plan": "{"},
)


@pytest.mark.parametrize("values", DAMAGES, ids=str)
def test_damaged_metadata_is_an_artefact_error(exported: Exported, tmp_path: Path, values: dict[str, str | None]) -> None:
    """From a file that verifies as it is: what fails is the damage."""
    path = damaged(exported.proto, tmp_path / "damaged.onnx", **values)
    with pytest.raises(ArtefactError, match="metadata is damaged"):
        verify_file(path)
    with pytest.raises(ArtefactError, match="metadata is damaged"):
        inspect(path)
