"""`stm bench accuracy` on the CPU: figures against plain loops, stopping and going on, budgets, noise, the document, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import exporter.accuracy.fast_scan as fast_scan_module
import exporter.accuracy.latency as latency_module
import exporter.accuracy.plots as plots_module
import exporter.accuracy.runner as runner_module
import stm.registry
from exporter.accuracy import Run, measure, read_run, update_document
from exporter.accuracy.budgets import TOKEN_LAYERS, Budget, at_flops, budgets, k_schedule, parse_flops
from exporter.accuracy.cells import GROUPS, Bench, Cell, cells, family, load_plan, normalised, parse_methods, scheduled_like
from exporter.accuracy.observe import class_state, observe
from exporter.accuracy.plots import draw_plots
from exporter.accuracy.records import Records
from exporter.accuracy.report import against, claims, markdown, terminal_lines
from exporter.accuracy.results import Latency
from exporter.accuracy.statistics import NOISE, bootstrap_mean, paired_difference
from exporter.bench.report import BEGIN, END
from exporter.bench.timing import HostClock, Prepared
from exporter.bench.workshop import Workshop
from exporter.cli import _parser, main
from exporter.errors import ArtefactError, BuildError
from exporter.progress import Steps
from stm import PRESETS, ConfigError, MergePlan, PlanError, VimConfig, VisionMamba, make_plan, model_config, plan_summary, with_plan
from stm.data import DigitPairs
from stm.flops import gflops_true
from stm.reduction import METHODS, create_reduction, reduction_gflops_true, reduction_summary, save_reduction, schedule_text, with_reduction

DOCUMENT = Path(__file__).parents[2] / "docs" / "accuracy.md"
TINY = VimConfig("vim-tiny-test", 16, depth=4, d_state=4, image_size=(96, 96), num_classes=100)  # 36 patches
pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"images": 10, "batch": 5, "device": "cpu", "token_layers": [20], "flops": ["20%"], "variants": ["anywhere"]}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than all the rest of a tiny run."""
    monkeypatch.setattr(plots_module, "draw_plots", lambda run, folder: [])


def tiny(whole: bool = True) -> VisionMamba:
    return VisionMamba(TINY, cls_only_last=not whole).eval().requires_grad_(False)


def images(count: int, variant: str = "anywhere") -> tuple[torch.Tensor, torch.Tensor]:
    return DigitPairs("test", variant).batch(torch.arange(count))


