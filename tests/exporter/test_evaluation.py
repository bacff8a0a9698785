"""`stm eval`, end to end on the CPU: accuracy against an independent count, resuming, torchrun, files, engines, refusals."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import exporter.evaluation.runner as runner_module
import exporter.evaluation.subjects as subjects_module
from exporter import evaluate
from exporter.cli import _parser, main
from exporter.errors import ArtefactError, ParityError
from exporter.evaluation import Evaluation
from exporter.evaluation.preprocessing import Preprocessing
from exporter.evaluation.ranks import Ranks
from exporter.evaluation.records import Prediction, Records
from exporter.evaluation.subjects import DTYPES, in_precision, model_subjects
from exporter.runtimes.pytorch import TorchRunner
from stm import ConfigError, MissingDependencyError, PlanError, VimConfig, VisionMamba, with_plan
from stm.reduction import create_reduction, with_reduction

from .conftest import SMALL, small_model, small_plan

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 noisy images of 7 classes; more classes than the 5 kept, so that top-5 can miss."""
    root, rng = tmp_path_factory.mktemp("eval") / "images", np.random.default_rng(3)
    for index in range(17):
        folder = root / f"n{index % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70 + index, 50)).save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return root


@pytest.fixture
def model() -> VisionMamba:
    return small_model(num_classes=CLASSES)


def run(data: Any, output: Any, model: VisionMamba, **options: Any) -> Evaluation:
    plans = {"none": None, "merged": small_plan(), "tome": create_reduction("tome", model.config, schedule={1: 4, 2: 2})}
    result = evaluate(data, output, **{"model": model, "plans": plans, "device": "cpu", "batch": 4, "workers": 0, **options})
    assert result is not None
    return result


def figures(result: Evaluation) -> list[tuple[Any, ...]]:
    return [(a.name, a.top1, a.top5, a.difference, a.agreement) for a in result.accuracies]


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for path in folder.glob("predictions-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


# --- what is counted -------------------------------------------------------------------------------------------------------


def test_accuracy_is_what_a_plain_loop_counts(data: Path, model: VisionMamba, tmp_path: Path) -> None:
    result = run(data, tmp_path / "run", model)
    prepare = Preprocessing(SMALL.image_size, SMALL.mean, SMALL.std)
    files = sorted(data.rglob("*.*"))
    truth = np.array([int(path.parent.name[1:]) for path in files])
    images = torch.from_numpy(np.stack([prepare(Image.open(path)) for path in files]))
    variants = {
        "none": model,
        "merged": with_plan(model, small_plan()),
        "tome": with_reduction(model, create_reduction("tome", SMALL.with_changes(num_classes=CLASSES), schedule={1: 4, 2: 2})),
    }
    order = {name: variant(images).argsort(1, descending=True).numpy() for name, variant in variants.items()}
    assert result.images == 17
    for name, best in order.items():
        assert result[name].top1.hits == int((best[:, 0] == truth).sum())
        assert result[name].top5.hits == int((best[:, :5] == truth[:, None]).any(1).sum()) < 17
    for name in ("merged", "tome"):
        before, after = order["none"][:, 0] == truth, order[name][:, 0] == truth
        d = result[name].difference
        assert d is not None
        assert (d.lost, d.gained) == (int((before & ~after).sum()), int((~before & after).sum()))
        assert result[name].agreement == pytest.approx(float((order[name][:, 0] == order["none"][:, 0]).mean()))
    assert result["none"].difference is None
    assert [row["top"]["merged"][0] for row in lines(tmp_path / "run")] == order["merged"][:, 0].tolist()
    assert all(a.images_per_second and a.images_per_second > 0 for a in result.accuracies)
    assert (result["merged"].figures["tokens_left"], result["tome"].figures["tokens_left"]) == (5, 7)


def test_files_of_a_run(data: Path, model: VisionMamba, tmp_path: Path) -> None:
    result = run(data, tmp_path, model)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "predictions-0.jsonl", "timing-0.jsonl", "eval.json", "eval.md"}
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["accuracies"][1]["difference"]["verdict"] == "within noise"
    text = (tmp_path / "eval.md").read_text()
    for word in ("| merged | 5 |", "within noise", "McNemar", "Wilson", "synsets", "17 images (folders)"):
        assert word in text
    assert "Beside the paper" not in text, "nothing published fits this model"
    assert "/" not in text.replace("/s", "").replace(" / ", ""), "no paths of the machine"


