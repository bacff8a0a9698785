"""One exported vim-t for all, and models small enough to export in seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import stm.registry
from exporter import export
from exporter.onnx_export import export_onnx
from exporter.runtimes.ort import onnxruntime_session
from stm import MergePlan, VimConfig, VisionMamba, create_model, make_plan

SMALL = VimConfig("vim-small-test", 32, depth=3, d_state=4, image_size=(48, 64), num_classes=10)


@dataclass(frozen=True)
class Exported:
    path: Path
    proto: onnx.ModelProto
    model: VisionMamba


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """vim-t under stm-20 with random weights, as `stm-export` writes it, not verified."""
    path = tmp_path_factory.mktemp("exported") / "vim.onnx"
    export("vim-t", path, weights="random", plan="stm-20", verify_output=False)
    return Exported(path, onnx.load(path), create_model("vim-t", plan="stm-20"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two OpenMP threads on a busy machine of two cores wait for each other for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(plan: MergePlan | None = None, **changes: object) -> VisionMamba:
    config = SMALL.with_changes(**changes)
    model = VisionMamba(config)
    model.init_weights(0)
    model.set_plan(plan)
    return model.eval().requires_grad_(False)


def small_plan(weights: str = "hsp", rule: str = "edge", rate: float | None = None, proportional_decay: bool = False) -> MergePlan:
    schedule = {1: (2, 2), 2: (2, 2)} if rate is None else None
    return make_plan(SMALL, rate=rate, schedule=schedule, weights=weights, rule=rule, proportional_decay=proportional_decay)


@pytest.fixture(scope="session")
def small_exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """3 layers, 12 patches, merging before layers 1 and 2."""
    model = small_model(small_plan())
    proto = export_onnx(model)
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.save(proto, path)
    return Exported(path, proto, model)


@pytest.fixture
def tiny_vim_t(monkeypatch: pytest.MonkeyPatch) -> VimConfig:
    """While a test runs, the name vim-t stands for a model of 3 layers, and vim-b for one of its size."""
    for name in ("vim-t", "vim-b"):
        entry = stm.registry._MODELS[name]
        config = VimConfig(name, 32, depth=3, d_state=4)
        monkeypatch.setitem(stm.registry._MODELS, name, stm.registry.ModelEntry(config, entry.official_name, entry.weights))
    return stm.registry.model_config("vim-t", 64)


def run_onnx(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime_session(model.SerializeToString(), threads=2)
    return list(session.run(None, feeds))


@pytest.fixture(scope="session")
def polygraphy() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the polygraphy command of this environment."""
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)

    return call


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield
