"""The door to methods that look at the image: `stm-export --reduction`, what the file says, verifying it again."""

import json

import pytest
import torch

from exporter.cli import main
from exporter.deploy import export
from exporter.images import parity_inputs
from exporter.inspection import inspect
from exporter.parity import tolerance_of_method
from exporter.tolerances import tolerance
from exporter.verification import verify_file
from stm import PlanError, create_model
from stm.reduction import create_reduction, with_reduction

pytestmark = pytest.mark.usefixtures("tiny_vim_t")
RANDOM = ["--model", "vim-t", "--image-size", "64", "--weights", "random"]


def run(*arguments):
    return main([str(argument) for argument in arguments], verb="export")


def test_a_method_is_exported_verified_and_named(tmp_path, capsys):
    out = tmp_path / "tome.onnx"
    assert run(*RANDOM, "--reduction", "tome:tl-792", "-o", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parity"]["passed"]
    assert said["summary"]["method"] == "tome"
    found = inspect(out)
    described = json.loads(found["metadata"]["reduction"])
    assert described["method"] == "tome"
    assert described["schedule"] == {str(layer): count for layer, count in said["summary"]["schedule"].items()}
    assert found["seqlen"] == said["summary"]["seqlen"]
    assert verify_file(out, batches=(2,)), "made again from the file alone"


def test_a_directory_has_no_plan(tmp_path):
    config = create_model("vim-t", image_size=64).config
    method = create_reduction("random", config, schedule={1: 3}, seed=2)
    result = export("vim-t", tmp_path / "out", weights="random", image_size=64, reduction=method)
    assert result.parity
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "parity.json", "reference"]
    assert result.summary["seqlen"] == [17, 14, 14]


@pytest.mark.parametrize(
    "extra", [["--rate", "0.2"], ["--plan", "stm-20"], ["--rule", "spread"], ["--proportional-decay"]], ids=lambda extra: extra[0]
)
def test_a_method_and_a_plan_are_refused(extra, tmp_path, capsys):
    assert run(*RANDOM, "--reduction", "tome:tl-792", *extra, "-o", tmp_path / "x.onnx") == PlanError.exit_code
    assert f"--reduction and {extra[0]}: a method that looks at the image has no merge plan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_refused(tmp_path, capsys):
    assert run(*RANDOM, "--reduction", "pumer:tl-792", "-o", tmp_path / "x.onnx") == PlanError.exit_code
    assert "no reduction 'pumer'; choose from tome, " in capsys.readouterr().err


def test_half_precision_is_judged_by_pytorchs_own():
    model = create_model("vim-t", image_size=64)
    reduced = with_reduction(model, create_reduction("mtr", model.config, schedule={1: 3, 2: 2})).requires_grad_(False)
    feeds = parity_inputs((64, 64), model.config.mean, model.config.std, (2,))
    with torch.no_grad():
        allowed = tolerance_of_method(reduced, "bf16", feeds)
    table = tolerance("bf16")
    assert allowed.max_error >= table.max_error
    assert allowed.cosine <= table.cosine
    assert next(reduced.parameters()).dtype == torch.float32