def test_the_papers_figures_stand_beside_measured_ones(data: Path, model: VisionMamba) -> None:
    from exporter.evaluation.published import Published
    from exporter.evaluation.results import count, markdown

    result = run(data, None, model)
    made = {0: Prediction(0, "a", 1, {"none": [1], "x": [0]}), 1: Prediction(1, "b", 1, {"none": [1], "x": [1]})}
    cells = {"none": (Published(76.1, "1.45 G", "table 2, ViM without merging"),)}
    result.accuracies = count(made, dict.fromkeys(("none", "x"), result["none"].figures), cells, "none", [])
    assert "| none | 76.1 | 1.45 G | 100.00 | +23.90 | table 2, ViM without merging |" in markdown(result)
    assert any("paper 76.1 %, measured +23.90" in line for line in result.lines())
    assert result["x"].images_per_second is None


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_what_must_be_wide(data: Path, model: VisionMamba, precision: str) -> None:
    half = in_precision(small_model(num_classes=CLASSES), precision)
    wide = {name.rsplit(".", 2)[-1] if not name.endswith("bias") else "dt bias" for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "A_b_log", "D", "D_b", "dt bias"}
    result = run(data, None, model, precision=precision)
    assert result["none"].figures == run(data, None, model)["none"].figures
    assert next(model.parameters()).dtype == torch.float32, "the caller's model stays as it was"
    images = torch.randn(2, 3, *SMALL.image_size)
    exact, rounded = model(images), half(images.to(DTYPES[precision])).float()
    assert (exact - rounded).abs().max() < 0.1 * exact.std()


def test_logits_that_are_not_finite_stop_the_run(data: Path, model: VisionMamba) -> None:
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ParityError, match=r"none: logits of .*n00000000.* are not finite"):
        run(data, None, model)


def test_worker_processes_make_no_difference(data: Path, model: VisionMamba) -> None:
    assert figures(run(data, None, model, workers=2)) == figures(run(data, None, model))


# --- resuming --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(data: Path, model: VisionMamba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two batches of 4 done and a third cut off in the middle of a line."""
    folder, append = tmp_path / "run", Records.append

    def fail(self: Records, batch: Any, timing: Any) -> None:
        append(self, batch, timing)
        if len((folder / "predictions-0.jsonl").read_text().splitlines()) == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "append", fail)
        with pytest.raises(KeyboardInterrupt):
            run(data, folder, model)
    for kind, cut in (("predictions", 30), ("timing", 5)):
        path = folder / f"{kind}-0.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
    return folder


def test_an_interrupted_run_goes_on(data: Path, model: VisionMamba, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(data, tmp_path / "whole", model)
    seen: list[int] = []
    classify = runner_module.classify

    def counted(subject: Any, pixels: Any, where: Any) -> Any:
        seen.append(len(pixels))
        return classify(subject, pixels, where)

    monkeypatch.setattr(runner_module, "classify", counted)
    result = run(data, interrupted, model)
    assert seen == [4, 4, 4, 2, 2, 2], "11 of 17 were done"
    assert result.resumed == 11
    assert figures(result) == figures(whole)
    assert lines(interrupted) == lines(tmp_path / "whole")
    seen.clear()
    again = run(data, interrupted, model)
    assert (seen, again.resumed, figures(again)) == ([], 17, figures(whole))
    assert again["none"].images_per_second is not None, "timings are kept"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plans": {"none": None, "merged": small_plan("sum"), "tome": None}}, ["subjects.merged", "was", "is"]),
        ({"plans": {"none": None}}, ["subjects was none, merged, tome, is none"]),
        ({"precision": "bf16"}, ["precision was fp32, is bf16"]),
        ({"crop_ratio": 1.0}, ["preprocessing.crop_ratio was 0.875, is 1.0"]),
        ({"limit": 5}, ["data.images was 17, is 5"]),
    ],
)
def test_another_run_is_refused_with_both_values(data: Path, model: VisionMamba, interrupted: Path, change: dict[str, Any], words: list[str]) -> None:
    before = (interrupted / "predictions-0.jsonl").read_bytes()
    with pytest.raises(ArtefactError) as error:
        run(data, interrupted, model, **change)
    for word in words:
        assert word in str(error.value)
    assert (interrupted / "predictions-0.jsonl").read_bytes() == before
    assert error.value.exit_code == 9