# --- the class token's state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_class_state_is_the_recurrence_stopped_at_the_class_token(reverse: bool, scaled: bool) -> None:
    g = torch.Generator().manual_seed(1)
    batch, seqlen, d_inner, d_state = 3, 11, 4, 5
    u, B = (torch.randn(batch, seqlen, d, generator=g, dtype=torch.float64) for d in (d_inner, d_state))
    time = torch.rand(batch, seqlen, d_inner, generator=g, dtype=torch.float64)
    A = -torch.rand(d_inner, d_state, generator=g, dtype=torch.float64)
    scale = torch.rand(seqlen, generator=g) * 3 if scaled else None
    places = [0, 6, 10]
    for row, cls in enumerate(places):
        h = torch.zeros(d_inner, d_state, dtype=torch.float64)
        for t in range(seqlen - 1, cls - 1, -1) if reverse else range(cls + 1):
            s = 1.0 if scale is None else float(scale[t])
            h = torch.exp(s * time[row, t][:, None] * A) * h + (time[row, t] * u[row, t])[:, None] * B[row, t]
        one = class_state(u[row : row + 1], time[row : row + 1], A, B[row : row + 1], cls, reverse=reverse, decay_scale=scale)
        many = class_state(u, time, A, B, torch.tensor(places)[:, None], reverse=reverse, decay_scale=scale)
        torch.testing.assert_close(one[0], h, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(many[row], h, rtol=1e-12, atol=1e-12)


KINDS = ["none", "hsp", "one_sided", "proportional", "tome", "r-meeto", "hsa", "mtr-balanced"]


def of_kind(kind: str) -> VisionMamba:
    base = tiny()
    if kind == "none":
        return base
    if kind in METHODS:
        return with_reduction(base, create_reduction(kind, TINY, schedule={1: 4, 2: 6}))
    rule = kind if kind == "one_sided" else "edge"
    left = (6, 0) if kind == "one_sided" else (3, 3)
    return with_plan(base, make_plan(TINY, schedule={1: left, 2: left}, rule=rule, proportional_decay=kind == "proportional"))


@pytest.mark.parametrize("kind", KINDS)
def test_observed_states_give_the_scans_outputs_at_the_class_token(kind: str) -> None:
    """y = C h + D u holds at the class token for every layer, direction and method, so h is the state that the model used."""
    model, pixels = of_kind(kind), normalised(images(3)[0], TINY)
    place: list[Any] = [TINY.cls_index]
    found: list[list[torch.Tensor]] = []
    if hasattr(model, "reduction"):
        model.reduction.register_forward_hook(lambda module, arguments, result: place.__setitem__(0, result.cls))
    for index, block in enumerate(model.blocks):

        def scanned(module: Any, arguments: Any, y: torch.Tensor, layer: int = index) -> None:
            u, _, C, D, *_ = arguments
            cls = place[0] if hasattr(model, "reduction") else model.cls_positions[layer]
            rows = torch.arange(len(u)), torch.as_tensor(cls).flatten().expand(len(u))
            found.append([t[rows] for t in (y, u, C)] + [D])

        block.mixer.scan.register_forward_hook(scanned)
        block.mixer.scan_b.register_forward_hook(scanned)
    seen = observe(model, pixels)
    assert len(found) == 2 * TINY.depth
    for number, (y, u, C, D) in enumerate(found):
        h = seen.states[number // 2][:, number % 2]
        torch.testing.assert_close(torch.einsum("bn,ben->be", C, h) + D * u, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_observing_changes_nothing_and_ends_at_the_logits(kind: str) -> None:
    model, pixels = of_kind(kind), normalised(images(3)[0], TINY)
    seen = observe(model, pixels)
    torch.testing.assert_close(seen.logits, model(pixels), rtol=0, atol=0)
    torch.testing.assert_close(model.head(model.norm_f(seen.tokens[-1])), seen.logits)
    assert [tuple(state.shape) for state in seen.states] == [(3, 2, TINY.d_inner, TINY.d_state)] * TINY.depth
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "hooks are taken off"


# --- budgets and methods -----------------------------------------------------------------------------------------------------


def test_the_papers_presets_are_members_of_the_family() -> None:
    config = model_config("vim-t")
    for name in PRESETS:
        plan = make_plan(config, preset=name)
        assert make_plan(config, schedule=k_schedule(config, plan.token_layers_removed)) == plan, name
    assert [budget.label for budget in budgets(config, None, None)] == ["TL 552", "TL 792", "TL 960", "TL 1076", "-40 % FLOPs"]


@pytest.mark.parametrize(("text", "share"), [("40%", 0.4), ("-40%", 0.4), ("0.6x", 0.4), ("0.4", 0.4), (" -17.5 % ", 0.175)])
def test_flops_are_read_as_saved_or_left(text: str, share: float) -> None:
    assert parse_flops(text) == share


@pytest.mark.parametrize("text", ["", "40", "-0%", "100%", "1.5x", "much", "nan%"])
def test_other_flops_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="40%"):
        parse_flops(text)


@pytest.mark.parametrize("name", sorted({*GROUPS["weights"], *GROUPS["generators"], *GROUPS["rivals"]} - {"stm-constant"}))
def test_every_method_meets_its_budget(name: str) -> None:
    config = VimConfig("vim-test", 16, d_state=4, num_classes=100)  # 197 tokens, 24 layers
    with torch.device("meta"):
        bench = Bench(VisionMamba(config, cls_only_last=False))
    if name in GROUPS["rivals"]:
        for budget in (Budget(TOKEN_LAYERS, 792), Budget("flops", 0.4)):
            reduction = bench._reduction(name, budget, matching=True)
            if budget.kind == TOKEN_LAYERS:
                assert reduction.token_layers_removed == 792
            else:
                assert reduction_gflops_true(reduction) == pytest.approx(0.6 * gflops_true(config), rel=0.012)
    else:
        figures = bench._ours(name, Budget(TOKEN_LAYERS, 792)).figures
        assert figures["token_layers_removed"] == 792
        assert bench._ours(name, Budget("flops", 0.3)).figures["gflops_true_change"] == pytest.approx(-0.3, abs=0.005)


def test_what_cannot_be_saved_is_said() -> None:
    with pytest.raises(PlanError, match=r"9999 token-layers cannot be removed from 'vim-tiny-test' on one side: at most 51"):
        k_schedule(TINY, 9999, one_sided=True)
    with pytest.raises(PlanError, match=r"-90.0% FLOPs cannot be reached: the nearest is -\d"):
        at_flops(TINY, 0.9, lambda n: (None, gflops_true(TINY, make_plan(TINY, schedule=k_schedule(TINY, n)))))


def test_groups_and_names_of_methods() -> None:
    assert parse_methods(["generators", "weights", "mtr", "mtr"])[:5] == ["stm", "stm-frontier", "stm-spread", "stm-one-sided", "stm-literal"]
    assert len(parse_methods(["all"])) == len(set(parse_methods(["all"]))) == 10 + 2 * len(METHODS) + 2
    assert {family(name) for name in parse_methods(["all"])} == {"stm", "ablation", "rival", "frozen", "control"}
    assert family("mine") == family("frozen-mine") == "plan"
    with pytest.raises(ConfigError, match=r"no method 'tom'; groups: all, weights"):
        parse_methods(["tom"])


def test_a_users_plan_stands_at_the_budget_that_it_spends() -> None:
    plan = make_plan(TINY, schedule={1: (3, 3), 2: (1, 0)})  # 20 token-layers
    other = make_plan(TINY, schedule={1: (5, 5)})
    wanted = budgets(TINY, [20], ["20%"])
    found = cells(TINY, ["stm"], wanted, {"mine": [plan, other]})
    assert [(cell.name, cell.budget.label) for cell in found] == [
        ("mine", "TL 20"),
        ("stm", "TL 20"),
        ("stm", "-20 % FLOPs"),
        ("mine", "TL 30"),
    ]
    with pytest.raises(ConfigError, match="two plans of this name spend TL 20"):
        cells(TINY, [], wanted, {"mine": [plan, plan]})
    with pytest.raises(ConfigError, match="'tome' is a method of the table"):
        cells(TINY, [], wanted, {"tome": [plan]})
    with pytest.raises(PlanError, match="the plan was made for model 'vim-tiny-test', this is 'vim-n'"):
        cells(model_config("vim-n"), [], wanted, {"mine": [plan]})


# --- noise -------------------------------------------------------------------------------------------------------------------


def test_a_difference_within_noise_is_called_so() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(1000) < 0.9
    few, many = right.copy(), right.copy()
    few[np.flatnonzero(right)[:12]] = False  # about as many gained as lost
    few[np.flatnonzero(~right)[:8]] = True
    many[np.flatnonzero(right)[:40]] = False
    assert paired_difference(right, right).verdict == NOISE, "the same answers: an interval of 0 alone"
    assert (paired_difference(right, right).low, paired_difference(right, right).high) == (0, 0)
    one = right.copy()
    one[np.flatnonzero(right)[0]] = False
    assert paired_difference(one, right).high == 0, "one image of 1000 is noise, not by rounding's grace"
    assert paired_difference(one, right).verdict == NOISE
    assert paired_difference(few, right).verdict == NOISE
    assert paired_difference(many, right).verdict == "lower"
    assert paired_difference(right, many).verdict == "higher"


def test_the_bootstrap_has_the_normal_interval_where_that_holds() -> None:
    x = np.random.default_rng(3).normal(5, 2, 900)
    found = bootstrap_mean(x)
    half = 1.96 * x.std() / 30
    assert found.value == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.15 * half)
    assert bootstrap_mean(x) == found, "the same from run to run"
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="bootstrap of values"):
        bootstrap_mean([])


