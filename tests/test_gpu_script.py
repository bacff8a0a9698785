"""tests/gpu.sh with stand-ins for all tools: every part is run, on which GPU, and a step that fails makes the whole fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALL = 'echo "$(basename "$0") gpu=$CUDA_VISIBLE_DEVICES $* $STM_GPU_REDUCTIONS_PART" >> "$CALLS"\n'
TOOL = f'#!/bin/bash\n{CALL}case "$*" in *"$BREAKS"*) exit 3 ;; esac\n'
SMI = '#!/bin/bash\ncase "$*" in *index*) printf "0\\n1\\n" ;; *) echo "Stub GPU, 1.2" ;; esac\n'
TRTEXEC = TOOL + 'echo "[07/01/2026-10:00:00] [I] Throughput: 100 qps"\n'


def run(folder: Path, breaks: str = "nothing at all", **environment: str) -> tuple[int, list[str], str]:
    """(exit code, calls as `tool gpu=N arguments`, summary)."""
    work, tools = folder / "work", folder / "tools"
    (work / "tests").mkdir(parents=True)
    for name in ("gpu.sh", "gpu_table.py"):
        shutil.copy(ROOT / "tests" / name, work / "tests" / name)
    libraries = work / "build" / "gpu-libs"
    libraries.mkdir(parents=True)
    (libraries / "libstm_trt10.so").touch()
    tools.mkdir()
    contents = dict.fromkeys(("cmake", "compute-sanitizer", "python3"), TOOL) | {"nvidia-smi": SMI, "trtexec": TRTEXEC}
    for path, content in [(tools / name, content) for name, content in contents.items()] + [(libraries / "stm_kernel_test", TOOL)]:
        path.write_text(content)
        path.chmod(0o755)
    calls = folder / "calls"
    set_here = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "BREAKS": breaks, "TENSORRT_INCLUDE_DIR": "/nowhere"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("STM_", "CUDA_VISIBLE"))}
    done = subprocess.run(["bash", "tests/gpu.sh", str(folder / "out")], cwd=work, env=kept | set_here | environment, capture_output=True, text=True)
    return done.returncode, calls.read_text().splitlines(), (folder / "out" / "summary.txt").read_text()


def test_everything_runs_and_what_is_timed_runs_on_the_first_gpu(tmp_path: Path) -> None:
    code, calls, summary = run(tmp_path)
    assert code == 0, summary
    assert "FAILED" not in summary
    assert summary.count("parity-") == 9
    for file in (
        "test_engine_build",
        "test_engine_parity",
        "test_scan_accuracy",
        "test_latency",
        "test_soak",
        "test_reductions",
        "test_bench",
        "samples",
    ):
        assert any(file in call for call in calls), file
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert any(call.startswith("compute-sanitizer") and tool in call for call in calls), tool
    used = {call.split("gpu=")[1].split(" ")[0] for call in calls if "test_engine_parity" in call}
    assert used == {"0", "1"}
    timed = [call for call in calls if any(name in call for name in ("test_latency", "test_soak", "test_bench", "--time", "--soak"))]
    assert len(timed) == 5
    assert summary.count("reductions-") == 4
    assert all("gpu=0 " in call for call in timed)
    assert summary.count("Throughput: 100 qps") == 4, "trtexec: built and run, with the library as static and as dynamic plugin"


def test_cards_that_are_given_are_kept_to(tmp_path: Path) -> None:
    _, calls, _ = run(tmp_path, CUDA_VISIBLE_DEVICES="3")
    assert {call.split("gpu=")[1].split(" ")[0] for call in calls} == {"3"}


@pytest.mark.parametrize("breaks", ["test_latency", "test_engine_parity", "racecheck", "--staticPlugins"])
def test_a_step_that_fails_fails_the_whole(tmp_path: Path, breaks: str) -> None:
    code, calls, summary = run(tmp_path, breaks)
    assert code != 0
    assert "FAILED (exit 3)" in summary
    assert any("test_bench" in call for call in calls), "what comes after it is run all the same"


def test_reductions_are_spread_over_as_many_processes_as_there_are_methods(tmp_path: Path) -> None:
    _, calls, summary = run(tmp_path, STM_GPU_PARTS="reductions", STM_GPU_REDUCTIONS="tome utr")
    assert summary.count("reductions-") == 2
    assert {call.split()[-1] for call in calls if "test_reductions.py" in call} == {"0/2", "1/2"}


def test_without_trtexec_it_says_so(tmp_path: Path) -> None:
    code, _, summary = run(tmp_path, STM_TRTEXEC="no-such-trtexec")
    assert code == 0
    assert "set STM_TRTEXEC" in summary