def test_other_weights_are_refused(data: Path, model: VisionMamba, interrupted: Path) -> None:
    model.head.bias.data[0] += 1
    with pytest.raises(ArtefactError, match=r"weights_sha256 was [0-9a-f]{64}, is [0-9a-f]{64}"):
        run(data, interrupted, model)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda text: text.replace('{"index": 2,', '{"index": 2 ', 1), "line 3 is damaged"),
        (lambda text: text.replace('"label"', '"lable"', 1), "line 1 is damaged"),
        (lambda text: text + text.splitlines()[0].replace('"none": [', '"none": [6, ') + "\n", "done twice with different answers"),
    ],
    ids=["json", "keys", "twice"],
)
def test_damaged_records_are_named(data: Path, model: VisionMamba, interrupted: Path, damage: Callable[[str], str], word: str) -> None:
    path = interrupted / "predictions-0.jsonl"
    whole = path.read_text()[: path.read_text().rfind("\n") + 1]
    path.write_text(damage(whole))
    with pytest.raises(ArtefactError, match=word):
        run(data, interrupted, model)
    path.write_text(whole + whole.splitlines()[0] + "\n")  # the same answer twice counts once
    assert run(data, interrupted, model).images == 17


def test_a_folder_of_something_else_and_a_run_that_goes_on(data: Path, model: VisionMamba, interrupted: Path) -> None:
    identity = {key: value for key, value in json.loads((interrupted / "run.json").read_text()).items() if key not in ("schema", "kind")}
    with Records(interrupted, identity), pytest.raises(ArtefactError, match=r"another `stm eval` is writing"):
        run(data, interrupted, model)
    (interrupted / "run.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not of this version"):
        run(data, interrupted, model)
    (interrupted / "run.json").unlink()
    with pytest.raises(ArtefactError, match="has predictions, but"):
        run(data, interrupted, model)


# --- images that cannot be read ----------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_and_passed_over_if_asked(data: Path, model: VisionMamba, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "images"
    shutil.copytree(data, copy)
    broken = copy / "n00000001" / "8.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200] + bytes(len(whole) - 200))
    with pytest.raises(ConfigError, match=r"cannot read image .*n00000001/8.jpg.*--unreadable skip"):
        run(copy, tmp_path / "run", model)
    result = run(copy, tmp_path / "run", model, unreadable="skip")
    assert (result.images, result["none"].top1.images) == (16, 16)
    assert [row["image"] for row in result.unreadable] == ["n00000001/8.jpg"]
    assert "1 images could not be read" in "\n".join(result.lines())
    assert "| n00000001/8.jpg |" in (tmp_path / "run" / "eval.md").read_text()
    broken.write_bytes(whole)  # the file system is well again: tried once more
    assert run(copy, tmp_path / "run", model).images == 17
    with pytest.raises(ConfigError, match="unreadable is 'ignore'"):
        run(copy, None, model, unreadable="ignore")


# --- shards ------------------------------------------------------------------------------------------------------------------


def test_shards_count_as_folders_do(data: Path, model: VisionMamba, tmp_path: Path) -> None:
    import io
    import tarfile

    files = sorted(data.rglob("*.*"))
    for part in range(3):
        with tarfile.open(tmp_path / f"val-{part}.tar", "w") as tar:
            for path in files[part::3]:
                for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.cls", str(int(path.parent.name[1:])).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    result = run(tmp_path, tmp_path / "run", model, workers=1)
    assert figures(result) == figures(run(data, None, model))
    assert result.identity["data"]["kind"] == "shards"