# --- measuring ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("accuracy") / "run"
    with torch.no_grad():
        methods = ["stm", "stm-constant", "stm-mean", "stm-one-sided", "stm-frontier", "tome", "tome-balanced", "mtr", "frozen-mtr", "controls"]
        return folder, measure(tiny(), folder, **{**QUICK, "variants": ["centred", "anywhere"]}, methods=methods)


def row_of(run: Run, name: str, budget: str = "TL 20", variant: str = "anywhere") -> Any:
    return next(row for row in run.rows if (row.name, row.budget, row.variant) == (name, budget, variant))


@pytest.mark.parametrize("name", ["stm", "stm-one-sided", "mtr", "resolution"])
def test_figures_are_what_a_plain_loop_finds(measured: tuple[Path, Run], name: str) -> None:
    _, run = measured
    row, base = row_of(run, name), tiny()
    made = Bench(base).make(Cell(name, Budget(TOKEN_LAYERS, 20)))
    pixels, labels = images(10)
    hits = same = 0
    kl, last = [], []
    for image, label in zip(pixels, labels, strict=True):
        a, b = observe(base, normalised(image[None], TINY)), observe(made.model, normalised(image[None], made.model.config))
        p, q = (torch.softmax(seen.logits[0].double(), 0) for seen in (a, b))
        hits += int(q.argmax() == label)
        same += int(q.argmax() == p.argmax())
        kl.append(float((p * (p / q).log()).sum()))
        last.append(float((b.states[-1] - a.states[-1]).norm() / a.states[-1].norm()))
    assert row.top1.hits == hits
    assert row.agreement == same / 10
    assert row.kl.value == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-9)
    assert row.state.value == pytest.approx(np.mean(last), rel=1e-3)
    assert row.states[-1] == pytest.approx(row.state.value, rel=1e-4)
    assert row.difference.gained - row.difference.lost == hits - run.unmerged("anywhere").top1.hits
    if name != "resolution":
        assert row.states[0] == 0, "nothing is merged before layer 1"
        assert row.figures["token_layers_removed"] == 20


def test_both_variants_all_budgets_and_what_is_impossible(measured: tuple[Path, Run]) -> None:
    folder, run = measured
    assert run.variants == ["centred", "anywhere"]
    assert run.budgets == ["TL 20", "-20 % FLOPs"]
    assert run.whole
    assert [(one["name"], one["reason"]) for one in run.head["impossible"]] == [
        ("smaller", "no smaller model: no model below vim-tiny-test comes with weights for these images")
    ]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "run.json",
        "accuracy.json",
        "accuracy.md",
        "accuracy-vs-flops-vim-tiny-test.png",
        "state-error-vs-layer-vim-tiny-test.png",
        "plans-vim-tiny-test.png",
    }
    answer = json.loads((folder / "accuracy.json").read_text())
    assert len(answer["rows"]) == len(run.rows) == 2 * (1 + 2 * 10)
    assert {row["to_reference"]["verdict"] for row in answer["rows"] if row["to_reference"]} <= {NOISE, "higher", "lower"}


@pytest.mark.usefixtures("no_plots")
def test_a_smaller_model_and_a_smaller_image_are_controls(tmp_path: Path) -> None:
    config = TINY.with_changes(name="smaller", d_model=8)
    run = measure(tiny(), tmp_path, **QUICK, methods=["stm", "controls"], smaller=VisionMamba(config).eval())
    small, coarse = (next(row for row in run.rows if row.name == name) for name in ("smaller", "resolution"))
    assert small.figures["gflops_true_change"] == pytest.approx(
        plan_summary(config, None)["gflops_true"] / plan_summary(TINY, None)["gflops_true"] - 1
    )
    assert small.states == (), "another width: no state to compare"
    assert coarse.schedule == "80x80 px, 26 tokens"
    assert all(any(row.name == "smaller" for row in run.at(budget, "anywhere")) for budget in run.budgets), "it stands in every table"


@pytest.mark.usefixtures("no_plots")
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = runner_module.observe

    def counted(model: VisionMamba, pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        return real(model, pixels)

    monkeypatch.setattr(runner_module, "observe", counted)
    whole = measure(tiny(), tmp_path / "whole", **QUICK, methods=["stm", "mtr"])
    assert len(calls) == 2 * (1 + 4), "two batches each of the unmerged model and of two methods at two budgets"
    calls.clear()
    stopped = measure(tiny(), tmp_path / "parts", **QUICK, methods=["stm", "mtr"], minutes=0)
    assert (calls, stopped.whole, stopped.head["left"]) == ([], False, 5)
    assert "5 measurements are left" in "\n".join(stopped.lines())

    def failing(model: VisionMamba, pixels: torch.Tensor) -> Any:
        if len(calls) == 5:
            raise KeyboardInterrupt
        return counted(model, pixels)

    monkeypatch.setattr(runner_module, "observe", failing)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny(), tmp_path / "parts", **QUICK, methods=["stm", "mtr"])
    done = sorted(path.name for path in (tmp_path / "parts" / "records").iterdir())
    assert done == ["anywhere--none--as-it-is.json", "anywhere--stm--TL-20.json"], "the unmerged model and one method; nothing half"
    assert not read_run(tmp_path / "parts").whole, "a run that was killed is no whole one"
    calls.clear()
    monkeypatch.setattr(runner_module, "observe", counted)
    resumed = measure(tiny(), tmp_path / "parts", **QUICK, methods=["stm", "mtr"])
    assert len(calls) == 2 * (1 + 3), "the unmerged model again, for its states, and three records"
    calls.clear()
    again = measure(tiny(), tmp_path / "parts", **QUICK, methods=["mtr", "stm"])
    assert calls == [], "nothing was left to do"
    for run in (resumed, again):
        assert [(r.name, r.budget, r.top1, r.kl, r.state) for r in sorted(run.rows, key=lambda r: (r.name, r.budget))] == [
            (r.name, r.budget, r.top1, r.kl, r.state) for r in sorted(whole.rows, key=lambda r: (r.name, r.budget))
        ]


