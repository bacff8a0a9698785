"""`python -m stm.data`: test images as files, which the usual preprocessing turns into what the model was tested on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.evaluation.data import open_images
from exporter.images import preprocess
from stm.data import CLASS_NAMES, DigitPairs
from stm.data.__main__ import main, png


def test_a_png_is_the_image(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 37, 50), dtype=torch.uint8)
    (tmp_path / "x.png").write_bytes(png(image))
    with Image.open(tmp_path / "x.png") as read:
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), image.permute(1, 2, 0).numpy())


def test_files_after_preprocessing_are_the_test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "digits"), "--images", "22"]) == 0  # more than one batch
    assert capsys.readouterr().out == f"wrote 44 test images to {tmp_path / 'digits'} (22 centred, 22 anywhere) and their classes (val.txt)\n"
    found = open_images([tmp_path / "digits"], len(CLASS_NAMES))
    assert len(found.samples) == 44
    for sample in found.samples[::7]:
        variant, index, label = sample.path.stem.split("-")
        images, labels = DigitPairs("test", variant).batch(torch.tensor([int(index)]))
        assert int(label) == sample.label == int(labels)
        with Image.open(sample.path) as read:
            pixels = preprocess(read, (224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        assert np.array_equal(pixels, images[0].numpy().astype(np.float32) / np.float32(255))


def test_writing_again_changes_nothing_and_other_files_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--images", "2", "--variant", "centred"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    assert main(arguments) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "cat.png").touch()
    assert main(arguments) == 2
    assert "cat.png, which is not of these images" in capsys.readouterr().err
    assert main([str(tmp_path / "cat.png" / "x")]) == 2  # not a folder
    assert "cannot write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--images", "0"])
