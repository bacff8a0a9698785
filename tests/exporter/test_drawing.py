"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from exporter import ExportError
from exporter.drawing import draw_plan
from stm import ConfigError, PlanError, make_plan, model_config

VIM_T = model_config("vim-t")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.parametrize(("model", "size", "rule"), [("vim-t", 224, "edge"), ("vim-t", (96, 160), "spread")])
def test_a_png_is_drawn(tmp_path: Path, model: str, size: int | tuple[int, int], rule: str) -> None:
    config = model_config(model, size)
    path = draw_plan(config, make_plan(config, rate=0.2, rule=rule), tmp_path / "new" / "plan.png")
    assert path == tmp_path / "new" / "plan.png"
    picture = pixels(path)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    assert [p.name for p in path.parent.iterdir()] == ["plan.png"]
    assert not plt.get_fignums(), "the figure is closed"


def test_the_picture_shows_the_plan_and_the_image(tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    Image.new("RGB", (300, 300)).save(black)
    unmerged, merged = make_plan(VIM_T), make_plan(VIM_T, preset="stm-40")
    plain = pixels(draw_plan(VIM_T, unmerged, tmp_path / "a.png", black))
    shown = pixels(draw_plan(VIM_T, merged, tmp_path / "b.png", black))
    photo = pixels(draw_plan(VIM_T, unmerged, tmp_path / "c.png"))
    left = (slice(100, 500), slice(100, 550))
    assert (plain[left].max(-1) < 40).mean() > 0.5, "the given image lies under the patches"
    coloured = (shown[left].max(-1) - shown[left].min(-1) > 60).mean()
    assert coloured > (plain[left].max(-1) - plain[left].min(-1) > 60).mean() + 0.1, "merged patches have colours"
    assert np.abs(photo - plain)[left].mean() > 20


def test_errors(tmp_path: Path) -> None:
    plan = make_plan(VIM_T, preset="stm-20")
    with pytest.raises(PlanError, match="'vim-s'"):
        draw_plan(model_config("vim-s"), plan, tmp_path / "x.png")
    with pytest.raises(ConfigError, match="cannot read image"):
        draw_plan(VIM_T, plan, tmp_path / "x.png", tmp_path / "missing.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        draw_plan(VIM_T, plan, tmp_path / "file" / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