@pytest.mark.usefixtures("no_plots")
def test_what_another_call_left_is_still_left(tmp_path: Path) -> None:
    first = measure(tiny(), tmp_path, **QUICK, methods=["stm"])
    assert first.whole
    measure(tiny(), tmp_path, **QUICK, methods=["mtr"], minutes=0)
    again = measure(tiny(), tmp_path, **QUICK, methods=["tome"])
    assert (again.whole, again.head["left"]) == (False, 2), "mtr at two budgets"
    assert measure(tiny(), tmp_path, **QUICK, methods=["mtr"]).whole


@pytest.mark.usefixtures("no_plots")
def test_what_is_recorded_is_not_left_when_the_time_is_up(tmp_path: Path) -> None:
    first, other = (make_plan(TINY, schedule={1: (count, 3)}, weights="mean") for count in (3, 4))
    measure(tiny(), tmp_path, **QUICK, methods=["stm"], plans={"mine": [first]})
    again = measure(tiny(), tmp_path, **QUICK, methods=["stm"], plans={"mine": [first]}, minutes=0)
    assert again.whole
    changed = measure(tiny(), tmp_path, **{**QUICK, "token_layers": [first.token_layers_removed]}, methods=[], plans={"mine": [other]}, minutes=0)
    assert not changed.whole, "another plan of that name"


@pytest.mark.usefixtures("no_plots")
def test_a_searched_schedule_is_a_row_at_the_budget_that_it_spends(tmp_path: Path) -> None:
    reduction = create_reduction("utr", TINY, schedule={2: 10})
    save_reduction(reduction, tmp_path / "utr.json")
    chosen = {**QUICK, "flops": [], "token_layers": [reduction.token_layers_removed]}
    run = measure(tiny(), tmp_path / "run", **chosen, methods=["utr", "mtr"], plans={"utr-best": [tmp_path / "utr.json"]})
    row = next(row for row in run.rows if row.name == "utr-best")
    assert (row.family, row.budget) == ("plan", f"TL {reduction.token_layers_removed}")
    assert row.schedule == schedule_text(reduction)
    wanted = Bench(tiny()).make(Cell("utr-best", budgets(TINY, [20], [])[0], reduction=reduction)).model
    pixels, labels = images(10)
    with torch.no_grad():
        assert (wanted(normalised(pixels, TINY)).argmax(1) == labels).tolist() == list(row.right)
    with pytest.raises(ConfigError, match="takes the layers of a merge plan, and utr-best is a method's schedule"):
        measure(tiny(), tmp_path / "run", **chosen, methods=["mtr@utr-best"], plans={"utr-best": [tmp_path / "utr.json"]})


@pytest.mark.usefixtures("no_plots")
def test_rivals_run_before_a_plans_layers_and_the_plan_is_compared_with_all(tmp_path: Path) -> None:
    late = make_plan(TINY, schedule={2: (10, 10)}, weights="mean")
    late.save(tmp_path / "late.json")
    chosen = {**QUICK, "flops": ["30%"], "token_layers": [late.token_layers_removed]}
    run = measure(tiny(), tmp_path / "run", **chosen, methods=["mtr", "rivals@best"], plans={"best": [tmp_path / "late.json"]})
    budget = f"TL {late.token_layers_removed}"
    assert [row.name for row in run.rows if row.family == "like"] == [f"{name}@best" for name in METHODS]
    for name in METHODS:
        row = row_of(run, f"{name}@best", budget)
        assert row.figures["seqlen"][1] == TINY.seqlen, "nothing goes before the plan's layer"
        if name not in ("hsa", "token-recognition", "random"):
            assert row.schedule.startswith("18 before 2, 2 before 3"), "no more than half at once, the rest in the next layer"
        assert row.figures["tokens_left"] == late.tokens_left
    table = dict(against(run, "best", "anywhere"))
    assert set(table) == {"mtr", *(f"{name}@best" for name in METHODS)}
    assert table["mtr"][budget] == paired_difference(row_of(run, "best", budget).right, row_of(run, "mtr", budget).right)
    assert "### vim-tiny-test, best against the others, points of top-1, anywhere" in markdown(run)
    with pytest.raises(ConfigError, match=r"takes its layers from the plan 'other'; give --plan other=FILE\.json"):
        parse_methods(["mtr@other"], ["best"])
    with pytest.raises(PlanError, match="find no layer any more"):
        scheduled_like(TINY, "tome", make_plan(TINY, schedule={3: (14, 14)}))


@pytest.mark.usefixtures("no_plots")
def test_a_changed_plan_is_measured_again(tmp_path: Path) -> None:
    first = make_plan(TINY, schedule={1: (3, 3), 2: (1, 0)})
    one = measure(tiny(), tmp_path, **QUICK, methods=["stm"], plans={"mine": [first]})
    two = measure(tiny(), tmp_path, **QUICK, methods=["stm"], plans={"mine": [make_plan(TINY, schedule={1: (3, 3), 2: (1, 0)}, weights="mean")]})
    assert row_of(one, "mine").kl != row_of(two, "mine").kl
    assert row_of(one, "stm").kl == row_of(two, "stm").kl
    assert row_of(two, "mine").plan == make_plan(TINY, schedule={1: (3, 3), 2: (1, 0)}, weights="mean")


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"images": 11}, "images was 10, is 11"), ({"model": "other"}, "weights_sha256 was")],
)
def test_another_run_in_the_folder_is_refused(measured: tuple[Path, Run], changes: dict[str, Any], text: str) -> None:
    folder, _ = measured
    model = tiny()
    if "model" in changes:
        model.init_weights(5)
        changes = {}
    with pytest.raises(ArtefactError, match=text):
        measure(model, folder, **{**QUICK, **changes}, methods=["stm"])


