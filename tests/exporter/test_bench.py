"""stm bench without a GPU: statistics, interleaving under fake clocks, the gate, JSON, Markdown, plots, rivals that stand in."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.bench import BenchResult, Case, Method, Skipped, read_json, update_document
from exporter.bench import profile as profiling
from exporter.bench.backends import OnnxBackend, TorchBackend
from exporter.bench.channel_first import ChannelFirstOps, ChannelFirstVim, mamba_ssm_ops, reference_conv, reference_norm
from exporter.bench.deit import DeitConfig, deit, deit_onnx
from exporter.bench.environment import environment, gpu_state
from exporter.bench.report import BEGIN, END, markdown, plottable, winners, write_json
from exporter.bench.runner import check_output, compare
from exporter.bench.statistics import Summary, median, paired_ratio, quantile
from exporter.bench.suites import SUITES, suite
from exporter.bench.timing import HostClock, Prepared, interleave, warm_up
from exporter.errors import ArtefactError, ParityError, PerformanceError
from stm import ConfigError, MissingDependencyError, VimConfig, model_config, selective_scan_fn

from .conftest import SMALL, Exported, run_onnx, small_model, small_plan

METHOD = Method(rounds=5, round_ms=10, warmup_ms=0, latencies=4)


# --- statistics -----------------------------------------------------------------------------------------------------------


def test_quantiles_are_numpys() -> None:
    values = [3.0, 1.0, 2.5, 9.0, 4.0]
    for q in (0, 0.1, 0.5, 0.9, 0.99, 1):
        assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)))
    assert median([2.0, 1.0]) == 1.5
    for bad in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError, match="quantile"):
            quantile(*bad)


def test_summary_spread_is_p10_to_p90_over_the_median() -> None:
    found = Summary.of([float(i) for i in range(1, 102)])
    assert (found.samples, found.p50, found.least, found.most) == (101, 51, 1, 101)
    assert found.spread == pytest.approx((91 - 11) / 51)
    assert Summary.of([2.0]).spread == 0


def test_paired_ratios_cancel_a_drift_that_unpaired_ones_do_not() -> None:
    drift = [1.0 + 0.2 * i for i in range(9)]
    found = paired_ratio([2 * d for d in drift], [4 * d for d in drift])
    assert (found.median, found.p10, found.p90, found.low, found.high, found.rounds) == (0.5, 0.5, 0.5, 0.5, 0.5, 9)
    noisy = paired_ratio([1.0, 1.1, 0.9, 1.3, 1.0], [1.0] * 5)
    assert noisy == paired_ratio([1.0, 1.1, 0.9, 1.3, 1.0], [1.0] * 5), "seeded"
    assert noisy.low <= noisy.median <= noisy.high
    for a, b in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="paired"):
            paired_ratio(a, b)


# --- clocks and rounds ----------------------------------------------------------------------------------------------------


class World:
    """A clock that only inferences move, and what ran in which order."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def backend(self, name: str, ms: float | Callable[[int], float], device: str = "cpu", logits: Any = None, weights: str = "w") -> Prepared:
        def run() -> None:
            self.now += (ms(self.log.count(name)) if callable(ms) else ms) / 1e3
            self.log += name

        out = None if logits is None else lambda: logits
        return Prepared(run, HostClock(lambda: self.now), device, "host", "fp32", logits=out, weights=weights)


def test_rounds_are_interleaved_and_bursts_fit_the_round() -> None:
    world = World()
    a, b = interleave([world.backend("a", 2), world.backend("b", 5)], METHOD)
    assert (a.burst, b.burst) == (5, 2)
    assert a.rounds_ms == pytest.approx([2] * 5)
    assert b.rounds_ms == pytest.approx([5] * 5)
    assert (len(a.latencies_ms), len(b.latencies_ms)) == (5 * 4, 5 * 2)
    # two warm-up inferences each; a round: one to settle, the burst, single ones
    assert world.log == "aabb" + ("a" * (1 + 5 + 4) + "b" * (1 + 2 + 2)) * 5


