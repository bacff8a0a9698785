"""The command line, in this process: exit codes, --json, what is left on failure, what is said about random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import onnx
import pytest
import torch
from onnx import numpy_helper

import exporter.onnx_export
from exporter.cli import main, main_export
from stm import VimConfig, VisionMamba, create_model, make_plan, model_config
from stm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("tiny_vim_t")
RANDOM = ["--model", "vim-t", "--image-size", "64", "--weights", "random"]


def export(*arguments: object) -> int:
    return main([str(argument) for argument in arguments], verb="export")


def meta(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def sabotage(path: Path) -> None:
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "layers.1.mixer.in_proj.weight_t"]
    value = numpy_helper.to_array(tensor).copy()
    value[3, 5] += 1
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("cli")}


@pytest.fixture
def made(outputs: dict[str, Any], tiny_vim_t: VimConfig, capsys: pytest.CaptureFixture[str]) -> Path:
    """A tiny vim-t with seed 5, exported and verified once by the command line."""
    path: Path = outputs["folder"] / "vim.onnx"
    if not path.exists():
        assert export(*RANDOM, "--rate", "0.3", "--seed", "5", "-o", path) == 0
        outputs["said"] = capsys.readouterr()
    return path


# --- 0 ---------------------------------------------------------------------------------------------------------------------


def test_export_says_what_it_made(made: Path, outputs: dict[str, Any]) -> None:
    out, err = outputs["said"]
    assert err == "", "not a terminal: no bars, no logs"
    words = ["RANDOM weights (seed 5)", "WARNING", "tokens left", "token-layers removed", "GFLOPs, true", "GFLOPs, paper", "PASSED", f"wrote {made}"]
    for word in words:
        assert word in out
    assert sorted(p.relative_to(made.parent).as_posix() for p in made.parent.rglob("*")) == [
        "vim.onnx",
        "vim.reference",
        "vim.reference/inputs.json",
        "vim.reference/outputs.json",
    ]
    found = meta(made)
    assert "RANDOM weights (seed 5)" in found["stm.weights"]
    assert found["stm.weights_random"] == "true"


def test_json_is_one_object_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(*RANDOM, "--plan", "stm-20", "--json", "--no-verify", "-o", tmp_path / "vim.onnx") == 0
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)
    assert answer["exit_code"] == 0
    assert answer["weights_random"] is True
    assert "RANDOM" in answer["weights"]
    assert answer["parity"] is None
    assert {"seqlen", "tokens_left", "token_layers_removed", "gflops_paper", "gflops_true"} <= answer["summary"].keys()
    assert answer["outputs"] == [str(tmp_path / "vim.onnx")]
    assert answer["bytes"] == (tmp_path / "vim.onnx").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["vim.onnx"]


def test_a_directory_gets_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(*RANDOM, "--rate", "0.3", "--json", "-o", tmp_path / "all") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parity"]["passed"] is True
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"model.onnx", "plan.json", "plan.png", "parity.json", "reference"}
    assert json.loads((tmp_path / "all" / "parity.json").read_text())["passed"] is True
    assert all(Path(path).exists() for path in answer["outputs"])


def test_verify(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(made), "--batch", "1,3"]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["verify", str(made), "--reference", str(made.with_suffix(".reference")), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["exit_code"], answer["passed"]) == (0, True)
    assert answer["metrics"]["max_error"] <= answer["allowed"]["max_error"]


def test_plan_json_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["plan", "--model", "vim-s", "--plan", "stm-20", "-o", str(tmp_path / "p.json"), "--draw", str(tmp_path / "p.png"), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tokens_left"], answer["token_layers_removed"], len(answer["seqlen"])) == (153, 792, 24)
    assert (answer["gflops_paper"], answer["gflops_true"] > answer["gflops_paper"]) == (4.2363, True)
    assert answer["outputs"] == [str(tmp_path / "p.json"), str(tmp_path / "p.png")]
    assert main(["inspect", str(tmp_path / "p.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_left"] == 153
    assert main(["plan", "--model", "vim-s", "--plan", str(tmp_path / "p.json")]) == 0
    text = capsys.readouterr().out
    assert "197 193 189" in text
    assert "153x13" in text
    assert "4.236 (-16.6%" in text


def test_plan_aligned_to_pieces_of_tokens(tmp_path, capsys):
    assert main(["plan", "--model", "vim-s", "--rate", "0.2", "--align", "8", "-o", str(tmp_path / "p.json")]) == 0
    assert "197 192x2 184x2 176x2 168x2 160x15" in capsys.readouterr().out
    assert main(["plan", "--model", "vim-s", "--plan", str(tmp_path / "p.json"), "--align", "8"]) == 2
    assert "a plan file holds its own" in capsys.readouterr().err
    assert main(["plan", "--model", "vim-s", "--align", "8"]) == 2
    assert "say how much, too" in capsys.readouterr().err
    assert main(["plan", "--model", "vim-s", "--rate", "0.9", "--align", "250"]) == 2
    assert "both sides must keep one" in capsys.readouterr().err
    assert main(["plan", "--model", "vim-s", "--align", "8", "--optimize", "--budget", "0.6x"]) == 2
    assert "--align: --optimize chooses that itself" in capsys.readouterr().err


def test_an_export_takes_the_aligned_plan(tmp_path, monkeypatch):
    made = []

    def stop(name, **options):
        made.append(options["plan"])
        raise ConfigError("far enough")

    monkeypatch.setattr("exporter.deploy.load_model", stop)
    assert main(["export", "--model", "vim-t", "--weights", "random", "--rate", "0.2", "--align", "8", "-o", str(tmp_path / "x.onnx")]) == 2
    assert made == [make_plan(model_config("vim-t"), rate=0.2, align=8)]


def test_inspect(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(made)]) == 0
    assert "RANDOM" in capsys.readouterr().out


# --- 2: usage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["export", "--model", "vim-t"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--no-such-option"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--rate", "1"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--rate", "nan"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--image-size", "0"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--image-size", "1x2x3"],
        ["export", "--model", "vim-t", "-o", "x.onnx", "--precision", "fp8"],
        ["export", "--mod", "vim-t", "-o", "x.onnx"],
        ["verify", "x.onnx", "--batch", "0"],
        ["bench"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vim-tt"], ["no model 'vim-tt'", "Did you mean 'vim-t'"]),
        ([*RANDOM, "--rate", "0.2", "--plan", "stm-20"], ["--rate or --plan, not both"]),
        ([*RANDOM, "--plan", "stm-21"], ["'stm-21'", "stm-20"]),
        ([*RANDOM, "--plan", "missing.json"], ["missing.json"]),
        ([*RANDOM, "--checkpoint", "x.pth"], ["--weights random excludes --checkpoint"]),
        (["--model", "vim-t", "--checkpoint", "missing.pth"], ["no weights file missing.pth"]),
        ([*RANDOM, "--classes", "missing.txt"], ["cannot read --classes missing.txt"]),
        ([*RANDOM, "--image-size", "8"], ["8x8", "smaller than a patch of 16"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_values_exit_with_2(arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vim.onnx"
    path.write_text("old")
    assert export(*arguments, "--json", "-o", path) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["exit_code"] == 2
    for word in words:
        assert word in answer["message"]
        assert word in err
    assert "Traceback" not in err
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["vim.onnx"]


@pytest.mark.parametrize("suffix", [".txt", ".onnxx"])
def test_unknown_suffix(suffix: str, tmp_path: Path) -> None:
    assert export(*RANDOM, "-o", tmp_path / f"vim{suffix}") == 2
    assert main(["plan", "--model", "vim-t", "-o", str(tmp_path / "plan.txt")]) == 2
    assert not list(tmp_path.iterdir())


def test_plan_to_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["plan", "--model", "vim-t", "-o", str(tmp_path / "file" / "plan.json")]) in (2, 4)
    assert "plan.json" in capsys.readouterr().err


# --- 3: published weights, the network, TensorRT --------------------------------------------------------------------------------


def test_without_network_both_ways_on_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert export("--model", "vim-t", "-o", tmp_path / "vim.onnx", "--json") == 3
    out, err = capsys.readouterr()
    for text in (json.loads(out)["message"], err):
        for word in ("hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth", "Name or service not known", "--checkpoint FILE", "--weights random"):
            assert word in text
    assert not list(tmp_path.iterdir())


def published(path: Path, name: str, **seeds: int) -> Path:
    """A file as the authors publish it, from a tiny model."""
    states = {}
    for entry, seed in seeds.items():
        states[entry] = create_model(name, seed=seed, image_size=64).state_dict()
    torch.save({**states, "epoch": 299, "scaler": "none"}, path)
    return path


@pytest.mark.parametrize(("name", "entry", "seed"), [("vim-t", "model", 1), ("vim-b", "model_ema", 2)])
def test_published_weights(
    name: str, entry: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = published(tmp_path / "hub.pth", name, model=1, model_ema=2), []

    def stand_in(repo: str, filename: str, **_: object) -> str:
        asked.append((repo, filename))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in)
    path = tmp_path / "vim.onnx"
    assert export("--model", name, "--image-size", "64", "--no-verify", "-o", path) == 0
    out = capsys.readouterr().out
    assert f"published weights hub.pth ({entry})" in out
    assert "RANDOM" not in out
    assert len(asked) == 1
    assert asked[0][0] == {"vim-t": "hustvl/Vim-tiny-midclstok", "vim-b": "hustvl/Vim-base-midclstok"}[name]
    found = meta(path)
    assert found["stm.weights_random"] == "false"
    assert len(found["stm.checkpoint_sha256"]) == 64
    head = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}["head.weight"]
    want = create_model(name, seed=seed, image_size=64).head.weight.detach().numpy()
    assert (numpy_helper.to_array(head) == want).all()


@pytest.mark.parametrize("suffix", [".engine", ".plan"])
def test_engines_need_tensorrt(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(*RANDOM, "-o", tmp_path / f"vim{suffix}") in (2, 3)
    assert not list(tmp_path.iterdir())


# --- 4, 7, 9 -----------------------------------------------------------------------------------------------------------------


def test_failed_export_is_4_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(exporter.onnx_export.torch.onnx, "export", fail)
    assert export(*RANDOM, "-o", tmp_path / "new" / "vim.onnx", "--json") == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "ExportError"
    assert "no such operator" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_failed_parity_is_7_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = exporter.deploy.export_onnx

    def dishonest(model: VisionMamba, **options: Any) -> onnx.ModelProto:
        path = tmp_path / "scratch.onnx"
        onnx.save(honest(model, **options), path)
        sabotage(path)
        made = onnx.load(path)
        path.unlink()
        return made

    monkeypatch.setattr(exporter.deploy, "export_onnx", dishonest)
    output = tmp_path / "all"
    old = output / "model.onnx"
    output.mkdir()
    old.write_text("old")
    assert export(*RANDOM, "--rate", "0.3", "--bisect", "-o", output, "--json") == 7
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["error"] == "ParityError"
    for word in ("layers.1.mixer.in_proj", "max |error|", f"{old}.failed"):
        assert word in answer["message"]
        assert word in err
    assert old.read_text() == "old"
    assert {p.name for p in output.iterdir()} == {old.name, f"{old.name}.failed"}


def test_verify_of_a_wrong_file_is_7(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    path = tmp_path / "wrong.onnx"
    path.write_bytes(made.read_bytes())
    sabotage(path)
    assert main(["verify", str(path), "--batch", "1", "--bisect", "--json"]) == 7
    answer = json.loads(capsys.readouterr().out)
    assert (answer["exit_code"], answer["passed"], answer["deviates_at"]) == (7, False, "layers.1.mixer.in_proj")
    assert main(["verify", str(path), "--reference", str(made.with_suffix(".reference"))]) == 7
    assert "FAILED" in capsys.readouterr().out


def test_artefact_mismatch_is_9(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["verify", str(tmp_path / "missing.onnx")], ["verify", str(made), "--reference", str(tmp_path)], ["inspect", "missing.onnx"]):
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 9
        out, err = capsys.readouterr()
        assert json.loads(out)["error"] == "ArtefactError"
        assert "Traceback" not in err


def test_reference_of_another_file_is_9(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.onnx"
    assert export(*RANDOM, "--image-size", "96", "-o", other) == 0
    assert main(["verify", str(made), "--reference", str(other.with_suffix(".reference"))]) == 9
    assert "inputs of shape (1, 3, 96, 96)" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--bisect"], ["--ema"], ["--checkpoint", "vim.pth"]], ids=lambda option: option[0])
def test_reference_goes_with_nothing_that_rebuilds_the_model(made: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made), "--reference", str(made.with_suffix(".reference")), *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_without_torch_inspect_works_and_verify_says_what_does(made: Path) -> None:
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ModuleNotFoundError('No module named torch', name='torch')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from exporter.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    saved = ["--reference", str(made.with_suffix(".reference"))]
    for arguments, code, words in ((["inspect"], 0, ""), (["verify"], 3, "--reference DIR"), (["verify", *saved], 0, "")):
        command = [sys.executable, "-c", block, arguments[0], str(made), *arguments[1:]]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ran.returncode, words in ran.stderr) == (code, True), ran.stderr
        assert "Traceback" not in ran.stderr


def test_verify_with_the_right_and_the_wrong_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = published(tmp_path / "right.pth", "vim-t", model=1, model_ema=2)
    path = tmp_path / "vim.onnx"
    assert export("--model", "vim-t", "--image-size", "64", "--checkpoint", right, "--ema", "--no-verify", "-o", path) == 0
    assert "checkpoint weights right.pth (model_ema)" in capsys.readouterr().out
    assert main(["verify", str(path), "--checkpoint", str(right), "--ema", "--batch", "1"]) == 0
    assert main(["verify", str(path), "--checkpoint", str(right), "--batch", "1"]) == 0, "the file says that it took model_ema"
    wrong = published(tmp_path / "wrong.pth", "vim-t", model=2, model_ema=1)
    assert main(["verify", str(path), "--checkpoint", str(wrong)]) == 9
    assert "hash" in capsys.readouterr().err
    assert main(["verify", str(path)]) == 9


def test_verify_knows_the_resize_method(tmp_path: Path) -> None:
    """A file made with --pos-embed-resize official from weights of another size can be verified."""
    weights = published(tmp_path / "other.pth", "vim-t", model=1)
    path = tmp_path / "vim.onnx"
    arguments = ["--model", "vim-t", "--image-size", "96", "--checkpoint", weights, "--pos-embed-resize", "official", "--no-verify", "-o", path]
    assert export(*arguments) == 0
    assert main(["verify", str(path), "--checkpoint", str(weights), "--batch", "1"]) == 0


# --- plan files and entry points ---------------------------------------------------------------------------------------------------


def test_a_plan_file_for_another_size_names_the_mend(tmp_path: Path, tiny_vim_t: VimConfig, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(tiny_vim_t, rate=0.2).save(tmp_path / "plan.json")
    assert export("--model", "vim-t", "--image-size", "96", "--weights", "random", "--plan", tmp_path / "plan.json", "-o", tmp_path / "x.onnx") == 2
    err = capsys.readouterr().err
    for word in ("37 tokens", "17", "64x64", "stm plan --model vim-t --image-size 96x96"):
        assert word in err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("run", [lambda: main(["--version"]), lambda: main(["export", "--help"]), main_export], ids=["version", "help", "stm-export"])
def test_entry_points(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["stm-export", "--help"])
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "stm" in out
    assert "usage" not in out or "exit codes" in out