@pytest.mark.usefixtures("no_plots")
def test_logits_that_are_not_finite_leave_a_reason_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner_module.observe

    def broken(model: VisionMamba, pixels: torch.Tensor) -> Any:
        seen = real(model, pixels)
        if model.plan is not None:
            seen.logits[1] = float("nan")
        return seen

    monkeypatch.setattr(runner_module, "observe", broken)
    run = measure(tiny(), tmp_path, **QUICK, methods=["stm", "mtr"])
    assert {row.name for row in run.rows} == {"none", "mtr"}
    assert "the logits of 1 of 5 images are not finite" in run.head["impossible"][0]["reason"]


# --- latency -----------------------------------------------------------------------------------------------------------------


def test_latency_is_taken_with_the_unmerged_model_and_rivals_may_lack_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, int]] = []

    class Fake:
        def prepare(self, batch: int, launch: str) -> Prepared:
            return Prepared(lambda: None, HostClock(), "cpu", launch, "fp16")

    def engine_of(workshop: Any, bench: Any, candidate: Any, label: str, batch: int) -> Any:
        if candidate is not None and candidate.reduction is not None:
            raise BuildError("rivals have no engine yet")
        built.append((label, batch))
        return Fake()

    monkeypatch.setattr(latency_module, "require_engines", lambda library: None)
    monkeypatch.setattr(latency_module, "engine_of", engine_of)
    monkeypatch.setattr(runner_module, "DEFAULT_LATENCY", ("stm", "mtr", "stm-mean"))
    arguments = {**QUICK, "methods": ["stm", "mtr"], "latency": ["default"], "latency_batches": [2]}
    drawn: list[list[int]] = []
    monkeypatch.setattr(plots_module, "_accuracy", lambda run, path, label, place: drawn.append([x for row in run.rows if (x := place(row))]) or path)
    monkeypatch.setattr(plots_module, "_layers", lambda run, path: path)
    monkeypatch.setattr(plots_module, "_plans", lambda run, path: path)
    run = measure(tiny(), tmp_path, **arguments)
    found = run.latency("stm", "TL 20", 2)
    assert found is not None
    assert found.median_ms is not None
    assert found.ratio is not None
    assert run.batches == [2]
    lacking = run.latency("mtr", "TL 20", 2)
    assert lacking is not None
    assert lacking.reason == "BuildError: rivals have no engine yet"
    page = markdown(run)
    assert "rivals have no engine yet" in page
    assert "ms, batch 2 (of unmerged), images/s" in page
    assert f"({found.ratio[0]:.3f}), {2000 / found.median_ms:,.0f} |" in page
    assert f"{tmp_path}/accuracy-vs-latency-b2-vim-tiny-test.png" in run.outputs
    assert [len(places) for places in drawn] == [5, 3], "all against FLOPs; the unmerged model and stm against latency"
    count = len(built)
    measure(tiny(), tmp_path, **arguments)
    assert len(built) == count, "timed once"
    timed_of = {"default": {"stm", "mtr"}, "rivals": {"mtr"}, "all": {"stm", "mtr"}}
    for group, names in timed_of.items():
        seen: list[set[str]] = []
        monkeypatch.setattr(
            latency_module, "time_engines", lambda bench, records, cells, *rest, seen=seen: seen.append({c.name for c in cells}) or []
        )
        measure(tiny(), tmp_path, **{**arguments, "latency": [group]})
        assert seen == [names], group
    with pytest.raises(ConfigError, match="latency of 'utr' is asked for, which is not measured"):
        measure(tiny(), tmp_path, **{**arguments, "latency": ["utr"]})


def test_a_rivals_engine_is_made_of_our_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    workshop = Workshop("cpu")
    monkeypatch.setattr(workshop, "_built", lambda lowered, name, batch: (built.append((lowered, name, batch)), (None, 0, "fake"))[1])
    config = TINY.with_changes(name="vim-n", image_size=(64, 64), depth=2)
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", stm.registry.ModelEntry(config, None, None))
    bench = Bench(VisionMamba(config, cls_only_last=False).eval())
    candidate = bench.make(Cell("mtr", Budget(TOKEN_LAYERS, 4)))
    assert latency_module.engine_of(workshop, bench, candidate, "mtr--TL-4", 2).name == "engine"
    lowered, name, batch = built[0]
    assert (name, batch.opt) == ("vim-n-mtr--TL-4-fp16-b2", 2)
    assert {node.op_type for node in lowered.graph.node} >= {"StmMambaScan", "TopK"}


def test_onnx_files_made_ahead_are_used_by_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY.with_changes(name="vim-n", image_size=(64, 64), depth=2)
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", stm.registry.ModelEntry(config, None, None))
    bench = Bench(VisionMamba(config, cls_only_last=False).eval())
    made = {name: bench.make(Cell(name, Budget(TOKEN_LAYERS, 4))) for name in ("stm", "mtr")}
    for name, candidate in made.items():
        described = candidate.reduction.describe() if candidate.reduction else None
        latency_module.export_ahead(tmp_path, latency_module.spec_of(bench, candidate, name), described)
    monkeypatch.setattr("exporter.onnx_export.export_onnx", lambda *_: pytest.fail("exported again"))
    workshop = Workshop("cpu", folder=tmp_path)
    monkeypatch.setattr(workshop, "_built", lambda lowered, name, batch: (None, 0, "fake"))
    for name, candidate in made.items():
        assert latency_module.engine_of(workshop, bench, candidate, name, 2).name == "engine"


