"""samples/classify_onnx.py reads a file of ours and prepares images as we do."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stm
from exporter.images import photos, preprocess
from exporter.onnx_export import export_onnx

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory):
    config = stm.VimConfig("vim-t", d_model=32, depth=2, image_size=(96, 80), num_classes=1000)
    model = stm.VisionMamba(config).eval()
    model.provenance = stm.Provenance("random", "seed 0", "", 0)
    path = tmp_path_factory.mktemp("sample") / "vim.onnx"
    path.write_bytes(export_onnx(model).SerializeToString())
    return path


def test_image_to_top_five(small_onnx, tmp_path):
    picture = tmp_path / "cat.jpg"
    photos()[1].save(picture, quality=95)
    command = [sys.executable, str(SAMPLES / "classify_onnx.py"), str(small_onnx), str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert "RANDOM" in lines[0]
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("size", [(224, 224), (192, 256)])
def test_images_are_prepared_as_ours(size, monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    import classify_onnx

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = preprocess(photos()[0], size, mean, std)
    theirs = classify_onnx.preprocess(photos()[0], list(size), {"crop_ratio": 0.875, "mean": mean, "std": std})
    np.testing.assert_array_equal(ours[None], theirs)
