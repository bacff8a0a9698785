"""Intervals and tests against published values, and the paper's cells against the FLOPs that they were matched by."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from exporter.evaluation.published import _MERGED, _ONE_SIDED, _RIVALS, _UNMERGED, published_plan, published_rival
from exporter.evaluation.statistics import PairedDifference, mcnemar_p, wilson_interval
from stm import MergePlan, make_plan, model_config, plan_summary
from stm.reduction import create_reduction, reduction_summary


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="21 of 20"):
        wilson_interval(21, 20)


@pytest.mark.parametrize(("lost", "gained"), [(1, 7), (7, 1), (6, 16), (0, 0), (5, 5), (0, 12), (150, 86), (900, 1010)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    n, fewer = lost + gained, min(lost, gained)
    exact = min(Fraction(1), 2 * Fraction(sum(math.comb(n, k) for k in range(fewer + 1)), 2**n))
    assert mcnemar_p(lost, gained) == pytest.approx(float(exact), rel=1e-9)


def test_mcnemar_known_values() -> None:
    assert mcnemar_p(1, 7) == pytest.approx(0.0703125)  # Fagerland et al. 2013, airway hyper-responsiveness
    assert mcnemar_p(6, 16) == pytest.approx(0.0525, abs=5e-5)  # the same, complete response


def test_paired_difference() -> None:
    d = PairedDifference.of(lost=60, gained=35, n=1000)
    up, down = 36 / 1002, 61 / 1002  # Bonett and Price 2012
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 1002)
    assert (d.value, d.low, d.high) == pytest.approx((-0.025, up - down - half, up - down + half), abs=1e-7)
    draws = np.random.default_rng(0).multinomial(1000, [0.06, 0.035, 0.905], size=20000)  # the bootstrap over images
    bootstrap = np.quantile((draws[:, 1] - draws[:, 0]) / 1000, [0.025, 0.975])
    assert (d.low, d.high) == pytest.approx(tuple(bootstrap), abs=1.5e-3)
    assert d.verdict == "worse"
    assert PairedDifference.of(35, 60, 1000).verdict == "better"
    assert PairedDifference.of(35, 36, 1000).verdict == "within noise"
    same = PairedDifference.of(0, 0, 50)
    assert (same.value, same.p, same.verdict) == (0, 1, "within noise")
    assert same.low < 0 < same.high, "no discordant image among 50 does not show that there are none"
    for lost, gained, n in ((1, 0, 0), (-1, 0, 5), (3, 3, 5)):
        with pytest.raises(ValueError, match="lost"):
            PairedDifference.of(lost, gained, n)


# --- the paper's cells ---------------------------------------------------------------------------------------------------------


def gigaflops(text: str) -> float | None:
    match = re.fullmatch(r"([\d.]+) G", text)
    return float(match.group(1)) if match else None


def test_cells_are_beside_the_plans_whose_flops_they_print() -> None:
    checked = 0
    for (model, preset), cells in _MERGED.items():
        config = model_config(model)
        figures = plan_summary(config, make_plan(config, preset=preset))
        for cell in cells:
            if (printed := gigaflops(cell.flops)) is not None:
                assert figures["gflops_paper"] == pytest.approx(printed, abs=0.0075), (model, preset)  # vim-s: 4.236 for 4.23
                checked += 1
    for model, cell in _UNMERGED.items():
        assert plan_summary(model_config(model), None)["gflops_paper"] == pytest.approx(gigaflops(cell.flops), abs=0.005)
        checked += 1
    for (model, method), cell in _RIVALS.items():
        figures = reduction_summary(create_reduction(method, model_config(model), "table2"))
        if (printed := gigaflops(cell.flops)) is not None:
            assert figures["gflops_paper"] == pytest.approx(printed, abs=0.0075), (model, method)
            checked += 1
        elif cell.flops:
            assert 100 * figures["gflops_paper_change"] == pytest.approx(float(cell.flops.rstrip(" %")), abs=0.06), (model, method)
            checked += 1
    assert checked == 11


def test_cells_match_model_and_plan_only(tmp_path: Path) -> None:
    tiny, small, base = (model_config(name) for name in ("vim-t", "vim-s", "vim-b"))
    assert [cell.top1 for cell in published_plan(tiny, None)] == [76.1]
    assert [cell.top1 for cell in published_plan(tiny, make_plan(tiny))] == [76.1]
    assert [cell.top1 for cell in published_plan(tiny, make_plan(tiny, preset="stm-40"))] == [72.2]
    assert [(c.top1, c.flops) for c in published_plan(small, make_plan(small, preset="stm-20"))] == [(79.3, "4.23 G"), (79.3, "")]
    assert published_plan(base, make_plan(base, preset="stm-15")) == ()
    make_plan(base, preset="stm-20").save(tmp_path / "p.json")
    assert [cell.top1 for cell in published_plan(base, MergePlan.load(tmp_path / "p.json"))] == [79.8]
    one = make_plan(tiny, preset="stm-30", rule="one_sided")
    assert [cell.top1 for cell in published_plan(tiny, one)] == [34.6]
    assert published_plan(tiny, make_plan(tiny, preset="stm-20", weights="sum")) == ()
    assert published_plan(tiny, make_plan(tiny, preset="stm-20", rule="spread")) == ()
    assert published_plan(tiny, make_plan(tiny, preset="stm-20", proportional_decay=True)) == ()
    assert published_plan(model_config("vim-t", 384), None) == ()
    assert published_plan(model_config("vim-t", 224, 10), None) == ()
    assert published_plan(model_config("vim-t-stride8"), None) == ()
    assert [cell.top1 for cell in published_rival(tiny, "r-meeto", "table2")] == [52.3]
    assert published_rival(tiny, "r-meeto", "tl-792") == ()
    assert published_rival(tiny, "tome", "table2") == ()
    assert set(_ONE_SIDED) == {("vim-t", f"stm-{rate}") for rate in (15, 20, 30, 40)}


def test_every_cell_says_where_it_stands() -> None:
    cells = [*_UNMERGED.values(), *(c for group in (*_MERGED.values(), *_ONE_SIDED.values()) for c in group), *_RIVALS.values()]
    assert all(cell.source.startswith(("table 2", "table 3")) for cell in cells)
    json.dumps([vars(cell) for cell in cells])