# --- several processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
def test_parts_are_disjoint_and_whole(size: int) -> None:
    parts = [Ranks(rank, size).part(range(17)) for rank in range(size)]
    assert sorted(index for part in parts for index in part) == list(range(17)), "no image is repeated to fill a part up"
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "hold numbers"),
        ({"WORLD_SIZE": "2"}, "meet in the output folder"),
    ],
)
def test_ranks_that_do_not_fit(data: Path, model: VisionMamba, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], word: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=word):
        run(data, None, model)


def test_torchrun_finishes_what_one_process_began(data: Path, tmp_path: Path) -> None:
    """17 images on 2 processes after 5 on one: each counts once, and the answer is that of one process."""
    arguments = ["--data", str(data), "--model", "vim-t", "--image-size", "32", "--num-classes", str(CLASSES), "--weights", "random"]
    arguments += ["--plan", "none,0.4", "--device", "cpu", "--batch", "4", "--workers", "0"]
    alone = evaluate(
        data, tmp_path / "alone", model="vim-t", image_size=32, num_classes=CLASSES, weights="random", plans=["none", "0.4"], device="cpu", workers=0
    )
    assert alone is not None
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "run.json").write_bytes((tmp_path / "alone" / "run.json").read_bytes())
    first = (tmp_path / "alone" / "predictions-0.jsonl").read_text().splitlines(keepends=True)[:5]
    (shared / "predictions-0.jsonl").write_text("".join(first))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "exporter", "eval", *arguments]
    ran = subprocess.run(
        [*command, "-o", str(shared), "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)  # one object: the other process says nothing
    assert (answer["images"], answer["processes"], answer["resumed"]) == (17, 2, 5)
    assert lines(shared) == lines(tmp_path / "alone")
    counts = [len((shared / f"predictions-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [5 + 6, 6]
    assert [a["top1"]["hits"] for a in answer["accuracies"]] == [a.top1.hits for a in alone.accuracies]


def test_an_output_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"rank 1 does not see .*run.json, which rank 0 wrote"):
        Records(tmp_path, {"subjects": {}}, rank=1).check()


# --- plans by name -----------------------------------------------------------------------------------------------------------


def test_specs(tmp_path: Path) -> None:
    from exporter.evaluation.subjects import parse_spec
    from stm import make_plan, model_config

    config = model_config("vim-t")
    assert parse_spec(config, "none") is None
    assert parse_spec(config, "0") is None
    assert parse_spec(config, "stm-20") == make_plan(config, preset="stm-20")
    assert parse_spec(config, "0.4", rule="spread") == make_plan(config, rate=0.4, rule="spread")
    make_plan(config, preset="stm-30", weights="sum").save(tmp_path / "p.json")
    assert parse_spec(config, str(tmp_path / "p.json"), rule="spread") == make_plan(config, preset="stm-30", weights="sum")
    for spec, method, preset in (("r-meeto", "r-meeto", "table2"), ("tome:tl-792", "tome", "tl-792")):
        rival = parse_spec(config, spec)
        assert (rival.method, rival.preset) == (method, preset)  # type: ignore[union-attr]
    for spec, word in (
        ("stm-99", "no plan 'stm-99'; give none, a preset"),
        ("tome", "table 2 gives its settings for no model"),
        ("tome:x", "no preset 'x'"),
        ("1.5", "rate"),
    ):
        with pytest.raises(PlanError, match=word):
            parse_spec(config, spec)
    with pytest.raises(PlanError, match="none is among the plans"):
        model_subjects(small_model(), {"none": None}, rule="spread")
    with pytest.raises(ConfigError, match="twice"):
        model_subjects("vim-t", ["none", "none"], weights="random")


def test_published_figures_belong_to_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> VisionMamba:
        made = small_model()
        made.config = made.config.with_changes(name="vim-t", image_size=(224, 224), num_classes=1000)
        made.provenance = subjects_module.stm.Provenance("random" if options["weights"] == "random" else "published", "x", "")
        return made

    monkeypatch.setattr(subjects_module, "load_model", load)
    monkeypatch.setattr(subjects_module, "with_plan", lambda model, plan: model)
    trained = model_subjects("vim-t", ["none", "stm-40"])
    assert [[cell.top1 for cell in subject.published] for subject in trained.members] == [[76.1], [72.2]]
    assert all(subject.published == () for subject in model_subjects("vim-t", ["none", "stm-40"], weights="random").members)


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_files(tiny_vim_t: VimConfig, tmp_path: Path) -> list[Path]:
    paths = []
    for name, rate in (("none", "0"), ("merged", "0.4")):
        path = tmp_path / f"{name}.onnx"
        arguments = ["--model", "vim-t", "--image-size", "64", "--weights", "random", "--num-classes", str(CLASSES), "--no-verify", "--rate", rate]
        assert main([*arguments, "-o", str(path)], verb="export") == 0
        paths.append(path)
    return paths


def test_onnx_files_count_as_pytorch_does(data: Path, onnx_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    common = ["--data", str(data), "--workers", "0", "--batch", "5", "--device", "cpu", "--json"]
    assert main(["eval", *map(str, onnx_files), *common, "-o", str(tmp_path / "files")]) == 0
    out, err = capsys.readouterr()
    files = json.loads(out)
    assert err == ""
    arguments = ["--model", "vim-t", "--image-size", "64", "--weights", "random", "--num-classes", str(CLASSES), "--plan", "none,0.4"]
    assert main(["eval", *arguments, *common, "-o", str(tmp_path / "torch")]) == 0
    torch_answer = json.loads(capsys.readouterr().out)
    assert [a["name"] for a in files["accuracies"]] == ["none.onnx", "merged.onnx"]
    assert (files["baseline"], files["weights_random"]) == ("none.onnx", True)
    for one, other in zip(files["accuracies"], torch_answer["accuracies"], strict=True):
        assert (one["top1"], one["top5"], one["difference"]) == (other["top1"], other["top5"], other["difference"])
        assert one["figures"]["tokens_left"] == other["figures"]["tokens_left"]
    rows = zip(lines(tmp_path / "files"), lines(tmp_path / "torch"), strict=True)
    assert all(list(one["top"].values()) == list(other["top"].values()) for one, other in rows)
    onnx_files[1].write_bytes(onnx_files[0].read_bytes())
    assert main(["eval", *map(str, onnx_files), *common, "-o", str(tmp_path / "files")]) == 9
    assert "subjects.merged.onnx" in json.loads(capsys.readouterr().out)["message"]


class FakeRunner:
    """A TensorRT runner's face: takes 4 to 6 images, answers with the PyTorch model."""

    def __init__(self, model: VisionMamba, name: str) -> None:
        self.torch, self.name = TorchRunner(model), name
        self.sizes: list[int] = []

    def __enter__(self) -> FakeRunner:
        self.torch.activate()
        return self

    def __exit__(self, *_: object) -> None:
        self.torch.deactivate()

    def infer(self, feeds: dict[str, Any]) -> OrderedDict[str, Any]:
        (images,) = feeds.values()
        assert (4 <= len(images) <= 6, images.dtype, images.flags.c_contiguous) == (True, np.float32, True)
        self.sizes.append(len(images))
        outputs: OrderedDict[str, Any] = self.torch.infer(feeds)
        return outputs

    def last_inference_time(self) -> float:
        return 0.5


@pytest.fixture
def engine(model: VisionMamba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A file that stands for an engine, its sidecar, and the runners made for it."""
    path = tmp_path / "vim.engine"
    path.write_bytes(b"engine")
    sidecar = {
        "model": "vim-t",
        "precision": "fp16",
        "image_size": list(SMALL.image_size),
        "num_classes": CLASSES,
        "normalization": {"mean": list(SMALL.mean), "std": list(SMALL.std), "crop_ratio": 0.875},
        "plan": None,
        "batch": {"min": 4, "opt": 5, "max": 6},
        "weights": "checkpoint weights x.pth",
        "weights_random": False,
        "weights_sha256": "ab" * 32,
    }
    made: list[FakeRunner] = []
    monkeypatch.setattr(subjects_module, "load_engine", lambda path, library: (object(), sidecar))
    monkeypatch.setattr(subjects_module, "require_device", lambda device, local_rank: "cuda")
    monkeypatch.setattr(subjects_module, "tensorrt_runner", lambda engine, name: made.append(FakeRunner(model, name)) or made[-1])
    return {"path": path, "sidecar": sidecar, "runners": made}


def test_engine_batches_fit_its_profile(data: Path, model: VisionMamba, engine: dict[str, Any], tmp_path: Path) -> None:
    result = evaluate(data, tmp_path / "run", files=[engine["path"]], workers=0)
    assert result is not None
    assert engine["runners"][0].sizes == [5, 5, 5, 4], "the best batch; the last 2 images are filled up to the least"
    plain = run(data, None, model)
    assert (result.images, result.accuracies[0].top1) == (17, plain["none"].top1)
    assert result.accuracies[0].images_per_second == pytest.approx(12 / 1.5), "the first batch warms up"
    assert (result.identity["precision"], result.identity["device"]) == ("fp16", "cuda")
    with pytest.raises(ConfigError, match=r"takes batches 4 to 6, asked 8; build it"):
        evaluate(data, None, files=[engine["path"]], workers=0, batch=8)
    with pytest.raises(ConfigError, match="engines run on a GPU"):
        evaluate(data, None, files=[engine["path"]], device="cpu")


def test_damaged_sidecars(data: Path, engine: dict[str, Any]) -> None:
    for key, value, word in (
        ("batch", {}, "which batches"),
        ("normalization", {"mean": [0, 0], "std": [1, 1, 1], "crop_ratio": 1}, "normalisation is damaged"),
    ):
        before = engine["sidecar"][key]
        engine["sidecar"][key] = value
        with pytest.raises(ArtefactError, match=word):
            evaluate(data, None, files=[engine["path"]])
        engine["sidecar"][key] = before


# --- the command line ----------------------------------------------------------------------------------------------------------


def test_people_read_what_was_measured(data: Path, tiny_vim_t: VimConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        "vim-t",
        "--image-size",
        "64",
        "--weights",
        "random",
        "--num-classes",
        str(CLASSES),
        "--plan",
        "none,0.4,mtr-balanced:tl-552",
    ]
    assert main(["eval", *arguments, "--data", str(data), "--workers", "0", "-o", str(tmp_path / "run"), "--limit", "9"]) == 0
    out, err = capsys.readouterr()
    assert err == "", "not a terminal: no bars"
    for word in (
        "RANDOM",
        "mean nothing",
        "mtr-balanced:tl-552",
        "within noise",
        "of none",
        "9 of 17 images",
        f"wrote {tmp_path / 'run' / 'eval.md'}",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["give .onnx or .engine files, or --model"]),
        (["x.onnx", "--model", "vim-t"], 2, ["not both"]),
        (["x.onnx", "--plan", "none"], 2, ["--plan belong to --model"]),
        (["x.onnx"], 9, ["no file x.onnx"]),
        (["x.txt"], 2, ["x.txt: give .onnx or .engine files"]),
        (["x.onnx", "x.onnx"], 2, ["given twice"]),
        (["--model", "vim-t", "--plan", "stm-99", "--weights", "random"], 2, ["no plan 'stm-99'"]),
        (["--model", "vim-t", "--weights", "random"], 2, ["7 class folders, the model has 1000 classes"]),
        (["--model", "vim-t", "--weights", "random", "--num-classes", "7", "--crop-ratio", "2"], 2, ["crop ratio is 2.0"]),
        (["--model", "vim-t", "--checkpoint", "nowhere.pth"], 2, ["no weights file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_commands(
    data: Path, tiny_vim_t: VimConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: list[str]
) -> None:
    assert main(["eval", *arguments, "--data", str(data), "-o", str(tmp_path / "run"), "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code
    for word in words:
        assert word in answer["message"]
    assert not (tmp_path / "run").exists(), "nothing is left by a run that did not start"


def document_commands() -> list[str]:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    found = re.findall(r"^(?:torchrun .*-m exporter|stm) (eval .*?)(?: +#.*)?$", blocks, re.M)
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("command", document_commands())
def test_documented_commands_parse(command: str) -> None:
    _parser().parse_args(shlex.split(command))


def test_a_gpu_that_is_not_there(data: Path, model: VisionMamba) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingDependencyError, match="needs an NVIDIA GPU"):
        run(data, None, model, device="cuda")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        run(data, None, model, device="tpu")
