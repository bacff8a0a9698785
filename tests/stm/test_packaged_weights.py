"""vim-n: its sizes, and its weights, which come with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

import stm
from exporter.cli import main
from stm.data import CLASS_NAMES, VARIANTS, DigitPairs
from stm.registry import PackagedWeights, model_entry

SHIPPED = model_entry("vim-n").weights


def test_vim_n_has_the_depth_and_tokens_of_the_published_models() -> None:
    nano, tiny = stm.model_config("vim-n"), stm.model_config("vim-t")
    assert (nano.d_model, nano.d_inner, nano.dt_rank, nano.d_state, nano.num_classes) == (64, 128, 4, 16, 100)
    for name in ("depth", "seqlen", "cls_index", "image_size", "patch_size", "d_conv", "d_state"):
        assert getattr(nano, name) == getattr(tiny, name)
    for preset in stm.PRESETS:
        assert stm.make_plan(nano, preset=preset).lengths == stm.make_plan(tiny, preset=preset).lengths
    assert stm.model_config("vim-n", num_classes=10).num_classes == 10
    assert stm.model_config("vim-t").num_classes == 1000
    assert "vim-n" in stm.list_models()


def test_vim_n_has_about_a_million_parameters() -> None:
    with torch.device("meta"):
        model = stm.VisionMamba(stm.model_config("vim-n"))
    assert sum(p.numel() for p in model.parameters()) == 1_046_884


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test runs, vim-n has 2 layers: what is exported here is not looked into."""
    entry = model_entry("vim-n")
    config = entry.config.with_changes(depth=2, d_model=32, dt_rank=2, d_state=4)
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", replace(entry, config=config))


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> stm.VisionMamba:
    """Stand-in weights where the package keeps its own: random ones, in float16 as they ship."""
    model = stm.create_model("vim-n", seed=3)
    (tmp_path / "weights").mkdir()
    save_file({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "weights" / "vim-n.safetensors")
    monkeypatch.setattr(stm.registry, "WEIGHTS_FOLDER", tmp_path / "weights")
    return model


def test_weights_come_from_the_package(packaged: stm.VisionMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no network has a part in it
    model = stm.create_model("vim-n", pretrained=True, plan="stm-20")
    assert model.provenance is not None
    assert (model.provenance.kind, model.provenance.is_random) == ("published", False)
    assert str(model.provenance) == "published weights vim-n.safetensors (bare)"
    assert model.config.num_classes == 100
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, packaged.state_dict()[name].half().float())


def test_the_command_line_takes_them_and_their_class_names(
    shallow: None, packaged: stm.VisionMamba, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "n.onnx"
    assert main(["export", "--model", "vim-n", "--image-size", "64", "--no-verify", "-o", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["model"], made["weights_random"]) == ("vim-n", False)
    meta = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(meta["stm.classes"]) == list(CLASS_NAMES)
    assert meta["stm.weights_kind"] == "published"


def test_another_number_of_classes_is_refused_with_the_mend(packaged: stm.VisionMamba) -> None:
    with pytest.raises(stm.CheckpointError, match="--num-classes 100"):
        stm.create_model("vim-n", pretrained=True, num_classes=1000)
    assert stm.create_model("vim-n", num_classes=7).head.out_features == 7


def test_a_package_without_the_file_says_so(
    shallow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stm.registry, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(stm.MissingDependencyError) as error:
        stm.create_model("vim-n", pretrained=True)
    for words in ("vim-n", str(tmp_path / "vim-n.safetensors"), "install it again", "docs/training.md", "--checkpoint FILE", "--weights random"):
        assert words in str(error.value)
    assert main(["export", "--model", "vim-n", "-o", str(tmp_path / "x.onnx")]) == 3
    assert "vim-n.safetensors" in capsys.readouterr().err
    assert main(["export", "--model", "vim-n", "--weights", "random", "--image-size", "64", "--no-verify", "-o", str(tmp_path / "x.onnx")]) == 0
    assert "RANDOM" in capsys.readouterr().out


@pytest.mark.skipif(
    not isinstance(SHIPPED, PackagedWeights) or not SHIPPED.path.is_file(), reason="vim-n is not trained yet: no stm/weights/vim-n.safetensors"
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_vim_n_classifies_images_it_never_saw(variant: str) -> None:
    model = stm.create_model("vim-n", pretrained=True)
    images, labels = DigitPairs("test", variant).batch(torch.arange(60))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.mean, model.config.std))
    with torch.no_grad():
        found = model((images / 255 - mean) / std).argmax(1)
    assert (found == labels).float().mean() > 0.8
