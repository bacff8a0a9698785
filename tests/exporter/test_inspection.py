"""inspect: .onnx, plans, weights, and everything else."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from exporter import ArtefactError, inspect
from stm import CheckpointError, ConfigError, PlanError, create_model, make_plan, model_config

from .conftest import Exported


def test_onnx(exported: Exported) -> None:
    found = inspect(exported.path)
    assert (found["kind"], found["bytes"], found["made_by_us"]) == ("onnx", exported.path.stat().st_size, True)
    assert found["ir_version"] == 10
    assert found["inputs"] == ["images float (batch, 3, 224, 224)"]
    assert found["outputs"] == ["logits float (batch, 1000)"]
    assert found["stm_nodes"]["StmSelectiveScanFwd"] == 24
    assert found["nodes_without_body"] == []
    assert found["seqlen"][-1] == 153
    assert found["classes"] == 1000
    assert "RANDOM" in found["metadata"]["weights"]


def test_onnx_of_others_and_without_bodies(small_exported: Exported, tmp_path: Path) -> None:
    plain = onnx.ModelProto()
    plain.CopyFrom(small_exported.proto)
    del plain.metadata_props[:]
    del plain.functions[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    found = inspect(tmp_path / "plain.onnx")
    assert not found["made_by_us"]
    assert found["seqlen"] is None
    assert "StmRmsNorm" in found["nodes_without_body"]


@pytest.mark.parametrize("model", ["vim-t", "mine"])
def test_plan(tmp_path: Path, model: str) -> None:
    config = model_config("vim-t").with_changes(name=model)
    make_plan(config, preset="stm-20").save(tmp_path / "plan.json")
    found = inspect(tmp_path / "plan.json")
    assert (found["kind"], found["model"], found["tokens_left"], found["token_layers_removed"]) == ("plan", model, 153, 792)
    assert found["merges"]["1"] == ["[0, 1] -> 2", "[195, 196] -> 194"]
    assert ("gflops_paper" in found) == (model == "vim-t"), "FLOPs need a model that we know"


@pytest.mark.parametrize("name", ["bare.pth", "published.pth", "ema.pth", "bare.safetensors"])
def test_weights(tmp_path: Path, name: str) -> None:
    state = {key: value.clone() for key, value in create_model("vim-t").state_dict().items()}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"bare.pth": state, "published.pth": {"model": state, "epoch": 1}, "ema.pth": {"model_ema": state}}[name], path)
    found = inspect(path)
    assert (found["kind"], found["fits"], found["tensors"], found["tokens"]) == ("checkpoint", "vim-t", 415, 197)
    assert found["parameters"] == 7_148_008
    assert found["entry"] == {"published.pth": "model", "ema.pth": "model_ema"}.get(name, "bare")
    assert found["dtypes"] == ["float32"]
    assert len(found["sha256"]) == 64


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no file"):
        inspect(tmp_path / "missing.onnx")
    for name, kind, wanted in (
        ("bad.onnx", ArtefactError, "as ONNX"),
        ("bad.json", PlanError, "not JSON"),
        ("bad.pth", CheckpointError, "cannot read|executed"),
        ("bad.safetensors", CheckpointError, "cannot read"),
        ("bad.txt", ConfigError, r"inspect reads \.onnx"),
    ):
        (tmp_path / name).write_bytes(b"\x08\x01 no such thing")
        with pytest.raises(kind, match=wanted):
            inspect(tmp_path / name)
