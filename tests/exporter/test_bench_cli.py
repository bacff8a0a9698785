"""`stm bench` on a machine without a GPU: ONNX Runtime against eager, sweeps, the gate's exit code, what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import exporter.bench.workshop as workshop
from exporter.bench import Method, bench
from exporter.cli import main
from exporter.errors import ArtefactError
from stm import VimConfig

pytestmark = pytest.mark.usefixtures("tiny_vim_t", "one_thread")
QUICK = ["--rounds", "3", "--round-ms", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def onnx_file(folder: Path, tiny_vim_t: VimConfig) -> Path:
    path = folder / "vim.onnx"
    if not path.exists():
        arguments = ["--model", "vim-t", "--image-size", "32", "--weights", "random", "--seed", "3", "--rate", "0.4", "--no-verify", "-o", str(path)]
        assert main(arguments, verb="export") == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main(["bench", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_onnx_against_eager_and_itself(onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, err = run(capsys, onnx_file, "--vs", "eager", onnx_file, "mamba_ssm", "deit", "--batch", "1,2", *QUICK, "-o", tmp_path)
    assert (code, err) == (0, "")
    rows = answer["measurements"]
    assert [row["backend"] for row in rows] == ["vim.onnx", "eager", "vim.onnx #2"] * 2
    assert [row["case"]["batch"] for row in rows] == [1] * 3 + [2] * 3
    assert rows[1]["difference"] < 1e-4, "same weights: the seed is in the file"
    assert rows[2]["difference"] == 0
    assert {row["backend"] for row in answer["skipped"]} == {"mamba_ssm", "deit"}
    assert all("GPU" in row["reason"] for row in answer["skipped"])
    assert len(answer["comparisons"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "latency-vs-batch.png"}
    assert json.loads((tmp_path / "bench.json").read_text())["measurements"] == rows


def test_merged_against_unmerged_in_the_same_rounds(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "vim-t", "--image-size", "32", "--runtime", "onnx", "--rate", "0,0.4", "--vs", "unmerged"]
    code, answer, err = run(capsys, *arguments, *QUICK)
    assert (code, err) == (0, "")
    assert [(row["case"]["rate"], row["backend"]) for row in answer["measurements"]] == [("0", "onnx"), ("0.4", "onnx"), ("0.4", "unmerged")]
    assert answer["measurements"][2].get("difference") is None, "what merging does to the logits is no error"
    assert [c["rival"] for c in answer["comparisons"]] == ["unmerged"]
    assert run(capsys, onnx_file, "--vs", "unmerged", *QUICK)[1]["skipped"] == []


def one_thread_pool(_: int) -> ThreadPoolExecutor:
    """A process would not know the tiny model, and torch exports in one thread at a time."""
    return ThreadPoolExecutor(1)


def test_exports_ahead_are_the_files_that_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "export_pool", one_thread_pool)
    monkeypatch.setattr(workshop.os, "cpu_count", lambda: 4)
    merged = workshop.Spec.of("vim-t", "0.4", (32, 32), "fp16")
    specs = [merged, merged.unmerged(), merged]
    workshop.Workshop("cpu", folder=tmp_path).export_ahead(specs)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2
    again = workshop.Workshop("cpu", folder=tmp_path)
    assert len({again.portable(spec).SerializeToString() for spec in specs}) == 2
    assert files == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, "made anew"
    workshop.Workshop("cpu").export_ahead(specs)


def test_an_export_ahead_that_fails_is_tried_again_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "export_pool", one_thread_pool)
    monkeypatch.setattr(workshop.os, "cpu_count", lambda: 4)
    merged = workshop.Spec.of("vim-t", "0.4", (32, 32), "fp16")

    def full(*_: object) -> None:
        raise ArtefactError("no space left")

    monkeypatch.setattr(workshop, "written_aside", full)
    made = workshop.Workshop("cpu", folder=tmp_path)
    made.export_ahead([merged, merged.unmerged()])
    with pytest.raises(ArtefactError, match="no space left"):
        made.portable(merged)


def test_processes_that_die_do_not_end_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where a script that calls bench has no main guard."""

    class Dying(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise BrokenExecutor("a child process terminated abruptly")

    monkeypatch.setattr(workshop, "export_pool", Dying)
    monkeypatch.setattr(workshop.os, "cpu_count", lambda: 4)
    merged = workshop.Spec.of("vim-t", "0.4", (32, 32), "fp16")
    workshop.Workshop("cpu", folder=tmp_path).export_ahead([merged, merged.unmerged()])
    assert not list(tmp_path.iterdir())


def test_gate_fails_with_8_and_says_what_was_allowed(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = run(capsys, onnx_file, "--vs", "eager", *QUICK, "--max-ratio", "0.000001")
    assert (code, answer["exit_code"], answer["gate"]["passed"]) == (8, 8, False)
    assert "allowed 1e-06" in answer["gate"]["failures"][0]
    assert main(["bench", str(onnx_file), "--vs", "eager", *QUICK, "--max-ratio", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "gate, ratio at most 1e+06: passed" in out
    assert "vim.onnx / eager, host: " in out


def test_a_sweep_of_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "vim-t", "--runtime", "eager", "--rate", "0,0.4", "--image-size", "32", "--batch", "1,2"]
    code, answer, _ = run(capsys, *arguments, *QUICK, "-o", tmp_path)
    assert code == 0
    cases = [(row["case"]["rate"], row["case"]["tokens_left"], row["case"]["batch"]) for row in answer["measurements"]]
    assert cases == [("0", 5, 1), ("0", 5, 2), ("0.4", 3, 1), ("0.4", 3, 2)]
    assert {path.name for path in tmp_path.glob("*.png")} == {"latency-vs-batch.png", "latency-vs-rate.png"}
    # The report is made again from the file, with no measurement, and merged into a document.
    document = tmp_path / "doc.md"
    document.write_text("<!-- stm bench: begin -->\n<!-- stm bench: end -->\n")
    code, again, _ = run(capsys, "--from", tmp_path / "bench.json", "--document", document)
    assert code == 0
    assert again["measurements"] == answer["measurements"]
    assert "### Latency" in document.read_text()


@pytest.mark.parametrize("more", [[], ["--profile"], ["--vs", "deit"]])
def test_engines_need_a_gpu_and_say_what_works(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, err = run(capsys, "--model", "vim-t", *more)
    assert (code, answer["exit_code"]) == (3, 3)
    for word in ("stm bench FILE.onnx --vs eager", "work"):
        assert word in answer["message"]
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vim-t", "--runtime", "onnx", "--precision", "fp16"], ["a portable .onnx is fp32"]),
        (["--model", "vim-t", "--runtime", "onnx", "--vs", "tensorflow"], ["no rival 'tensorflow'", "mamba_ssm"]),
        (["--model", "vim-tt", "--runtime", "onnx"], ["id you mean 'vim-t'"]),
        (["--model", "vim-t", "--runtime", "onnx", "--profile"], ["--profile looks into TensorRT engines"]),
        (["--model", "vim-t", "--runtime", "onnx", "--max-ratio", "0"], ["max ratio is 0"]),
        (["--suite", "performance", "--rate", "0.2"], ["--rate belong to --model"]),
        (["--suite", "performance", "--batch", "1"], ["--batch does not go with --suite"]),
        (["--model", "vim-t", "--device", "cpu"], ["GPU"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_bad_values(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, err = run(capsys, *arguments)
    assert code in (2, 3)
    for word in words:
        assert word in answer["message"]
    assert "Traceback" not in err


def test_missing_and_foreign_files_are_9(onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "missing.onnx")[0] == 9
    assert run(capsys, onnx_file, "--vs", "missing.engine")[0] == 9
    (tmp_path / "x.engine").write_bytes(b"")
    assert run(capsys, tmp_path / "x.engine")[0] == 9
    (tmp_path / "bench.json").write_text("{}")
    assert run(capsys, "--from", tmp_path / "bench.json")[0] == 9


def test_one_python_call(onnx_file: Path) -> None:
    found = bench(onnx_file, vs=["eager"], device="cpu", method=Method(rounds=2, round_ms=2, warmup_ms=0))
    assert [m.label for m in found.measurements] == ["vim.onnx", "eager"]
    found.check()


def test_a_rival_that_breaks_is_skipped_and_a_subject_that_breaks_ends_it(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(rounds=2, round_ms=2, warmup_ms=0)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of luck\nmore")

    monkeypatch.setattr(workshop.TorchBackend, "prepare", broken)
    found = bench(onnx_file, vs=["eager"], device="cpu", method=method, max_ratio=1e9)
    assert found.skipped[0].reason == "RuntimeError: CUDA error: out of luck"
    assert found.exit_code == 8, "what was not compared does not pass a gate"
    monkeypatch.setattr(workshop.OnnxBackend, "prepare", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        bench(onnx_file, device="cpu", method=method)
    with pytest.raises(ArtefactError):
        bench("missing.onnx")