def test_slow_backends_run_once_a_round_and_rounds_are_reported() -> None:
    world, rounds, last = World(), [], []
    (slow,) = interleave([world.backend("s", 500)], METHOD, step=lambda: rounds.append(1), last=last.append)
    assert (slow.burst, len(slow.latencies_ms), len(rounds), last) == (1, 5, 5, [0])


def test_warm_up_lasts_as_long_as_asked_and_sees_the_warm_time() -> None:
    world = World()
    cold_then_warm = world.backend("c", lambda n: 400 if n == 0 else 4)
    assert warm_up(cold_then_warm, Method(warmup_ms=500)) == pytest.approx(4)
    assert world.now >= 0.5
    assert warm_up(world.backend("d", 0.0), Method(warmup_ms=500, max_burst=50)) == 0, "ends with a clock that stands still"


def case(batch: int = 1, **changes: Any) -> Case:
    return Case(
        **{"model": "vim-t", "rate": "0", "image_size": (224, 224), "precision": "fp16", "batch": batch, "seqlen": 197, "tokens_left": 197, **changes}
    )


def test_compare_gives_ratios_differences_and_states() -> None:
    world, ones = World(), np.ones((1, 4))
    entries = [
        ("engine", world.backend("e", 1, "cuda", ones)),
        ("eager", world.backend("g", lambda n: 4 + 0.001 * n, logits=ones * 1.01)),
        ("deit", world.backend("d", 2, logits=ones * 7, weights="")),
    ]
    states = iter([{"sm_mhz": 1980.0}])
    measured, comparisons = compare(case(8), entries, METHOD, state=lambda: next(states))
    engine, eager, other = measured
    assert engine.gpu_state == {"sm_mhz": 1980.0}
    assert eager.gpu_state is None
    assert eager.difference == pytest.approx(0.01)
    assert (engine.difference, other.difference) == (None, None), "DeiT computes something else"
    assert engine.images_per_second == pytest.approx(8000)
    assert [c.rival for c in comparisons] == ["eager", "deit"]
    assert comparisons[1].ratio.median == pytest.approx(0.5)
    assert 0.2 < comparisons[0].ratio.median < 0.25


def test_what_is_not_finite_is_not_timed() -> None:
    with pytest.raises(ParityError, match="engine: the logits are not finite"):
        check_output("engine", World().backend("e", 1, logits=np.array([1.0, np.nan])))


# --- results --------------------------------------------------------------------------------------------------------------


def result(slow: float = 4.0, **changes: Any) -> BenchResult:
    """Two batches, two rates, two sizes; the rival wins at batch 128."""
    found = BenchResult({"gpu": None, "cpu": "test CPU", "cpu_cores": 2, "versions": {"torch": "2"}, "date": "today"}, {"rounds": 5}, **changes)
    for batch in (1, 128):
        for rate, left in (("0", 197), ("0.2", 158)):
            for size in (224, 384):
                world = World()
                rival = slow if batch == 1 else 0.5
                entries = [("engine", world.backend("e", left / 197)), ("eager", world.backend("g", rival))]
                measured, comparisons = compare(case(batch, rate=rate, tokens_left=left, image_size=(size, size)), entries, METHOD)
                found.measurements += measured
                found.comparisons += comparisons
    return found


def test_gate_names_measured_and_allowed() -> None:
    assert result(max_ratio=2.1).exit_code == 0
    result(max_ratio=2.1).check()
    failing = result(max_ratio=0.9)
    assert (failing.exit_code, len(failing.failures)) == (8, 4)
    with pytest.raises(PerformanceError) as caught:
        failing.check()
    assert caught.value.exit_code == 8
    for word in ("vim-t, rate 0, 224 px, fp16, batch 128", "2.000 times eager", "allowed 0.9"):
        assert word in str(caught.value)
    assert "FAILED" in "\n".join(failing.lines())