def test_latency_alone_goes_on_with_a_table_and_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY.with_changes(name="vim-n", image_size=(224, 224))
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", stm.registry.ModelEntry(config, None, None))
    monkeypatch.setattr(latency_module, "require_engines", lambda library: None)
    monkeypatch.setattr(
        latency_module, "_time", lambda shop, bench, candidate, cell, batch: Latency(cell.name, cell.budget.label, batch, 1.0, 0.0, 2.0)
    )
    arguments = {**QUICK, "methods": ["stm", "stm-mean", "mtr", "smaller"]}
    alone = {**arguments, "latency": ["stm", "mtr", "smaller"], "latency_batches": [2], "latency_only": True}
    with pytest.raises(ConfigError, match="holds none"):
        measure("vim-n", tmp_path / "new", **alone)
    model = VisionMamba(config, cls_only_last=False).eval()
    before = measure(model, tmp_path / "run", **arguments)
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [one["name"] for one in head["impossible"]] == ["smaller"]
    wrong: dict[str, dict[str, Any]] = {
        "of which methods": {"latency": None},
        "takes no weights": {"checkpoint": "weights.safetensors"},
        r"stm at TL 24 \(2 such\) is not in the table": {"token_layers": [24]},
        r"utr at TL 20 \(2 such\) is not in the table": {"methods": ["stm", "utr"], "latency": ["utr"]},
    }
    for message, changes in wrong.items():
        with pytest.raises(ConfigError, match=message):
            measure("vim-n", tmp_path / "run", **{**alone, **changes})
    monkeypatch.setattr(runner_module, "_record", lambda *_: pytest.fail("accuracy was measured"))
    run = measure("vim-n", tmp_path / "run", **alone)
    assert [run.latency(name, "TL 20", 2).median_ms for name in ("stm", "mtr")] == [1.0, 1.0]
    assert run.latency("stm-mean", "TL 20", 2) is None
    assert {row.name: row.top1 for row in run.rows} == {row.name: row.top1 for row in before.rows}
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {key: after[key] for key in head if key not in ("budgets", "methods")} == {
        key: head[key] for key in head if key not in ("budgets", "methods")
    }


def test_engines_of_other_kernels_are_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(
        latency_module, "_time", lambda shop, bench, candidate, cell, batch: made.append(cell.name) or Latency(cell.name, "", batch, 1.0)
    )
    cell, records = Cell("stm", Budget(TOKEN_LAYERS, 4)), Records(tmp_path)
    for engines, times in (("kernels 6", 1), ("kernels 6", 1), ("kernels 7", 2), ("", 2)):
        monkeypatch.setattr(latency_module, "engines_here", lambda library, engines=engines: engines)
        assert latency_module.time_engines(Bench(tiny()), records, [cell], (1,), None, None, Steps(1, False)) == []
        assert len(made) == times
    monkeypatch.setattr(latency_module, "engines_here", lambda library: "kernels 8")
    late = time.monotonic() - 1
    assert latency_module.time_engines(Bench(tiny()), records, [cell], (1, 2), None, late, Steps(1, False)) == [
        ("latency", "stm", "TL 4", "b1"),
        ("latency", "stm", "TL 4", "b2"),
    ]
    monkeypatch.setattr(latency_module, "engines_here", lambda library: "kernels 7")
    assert latency_module.time_engines(Bench(tiny()), records, [cell], (1, 2), None, late, Steps(1, False)) == [("latency", "stm", "TL 4", "b2")]


def test_engines_are_built_ahead_for_each_batch_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY.with_changes(name="vim-n", image_size=(64, 64), depth=2)
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", stm.registry.ModelEntry(config, None, None))
    bench = Bench(VisionMamba(config, cls_only_last=False).eval())
    built: list[tuple[str, int, str]] = []

    def note(workshop: Any, lowered: Any, name: str, batch: Any) -> tuple[Any, int, str]:
        built.append((name, batch.opt, workshop.timing_cache.parent.name))
        return None, 0, "fake"

    monkeypatch.setattr(Workshop, "_built", note)
    cells = [Cell(name, Budget(TOKEN_LAYERS, 4)) for name in ("stm", "mtr")]
    monkeypatch.setattr("exporter.bench.workshop.export_pool", lambda workers: ThreadPoolExecutor(1))
    names = ("vim-n-0-64", "vim-n-stm--TL-4-64", "vim-n-mtr--TL-4")
    for jobs, wanted in ((1, []), (2, [(f"{name}-fp16-b{batch}", batch, "engines") for name in names for batch in (2, 3)])):
        with latency_module.Exports(bench, Records(tmp_path / str(jobs)), cells, (2, 3), jobs) as exports:
            for cell in cells:
                exports.wait(latency_module.records_label(cell))
        assert built == wanted, jobs


def test_nothing_is_timed_while_engines_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def slow(*_: object) -> None:
        time.sleep(0.3)
        done.append("built")

    monkeypatch.setattr("exporter.bench.workshop.export_pool", ThreadPoolExecutor)
    monkeypatch.setattr(latency_module, "export_ahead", slow)
    monkeypatch.setattr(latency_module, "_timed", lambda *_: False)
    monkeypatch.setattr(latency_module, "_time", lambda *_: done.append("timed") or Latency("", "", 1))
    bench = Bench(tiny())
    cells = [Cell("mtr", Budget(TOKEN_LAYERS, n)) for n in (4, 8, 12)]
    with latency_module.Exports(bench, Records(tmp_path), cells, (1,), 2) as exports:
        assert latency_module.time_engines(bench, Records(tmp_path), cells, (1,), None, None, Steps(3, False), exports) == []
    assert done == ["built"] * 4 + ["timed"] * 3, "the unmerged model and three rivals"


def test_a_process_that_died_leaves_the_rest_to_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise BrokenExecutor("a process in the pool was terminated")

    monkeypatch.setattr("exporter.bench.workshop.export_pool", Dead)
    with latency_module.Exports(Bench(tiny()), Records(tmp_path), [Cell("mtr", Budget(TOKEN_LAYERS, 4))], (1,), 2) as exports:
        exports.settle(None)
        exports.wait("mtr--TL-4")


def test_build_jobs_without_latency_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --latency"):
        measure(tiny(), tmp_path, **QUICK, build_jobs=2)


# --- docs/accuracy.md --------------------------------------------------------------------------------------------------------


