"""stm plan --optimize in this process: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from exporter.cli import main
from exporter.plan_search import digits, image_files
from stm import ConfigError, MergePlan, gflops_true, model_config
from stm.reduction import load_reduction, reduction_gflops_true

pytestmark = pytest.mark.usefixtures("tiny_vim_t")
RANDOM = ["plan", "--model", "vim-t", "--image-size", "64", "--weights", "random"]
SEARCH = [*RANDOM, "--optimize", "--budget", "0.8x", "--count", "8", "--evaluations", "15", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index in range(5):
        Image.effect_noise((80, 70), 40 + 20 * index).convert("RGB").save(folder / ("more" if index % 2 else ".") / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_it_writes_an_ordinary_plan_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main([*SEARCH, "-o", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)
    plan, config = MergePlan.load(path), model_config("vim-t", 64)
    plan.check_fits(config)
    assert gflops_true(config, plan) <= 0.8 * gflops_true(config)
    found = answer["optimization"]
    assert found["divergence"] <= found["start_divergence"]
    assert found["images"] == 6
    assert answer["outputs"] == [str(path)]
    assert main(["inspect", str(path)]) == 0
    assert main([*SEARCH, "-o", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_text() == path.read_text(), "evaluations alone: repeatable"
    words = capsys.readouterr().out
    for word in ("searched", "held out", "paper's edge plan", "in the engine", "budget"):
        assert word in words


def test_the_schedule_of_a_method_is_searched_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tome.json"
    assert main([*SEARCH, "--reduction", "tome", "-o", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = model_config("vim-t", 64)
    reduction = load_reduction(path, config)
    assert reduction_gflops_true(reduction) <= 0.8 * gflops_true(config)
    assert {int(layer): count for layer, count in answer["schedule"].items()} == reduction.schedule
    assert answer["optimization"]["held_out_images"] == 2
    onnx = tmp_path / "tome.onnx"
    assert main(["export", "--model", "vim-t", "--image-size", "64", "--weights", "random", "--reduction", str(path), "-o", str(onnx), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    assert main([*SEARCH, "--reduction", "tome"]) == 0
    words = capsys.readouterr().out
    for word in ("schedule", "before", "evenly from layer 1", "budget"):
        assert word in words


def test_it_searches_on_a_folder_of_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SEARCH, "--images", str(pictures)]) == 0
    assert f"5 images of {pictures}" in capsys.readouterr().out
    assert [path.name for path in image_files(pictures, 2)] == ["0.png", "4.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimize"], "--optimize needs --budget"),
        (["--budget", "0.6x"], "--budget belongs to --optimize"),
        (["--optimize", "--budget", "0.6x", "--rate", "0.2"], "--rate: --optimize chooses that itself"),
        (["--optimize", "--budget", "0.001x"], "cannot be met"),
        (["--optimize", "--budget", "much"], "give 0.6x"),
        (["--optimize", "--budget", "0.8x", "--images", "nowhere"], "nowhere: no such folder"),
        (["--optimize", "--budget", "0.8x", "--images", "."], "no pictures"),
        (["--optimize", "--budget", "0.8x", "--images", ".", "--data", "digits"], "give --images or --data"),
        (["--optimize", "--budget", "0.8x", "--data", "digits"], "64x64"),
        (["--optimize", "--budget", "1ms"], "--latency-table"),
        (["--optimize", "--budget", "0.6x", "--latency-table", "none.json"], "cannot read latency table none.json"),
        (["--optimize", "--budget", "0.6x", "-o", "plan.txt"], "give .json"),
        (["--reduction", "tome"], "--reduction belongs to --optimize"),
        (["--optimize", "--budget", "0.8x", "--reduction", "tame"], "no reduction 'tame'"),
        (["--optimize", "--budget", "0.8x", "--reduction", "tome", "--objective", "state"], "--objective state"),
        (["--optimize", "--budget", "0.8x", "--reduction", "tome", "--draw", "x.png"], "no one plan to draw"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RANDOM, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_digits_are_of_both_variants_in_both_parts() -> None:
    images = digits(model_config("vim-n"), 10)
    assert images.shape == (10, 3, 224, 224)
    assert len(torch.unique(images.flatten(1)[:, :50], dim=0)) == 10
    with pytest.raises(ConfigError, match="224x224"):
        digits(model_config("vim-n", 64), 4)