def test_gate_fails_on_what_was_not_measured() -> None:
    missing = result(max_ratio=3)
    missing.skipped.append(Skipped(case(), "mamba_ssm", "not installed"))
    assert "mamba_ssm was not measured (not installed)" in missing.failures[0]
    nothing = BenchResult({}, {}, max_ratio=1.0)
    assert "nothing was compared" in nothing.failures[0]
    assert BenchResult({}, {}).failures == []


def test_json_round_trip(tmp_path: Path) -> None:
    made = result(max_ratio=2.1)
    made.skipped.append(Skipped(case(), "mamba_ssm", "not installed"))
    write_json(made, tmp_path / "bench.json")
    back = read_json(tmp_path / "bench.json")
    assert back.measurements == made.measurements
    assert back.comparisons == made.comparisons
    assert back.skipped == made.skipped
    assert markdown(back) == markdown(made)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("damage", [lambda d: d.update(schema=99), lambda d: d.update(measurements=[{}]), lambda d: d.pop("gate")])
def test_damaged_json_is_an_artefact_error(damage: Any, tmp_path: Path) -> None:
    data = result().to_dict()
    damage(data)
    (tmp_path / "bench.json").write_text(json.dumps(data))
    with pytest.raises(ArtefactError, match=r"bench\.json"):
        read_json(tmp_path / "bench.json")


def test_merging_runs_keeps_the_last_and_refuses_other_machines() -> None:
    first, second = result(), result(slow=2.0)
    first.skipped.append(Skipped(case(128, tokens_left=158, rate="0.2"), "eager", "out of memory"))
    both = BenchResult.merged([first, second])
    assert len(both.measurements) == len(first.measurements)
    assert both.comparisons[0].ratio.median == pytest.approx(0.5)
    assert both.skipped == []
    second.environment = {**second.environment, "gpu": "NVIDIA L4"}
    with pytest.raises(ArtefactError, match="different machines"):
        BenchResult.merged([first, second])


def test_markdown_says_who_wins_where_and_is_well_formed() -> None:
    text = markdown(result())
    best = {(c.batch, c.rate): first.backend for c, first, _ in winners(result())}
    assert best == {(1, "0"): "engine", (1, "0.2"): "engine", (128, "0"): "eager", (128, "0.2"): "eager"}
    for word in ("### Latency", "### Ratios", "### Who wins where", "test CPU", "95 % interval", "| vim-t | 0.2 | 158 | 384 | fp16 | 128 |"):
        assert word in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_plots_render(tmp_path: Path) -> None:
    made = result().write(tmp_path)
    assert sorted(Path(p).name for p in made if p.endswith(".png")) == ["latency-vs-batch.png", "latency-vs-rate.png", "latency-vs-resolution.png"]
    for path in tmp_path.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "blank"
    assert f"![{'latency vs batch'}](latency-vs-batch.png)" in (tmp_path / "bench.md").read_text()


def test_ticks_keep_apart() -> None:
    from exporter.bench.report import _apart

    assert _apart([59.9, 77.7, 80.2, 100.0], log=False) == [59.9, 77.7, 100.0]
    assert _apart([1, 8, 32, 128], log=True) == [1, 8, 32, 128]
    assert _apart([224.0], log=True) == [224.0]


def test_only_axes_that_vary_are_drawn() -> None:
    one = result()
    one.measurements = [m for m in one.measurements if m.case.batch == 1 and m.case.rate == "0"]
    assert list(plottable(one)) == ["resolution"]