def test_the_document_is_what_its_records_say(tmp_path: Path) -> None:
    """The archives beside it hold what each image gave; its tables are made from them, to the last digit."""
    docs = Path(__file__).parents[2] / "docs"
    written = (docs / "accuracy.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    made = ""
    for name in ("n", "t"):
        with tarfile.open(docs / "accuracy" / f"records-vim-{name}.tar.xz") as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, Debian 12's, knows no `filter`
            archive.extractall(tmp_path)
        made += markdown(read_run(tmp_path / f"accuracy-{name}"), [])
    lines = [line for line in written.splitlines() if line.strip() and not line.startswith("![")]
    assert lines == [line for line in made.splitlines() if line.strip()]


def test_a_plot_has_no_panels_of_stm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []

    def note(figure: Any, path: Path) -> Path:
        titles.extend(axes.get_title() for axes in figure.axes)
        return path

    run = measure(tiny(), tmp_path, **{**QUICK, "methods": ["stm", "stm-mean", "mtr"]})
    monkeypatch.setattr(plots_module, "_save", note)
    plots_module._accuracy(run, tmp_path / "all.png", "GFLOPs", lambda row: 1.0)
    assert {title.rpartition(": ")[2] for title in titles} == {"methods", "rules and weights of stm"}
    scales: list[str] = []
    monkeypatch.setattr(plots_module, "_save", lambda figure, path: scales.extend(axes.get_xscale() for axes in figure.axes) or path)
    for far, scale in ((3.0, "linear"), (10.0, "log")):
        scales.clear()
        plots_module._accuracy(run, tmp_path / "far.png", "ms", lambda row, far=far: far if row.name == "mtr" else 1.0)
        assert set(scales) == {scale}
    monkeypatch.setattr(plots_module, "_save", note)
    titles.clear()
    plots_module._accuracy(run, tmp_path / "some.png", "ms", lambda row: 1.0 if row.name in ("none", "stm", "mtr") else None)
    assert {title.rpartition(": ")[2] for title in titles} == {"methods"}


# --- the quicker scan --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; without it the reference scan runs")
def test_the_triton_scan_is_the_reference() -> None:
    """Under Triton's interpreter, which wants its variable before the kernel is made, hence the process."""
    code = "from exporter.accuracy.fast_scan import agrees; print([agrees('cpu', *size) for size in ((16, 4), (40, 16))])"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.stdout.strip() == "[True, True]", ran.stderr


def test_a_scan_that_fails_or_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import stm.vim

    assert not fast_scan_module.agrees("cpu", 16, 4), "no interpreter here, and the kernel needs a GPU"
    monkeypatch.setitem(sys.modules, "exporter.accuracy.fast_scan_kernel", SimpleNamespace(scan=lambda u, *_: u))
    assert not fast_scan_module.agrees("cpu", 16, 4)
    with fast_scan_module.fast_scan("cpu", 16, 4) as used:
        assert not used and stm.vim.selective_scan is fast_scan_module.selective_scan
    monkeypatch.setattr(fast_scan_module, "agrees", lambda *_: True)
    with fast_scan_module.fast_scan("cuda", 16, 4) as used:
        assert used and stm.vim.selective_scan is fast_scan_module._quick
        seen = observe(tiny(), normalised(images(2)[0], TINY)).logits  # on a CPU: the reference
    assert stm.vim.selective_scan is fast_scan_module.selective_scan
    assert torch.equal(seen, observe(tiny(), normalised(images(2)[0], TINY)).logits)


# --- the report --------------------------------------------------------------------------------------------------------------


def test_the_document_gets_the_tables_and_plots(measured: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = measured
    path = tmp_path / "accuracy.md"
    path.write_text(f"# Ours\n\nkept\n\n{BEGIN}\nold\n{END}\nkept too\n")
    made = update_document(run, path)
    text = path.read_text()
    assert text.startswith("# Ours\n\nkept\n")
    assert text.endswith(f"{END}\nkept too\n")
    assert "old" not in text
    assert "of the model given" in text
    for heading in ("TL 20, centred", "-20 % FLOPs, anywhere", "does it help?", "tokens removed before which layers", "not measured"):
        assert heading in text
    assert "| **stm** |" in text or "| stm |" in text
    assert NOISE in text
    for plot in made[1:]:
        assert Path(plot).stat().st_size > 5000
        assert f"({path.stem}/{Path(plot).name})" in text
    monkeypatch.setattr(plots_module, "draw_plots", lambda run, folder: [Path(plot) for plot in made[1:]])
    update_document(run, path)
    assert path.read_text() == text, "the same from run to run"
    with pytest.raises(ArtefactError, match="two runs of vim-tiny-test"):
        update_document([run, run], path)
    path.write_text("no markers")
    with pytest.raises(ArtefactError, match="does not have <!-- stm bench: begin -->"):
        update_document(run, path)


def test_claims_compare_pairs(measured: tuple[Path, Run]) -> None:
    _, run = measured
    found = {(one, other): cells for one, other, _, cells in claims(run, "anywhere")}
    assert set(found) == {
        ("stm", "stm-one-sided"),
        ("stm", "stm-mean"),
        ("stm", "stm-constant"),
        ("stm", "stm-frontier"),
        ("tome-balanced", "tome"),
    }
    one, other = row_of(run, "stm"), row_of(run, "stm-one-sided")
    assert found["stm", "stm-one-sided"]["TL 20"].value == pytest.approx(one.top1.value - other.top1.value)


def test_nothing_but_the_unmerged_model_makes_no_plot(tmp_path: Path) -> None:
    run = measure(tiny(), tmp_path / "run", **QUICK, methods=["smaller"])
    assert [row.name for row in run.rows] == ["none"]
    assert draw_plots(run, tmp_path / "plots") == []
    assert "no smaller model" in "\n".join(terminal_lines(run))


# --- the command line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_vim_n(monkeypatch: pytest.MonkeyPatch) -> VimConfig:
    """While a test runs, vim-n is a model of 6 layers."""
    entry = stm.registry._MODELS["vim-n"]
    config = VimConfig("vim-n", 16, depth=6, d_state=4, num_classes=100)
    monkeypatch.setitem(stm.registry._MODELS, "vim-n", stm.registry.ModelEntry(config, None, entry.weights, entry.class_names))
    return config


COMMAND = ["bench", "accuracy", "--model", "vim-n", "--weights", "random", "--images", "4", "--device", "cpu", "--token-layers", "60"]


@pytest.mark.usefixtures("no_plots")
def test_the_command_line(tiny_vim_n: VimConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, document = tmp_path / "plan.json", tmp_path / "doc.md"
    make_plan(tiny_vim_n, schedule={1: (15, 15)}).save(plan)
    document.write_text(f"{BEGIN}\n{END}\n")
    arguments = [*COMMAND, "--flops=-10%", "--methods", "stm,mtr", "--variants", "centred", "--plan", f"mine={plan}", "-o", str(tmp_path / "run")]
    assert main([*arguments, "--document", str(document), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in answer["rows"]] == ["none", "mine", "stm", "stm", "mtr", "mtr"]
    assert answer["budgets"] == ["TL 60", "-10 % FLOPs", "TL 150"], "the plan has a budget of its own"
    assert str(document) in answer["outputs"]
    assert "### vim-n, -10 % FLOPs, centred" in document.read_text()
    document.write_text(f"{BEGIN}\n{END}\n")
    assert main(["bench", "accuracy", "--from", str(tmp_path / "run"), "--document", str(document)]) == 0
    out = capsys.readouterr().out
    assert "WARNING: RANDOM weights (seed 0)" in out
    assert "### vim-n, TL 60, centred" in document.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--methods", "stm,magic"], 2, "no method 'magic'"),
        (["--flops", "lots"], 2, "give what is saved, 40% or 0.4, or what is left, 0.6x"),
        (["--token-layers", "60,60"], 2, "budget TL 60 is given twice"),
        (["--variants", "sideways"], 2, "variants are sideways; choose from centred, anywhere"),
        (["--plan", "mine=none.json"], 2, "cannot read plan none.json"),
        (["--plan", "stm=plan.json"], 2, "plan"),
        (["--minutes", "-1"], 2, "minutes is -1.0"),
        (["--methods", "stm", "--latency", "utr"], 2, "latency of 'utr' is asked for"),
        (["--methods", "stm", "--latency"], 3, "TensorRT"),
        (["--checkpoint", "none.safetensors"], 2, "--weights random excludes --checkpoint"),
    ],
)
def test_what_is_wrong_is_said(tiny_vim_n: VimConfig, arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *arguments]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


def test_damaged_and_foreign_folders_are_refused(measured: tuple[Path, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy", "--from", str(tmp_path)]) == 9
    assert "it has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"schema": 1, "kind": "eval-run"}')
    with pytest.raises(ArtefactError, match="not of this version's `stm bench accuracy`"):
        read_run(tmp_path)
    folder = tmp_path / "copy"
    (folder / "records").mkdir(parents=True)
    source, _ = measured
    (folder / "run.json").write_text((source / "run.json").read_text())
    for path in (source / "records").glob("anywhere--none*"):
        (folder / "records" / path.name).write_text(path.read_text())
    assert [row.name for row in read_run(folder).rows] == ["none"]
    other = json.loads((source / "records" / "anywhere--stm--TL-20.json").read_text())
    (folder / "records" / "anywhere--stm--TL-20.json").write_text(json.dumps({**other, "top": other["top"][:3]}))
    with pytest.raises(ArtefactError, match="stm has 3 predictions for 10 images"):
        read_run(folder)
    (folder / "records" / "anywhere--stm--TL-20.json").write_text("{cut")
    with pytest.raises(ArtefactError, match=r"anywhere--stm--TL-20\.json .*remove it, and it is measured again"):
        read_run(folder)
    assert main(["bench", "accuracy", "--from", str(folder), "--methods", "stm"]) == 2
    assert "--methods belong to --model" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 10 classes, the images of stm\.data have 100"):
        measure(VisionMamba(TINY.with_changes(num_classes=10)), tmp_path, **QUICK)


WHOLE_LINES = re.sub(r"\\\n *", "", DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", re.findall(r"^    stm (bench accuracy .*)$", WHOLE_LINES, re.M))
def test_documented_commands_parse(command: str) -> None:
    _parser("bench accuracy").parse_args(shlex.split(command, comments=True)[2:])


@pytest.mark.parametrize("path", sorted((DOCUMENT.parent / "plans").glob("*.json")), ids=lambda path: path.stem)
def test_plans_of_the_document_fit_their_model_and_keep_their_budget(path: Path) -> None:
    """vim-t-utr-60.json: for vim-t, at most 0.60 of the true FLOPs; the matching of a method that looks at the image is counted."""
    *model, percent = path.stem.replace("-utr", "").split("-")
    config = model_config("-".join(model), num_classes=100)
    plan = load_plan(path, config)
    if isinstance(plan, MergePlan):
        plan.check_fits(config)
    figures = plan_summary(config, plan) if isinstance(plan, MergePlan) else reduction_summary(plan)
    assert figures["gflops_true"] <= int(percent) / 100 * gflops_true(config)


def test_the_document_has_the_markers() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "accuracy", "--help"])
    assert done.value.code == 0
    assert "usage: stm bench accuracy" in capsys.readouterr().out


def test_normalising_resizes_only_where_the_size_differs() -> None:
    pixels, _ = images(1)
    full = normalised(pixels, TINY.with_changes(image_size=(224, 224)))
    mean, std = torch.tensor(TINY.mean).view(3, 1, 1), torch.tensor(TINY.std).view(3, 1, 1)
    torch.testing.assert_close(full, (pixels / 255 - mean) / std)
    small = normalised(pixels, TINY)
    assert tuple(small.shape) == (1, 3, 96, 96)
    area = F.interpolate(pixels / 255, (96, 96), mode="area")
    assert float(((small * std + mean) - area).abs().mean()) < 0.05


def test_plans_of_a_run_survive_their_records(measured: tuple[Path, Run]) -> None:
    folder, run = measured
    plan = row_of(run, "stm").plan
    assert isinstance(plan, MergePlan)
    assert plan == make_plan(TINY, schedule=k_schedule(TINY, 20))
    assert [row.plan for row in read_run(folder).rows] == [row.plan for row in run.rows]
