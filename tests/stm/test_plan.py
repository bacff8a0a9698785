"""The plan: JSON, the checked door, generators, presets, rates, files."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stm import PRESETS, RULES, Group, MergePlan, PlanError, VimConfig, make_plan, model_config
from stm.plan import MAX_PLAN_BYTES, aligned_schedule, resolve_plan

VIM_T = model_config("vim-t")
BASE: dict[str, Any] = {
    "schema": 1,
    "model": "vim-t",
    "image_size": [224, 224],
    "seqlen": 197,
    "cls_index": 98,
    "weights": "hsp",
    "layers": {
        "1": [{"sources": [0, 1], "target": 2}, {"sources": [195, 196], "target": 194}],
        "2": [{"sources": [0], "target": 5}, {"sources": [190], "target": 180}],
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(BASE), **changes}


def one_layer(*groups: tuple[list[int], int], layer: str = "1", **changes: Any) -> dict[str, Any]:
    return changed(layers={layer: [{"sources": sources, "target": target} for sources, target in groups]}, **changes)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in BASE.items() if name != key}


# --- what a plan says -------------------------------------------------------------------------------------------------


def test_derived_figures_follow_the_groups() -> None:
    plan = MergePlan.from_dict(BASE)
    assert plan.lengths == [197, 193] + [191] * 22
    assert plan.cls_positions == [98, 96] + [95] * 22
    assert (plan.tokens_left, plan.token_layers_removed) == (191, 4 + 22 * 6)
    assert plan.keep(1) == list(range(2, 195))
    assert plan.pairs(1) == [(0, 2), (1, 2), (195, 194), (196, 194)]
    members = [list(tokens) for tokens in plan.members()]
    assert members[0] == [[p] for p in range(197)]
    assert members[1][0] == [2, 0, 1]
    assert members[1][-1] == [194, 195, 196]
    # before layer 2, position 0 stands for 2, 0, 1 and joins position 5, original 7; position 190 for 192
    assert members[2][4] == [7, 2, 0, 1]
    assert members[2][-3:] == [[191], [193], [194, 195, 196]]
    assert members[2][179] == [182, 192]
    assert members[2][plan.cls_positions[2]] == [98]


def test_members_can_be_collected() -> None:
    plan = MergePlan.from_dict(BASE)
    assert list(plan.members()) == [list(tokens) for tokens in plan.members()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_count_every_token_once(preset: str, rule: str) -> None:
    plan = make_plan(VIM_T, preset=preset, rule=rule)
    for tokens, sizes, length, cls in zip(plan.members(), plan.sizes(), plan.lengths, plan.cls_positions, strict=True):
        assert sorted(p for token in tokens for p in token) == list(range(197))
        assert [len(token) for token in tokens] == sizes
        assert len(sizes) == length
        assert tokens[cls] == [98]
        assert all(max(token) < 98 for token in tokens[:cls])
        assert all(min(token) > 98 for token in tokens[cls + 1 :])
        assert [token[0] for token in tokens] == sorted(token[0] for token in tokens)


# --- multiples of tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("multiple", [2, 8, 16])
def test_an_aligned_plan_leaves_multiples_near_the_plan(preset: str, rule: str, multiple: int) -> None:
    whole, plan = make_plan(VIM_T, preset=preset, rule=rule), make_plan(VIM_T, preset=preset, rule=rule, align=multiple)
    assert plan.layers
    assert set(plan.layers) <= set(whole.layers)
    for layer in range(1, VIM_T.depth):
        left = plan.lengths[layer]
        assert left == VIM_T.seqlen or left % multiple == 0
        assert abs(left - whole.lengths[layer]) <= multiple / 2 or left == VIM_T.seqlen
        sides = plan.cls_positions[layer], left - 1 - plan.cls_positions[layer]
        assert rule == "one_sided" or abs(sides[0] - sides[1]) <= 1
        assert rule != "one_sided" or sides[1] == 98


def test_alignment_to_one_token_changes_nothing() -> None:
    assert make_plan(VIM_T, rate=0.2, align=1) == make_plan(VIM_T, rate=0.2)
    schedule = {layer: tuple(len(g.sources) for g in groups) for layer, groups in make_plan(VIM_T, rate=0.2).layers.items()}
    assert aligned_schedule(VIM_T, schedule, 1) == schedule


def test_alignment_of_rate_0_2_to_8_tokens_by_hand() -> None:
    """193, 189, 185, .. 161, 158 tokens: the nearest multiples of 8, of which each second asks for nothing."""
    plan = make_plan(VIM_T, rate=0.2, align=8)
    assert {layer: [len(g.sources) for g in groups] for layer, groups in plan.layers.items()} == {
        1: [3, 2],
        3: [4, 4],
        5: [4, 4],
        7: [4, 4],
        9: [4, 4],
    }
    assert plan.lengths[:11] == [197, 192, 192, 184, 184, 176, 176, 168, 168, 160, 160]


def test_alignment_that_leaves_no_side_is_refused() -> None:
    with pytest.raises(PlanError, match="align 300: before layer 12 0 tokens would be left"):
        make_plan(VIM_T, rate=0.3, align=300)
    with pytest.raises(PlanError, match="align 100: 20 of 197 tokens are to go, and what is left is nearer to 200"):
        make_plan(VIM_T, rate=0.1, align=100)
    assert aligned_schedule(VIM_T, {}, 8) == {}
    for wrong in (0, -8, 2.0):
        with pytest.raises(PlanError, match="it is a number of tokens, 1 or more"):
            make_plan(VIM_T, rate=0.2, align=wrong)  # type: ignore[arg-type]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_json_round_trip(rule: str) -> None:
    plan = make_plan(VIM_T, preset="stm-20", rule=rule, weights="decay", proportional_decay=True)
    text = plan.to_json()
    assert MergePlan.from_json(text) == plan
    assert MergePlan.from_dict(json.loads(text)).to_json() == text
    assert sum('"sources"' in line for line in text.splitlines()) == len(plan.layers), "one line a layer, so that diff helps"


def test_json_round_trip_keeps_constants() -> None:
    plan = MergePlan.from_dict(one_layer(([0, 1], 2), ([196], 195), weights="constant", constants={"1": [0.1, 2 / 3, 1]}))
    assert plan.constants == {1: (0.1, 2 / 3, 1.0)}
    assert MergePlan.from_json(plan.to_json()) == plan


def test_with_weights_drops_constants() -> None:
    plan = MergePlan.from_dict(one_layer(([0], 1), weights="constant", constants={"1": [0.5]}))
    assert plan.with_weights("sum").constants is None


DOOR = {
    "not an object": ([], ["JSON object", "list"]),
    "null": (None, ["JSON object", "NoneType"]),
    "other schema": (changed(schema=2), ["2", "reads 1", "stm plan"]),
    "schema missing": (without("schema"), ["None", "reads 1", "stm plan"]),
    "key missing": (without("weights"), ["lacks weights", "stm plan"]),
    "unknown key": (changed(colour="red"), ["'colour'", "allowed", "proportional_decay"]),
    "image size short": (changed(image_size=[224]), ["[224]", "[height, width]"]),
    "image size text": (changed(image_size=["a", 1]), ["image_size", "'a'", "whole number"]),
    "model empty": (changed(model=""), ["''", "model name"]),
    "model number": (changed(model=5), ["5", "model name"]),
    "seqlen short": (changed(seqlen=2), ["seqlen is 2", "3..16384"]),
    "seqlen long": (changed(seqlen=16385), ["16385", "3..16384"]),
    "seqlen bool": (changed(seqlen=True), ["seqlen", "True", "whole number"]),
    "seqlen float": (changed(seqlen=197.0), ["seqlen", "197.0", "whole number"]),
    "depth none": (changed(depth=0), ["depth is 0", "1..1024"]),
    "depth large": (changed(depth=1025), ["1025", "1..1024"]),
    "class first": (changed(cls_index=0), ["cls_index is 0", "197 tokens", "1..195"]),
    "class last": (changed(cls_index=196), ["cls_index is 196", "1..195"]),
    "weights unknown": (changed(weights="best"), ["'best'", "hsp_literal", "mean"]),
    "weights a list": (changed(weights=["hsp"]), ["['hsp']", "choose from"]),
    "decay not bool": (changed(proportional_decay=1), ["proportional_decay is 1", "true or false"]),
    "layers a list": (changed(layers=[]), ["layers", "object", "list"]),
    "layer not a number": (changed(layers={"x": []}), ["'x'", "layer number"]),
    "layer padded": (changed(layers={"01": []}), ["'01'", "layer number"]),
    "layer not ascii": (changed(layers={"²": []}), ["layer number"]),
    "groups not a list": (changed(layers={"1": {}}), ["layer 1", "list", "dict"]),
    "group without target": (changed(layers={"1": [{"sources": [0]}]}), ["layer 1", '"target"']),
    "group a list": (changed(layers={"1": [[0, 1]]}), ["layer 1", "[0, 1]"]),
    "source text": (one_layer((["0"], 1)), ["layer 1 source", "'0'"]),  # type: ignore[list-item]
    "target null": (one_layer(([0], None)), ["layer 1 target", "None"]),  # type: ignore[arg-type]
    "layer too deep": (one_layer(([0], 1), layer="24"), ["layer 24", "0..23"]),
    "layer 0": (one_layer(([0], 1), layer="0"), ["layer 0", "before layer 1"]),
    "no sources": (one_layer(([], 1)), ["layer 1, target 1", "no sources", "drop"]),
    "position outside": (one_layer(([197], 196)), ["197", "0..196"]),
    "position negative": (one_layer(([-1], 1)), ["-1", "0..196"]),
    "class token a source": (one_layer(([98], 99)), ["98", "class token", "never merges"]),
    "class token a target": (one_layer(([97], 98)), ["98", "class token", "never merges"]),
    "source twice": (one_layer(([0, 0], 1)), ["position 0", "disjoint"]),
    "two groups share": (one_layer(([0], 1), ([1], 2)), ["position 1", "disjoint"]),
    "source is target": (one_layer(([1], 1)), ["position 1", "disjoint"]),
    "sources unordered": (one_layer(([1, 0], 2)), ["[1, 0]", "ascending"]),
    "outwards left": (one_layer(([2], 1)), ["source 2", "outer side", "98", "towards the class token"]),
    "outwards right": (one_layer(([194], 195)), ["source 194", "outer side", "98"]),
    "across the class token": (one_layer(([0], 150)), ["source 0", "outer side", "98"]),
    "across from the right": (one_layer(([196], 3)), ["source 196", "outer side", "98"]),
    "constants missing": (one_layer(([0], 1), weights="constant"), ["{}", "{1: 1}", "calibrate"]),
    "constants too few": (one_layer(([0, 1], 2), weights="constant", constants={"1": [0.5]}), ["{1: 1}", "{1: 2}"]),
    "constants for another": (one_layer(([0], 1), weights="constant", constants={"2": [0.5]}), ["{2: 1}", "{1: 1}"]),
    "constants unused": (one_layer(([0], 1), constants={"1": [0.5]}), ["'hsp'", "constant", "drop"]),
    "constant NaN": (one_layer(([0], 1), weights="constant", constants={"1": [float("nan")]}), ["layer 1", "nan", "finite"]),
    "constant text": (one_layer(([0], 1), weights="constant", constants={"1": ["1"]}), ["layer 1", "'1'", "finite"]),
    "constants a list": (one_layer(([0], 1), weights="constant", constants=[0.5]), ["constants", "object", "list"]),
}


@pytest.mark.parametrize("name", DOOR)
def test_the_door_refuses(name: str) -> None:
    data, wanted = DOOR[name]
    with pytest.raises(PlanError) as caught:
        MergePlan.from_json(json.dumps(data))
    for text in wanted:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        # before layer 2 there are 193 tokens and the class token is at 96
        ({"2": [{"sources": [193], "target": 192}]}, ["layer 2", "193", "0..192"]),
        ({"2": [{"sources": [96], "target": 97}]}, ["layer 2", "96", "class token"]),
        ({"2": [{"sources": [97], "target": 98}]}, ["layer 2", "97", "outer side", "96"]),
    ],
)
def test_positions_are_those_of_the_shortened_sequence(layers: dict[str, Any], wanted: list[str]) -> None:
    data = changed(layers={"1": BASE["layers"]["1"], **layers})
    with pytest.raises(PlanError) as caught:
        MergePlan.from_dict(data)
    assert all(text in str(caught.value) for text in wanted)
    MergePlan.from_dict(changed(layers={"1": BASE["layers"]["1"], "2": [{"sources": [98], "target": 97}]}))


def test_one_token_stays_on_each_side() -> None:
    tiny = {"seqlen": 5, "cls_index": 2, "depth": 4}
    MergePlan.from_dict(one_layer(([0], 1), ([4], 3), **tiny))
    rest = {"2": [{"sources": [0], "target": 1}]}
    with pytest.raises(PlanError, match=r"outer side|class token"):
        MergePlan.from_dict(changed(layers={**one_layer(([0], 1), ([4], 3))["layers"], **rest}, **tiny))


FIT = {
    "model": ({"name": "vim-s"}, ["'vim-t'", "'vim-s'", "stm plan --model vim-s --image-size 224x224"]),
    "image size": ({"image_size": (192, 256)}, ["193 tokens", "192x256", "197", "224x224", "--image-size 192x256"]),
    "same length": ({"image_size": (112, 448)}, ["112x448", "224x224"]),
    "depth": ({"depth": 12}, ["12 layers", "24"]),
}


@pytest.mark.parametrize("name", FIT)
def test_a_plan_for_another_model_is_refused_with_both_values(name: str) -> None:
    changes, wanted = FIT[name]
    config = VIM_T.with_changes(**changes)
    with pytest.raises(PlanError) as caught:
        resolve_plan(config, MergePlan.from_dict(BASE))
    for text in wanted:
        assert text in str(caught.value)


def test_another_class_position_is_refused() -> None:
    plan = MergePlan.from_dict(changed(cls_index=97, layers={}))
    with pytest.raises(PlanError, match=r"at 98.*expects 97.*stm plan"):
        plan.check_fits(VIM_T)


# --- generators -------------------------------------------------------------------------------------------------------

PRESET_FIGURES = {"stm-15": (1, 23, 151, 552), "stm-20": (2, 11, 153, 792), "stm-30": (2, 15, 137, 960), "stm-40": (2, 20, 118, 1076)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    k, last, left, token_layers = PRESET_FIGURES[name]
    plan = make_plan(VIM_T, preset=name)
    lengths, gone = [197], 0
    for layer in range(1, 24):
        gone += 2 * k if layer <= last else 0
        lengths.append(max(197 - gone, left))
    assert plan.lengths == lengths
    assert (plan.tokens_left, plan.token_layers_removed) == (left, token_layers)
    assert plan == make_plan(VIM_T, preset=name, rule="edge", weights="hsp"), "edge and hsp are the defaults"
    assert resolve_plan(VIM_T, name) == plan


def test_edge_folds_the_outermost_into_the_next_one_inward() -> None:
    plan = make_plan(VIM_T, schedule={1: (2, 1), 4: (1, 3)})
    assert plan.layers == {
        1: (Group((0, 1), 2), Group((196,), 195)),
        4: (Group((0,), 1), Group((191, 192, 193), 190)),
    }


def test_the_odd_remainder_leaves_left() -> None:
    plan = make_plan(VIM_T, preset="stm-40")
    removed = {layer: (sum(p < q for p, q in plan.pairs(layer)), sum(p > q for p, q in plan.pairs(layer))) for layer in plan.layers}
    assert removed == {**dict.fromkeys(range(1, 20), (2, 2)), 20: (2, 1)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_removes_what_the_schedule_says(rule: str, preset: str) -> None:
    plan, edge = make_plan(VIM_T, preset=preset, rule=rule), make_plan(VIM_T, preset=preset)
    assert plan.lengths == edge.lengths
    left = 98 - plan.cls_positions[-1]
    removed = 197 - plan.tokens_left
    assert left == (removed if rule == "one_sided" else (removed + 1) // 2)


def test_frontier_pairs_untouched_tokens_from_outside_inward() -> None:
    plan = make_plan(VIM_T, preset="stm-20", rule="frontier")
    tokens = list(plan.members())[-1]
    assert sorted(map(sorted, filter(lambda token: len(token) > 1, tokens))) == (
        [[2 * i, 2 * i + 1] for i in range(22)] + sorted([196 - 2 * i - 1, 196 - 2 * i] for i in range(22))
    )
    assert plan.groups(1) == (Group((0,), 1), Group((2,), 3), Group((194,), 193), Group((196,), 195))
    assert plan.groups(2) == (Group((2,), 3), Group((4,), 5), Group((188,), 187), Group((190,), 189))


def test_frontier_starts_again_when_every_pair_is_used() -> None:
    config = model_config("vim-t", (64, 64))  # 16 patches, 8 a side
    plan = make_plan(config, schedule={1: (4, 0), 2: (2, 0)}, rule="frontier")
    assert [len(token) for token in list(plan.members())[2][:2]] == [4, 4]


def test_spread_is_even() -> None:
    plan = make_plan(VIM_T, schedule={1: (4, 4)}, rule="spread")
    starts = [group.sources[0] for group in plan.groups(1) if group.target < 98]
    assert starts == [0, 24, 49, 73]
    assert all(abs(group.sources[0] - group.target) == 1 for group in plan.groups(1))
    mirrored = sorted(196 - group.sources[0] for group in plan.groups(1) if group.target > 98)
    assert mirrored == starts


def test_one_sided_merges_left_only() -> None:
    plan = make_plan(VIM_T, preset="stm-20", rule="one_sided")
    assert all(p < q for layer in plan.layers for p, q in plan.pairs(layer))
    assert plan.groups(1) == (Group((0, 1, 2, 3), 4),)


@pytest.mark.parametrize("rule", ["frontier", "spread"])
def test_pairs_need_two_tokens_each(rule: str) -> None:
    with pytest.raises(PlanError, match=rf"{rule}.*50 pairs need 100 tokens, the side has 98.*edge"):
        make_plan(VIM_T, schedule={1: (50, 0)}, rule=rule)


RATES = {  # rate, image size, model -> k of the first layer, removed in all
    "0": (0.0, "vim-t", 224, 0, 0),
    "0.1": (0.1, "vim-t", 224, 1, 20),
    "0.15 is still k=1": (0.15, "vim-t", 224, 1, 30),
    "0.2": (0.2, "vim-t", 224, 2, 39),
    "0.3": (0.3, "vim-t", 224, 2, 59),
    "0.4": (0.4, "vim-t", 224, 2, 79),
    "0.6 does not fit in 23 layers at k=2": (0.6, "vim-t", 224, 3, 118),
    "0.99 is too much for 2 a side": (0.98, "vim-t", 224, 5, 193),
    "384": (0.2, "vim-t", 384, 6, 115),
    "384 low": (0.15, "vim-t", 384, 3, 87),
    "stride 8": (0.2, "vim-t-stride8", 224, 7, 146),
    "128": (0.2, "vim-t", 128, 1, 13),
    "not square": (0.2, "vim-b", (192, 256), 2, 39),
}


@pytest.mark.parametrize("name", RATES)
def test_rate(name: str) -> None:
    rate, model, size, k, removed = RATES[name]
    config = model_config(model, size)
    plan = make_plan(config, rate=rate)
    assert config.seqlen - plan.tokens_left == removed
    assert plan.removed(1) == min(2 * k, removed)
    assert (plan.merges, bool(plan.layers)) == (removed > 0, removed > 0)
    lengths = plan.lengths
    assert all(a - b in (2 * k, 0) for a, b in pairwise(lengths) if b != lengths[-1])
    left = config.cls_index - plan.cls_positions[-1]
    assert left - (removed - left) == removed % 2


def test_rate_reproduces_the_paper_s_40_percent() -> None:
    assert make_plan(VIM_T, rate=0.4) == make_plan(VIM_T, preset="stm-40")
    assert make_plan(VIM_T, rate=0.3).token_layers_removed == 951


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), "0.2", True])
def test_rate_out_of_range(rate: Any) -> None:
    with pytest.raises(PlanError, match=r"0 <= rate < 1"):
        make_plan(VIM_T, rate=rate)


def test_small_grid_keeps_one_token_a_side() -> None:
    config = model_config("vim-t", 128)  # 8 x 8 patches, 65 tokens, 32 a side
    plan = make_plan(config, rate=62 / 65)
    assert plan.tokens_left == 3
    assert plan.cls_positions[-1] == 1
    with pytest.raises(PlanError, match=r"63 of 65 tokens cannot be removed.*at most 62.*lower the rate"):
        make_plan(config, rate=63 / 65)
    with pytest.raises(PlanError, match=r"left side only.*at most 31"):
        make_plan(config, rate=0.5, rule="one_sided")


def test_a_side_that_runs_out_leaves_the_rest_to_the_other() -> None:
    config = model_config("vim-t", 48)  # 3 x 3 patches, class token at 4 of 10: 4 left, 5 right
    plan = make_plan(config, schedule={1: (3, 3)})
    assert plan.tokens_left == 4
    plan = make_plan(config, rate=0.7)
    assert [plan.removed(layer) for layer in sorted(plan.layers)] == [2, 2, 2, 1]
    assert plan.pairs(4) == [(3, 2)]
    assert (plan.tokens_left, plan.cls_positions[-1]) == (3, 1)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"rate": 0.2, "preset": "stm-20"}, "not several"),
        ({"rule": "random"}, "'random'; choose from edge, frontier"),
        ({"preset": "stm-50"}, "'stm-50'; choose from stm-15"),
        ({"rate": 0.2, "weights": "best"}, "'best'; choose from hsp"),
        ({"schedule": {0: (1, 1)}}, "layer 0"),
        ({"schedule": {1: (98, 0)}}, "position 98|at least one"),
    ],
)
def test_make_plan_refuses(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(PlanError, match=wanted):
        make_plan(VIM_T, **options)


def test_a_model_of_one_layer_cannot_merge() -> None:
    config = VimConfig("one", 32, depth=1)
    assert not make_plan(config, rate=0.0).merges
    with pytest.raises(PlanError, match=r"1 layer.*before layer 1"):
        make_plan(config, rate=0.2)


# --- malformed input never raises anything but PlanError ----------------------------------------------------------------

_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
_json = st.recursive(_leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, item in inner for found in _paths(item, (*path, key))]


def _replaced(path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    data = copy.deepcopy(FULL)
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return data


FULL = one_layer(([0, 1], 2), ([196], 195), weights="constant", constants={"1": [0.5, 0.5, 1]}, depth=24, proportional_decay=False)


def _only_plan_error(text: str) -> None:
    try:
        plan = MergePlan.from_json(text)
    except PlanError:
        return
    assert MergePlan.from_json(plan.to_json()) == plan
    assert len(plan.lengths) == plan.depth


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_paths(FULL)), _json)
def test_fuzz_a_plan_with_one_entry_replaced(path: tuple[Any, ...], new: Any) -> None:
    _only_plan_error(json.dumps(_replaced(path, new)))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | _json.map(json.dumps))
@example("[" * 100_000)
@example('{"schema": 1')
@example("NaN")
def test_fuzz_text(text: str) -> None:
    _only_plan_error(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_fuzz_cut_text(start: int, stop: int) -> None:
    text = json.dumps(FULL)
    _only_plan_error(text[start % len(text) : stop % len(text)])


HUGE = "1" * 5000  # longer than Python turns into an int


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(FULL).replace("197", HUGE),
        json.dumps(FULL).replace('"1": [{', f'"{HUGE}": [{{'),
        json.dumps(FULL).replace("0.5, 0.5", "0.5, " + "1" * 400),
        HUGE,
    ],
    ids=["seqlen", "layer", "constant", "bare"],
)
def test_huge_numbers(text: str) -> None:
    with pytest.raises(PlanError):
        MergePlan.from_json(text)


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    plan = make_plan(VIM_T, preset="stm-20")
    plan.save(tmp_path / "plan.json")
    assert MergePlan.load(tmp_path / "plan.json") == plan
    assert resolve_plan(VIM_T, str(tmp_path / "plan.json")) == plan
    assert resolve_plan(VIM_T, tmp_path / "plan.json") == plan
    assert resolve_plan(VIM_T, None) is None
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_file_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content, wanted in ((b"{", "not JSON"), (b"\xff\xfe", "cannot read"), (b'{"schema": 9}', "schema is 9")):
        bad.write_bytes(content)
        with pytest.raises(PlanError, match=wanted) as caught:
            MergePlan.load(bad)
        assert str(bad) in str(caught.value)
    with pytest.raises(PlanError, match=r"cannot read plan.*missing\.json"):
        resolve_plan(VIM_T, str(tmp_path / "missing.json"))
    with pytest.raises(PlanError, match="cannot read plan"):
        MergePlan.load(tmp_path)
    with pytest.raises(PlanError, match=r"'stm-25'; presets: stm-15.*stm plan"):
        resolve_plan(VIM_T, "stm-25")


def test_a_plan_file_is_bounded(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(PlanError, match=rf"{MAX_PLAN_BYTES + 1} bytes.*at most {MAX_PLAN_BYTES}"):
        MergePlan.load(large)


@pytest.mark.parametrize(
    "broken",
    [
        "os.replace",
        "pathlib.Path.write_text",
    ],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "plan.json"
    make_plan(VIM_T, preset="stm-20").save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises((OSError, PlanError)):
        make_plan(VIM_T, preset="stm-40").save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