def test_document_gets_tables_between_its_markers_only(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nkept\n")
    small = result()
    small.measurements = [m for m in small.measurements if m.case.rate == "0" and m.case.image_size == (224, 224)]
    update_document(small, path)
    update_document(small, path)
    text = path.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith(f"{END}\n\nkept\n")
    assert (text.count("### Latency"), "old" in text) == (1, False)
    assert "(performance/latency-vs-batch.png)" in text
    assert (tmp_path / "performance" / "latency-vs-batch.png").is_file()
    path.write_text("no markers")
    with pytest.raises(ArtefactError, match="once each"):
        update_document(result(), path)
    assert path.read_text() == "no markers"


def test_the_repositorys_document_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert "stm bench --suite" in text


def test_suites_cover_the_issues_table() -> None:
    cases = {row for s in suite("performance") for row in itertools.product(s.models, s.rates, [size[0] for size in s.image_sizes], s.batches)}
    assert {(f"vim-{m}", "0", 224, b) for m in "tsb" for b in (1, 128)} <= cases
    assert {("vim-s", "stm-20", 224, 128), ("vim-s", "stm-40", 224, 128), ("vim-s", "0.2", 1024, 16)} <= cases
    with pytest.raises(ConfigError, match="headline"):
        suite("nothing")
    assert set(SUITES) == {"headline", "rate", "resolution", "batch", "performance"}


# --- environment ----------------------------------------------------------------------------------------------------------


def fake_smi(folder: Path, unknown: str = "") -> None:
    """An nvidia-smi that answers, and refuses a query that holds `unknown`."""
    script = f"""#!/bin/sh
for a in "$@"; do case "$a" in --query-gpu=*) q="${{a#--query-gpu=}}";; esac; done
case "$q" in *{unknown or "never"}*) echo "not a valid field"; exit 2;; esac
echo "$q" | tr , '\\n' | sed -e 's/^clocks_throttle.*/0x0/' -e 's/^pstate/P0/' -e 's/^power.draw/[N\\/A]/' \\
  -e 's/^[a-z].*/1980/' | paste -sd, | sed 's/,/, /g'
"""
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize("unknown", ["", "clocks_throttle"])
def test_gpu_state_reads_nvidia_smi(unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, unknown)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state = gpu_state()
    assert state is not None
    assert (state["sm_mhz"], state["power_state"]) == (1980.0, "P0")
    assert "power_watts" not in state, "[N/A] is no number"
    assert ("throttle_reasons" in state) == (not unknown)


def test_environment_without_a_gpu_is_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() is None
    found = json.loads(json.dumps(environment()))
    assert found["cpu"]
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])


# --- rivals ---------------------------------------------------------------------------------------------------------------


def test_eager_and_onnx_compute_the_same_and_keep_their_weights(small_exported: Exported) -> None:
    eager = TorchBackend("eager", lambda: small_exported.model, SMALL.image_size, "cpu", "fp32", "w").prepare(3, "graph")
    ort = OnnxBackend("onnx", small_exported.path, SMALL.image_size, "cpu", "w").prepare(3, "graph")
    assert (eager.launch, ort.launch, eager.weights) == ("host", "host", "w")
    assert eager.memory["weights"] == 4 * sum(p.numel() for p in small_exported.model.parameters())
    assert eager.logits is not None
    assert ort.logits is not None
    np.testing.assert_allclose(eager.logits(), ort.logits(), rtol=1e-4, atol=1e-5)


OPS = ChannelFirstOps(selective_scan_fn, reference_conv, reference_norm, "stand-ins")


