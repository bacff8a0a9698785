"""`stm bench` on a GPU: our engine against eager, ONNX Runtime, DeiT and mamba_ssm; the profile; the gate."""

import importlib.util
import json

import pytest

from exporter.bench import Method, bench
from exporter.cli import main

METHOD = Method(rounds=7, round_ms=20, warmup_ms=100)
VS = ["eager", "deit", *(["mamba_ssm"] if importlib.util.find_spec("mamba_ssm") else [])]


@pytest.fixture(scope="module")
def measured(work):
    """ViM-Ti, stm-20, batch 1 and 64, both launches, profiled."""
    return bench(
        models=["vim-t"], rates=["stm-20"], batches=[1, 64], vs=VS, launch="both", profile=True, output=work / "bench", opt_level=1, method=METHOD
    )


def rows(result, backend, launch="graph"):
    return {m.case.batch: m for m in result.measurements if m.backend == backend and m.launch == launch}


def test_all_backends_are_measured_in_both_launches(measured, record):
    assert measured.skipped == []
    for backend in ["engine", *VS]:
        for launch in ("graph", "plain"):
            found = rows(measured, backend, launch)
            assert set(found) == {1, 64}, (backend, launch, [m.notes for m in measured.measurements if m.backend == backend])
            for batch, m in found.items():
                record("bench", backend=backend, launch=launch, batch=batch, median_ms=m.median_ms, spread=m.spread, memory=m.memory)
                assert m.median_ms > 0
                assert m.gpu_state
    assert any("attention fused" in note for note in rows(measured, "deit")[1].notes)


def test_ours_computes_what_eager_computes_and_is_faster(measured):
    for batch, m in rows(measured, "eager").items():
        assert m.difference < 0.05, batch
    for c in measured.comparisons:
        if c.rival == "eager":
            assert c.ratio.high < 1, str(c)


def test_graph_timing_agrees_with_the_first_figures(measured, work):
    """The same engine by `graph_latency_ms`: two ways to measure, one number."""
    from exporter.engine import deserialize, process
    from exporter.runtimes.trt import graph_latency_ms

    (path,) = (work / "bench" / "engines").glob("vim-t-stm-20-224-fp16-b64-*.engine")
    other = graph_latency_ms(deserialize(process(), path.read_bytes()), 64, (224, 224))["median_ms"]
    assert rows(measured, "engine")[64].median_ms == pytest.approx(other, rel=0.08)


def test_memory_is_accounted_for(measured):
    engine, eager = rows(measured, "engine")[64].memory, rows(measured, "eager")[64].memory
    assert engine["peak"] >= engine["weights"] + engine["activations"] > 0
    assert eager["peak"] > eager["weights"] > 0


def test_profile_books_our_kernels_on_their_modules(measured, record):
    assert len(measured.profiles) == 2
    for profile in measured.profiles:
        found = {row["module"]: row for row in profile["modules"]}
        for module in ("layers.*.mixer.mamba_scan", "layers.*.mixer.conv_xproj"):
            assert found[module]["nodes"] == 24
            assert found[module]["floor_us"] > 0
            if "batch 64" in profile["case"]:  # at batch 1 the floor is a launch in a graph, which the profiler does not time
                assert found[module]["us"] > 0.9 * found[module]["floor_us"], "under its floor: the floor is wrong"
        unknown = found.get("(TensorRT's own)", {"share": 0})["share"]
        record("profile", case=profile["case"], total_ms=profile["total_ms"], unknown=unknown, modules=profile["modules"][:8])
        assert unknown < 0.25, "the names of TensorRT's layers do not lead to modules"


def test_engines_are_used_again(measured, work):
    before = {path: path.stat().st_mtime_ns for path in (work / "bench" / "engines").iterdir()}
    again = bench(models=["vim-t"], rates=["stm-20"], batches=[1], vs=["deit"], output=work / "bench", opt_level=1, method=METHOD)
    assert any(note.startswith("engine from") for note in rows(again, "engine")[1].notes)
    assert before == {path: path.stat().st_mtime_ns for path in (work / "bench" / "engines").iterdir()}


def test_command_line_gate(work, capsys):
    path = work / "gate.engine"
    assert main(["export", "--model", "vim-t", "--weights", "random", "--batch", "1:4:8", "--opt-level", "1", "--no-verify", "-o", str(path)]) == 0
    capsys.readouterr()
    arguments = ["bench", str(path), "--vs", "eager", str(path), "--rounds", "7", "--round-ms", "20", "--json"]
    assert main([*arguments, "--max-ratio", "1.1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted({row["case"]["batch"] for row in answer["measurements"]}) == [1, 4, 8]
    same = [c["ratio"]["median"] for c in answer["comparisons"] if c["rival"] == "gate.engine #2"]
    assert same == pytest.approx([1] * 3, abs=0.05), "the same engine twice: what a difference is worth"
    assert main([*arguments, "--max-ratio", "0.0001"]) == 8
