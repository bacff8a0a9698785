"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from exporter.cli import main
from exporter.errors import ExportError
from exporter.files import Staging, check_writable, written_aside


def test_staged_files_appear_together_main_one_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with Staging(tmp_path / "new") as staging:
        for name in ("main", "deep/second"):
            staging.path(tmp_path / "new" / name).write_text(name)
        assert not (tmp_path / "new" / "main").exists()
    assert order == ["second", "main"]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["new/deep/second", "new/main"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_nothing_changes_on_an_error(tmp_path, error):
    (tmp_path / "old").write_text("old")
    with pytest.raises(error), Staging(tmp_path) as staging:  # noqa: PT012
        staging.path(tmp_path / "old").write_text("new")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "old")]


def test_os_errors_become_ours(tmp_path):
    with pytest.raises(ExportError, match="cannot write"), written_aside(tmp_path / "x") as aside:
        raise OSError(28, "No space left on device", str(aside))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"), Staging(tmp_path) as staging:
        staging.path(tmp_path / "file" / "below").write_text("x")


def test_check_writable(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="it is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is not a folder"):
        check_writable(tmp_path / "file" / "x.onnx")


REFUSED = {
    "a folder of that name": ("isdir.onnx", 4, "it is a folder"),
    "below a file": ("c.pth/x.onnx", 4, "is not a folder"),
    "the reference's place is a file": ("f.onnx", 4, "is not a folder"),
    "no name": (".onnx", 2, "NAME.onnx"),
}


@pytest.mark.parametrize(("output", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_outputs_are_found_before_the_work(output, code, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "isdir.onnx").mkdir()
    (tmp_path / "c.pth").write_text("")
    (tmp_path / "f.reference").write_text("")
    monkeypatch.setattr("exporter.deploy.load_model", lambda *a, **k: pytest.fail("weights were loaded first"))
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert main(["export", "--model", "vim-t", "--weights", "random", "-o", output]) == code
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_class_names_are_counted_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    monkeypatch.setattr("exporter.deploy.load_model", lambda *a, **k: pytest.fail("weights were loaded first"))
    arguments = ["export", "--model", "vim-t", "--weights", "random", "--classes", str(tmp_path / "names.txt"), "-o", str(tmp_path / "x.onnx")]
    assert main(arguments) == 2
    assert "--num-classes 2" in capsys.readouterr().err


def test_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys, tiny_vim_t):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.deploy.verify", press)
    (tmp_path / "vim.onnx").write_text("old")
    assert main(["export", "--model", "vim-t", "--image-size", "64", "--weights", "random", "-o", str(tmp_path / "vim.onnx")]) == 130
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("vim.onnx", "old")]


@pytest.mark.parametrize("output", ["out.v1/", "plain"])
def test_directory_forms(output, tmp_path, tiny_vim_t):
    folder = os.path.join(tmp_path, output)
    assert main(["export", "--model", "vim-t", "--image-size", "16", "--weights", "random", "-o", folder]) == 0
    made = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
    assert made == ["model.onnx", "parity.json", "plan.json", "plan.png", "reference/inputs.json", "reference/outputs.json"]
