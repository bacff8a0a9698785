"""The plan search: its form of a plan, budgets, knapsack, least squares, and that it never returns worse than what it started from."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stm import ConfigError, MergePlan, PlanError, ShapeError, VimConfig, VisionMamba, gflops_true, make_plan, model_config
from stm.calibration import calibrate_constants
from stm.factory import with_plan
from stm.optimization import LatencyTable, optimize_plan, parse_budget
from stm.optimization.budget import Budget
from stm.optimization.constants import _output, flat_constants, quadratic, ridge, with_constants
from stm.optimization.evaluation import Divergence, first_difference
from stm.optimization.images import dead_leaves, moved
from stm.optimization.layout import fixed_tokens, groups_of, leaves_of, plan_of, saved
from stm.optimization.optimizer import is_edge
from stm.optimization.search import Limits, Search, cells, knapsack, paper_plan, ramp, token_orders

TINY = VimConfig("tiny", 16, depth=6, d_state=4, image_size=(96, 96), num_classes=7)  # 37 tokens
VIM_T = model_config("vim-t")


@pytest.fixture(scope="module")
def model() -> VisionMamba:
    return VisionMamba(TINY).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return dead_leaves(TINY, 8, seed=1)


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["edge", "frontier", "spread", "one_sided"])
@pytest.mark.parametrize("preset", ["stm-15", "stm-20", "stm-40"])
def test_every_rule_is_a_layout(rule: str, preset: str) -> None:
    plan = make_plan(VIM_T, preset=preset, rule=rule)
    again = plan_of(VIM_T, leaves_of(plan), plan.weights)
    assert again == plan
    assert saved(leaves_of(plan), plan.depth) == plan.token_layers_removed


def test_any_layout_is_a_plan() -> None:
    draw = random.Random(0)
    for _ in range(20):
        leaves = [draw.randint(1, TINY.depth) for _ in range(TINY.seqlen)]
        for token in fixed_tokens(TINY):
            leaves[token] = TINY.depth
        plan = plan_of(TINY, leaves, "mean")  # the plan's own door checks it
        assert leaves_of(plan) == tuple(leaves)
        assert plan.token_layers_removed == saved(leaves, TINY.depth)


def test_a_layout_that_is_no_plan_names_the_token() -> None:
    stays = [TINY.depth] * TINY.seqlen
    for token, layer, words in ((17, 2, "token 17 cannot leave"), (3, 0, "token 3 leaves before layer 0"), (3, 7, r"1\.\.6")):
        leaves = [*stays[:token], layer, *stays[token + 1 :]]
        with pytest.raises(PlanError, match=words):
            groups_of(TINY, leaves)
    with pytest.raises(PlanError, match="3 tokens are told"):
        groups_of(TINY, [1, 2, 3])


def test_is_edge_tells_the_edge_rule() -> None:
    assert is_edge(make_plan(VIM_T, preset="stm-40"))
    assert is_edge(make_plan(VIM_T, rate=0.3, rule="one_sided"))
    assert not is_edge(make_plan(VIM_T, preset="stm-20", rule="spread"))
    order = token_orders(VIM_T)["edge"]
    layout = ramp(VIM_T, order, 9, 12, 800)
    assert layout is not None
    assert is_edge(plan_of(VIM_T, layout))


def test_orders_hold_every_token_that_may_leave_once() -> None:
    for config in (TINY, VIM_T, TINY.with_changes(image_size=(48, 80))):
        for order in token_orders(config).values():
            assert sorted(order) == sorted(set(range(config.seqlen)) - fixed_tokens(config))
        for bands in (1, 3, 50):
            assert sorted(token for cell in cells(config, bands) for token in cell) == sorted(set(range(config.seqlen)) - fixed_tokens(config))


def test_a_beginning_of_the_even_order_is_even() -> None:
    order = token_orders(VIM_T)["even"]
    gaps = np.diff(sorted(token for token in order[:48] if token < VIM_T.cls_index))
    assert gaps.max() <= 2 * gaps.min()


# --- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "limit"),
    [("0.6x", "GFLOPs", 0.6 * gflops_true(TINY)), ("-40%", "GFLOPs", 0.6 * gflops_true(TINY)), ("60tl", "token-layers", 37 * 6 - 60)],
)
def test_budgets_in_words(text: str, unit: str, limit: float) -> None:
    budget = parse_budget(text, TINY)
    assert (budget.unit, budget.limit) == (unit, pytest.approx(limit))


@pytest.mark.parametrize("text", ["", "0.6", "40%", "-0.6x", "1.2", "fast", "1e-1x"])
def test_a_budget_in_other_words_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.6x"):
        parse_budget(text, TINY)


def test_an_impossible_budget_says_what_is_possible() -> None:
    with pytest.raises(PlanError, match=r"cannot be met by 'tiny'.*leaves .* of .* GFLOPs.*raise the budget"):
        parse_budget("0.1x", TINY)
    with pytest.raises(ConfigError, match="nothing to save"):
        parse_budget("1x", TINY)
    with pytest.raises(ConfigError, match="--latency-table"):
        parse_budget("1ms", TINY)


def test_the_lowest_budget_is_what_the_shortest_plan_costs() -> None:
    leaves = [1] * TINY.seqlen
    for token in fixed_tokens(TINY):
        leaves[token] = TINY.depth
    lowest = gflops_true(TINY, plan_of(TINY, leaves, "constant", {1: (0.0,) * 34}))
    whole = gflops_true(TINY)
    parse_budget(f"{lowest / whole + 1e-3:.6f}x", TINY)
    with pytest.raises(PlanError):
        parse_budget(f"{lowest / whole - 2e-3:.6f}x", TINY)


def test_latency_table(tmp_path: Any) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"layer_ms": {"10": 1.0, "40": 2.5}, "fixed_ms": 0.5}')
    table = LatencyTable.load(path)
    assert table.layer(20) == pytest.approx(1.5)
    assert table.layer(4) == pytest.approx(0.7)  # beyond the table as at its end
    assert table([10, 40]) == pytest.approx(4.0)
    budget = parse_budget("0.8x", TINY, table)
    assert (budget.unit, budget.limit) == ("ms", pytest.approx(0.8 * (0.5 + 6 * table.layer(37))))
    path.write_text('{"layer": 3}')
    with pytest.raises(ConfigError, match="layer_ms"):
        LatencyTable.load(path)
    with pytest.raises(ConfigError, match="two lengths"):
        LatencyTable({3: 1.0})


def test_paper_plan_is_the_presets_family() -> None:
    plan = make_plan(VIM_T, preset="stm-40")
    found = paper_plan(VIM_T, Budget(VIM_T, "GFLOPs", gflops_true(VIM_T, plan)))
    assert found == plan


# --- knapsack ---------------------------------------------------------------------------------------------------------


def test_knapsack_is_exact() -> None:
    draw = random.Random(3)
    for _ in range(60):
        items = draw.randint(1, 5)
        gains = [[draw.randint(0, 9) for _ in range(draw.randint(1, 4))] for _ in range(items)]
        costs = [[draw.uniform(-1, 3) for _ in row] for row in gains]
        least = draw.randint(0, 25)
        best = min(
            (
                sum(costs[item][option] for item, option in enumerate(options))
                for options in itertools.product(*(range(len(row)) for row in gains))
                if sum(gains[item][option] for item, option in enumerate(options)) >= least
            ),
            default=None,
        )
        picked = knapsack(costs, gains, least)
        if best is None:
            assert picked is None
        else:
            assert picked is not None
            assert sum(gains[item][option] for item, option in enumerate(picked)) >= least
            assert sum(costs[item][option] for item, option in enumerate(picked)) == pytest.approx(best)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_the_whole_model(model: VisionMamba, images: Tensor) -> None:
    divergence = Divergence(model, images.split(3))
    assert divergence(None).max() < 1e-6
    first, second = make_plan(TINY, rate=0.3), make_plan(TINY, rate=0.3, rule="spread", weights="mean", proportional_decay=True)
    for plan in (first, second):
        p, q = (with_plan(model, which)(images).double().log_softmax(-1) for which in (None, plan))
        expected = (p.exp() * (p - q)).sum(-1).detach()
        torch.testing.assert_close(divergence(plan), expected, rtol=1e-4, atol=1e-7)


def test_shared_layers_change_nothing(model: VisionMamba, images: Tensor) -> None:
    leaves = list(leaves_of(make_plan(TINY, rate=0.4)))
    base = plan_of(TINY, leaves, "hsp")
    changed = [TINY.depth if leave == 4 else leave for leave in leaves]
    alone, sharing = Divergence(model, [images]), Divergence(model, [images])
    sharing(base, keep=True)
    before = sharing.forwards
    plan = plan_of(TINY, changed, "hsp")
    assert first_difference(plan, base, TINY.depth) == 4
    assert torch.equal(sharing(plan), alone(plan))
    assert sharing.forwards - before == pytest.approx(2 / 6)
    proportional = plan_of(TINY, changed, "hsp", None, True)
    assert torch.equal(sharing(proportional), alone(proportional))
    tight = Divergence(model, [images], cache_bytes=1)
    tight(base, keep=True)
    assert torch.equal(tight(plan), alone(plan))


def test_a_plan_that_cannot_win_stops_early(model: VisionMamba, images: Tensor) -> None:
    divergence = Divergence(model, images.split(2))
    good, bad = make_plan(TINY, schedule={5: (1, 1)}), make_plan(TINY, rate=0.8)
    rival = divergence(good)
    assert len(divergence(bad, rival=rival)) < len(images)
    assert torch.equal(divergence(good, rival=rival), rival)
    assert torch.equal(divergence(good, rival=divergence(bad)), rival)


def test_state_divergence_is_relative_to_the_class_token(model: VisionMamba, images: Tensor) -> None:
    divergence = Divergence(model, [images], "state")
    assert divergence(None).max() == 0
    assert (divergence(make_plan(TINY, rate=0.4)) > 0).all()
    with pytest.raises(ConfigError, match="objective"):
        Divergence(model, [images], "top1")
    with pytest.raises(ConfigError, match="images"):
        Divergence(model, [])


# --- least squares ----------------------------------------------------------------------------------------------------


def test_ridge_is_numpys_least_squares() -> None:
    rng = np.random.default_rng(0)
    a, r, strength = rng.normal(size=(30, 5)), rng.normal(size=30), 0.3
    scale = strength * np.mean(np.diag(a.T @ a))
    expected = np.linalg.lstsq(np.vstack([a, np.sqrt(scale) * np.eye(5)]), np.concatenate([-r, np.zeros(5)]), rcond=None)[0]
    found = ridge(torch.from_numpy(a.T @ a), torch.from_numpy(a.T @ r), strength)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("objective", ["kl", "state"])
def test_quadratic_is_the_divergence_nearby(objective: str, images: Tensor) -> None:
    model = VisionMamba(TINY).eval().double()
    images = images.double()
    plan = calibrate_constants(model, make_plan(TINY, rate=0.2), [images])
    divergence = Divergence(model, images.split(5), objective)
    near = quadratic(model, plan, [images], objective, rows=12)
    at = flat_constants(plan)
    assert near.value == pytest.approx(float(divergence(plan).mean()), rel=1e-6)
    direction = torch.randn(len(at), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-4 * direction
    shifted = [with_constants(plan, at + sign * step) for sign in (1, -1)]
    up, down = (float(divergence(which).mean()) for which in shifted)
    assert (up - down) / 2 == pytest.approx(float(near.gradient @ step), rel=1e-2)
    assert (near.hessian - near.hessian.T).abs().max() < 1e-12
    # Gauss-Newton: J^T F J, here from a difference of outputs; the rows are random
    truth, high, low = (_output(with_plan(model, which), images, objective).detach() for which in (None, *shifted))
    change = (high - low) / 2e-4
    if objective == "kl":
        p = truth.softmax(-1)
        expected = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
    else:
        expected = 2 * change.square().sum(-1) / truth.square().sum(-1)
    assert float(direction @ near.hessian @ direction) == pytest.approx(float(expected.mean()), rel=0.5)


def test_least_squares_needs_constants(model: VisionMamba, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="constants"):
        quadratic(model, make_plan(TINY, rate=0.2), [images])


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.9x", "0.6x", "80tl"])
@pytest.mark.parametrize("objective", ["kl", "state"])
def test_it_keeps_the_budget_and_beats_its_start(model: VisionMamba, images: Tensor, text: str, objective: str) -> None:
    seen: list[tuple[MergePlan, float]] = []
    found = optimize_plan(
        model,
        text,
        images,
        off_centre=False,
        objective=objective,
        seconds=None,
        evaluations=90,
        better=lambda plan, value: seen.append((plan, value)),
    )
    budget = parse_budget(text, TINY)
    assert all(budget.holds(plan) for plan, _ in seen), "what is saved on the way keeps the budget, too"
    assert [value for _, value in seen] == sorted((value for _, value in seen), reverse=True)
    assert seen[-1] == (found.plan, found.divergence)
    assert found.start is not None
    assert found.start_divergence is not None
    assert found.divergence <= found.start_divergence
    assert (found.images, found.held_out_images) == (6, 2)
    again = Divergence(model, [images[[0, 1, 2, 4, 5, 6]]], objective)(found.plan)
    assert float(again.mean()) == pytest.approx(found.divergence, rel=1e-4)
    assert MergePlan.from_json(found.plan.to_json()) == found.plan
    assert any("held out" in line for line in found.lines())


def test_the_same_seed_finds_the_same_plan(model: VisionMamba, images: Tensor) -> None:
    one, two = (optimize_plan(model, "0.7x", images, seconds=None, evaluations=70, seed=4) for _ in range(2))
    assert one.plan == two.plan
    assert (one.divergence, one.held_out) == (two.divergence, two.held_out)


def test_without_images_it_makes_some(model: VisionMamba) -> None:
    found = optimize_plan(model, "0.8x", seconds=None, evaluations=12)
    assert (found.data, found.images, found.held_out_images) == ("generated images", 24, 8)
    assert found.held_out is not None


def test_rounds_of_table_and_knapsack_help(model: VisionMamba, images: Tensor) -> None:
    """From a poor start, without the portfolio."""
    divergence, budget = Divergence(model, [images]), parse_budget("0.8x", TINY)
    search = Search(divergence, budget, limits=Limits(None, 10_000))
    search._starts()
    assert search.start is not None
    while search._round(3, wide=False) or search._round(3, wide=True):
        pass
    assert search.best is not None
    assert search.best_value < search.start[1]
    assert budget.holds(search.plan(search.best))


def test_ctrl_c_leaves_the_best_so_far(model: VisionMamba, images: Tensor) -> None:
    def stop(progress: Any) -> None:
        if progress.evaluations == 5:
            raise KeyboardInterrupt

    found = optimize_plan(model, "0.8x", images, seconds=None, evaluations=100, report=stop)
    assert found.stopped == "interrupted"
    assert found.evaluations == 5
    assert found.plan.merges


def test_wrong_arguments_are_refused(model: VisionMamba, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="no images"):
        optimize_plan(model, "0.8x", images[:0])
    with pytest.raises(ShapeError, match=r"\(n, 3, 96, 96\)"):
        optimize_plan(model, "0.8x", torch.zeros(2, 3, 64, 64))
    with pytest.raises(ConfigError, match="limit"):
        optimize_plan(model, "0.8x", images, seconds=None)
    with pytest.raises(ConfigError, match="seconds is 0"):
        optimize_plan(model, "0.8x", images, seconds=0)
    with pytest.raises(ConfigError, match="weights"):
        optimize_plan(model, "0.8x", images, weights=["best"])
    with pytest.raises(PlanError, match="cannot be met"):
        optimize_plan(model, "0.01x", images)


# --- images -----------------------------------------------------------------------------------------------------------


def test_generated_images_favour_no_place() -> None:
    pixels = dead_leaves(VimConfig("x", 8, image_size=(64, 64)), 200, seed=0)
    assert torch.equal(pixels[:2], dead_leaves(VimConfig("x", 8, image_size=(64, 64)), 200, seed=0)[:2])
    edges = (pixels[..., 1:] - pixels[..., :-1]).abs().mean((0, 1, 2))
    middle, border = edges[24:40].mean(), torch.cat([edges[:8], edges[-8:]]).mean()
    assert 0.85 < middle / border < 1.15


def test_moved_images_have_their_middle_elsewhere() -> None:
    images = torch.zeros(5, 3, 64, 64)
    images[..., 28:36, 28:36] = 1
    there = moved(images, seed=0)
    assert there.sum() == images.sum()
    assert there[..., 30:34, 30:34].sum() == 0
