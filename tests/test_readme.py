"""The README's commands are the ones that work: its job runs, its options exist, its sample reads its file."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.cli import _parser
from exporter.images import photos, preprocess

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def stm_commands():
    """Every `stm ...` or `stm-export ...` line of a shell block."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.sub(r"^(\.venv/bin/)", "", part).partition("#")[0].strip() for part in parts if re.match(r"(\.venv/bin/)?stm(-export)? ", part)]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("command", stm_commands())
def test_every_command_parses(command):
    program, *arguments = shlex.split(command)
    parser = _parser("export") if program == "stm-export" else _parser()
    parser.parse_args(arguments)


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "test command" in script
    assert re.search(r"<!-- test command -->\n```bash\n.*pytest.*\n```", README)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_sample_classifies(vim_t_onnx, tmp_path):
    picture = tmp_path / "cat.jpg"
    photos()[1].save(picture, quality=95)
    command = [sys.executable, str(ROOT / "samples" / "classify_onnx.py"), str(vim_t_onnx), str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert "RANDOM" in lines[0]
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("size", [(224, 224), (192, 256)])
def test_sample_prepares_images_as_we_do(size):
    sys.path.insert(0, str(ROOT / "samples"))
    try:
        import classify_onnx
    finally:
        sys.path.pop(0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image: Image.Image = photos()[0]
    ours = preprocess(image, size, mean, std)
    theirs = classify_onnx.preprocess(image, list(size), {"crop_ratio": 0.875, "mean": mean, "std": std})
    np.testing.assert_array_equal(ours[None], theirs)