@pytest.mark.parametrize("merge", [None, "hsp", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_channel_first_flow_is_the_same_network(merge: str | None, dtype: torch.dtype) -> None:
    model = small_model(small_plan(merge) if merge else None).to(dtype)
    images = torch.randn(2, 3, *SMALL.image_size)
    want, got = model(images).float(), ChannelFirstVim(model, OPS)(images)
    assert float((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_mamba_ssm_that_is_not_there_says_so() -> None:
    with pytest.raises(MissingDependencyError, match="mamba_ssm and causal_conv1d do not import"):
        mamba_ssm_ops()


def test_deit_sizes_are_the_published_ones() -> None:
    for name, millions in (("vim-t", 5.7), ("vim-s", 22.1)):
        config = DeitConfig.like(model_config(name))
        assert sum(p.numel() for p in deit(config).parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert DeitConfig.like(model_config("vim-b")).heads == 12


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_deit_onnx_is_typed_inside_float_outside_and_has_no_node_of_ours(precision: str) -> None:
    config = DeitConfig(64, 2, (32, 32), depth=1, num_classes=8)
    model = deit_onnx(config, precision, 2)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("Softmax") == 1
    assert ops.count("MatMul") >= 2
    assert {node.domain for node in model.graph.node} <= {""}
    (images,), (logits,) = model.graph.input, model.graph.output
    assert [v.type.tensor_type.elem_type for v in (images, logits)] == [1, 1]
    assert [d.dim_value for d in images.type.tensor_type.shape.dim] == [2, 3, 32, 32]
    weights = {t.data_type for t in model.graph.initializer if len(t.dims) >= 2 and max(t.dims) > 8 and t.data_type in (1, 10)}
    assert weights == {1 if precision == "fp32" else 10}
    feed = torch.randn(2, 3, 32, 32)
    want = deit(config)(feed).numpy()
    np.testing.assert_allclose(run_onnx(model, images=feed.numpy())[0], want, atol=1e-4 if precision == "fp32" else 3e-2)


# --- profile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("layers.3.mixer.mamba_scan", ["layers.3.mixer.mamba_scan"]),
        ("layers.3.mixer.in_proj/MatMul", ["layers.3.mixer.in_proj"]),
        ("__myl_Fused_mye1[ONNX Layer: layers.12.mixer.out_proj/MatMul]", ["layers.12.mixer.out_proj"]),
        ("[ONNX Layer: patch_embed.proj/MatMul] [ONNX Layer: layers.0.norm/Mul]", ["patch_embed.proj", "layers.0.norm"]),
        ("patch_embed.patch_rows", ["patch_embed.patch_rows"]),
        ("layers.1.mixer.in_proj.weight_t_fp16 + head/Gemm", ["layers.1.mixer.in_proj.weight_t_fp16", "head"]),
        ("layers.1.mixer.x_dbl", ["layers.1.mixer"]),
        ("__myl_Move_0", []),
    ],
)
def test_modules_are_found_in_tensorrts_names(text: str, modules: list[str]) -> None:
    assert profiling.modules_of(text) == modules


def test_floors_agree_with_the_measured_ceilings_of_a_vim_s_layer() -> None:
    """Microseconds (bytes, tensor, special functions) that bench/floors.py gives for one layer at batch 128."""
    config, top = model_config("vim-s"), profiling.KNOWN["NVIDIA H100 80GB HBM3"]
    work = profiling.kernel_work(config, [197] * 24, 128, "fp16", cls_index=98)
    for kernel, wanted in (("in_proj", (33, 43, 0)), ("conv_xproj", (15, 6, 19)), ("mamba_scan", (41, 3, 196))):
        found = work[f"layers.3.mixer.{kernel}"]
        got = (found.bytes / top.bytes * 1e6, found.tensor / 693e12 * 1e6, found.mufu / 4.15e12 * 1e6)
        assert got == pytest.approx(wanted, abs=1.5)
    outside = {"patch_embed.patch_rows": (38, 0), "patch_embed.proj": (20, 21), "layers.0.norm": (26, 0), "layers.3.norm": (39, 0)}
    for kernel, floors in outside.items():
        assert (work[kernel].bytes / top.bytes * 1e6, work[kernel].tensor / 693e12 * 1e6) == pytest.approx(floors, abs=1), kernel
    assert work["layers.3.mixer.mamba_scan"].floor_us(top)[1] == "special functions"
    assert work["layers.3.mixer.in_proj"].floor_us(top)[1] == "tensor"
    last, full = work["layers.23.mixer.mamba_scan"], work["layers.22.mixer.mamba_scan"]
    assert 0.4 < last.mufu / full.mufu < 0.55, "two halves instead of two whole walks"
    tiny = profiling.kernel_work(config, [197] * 24, 1, "fp16")["layers.3.norm"].floor_us(top)
    assert tiny == (2.5, "launch")


def test_unknown_cards_use_the_measured_copy() -> None:
    assert profiling.ceilings("NVIDIA X") is None
    found = profiling.ceilings("NVIDIA X", sm_count=100, sm_hertz=2e9, copy_bandwidth=1e12)
    assert found is not None
    assert (found.bytes, found.mufu, found.tensor) == (1e12, 3.2e12, None)
    assert "not in the table" in found.source


def test_nodes_are_grouped_by_module_and_layer() -> None:
    config = VimConfig("t", 64, depth=2)
    work = profiling.kernel_work(config, [197, 193], 8, "fp16", 98)
    times = [
        ("patch_embed.patch_rows", 5.0),
        ("__myl_3", 1.5),
        ("layers.0.norm.add_merge_norm", 2.0),
        *(
            (f"layers.{i}.mixer.{kernel}", us)
            for i in range(2)
            for kernel, us in (("in_proj/MatMul", 4.0), ("conv_xproj", 3.0), ("mamba_scan", 20.0))
        ),
        ("__myl_7", 1.0),
        ("layers.1.norm.add_merge_norm", 2.0),
        ("Reformatting CopyNode", 0.5),
    ]
    described = {"__myl_3": "[ONNX Layer: patch_embed.proj/MatMul]", "__myl_7": "[ONNX Layer: layers.1.mixer.out_proj/MatMul]"}
    tables = profiling.group(times, described, work, profiling.KNOWN["NVIDIA H100 80GB HBM3"])
    rows = {row["module"]: row for row in tables["modules"]}
    assert tables["modules"][0]["module"] == "layers.*.mixer.mamba_scan"
    assert (rows["layers.*.mixer.mamba_scan"]["us"], rows["layers.*.mixer.mamba_scan"]["nodes"]) == (40, 2)
    assert rows["layers.*.mixer.out_proj"]["us"] == 1
    assert "(TensorRT's own)" in rows
    assert (rows["layers.*.norm"]["us"], rows["layers.*.norm"]["nodes"]) == (4, 2), "a node under a module with a floor is booked on that"
    assert (rows["patch_embed.patch_rows"]["us"], rows["patch_embed.proj"]["us"]) == (5, 1.5)
    assert all("floor_us" in rows[name] for name in ("patch_embed.patch_rows", "patch_embed.proj", "layers.*.norm"))
    assert tables["layers"]["layers.1"] == 30
    assert tables["total_ms"] == pytest.approx(0.066)
    assert math.isclose(sum(row["share"] for row in tables["modules"]), 1)
    assert rows["layers.*.mixer.mamba_scan"]["floor_us"] > 0
    shown = result()
    shown.profiles.append({"case": "c", "engine": "engine", "ceilings": {"source": "here"}, **tables})
    assert "layers.*.mixer.mamba_scan" in "\n".join(shown.lines())
    assert "Where the time goes" in markdown(shown)
    json.dumps(shown.to_dict())


# --- estimates -----------------------------------------------------------------------------------------------------------------


def profile_of(**work: float) -> dict[str, Any]:
    from exporter.bench.profile import KNOWN, Work

    top = KNOWN["NVIDIA H100 80GB HBM3"]
    floor, bound = Work(**work).floor_us(top)
    row = {"module": "m", "us": 2 * floor, "floor_us": floor, "bound": bound, "work": {"bytes": 0.0, "mufu": 0.0, "tensor": 0.0, **work}}
    return {"case": "c", "ceilings": {"source": top.source}, "modules": [row]}


def test_estimates_scale_with_the_ceiling_that_binds() -> None:
    from exporter.bench.estimates import CARDS, MEASURED, estimate

    a100, orin = CARDS[0], CARDS[3]
    low, high = estimate(profile_of(bytes=1e9), 1.0, a100) or (0, 0)
    assert low == high == pytest.approx(MEASURED.bytes / a100.bytes)
    low, high = estimate(profile_of(mufu=1e9), 3.0, a100) or (0, 0)
    assert low == pytest.approx(3 * 132 * 1.98 / (108 * 1.41))
    assert high == pytest.approx(2 * low), "half the FP32 lanes"
    low, high = estimate(profile_of(tensor=1e12), 1.0, orin) or (0, 0)
    assert low == high == pytest.approx(989 / 42.5)


def test_nothing_is_estimated_from_launches_or_another_card() -> None:
    from exporter.bench.estimates import CARDS, estimate, estimate_rows

    assert estimate(profile_of(bytes=10.0), 1.0, CARDS[0]) is None
    assert estimate({**profile_of(bytes=1e9), "ceilings": {"source": "copy measured here"}}, 1.0, CARDS[0]) is None
    assert estimate_rows([profile_of(bytes=1e9)], {}) == []
    assert len(estimate_rows([profile_of(bytes=1e9)], {"c": 1.0})) == len(CARDS)


@pytest.mark.parametrize(
    ("kind", "piece"), [("engine@32", 32), ("engine@0", None), ("engine@", None), ("engine", None), ("deit@8", None), ("engine@1.5", None)]
)
def test_pieces_are_named_by_the_rival(kind: str, piece: int | None) -> None:
    from exporter.bench.workshop import piece_of

    assert piece_of(kind) == piece


def test_a_batch_must_be_whole_pieces() -> None:
    from exporter.bench.backends import EngineBackend

    class Engine:
        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            return [(32, 3, 224, 224)] * 3

    backend = EngineBackend("engine@32", Engine(), (224, 224), "fp16", piece=32)
    backend._check_batch(128)
    with pytest.raises(ConfigError, match="batch 100 is no multiple of the piece, 32"):
        backend._check_batch(100)


def test_portable_files_are_kept_and_made_anew_for_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exporter.onnx_export as exporting
    from exporter.bench.workshop import Spec, Workshop

    exported: list[str] = []
    model = small_model()

    def export(model: Any) -> Any:
        exported.append("once")
        return real(model)

    real = exporting.export_onnx
    monkeypatch.setattr(exporting, "export_onnx", export)
    monkeypatch.setattr(Workshop, "model", lambda self, spec: model)
    spec = Spec.of("vim-t", "0", (224, 224), "fp32")
    first, second = (Workshop("cpu", folder=tmp_path / "engines").portable(spec).SerializeToString(deterministic=True) for _ in range(2))
    assert (len(exported), len(list((tmp_path / "engines").iterdir()))) == (1, 1)
    assert first == second
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert Workshop("cpu", folder=tmp_path / "engines").portable(spec).SerializeToString(deterministic=True) != first
    assert len(exported) == 2


@pytest.mark.parametrize("launch", ["graph", "plain"])
def test_what_a_captured_graph_reads_lives_until_it_is_closed(launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph has addresses only: images that die with `prepare` are memory that its next replay may not read. CUDA stands in."""
    import contextlib
    import gc
    import weakref

    from exporter.bench import backends

    class Sum(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).sum(1, keepdim=True)

    class Made:
        images: weakref.ref[torch.Tensor]

        def to(self, device: str) -> torch.Tensor:
            made = torch.ones(2, 3, 8, 8)
            Made.images = weakref.ref(made)
            return made

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

    class Graph:
        def replay(self) -> None: ...

    monkeypatch.setattr(backends, "random_images", lambda batch, size: Made())
    monkeypatch.setattr(backends, "require_cuda", lambda what: None)
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "CUDAGraph": Graph,
        "graph": lambda *args, **options: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    prepared = TorchBackend("mamba_ssm", Sum, (8, 8), "cuda", "fp32").prepare(2, launch)
    gc.collect()
    assert prepared.launch == launch
    assert Made.images() is not None
    prepared.close()
    del prepared
    gc.collect()
    assert Made.images() is None
