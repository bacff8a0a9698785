"""The schedule search: the least that meets the budget, never worse than the method as it is usually run, and its file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stm import ConfigError, PlanError, ShapeError, VimConfig, VisionMamba, gflops_true
from stm.factory import with_plan
from stm.optimization import LatencyTable, optimize_schedule, parse_budget
from stm.optimization.budget import Budget
from stm.optimization.images import dead_leaves
from stm.optimization.schedules import Fit, _Distance, reduction_cost
from stm.reduction import create_reduction, load_reduction, parse_reduction, reduction_gflops_true, save_reduction, with_reduction

TINY = VimConfig("tiny", 16, depth=6, d_state=4, image_size=(96, 96), num_classes=7)  # 37 tokens


@pytest.fixture(scope="module")
def model() -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(TINY).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return dead_leaves(TINY, 8, seed=1)


@pytest.mark.parametrize("method", ["tome", "tome-balanced", "utr", "random"])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (0, 1, 2, 0, 1), (0, 0, 0, 1, 0), (3, 0, 0, 0, 1)])
def test_a_fit_removes_the_fewest_tokens_that_meet_the_budget(method: str, weights: tuple[int, ...]) -> None:
    budget = parse_budget("0.75x", TINY)
    fit = Fit(method, TINY, budget, {})
    found = fit(weights)
    every = [fit._made(weights, count) for count in range(1, TINY.seqlen - 2)]
    enough = [made for made in every if made is not None and reduction_gflops_true(made) <= budget.limit]
    if found is None:
        assert not enough or None in every[: every.index(enough[0])]
        return
    assert set(found.schedule) <= {index + 1 for index, weight in enumerate(weights) if weight}
    assert sum(found.schedule.values()) == min(sum(made.schedule.values()) for made in enough)
    # shares: no layer is more than a token away from its weight's
    total = sum(found.schedule.values())
    for layer, weight in enumerate(weights, 1):
        assert abs(found.schedule.get(layer, 0) - total * weight / sum(weights)) <= 1


def test_the_divergence_is_the_kl_of_the_predictions(model: VisionMamba, images: Tensor) -> None:
    reduction = create_reduction("tome", TINY, schedule={2: 5, 4: 6})
    distance = _Distance(model, [images[:5], images[5:]])
    with torch.no_grad():
        before, after = (m(images).double().log_softmax(1) for m in (with_plan(model, None), with_reduction(model, reduction)))
    wanted = (before.exp() * (before - after)).sum(1)
    assert torch.allclose(distance(reduction), wanted, atol=1e-9)
    assert len(distance(reduction, torch.zeros(8, dtype=torch.float64))) == 5, "it cannot win any more after the first batch"


def test_the_search_meets_the_budget_and_never_returns_worse_than_the_usual_schedule(model: VisionMamba, images: Tensor) -> None:
    kept: list[float] = []
    found = optimize_schedule(model, "utr", "0.8x", images, seconds=None, evaluations=40, better=lambda _, value: kept.append(value))
    again = optimize_schedule(model, "utr", "0.8x", images, seconds=None, evaluations=40)
    assert reduction_gflops_true(found.reduction) <= 0.8 * gflops_true(TINY)
    assert found.start is not None
    assert found.start_divergence is not None
    assert found.divergence <= found.start_divergence
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == found.divergence
    assert (again.reduction.schedule, again.divergence) == (found.reduction.schedule, found.divergence), "evaluations alone: repeatable"
    assert (found.images, found.held_out_images) == (12, 4)
    assert 10 < found.evaluations <= 40
    assert found.held_out is not None
    text = "\n".join(found.lines())
    for word in ("schedule", "searched", "held out", "evenly from layer 1", "budget"):
        assert word in text


def test_every_schedule_of_a_tiny_model_is_no_better(model: VisionMamba, images: Tensor) -> None:
    """Against brute force over the layers that a window may have, at a token budget."""
    small = VisionMamba(TINY.with_changes(depth=4)).eval()
    config = small.config
    found = optimize_schedule(small, "tome-balanced", "20tl", images, off_centre=False, held_out=images[:2], seconds=None, evaluations=400)
    distance, budget = _Distance(small, [images]), found.budget
    windows = [weights for weights in itertools.product((0.0, 1.0), repeat=3) if any(weights)]
    fits = [made for weights in windows if (made := Fit("tome-balanced", config, budget, {})(weights)) is not None]
    least = min(float(distance(made).mean()) for made in fits)
    assert found.divergence <= least * (1 + 2e-3)


@pytest.mark.parametrize("budget", ["25tl", "0.8x", "-20%"])
def test_budgets_of_all_kinds(model: VisionMamba, images: Tensor, budget: str) -> None:
    found = optimize_schedule(model, "tome", budget, images[:4], seconds=None, evaluations=3, off_centre=False)
    assert reduction_cost(found.budget, found.reduction) <= found.budget.limit


def test_milliseconds_by_a_table() -> None:
    table = LatencyTable({37: 0.3, 10: 0.1}, 0.2)
    reduction = create_reduction("tome", TINY, schedule={3: 10})
    assert reduction_cost(Budget(TINY, "ms", 1.0, table), reduction) == pytest.approx(table(reduction.lengths))


def test_what_cannot_be_done_is_refused(model: VisionMamba, images: Tensor) -> None:
    for error, words, change in (
        (PlanError, "no reduction 'tame'", {"method": "tame"}),
        (PlanError, "no schedule of it", {"method": "tome", "budget": "165tl"}),
        (ConfigError, "needs a limit", {"evaluations": None}),
        (ConfigError, "evaluations is 0", {"evaluations": 0}),
        (ShapeError, "expected", {"images": images[..., :32]}),
        (PlanError, "no option", {"metric": "x"}),
    ):
        arguments = {"method": "tome", "budget": "0.8x", "images": images, "seconds": None, "evaluations": 3, **change}
        with pytest.raises(error, match=words):
            optimize_schedule(model, **arguments)


def test_a_schedule_is_a_file_that_every_command_takes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    made = create_reduction("r-meeto", TINY, schedule={2: 4, 4: 3}, metric="delta")
    save_reduction(made, path)
    for again in (load_reduction(path, TINY), parse_reduction(str(path), TINY)):
        assert again.describe() == made.describe()
    with pytest.raises(PlanError, match=r"is for tiny with 37 tokens, the model is tiny with 17"):
        load_reduction(path, TINY.with_changes(image_size=(64, 64)))
    with pytest.raises(PlanError, match=r"cannot read the reduction .*none\.json"):
        load_reduction(tmp_path / "none.json", TINY)
    for text, words in (("{}", "expected \\('reduction', 1\\)"), ("[]", "cannot read"), ("{", "cannot read")):
        path.write_text(text)
        with pytest.raises(PlanError, match=words):
            load_reduction(path, TINY)
    save_reduction(made, path)
    data = json.loads(path.read_text())
    del data["method"]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="cannot read the reduction"):
        load_reduction(path, TINY)
    with pytest.raises(PlanError, match="cannot write reduction"):
        save_reduction(made, tmp_path / "no" / "x.json")
