"""Methods that look at the image: each against a slow literal transcription of its description, invariants, freezing,
schedules, FLOPs. Their graphs: tests/exporter/test_lowering_reductions.py."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stm import Group, PlanError, VimConfig, VisionMamba, gflops_true, make_plan, model_config, with_plan
from stm.reduction import (
    EQUAL_TOKEN_LAYERS,
    METHODS,
    UTR,
    BalancedMTR,
    BalancedToMe,
    FambaV,
    RandomDrop,
    Reduced,
    ReducedVim,
    Reduction,
    RMeeTo,
    ScanState,
    Selection,
    TokenRecognition,
    Tokens,
    ToMe,
    create_reduction,
    even_schedule,
    freeze,
    from_description,
    interval_layers,
    keep_schedule,
    list_reductions,
    merge_matrix_flops,
    method_schedule,
    parse_reduction,
    reduction_gflops_paper,
    reduction_gflops_true,
    reduction_summary,
    schedule_text,
    schedules_table,
    strategy_layers,
    with_reduction,
)
from stm.reduction.hidden_state_alignment import align
from stm.reduction.model import AlignedScan

CONFIG = VimConfig("vim-test", 16, depth=4, d_state=4, image_size=(80, 96), num_classes=10)  # 30 patches, class token at 15
SCHEDULE = {1: 4, 2: 3, 3: 5}
N = CONFIG.seqlen
Link = tuple[int, int | None]
Choice = list[Link]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """No gradients, and one thread: the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def scan_state(batch: int, length: int) -> ScanState:
    e, n = CONFIG.d_inner, CONFIG.d_state
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return ScanState(draw(batch, length, e), draw(e), -draw(e, n).exp(), draw(batch, length, n), draw(batch, length, n), draw(batch, length, e))


def tokens(cls: int | list[int] = 15, length: int = N) -> Tokens:
    place = cls if isinstance(cls, int) else torch.tensor(cls).unsqueeze(1)
    x = torch.randn(3, length, CONFIG.d_model, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, length)).double()
    return Tokens(x, torch.randn_like(x), scan_state(3, length), scan_state(3, length), sizes, place)


def cls_of(t: Tokens, image: int) -> int:
    return t.cls if isinstance(t.cls, int) else int(t.cls[image, 0])


# --- literal transcriptions: which tokens go, one image -----------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def bipartite(places: list[int], features: np.ndarray, r: int, alike: Callable[[Any, Any], float] = cosine) -> Choice:
    """Every even-numbered of `places` finds its most similar odd-numbered one; the r best links."""
    links = []
    for i in places[0::2]:
        best, partner = -math.inf, -1
        for j in places[1::2]:
            if alike(features[i], features[j]) > best:
                best, partner = alike(features[i], features[j]), j
        links.append((best, i, partner))
    links.sort(reverse=True)
    return [(i, j) for _, i, j in links[:r]]


def softplus_mean(state: ScanState, image: int, place: int) -> float:
    raw = (state.delta[image, place] + state.delta_bias).numpy()
    return float(np.mean([math.log1p(math.exp(v)) for v in raw]))


def third_groups(places: list[int], importance: dict[int, float], features: np.ndarray, r: int) -> Choice:
    ranked = sorted(places, key=lambda p: importance[p])
    sources, targets = ranked[:r], ranked[r : r + len(places) // 3]
    return [(s, max(targets, key=lambda t: cosine(features[s], features[t]))) for s in sources]


def clipped(t: Tokens, image: int, place: int, branch: str = "both") -> float:
    total = 0.0
    for name, state in (("forward", t.forward_state), ("backward", t.backward_state)):
        if branch in ("both", name):
            total += sum(max(0.0, float(v)) for v in state.y[image, place]) / state.y.shape[2]
    return total


def literal(name: str, t: Tokens, image: int, r: int, **options: Any) -> Choice:
    c, length, x = cls_of(t, image), t.x.shape[1], t.x[image].numpy()
    everywhere = [p for p in range(length) if p != c]
    both_sides = [(list(range(c)), (r + 1) // 2), (list(range(c + 1, length)), r // 2)]
    if name in ("tome", "famba-v") or (name == "r-meeto" and not options.keys() - {"cls_position"}):
        return bipartite(everywhere, x, r)
    if name == "tome-balanced":
        return [link for places, count in both_sides for link in bipartite(places, x, count)]
    if name == "r-meeto":
        alike = {
            "cosine": cosine,
            "l1": lambda a, b: -float(np.abs(a - b).sum()),
            "l2": lambda a, b: -float(np.sqrt(((a - b) ** 2).sum())),
        }[options.get("distance", "cosine")]
        states, kind = (t.forward_state, t.backward_state), options.get("metric", "x")
        if kind == "delta":
            features = np.concatenate([np.log1p(np.exp((s.delta[image] + s.delta_bias).numpy())) for s in states], 1)
        else:
            features = x if kind == "x" else np.concatenate([getattr(s, kind)[image].numpy() for s in states], 1)
        return bipartite(everywhere, features, r, alike)
    if name in ("mtr", "mtr-balanced"):
        importance = {p: softplus_mean(t.forward_state, image, p) + softplus_mean(t.backward_state, image, p) for p in everywhere}
        groups = [(everywhere, r)] if name == "mtr" else both_sides
        return [link for places, count in groups for link in third_groups(places, importance, x, count)]
    if name in ("token-recognition", "hsa"):
        ranked = sorted(everywhere, key=lambda p: clipped(t, image, p, options.get("branch", "both")))
        return [(p, None) for p in ranked[:r]]
    assert name == "utr"
    ranked = sorted(everywhere, key=lambda p: clipped(t, image, p))
    low, high = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    links = []
    for a in low:
        b = max(high, key=lambda p: cosine(x[a], x[p]))
        links.append((cosine(x[a], x[b]), a, b))
    links.sort(reverse=True)
    return [(a, b) for _, a, b in links[:r]]


def carry_out(t: Tokens, image: int, choice: Choice, average: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(kept positions, tokens, sizes) of one image, order kept, token by token."""
    x, size = t.x[image].numpy(), t.sizes[image].numpy()
    hidden = t.hidden[image].numpy()
    pruned = {p for p, _ in choice[: len(choice) // 2]} if average == "utr" else set()
    keep, out, sizes = [], [], []
    for q in range(x.shape[0]):
        if q in dict(choice):
            continue
        members = [q] + [p for p, into in choice if into == q]
        if average == "size":
            out.append(sum(size[p] * x[p] for p in members) / sum(size[p] for p in members))
        elif average == "utr":
            alive = [p for p in members if p not in pruned]
            out.append(np.mean([x[p] - hidden[p] for p in members], 0) + np.mean([hidden[p] for p in alive], 0))
        else:
            out.append(np.mean([x[p] for p in members], 0))
        keep.append(q)
        sizes.append(sum(size[p] for p in members))
    return keep, np.array(out), np.array(sizes)


LITERAL = [
    ("tome", {}, "size"),
    ("tome-balanced", {}, "size"),
    ("r-meeto", {"cls_position": "true"}, "size"),
    *(("r-meeto", {"cls_position": "true", "metric": metric}, "size") for metric in ("delta", "B", "C")),
    *(("r-meeto", {"cls_position": "true", "distance": distance}, "size") for distance in ("l1", "l2")),
    ("mtr", {}, "plain"),
    ("mtr-balanced", {}, "plain"),
    *(("token-recognition", {"branch": branch}, "plain") for branch in ("both", "forward", "backward")),
    ("hsa", {}, "plain"),
    ("utr", {}, "utr"),
    ("famba-v", {}, "size"),
]


@pytest.mark.parametrize(("name", "options", "average"), LITERAL, ids=lambda value: str(value))
@pytest.mark.parametrize("cls", [15, 9, [12, 15, 20]], ids=str)
def test_method_is_its_description(name: str, options: dict[str, Any], average: str, cls: int | list[int]) -> None:
    balanced = name.endswith("balanced")
    if balanced and not isinstance(cls, int):
        cls = 17
    r = 7
    t = tokens(cls)
    reduced = create_reduction(name, CONFIG, schedule={1: r}, **options)(1, t)
    assert reduced.x.shape == (3, N - r, CONFIG.d_model)
    assert isinstance(reduced.cls, int) == balanced
    for image in range(3):
        keep, x, sizes = carry_out(t, image, literal(name, t, image, r, **options), average)
        assert reduced.keep.expand(3, -1)[image].tolist() == keep
        np.testing.assert_allclose(reduced.x[image], x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(reduced.sizes[image], sizes)
        c = cls_of(t, image)
        now = reduced.cls if isinstance(reduced.cls, int) else int(reduced.cls[image, 0])
        assert now == keep.index(c)
        if average != "utr":  # there it is the sum of two means of one token each
            assert torch.equal(reduced.x[image, now], t.x[image, c]), "the class token is kept exactly"


def test_r_meeto_compatible_puts_the_class_token_at_its_guess() -> None:
    t, r = tokens(13), 7
    reduced = RMeeTo(CONFIG, {1: r})(1, t)
    assert reduced.cls == math.floor(13 * (30 - r) / 30)
    for image in range(3):
        keep, x, sizes = carry_out(t, image, bipartite([p for p in range(N) if p != 13], t.x[image].numpy(), r), "size")
        old = keep.index(13)
        order = [i for i in range(len(keep)) if i != old]
        order.insert(reduced.cls, old)
        assert reduced.keep[image].tolist() == [keep[i] for i in order]
        np.testing.assert_allclose(reduced.x[image], x[order], rtol=1e-10)
        np.testing.assert_allclose(reduced.sizes[image], sizes[order])
    assert torch.equal(reduced.x[:, reduced.cls], t.x[:, 13])


def test_famba_v_published_order_is_unmerged_a_then_b() -> None:
    r, t = 7, tokens(15)
    reduced = FambaV(CONFIG, {1: r}, order="published")(1, t)
    assert reduced.cls == math.floor(15 * (30 - r) / 30)
    patches = [p for p in range(N) if p != 15]
    for image in range(3):
        gone = dict(bipartite(patches, t.x[image].numpy(), r))
        order = [p for p in patches[0::2] if p not in gone] + patches[1::2]
        order.insert(reduced.cls, 15)
        assert reduced.keep[image].tolist() == order
    again = FambaV(CONFIG, {1: 7, 2: 5}, order="published")(
        2, replace(t, residual=reduced.x, hidden=0 * reduced.x, sizes=reduced.sizes, cls=reduced.cls)
    )
    assert torch.equal(again.x[:, again.cls], t.x[:, 15])


def test_middle_class_token_of_the_public_code() -> None:
    t = tokens(15)
    reduced = TokenRecognition(CONFIG, {1: 6}, branch="backward", cls_position="middle")(1, t)
    assert reduced.cls == 25 // 2
    assert torch.equal(reduced.x[:, reduced.cls], t.x[:, 15])
    rest = torch.cat([reduced.keep[:, : reduced.cls], reduced.keep[:, reduced.cls + 1 :]], 1)
    assert (rest.diff(dim=1) > 0).all()


def test_random_drop_is_drawn_once() -> None:
    t = tokens(15)
    method = RandomDrop(CONFIG, SCHEDULE, seed=3)
    reduced = method(1, t)
    assert torch.equal(reduced.x, t.x[:, reduced.keep[0]])
    assert reduced.keep[0, reduced.cls] == 15
    assert torch.equal(RandomDrop(CONFIG, SCHEDULE, seed=3)(1, t).keep, reduced.keep)
    kept = Counter(tuple(RandomDrop(CONFIG, SCHEDULE, seed=seed)(1, t).keep[0].tolist()) for seed in range(20))
    assert len(kept) > 15


@pytest.mark.parametrize("backward", [False, True])
def test_alignment_walks_the_whole_sequence(backward: bool) -> None:
    """Two cuts: kept tokens feed the state, pruned ones decay it with the step they had when they went."""
    scan = AlignedScan(reverse=backward)
    keeps = [[0, 2, 3, 5, 6, 8], [0, 1, 3, 4]]  # of 9, then of the 6
    states = [(scan_state(1, 9), scan_state(1, 9)), (scan_state(1, 6), scan_state(1, 6))]
    alignment = None
    for keep, (forward, backwards) in zip(keeps, states, strict=True):
        gone = Selection(torch.tensor([[p for p in range(forward.delta.shape[1]) if p not in keep]]), None)
        reduced = Reduced(torch.empty(0), torch.empty(0), 0, torch.tensor([keep]), gone, forward.delta.shape[1])
        alignment = align(alignment, reduced, forward, backwards)
    assert alignment is not None
    where = [keeps[0][i] for i in keeps[1]]
    state, u, D = scan_state(1, 4), torch.randn(1, 4, CONFIG.d_inner, dtype=torch.float64), torch.randn(CONFIG.d_inner, dtype=torch.float64)
    got = scan(u, state, state.C, D, None, alignment)[0]
    index = int(backward)
    first, second = states[0][index].time[0], states[1][index].time[0]
    h, want = torch.zeros_like(state.A), {}
    for p in reversed(range(9)) if backward else range(9):
        if p in where:
            i = where.index(p)
            step = state.time[0, i].unsqueeze(1)
            h = torch.exp(step * state.A) * h + step * state.B[0, i] * u[0, i].unsqueeze(1)
            want[i] = h @ state.C[0, i] + D * u[0, i]
        else:
            stale = second[keeps[0].index(p)] if p in keeps[0] else first[p]
            h = torch.exp(stale.unsqueeze(1) * state.A) * h
    torch.testing.assert_close(got, torch.stack([want[i] for i in range(4)]))


# --- the model ----------------------------------------------------------------------------------------------------------


def vision_mamba(config: VimConfig = CONFIG, seed: int = 0) -> VisionMamba:
    model = VisionMamba(config)
    model.init_weights(seed)
    return model.eval().requires_grad_(False)


def pictures(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 80, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list_reductions())
def test_model_under_a_method(name: str) -> None:
    model, images = vision_mamba(), pictures()
    method = create_reduction(name, CONFIG, schedule=SCHEDULE)
    reduced = with_reduction(model, method)
    assert reduced.state_dict().keys() == model.state_dict().keys()
    assert reduced.head.weight.data_ptr() == model.head.weight.data_ptr()
    seen: list[tuple[Tokens, Reduced]] = []
    handle = method.register_forward_hook(lambda module, args, out: seen.append((args[1], out)))
    logits = reduced(images)
    handle.remove()
    assert [out.x.shape[1] for _, out in seen] == method.lengths[1:] == [27, 24, 19]
    for layer, (t, out) in zip(SCHEDULE, seen, strict=True):
        before, now = t.cls, out.cls
        for image in range(3):
            c = before if isinstance(before, int) else int(before[image, 0])
            d = now if isinstance(now, int) else int(now[image, 0])
            keep, assignment = out.keep.expand(3, -1)[image], out.assignment.expand(3, -1, -1)[image]
            assert keep[d] == c
            assert assignment[d].nonzero()[:, 0].tolist() == [c], "nothing merges into the class token"
            assert (assignment.sum(0) == 1).all() if method.merges else (assignment.sum(0) <= 1).all()
            assert (assignment.gather(1, keep.unsqueeze(1)) == 1).all()
            if name != "utr":
                assert torch.equal(out.x[image, d], t.x[image, c])
            if name != "r-meeto":
                assert (keep.diff() > 0).all(), "order"
            if name.endswith("balanced"):
                assert d == c - (SCHEDULE[layer] + 1) // 2, "counts a side"
        if method.merges:
            assert (out.sizes.sum(1) == N).all()
        else:
            assert (t.sizes == 1).all(), "who is dropped adds to nobody"
    assert torch.equal(reduced(images), logits), "deterministic"
    one_by_one = torch.cat([reduced(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(one_by_one, logits, rtol=1e-4, atol=1e-5)
    full = with_reduction(model, method)
    full.cls_only_last = False
    torch.testing.assert_close(full(images), logits, rtol=1e-4, atol=1e-5)
    assert (with_reduction(model, create_reduction(name, CONFIG, schedule={})))(images).sub(model(images)).abs().max() < 1e-5
    half = with_reduction(vision_mamba().bfloat16(), method)
    assert half(images).isfinite().all()


def test_a_method_for_another_sequence_is_refused() -> None:
    with pytest.raises(PlanError, match="made for 31 tokens and 4 layers, 'vim-test' has 17 and 4"):
        ReducedVim(CONFIG.with_changes(image_size=(64, 64)), ToMe(CONFIG, {1: 2}))


# --- freezing -----------------------------------------------------------------------------------------------------------


class Fixed(Reduction):
    """Every image merges the same outer tokens into inner ones; or, with `by_sign`, what the sign of x says."""

    name = "fixed"
    by_sign = False

    def select(self, layer: int, tokens: Tokens) -> Selection:
        gone, into = torch.tensor([[2, 3, 27]]), torch.tensor([[7, 7, 20]])
        if self.by_sign:
            up = (tokens.x[:, :1].mean(-1) > 0).long()
            gone, into = gone + up, into + up
        return Selection(gone, into)


def test_frozen_plan_equals_a_method_that_always_agrees() -> None:
    model, images = vision_mamba(), pictures()
    method = Fixed(CONFIG, {1: 3, 3: 3})
    plan = freeze(model, method, [images[:2], images[2:]])
    assert plan.layers[1] == (Group((2, 3), 7), Group((27,), 20))
    assert plan.weights == "mean"
    assert plan.lengths == method.lengths
    torch.testing.assert_close(with_plan(model, plan)(images), with_reduction(model, method)(images), rtol=1e-4, atol=1e-5)


def test_the_majority_makes_the_plan() -> None:
    model, images = vision_mamba(), pictures(9)
    method = Fixed(CONFIG, {1: 3})
    method.by_sign = True
    seen: list[Reduced] = []
    handle = method.register_forward_hook(lambda module, args, out: seen.append(out))
    plan = freeze(model, method, [images])
    handle.remove()
    shifted = sum(2 in keep for keep in seen[0].keep)  # of the 9
    assert 0 < shifted < 9, "they do not agree"
    shifted_groups, others = (Group((3, 4), 8), Group((28,), 21)), (Group((2, 3), 7), Group((27,), 20))
    assert plan.layers[1] == (shifted_groups if shifted > 4 else others)


def seed_where(condition: Callable[[int], bool]) -> int:
    return next(seed for seed in range(200) if condition(seed))


def test_frozen_random_drop_is_exact() -> None:
    model, images = vision_mamba(), pictures()

    def expressible(seed: int) -> bool:
        kept = with_keeps(model, RandomDrop(CONFIG, SCHEDULE, seed), images)
        return all({c - 1, c + 1} <= set(keep) for c, keep in kept)

    method = RandomDrop(CONFIG, SCHEDULE, seed_where(expressible))
    plan = freeze(model, method, [images])
    assert (plan.weights, plan.lengths) == ("constant", method.lengths)
    torch.testing.assert_close(with_plan(model, plan)(images), with_reduction(model, method)(images), rtol=1e-4, atol=1e-5)


def with_keeps(model: VisionMamba, method: Reduction, images: Tensor) -> list[tuple[int, list[int]]]:
    """(class position before, kept positions) of the first image at every step."""
    found: list[tuple[int, list[int]]] = []

    def record(module: Any, args: Any, out: Reduced) -> None:
        found.append((cls_of(args[1], 0), out.keep[0].tolist()))

    handle = method.register_forward_hook(record)
    with_reduction(model, method)(images)
    handle.remove()
    return found


def test_frozen_pruning_of_one_image_is_exact_on_it() -> None:
    model = vision_mamba()

    def expressible(seed: int) -> bool:
        kept = with_keeps(model, TokenRecognition(CONFIG, SCHEDULE), pictures(1, seed))
        return all({c - 1, c + 1} <= set(keep) for c, keep in kept)

    image = pictures(1, seed_where(expressible))
    method = TokenRecognition(CONFIG, SCHEDULE)
    plan = freeze(model, method, [image])
    torch.testing.assert_close(with_plan(model, plan)(image), with_reduction(model, method)(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list_reductions())
def test_every_method_freezes(name: str) -> None:
    model, images = vision_mamba(), pictures(4)
    method = create_reduction(name, CONFIG, schedule=SCHEDULE)
    plan = freeze(model, method, [images])
    assert plan == freeze(model, method, [images[:1], images[1:]])
    assert plan.lengths == method.lengths
    assert plan.proportional_decay == (name == "hsa")
    if name.endswith("balanced"):
        assert plan.cls_positions == [15, 13, 11, 8]
    assert with_plan(model, plan)(images).isfinite().all()


def test_freezing_fills_what_a_plan_cannot_say() -> None:
    class Across(Reduction):
        name = "across"

        def select(self, layer: int, tokens: Tokens) -> Selection:
            return Selection(torch.tensor([[0, 30, 5]]), torch.tensor([[29, 1, 9]]))

    plan = freeze(vision_mamba(), Across(CONFIG, {1: 3}), [pictures()])
    assert plan.layers[1] == (Group((0,), 1), Group((5,), 9), Group((30,), 29))
    with pytest.raises(ValueError, match="no images"):
        freeze(vision_mamba(), Across(CONFIG, {1: 3}), [])

    class Innermost(Reduction):
        name, merges = "innermost", False

        def select(self, layer: int, tokens: Tokens) -> Selection:
            return Selection(torch.tensor([[14, 16]]), None)

    plan = freeze(vision_mamba(), Innermost(CONFIG, {1: 2}), [pictures()])
    assert plan.removed(1) == 2


# --- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_reductions())
def test_presets_remove_equal_token_layers(name: str) -> None:
    config = model_config("vim-t", 224)
    for preset, plan in EQUAL_TOKEN_LAYERS.items():
        method = create_reduction(name, config, preset)
        assert method.token_layers_removed == int(preset.removeprefix("tl-")) == make_plan(config, preset=plan).token_layers_removed
        assert f"TL {method.token_layers_removed}" in schedule_text(method)
        if METHODS[name].layers is None:
            assert method.lengths == make_plan(config, preset=plan).lengths
    create_reduction(name, config.with_changes(image_size=(384, 384)), "tl-792")


def test_flops_are_the_published_ones() -> None:
    tiny, small, base = (model_config(name, 224) for name in ("vim-t", "vim-s", "vim-b"))

    def r_meeto(config: VimConfig, r: int, matching: bool = True) -> float:
        return round(reduction_gflops_paper(RMeeTo(config, dict.fromkeys(interval_layers(config), r)), matching), 3)

    assert [r_meeto(tiny, r) for r in (2, 4, 5, 6, 11)] == [1.409, 1.326, 1.285, 1.243, 1.037]
    assert [r_meeto(small, r) for r in (2, 4, 6, 11)] == [4.875, 4.587, 4.300, 3.585]
    assert r_meeto(base, 11) == 13.207
    assert reduction_summary(create_reduction("r-meeto", base, "table2"))["gflops_paper_change"] == pytest.approx(-0.0471, abs=5e-5)
    assert round(reduction_gflops_paper(create_reduction("hsa", tiny, "table2"), matching=False), 3) == 1.293
    assert round(reduction_gflops_paper(create_reduction("hsa", small, "table2"), matching=False), 3) == 3.606
    assert round(reduction_gflops_paper(create_reduction("token-recognition", small, "table2"), matching=False), 3) == 3.582
    aligned, plain = create_reduction("hsa", tiny, "tl-792"), create_reduction("token-recognition", tiny, "tl-792")
    assert reduction_gflops_true(aligned) > reduction_gflops_true(plain)
    dropped = create_reduction("random", tiny, "tl-792")
    plan = make_plan(tiny, preset="stm-20", weights="sum")
    assert reduction_gflops_true(dropped) == pytest.approx(gflops_true(tiny, plan), abs=1e-4)
    assert merge_matrix_flops(dropped) == 0, "rows are moved"
    assert merge_matrix_flops(create_reduction("tome", tiny, "tl-792")) == sum((193 - 4 * k) * 4 * 192 for k in range(11))


@pytest.mark.parametrize(("r", "left"), [(1, 94), (2, 89), (5, 76), (11, 76)])
def test_r_meeto_last_layer_trap(r: int, left: int) -> None:
    config = model_config("vim-t", 224)
    schedule = dict.fromkeys(interval_layers(config), r)
    assert RMeeTo(config, schedule, last_layer_trap=True).lengths[-1] == left
    assert RMeeTo(config, schedule).lengths[-1] == 197 - 11 * r
    assert max(interval_layers(config)) == 22


def test_published_schedules() -> None:
    config = model_config("vim-s", 224)
    assert keep_schedule(config, 0.8, (5, 9, 13)) == {6: 40, 10: 32, 14: 24}
    assert keep_schedule(config, 0.75, (6, 12, 18)) == {7: 50, 13: 36, 19: 28}
    assert interval_layers(config, first=1)[:2] == (1, 3)
    assert strategy_layers(config, "alternate")[:2] == (1, 3)
    assert strategy_layers(config, "lower", 20) == (21, 22, 23)
    assert strategy_layers(config, "upper", 3) == (1, 2)
    assert len(strategy_layers(config, "all")) == 23
    assert schedule_text(create_reduction("tome", config, "tl-1076")) == "4 before 1..19, 3 before 20: 118 left, TL 1076"
    assert even_schedule(config, (6, 10, 14), 42) == {6: 1, 10: 1, 14: 1}
    rows = schedules_table(config, ["tome", "hsa"]).splitlines()
    assert len(rows) == 2 + 4 + 5


def test_schedules_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stm.reduction", "vim-b"])
    runpy.run_module("stm.reduction", run_name="__main__")
    assert "| r-meeto | table2 | 2 before 2,4..22: 175 left, TL 264 | 17.979 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["stm.reduction", "vim-z"])
    with pytest.raises(SystemExit, match="error: "):
        runpy.run_module("stm.reduction", run_name="__main__")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_reduction("tomee", CONFIG, "tl-552"), "no reduction 'tomee'"),
        (lambda: create_reduction("tome", CONFIG, "tl-5"), "no preset 'tl-5'"),
        (lambda: create_reduction("tome", CONFIG), "one of preset and schedule"),
        (lambda: method_schedule("mtr", CONFIG, "table2"), "for no model"),
        (lambda: ToMe(CONFIG, {0: 1}), "before layer 0; 'vim-test' allows layers 1..3"),
        (lambda: ToMe(CONFIG, {1: 16}), "layer 1 removes 16 of 31 tokens; 1..15"),
        (lambda: BalancedToMe(CONFIG, {1: 15}), "removes 8 of the 15 tokens on the left"),
        (lambda: BalancedMTR(CONFIG.with_changes(image_size=(48, 48)), {1: 1, 2: 3}), "layer 2 removes 2 of the 3 tokens on the left"),
        (lambda: RMeeTo(CONFIG, {1: 2}, metric="keys"), "metric is 'keys'"),
        (lambda: UTR(CONFIG, {1: 2}, prune=2), "prune is 2"),
        (lambda: even_schedule(CONFIG, [], 3), "not layers 1..3"),
    ],
)
def test_errors_name_both_values(call: Callable[[], object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        call()


# --- as the command line writes it --------------------------------------------------------------------------------------


def test_a_method_from_text_and_from_its_description() -> None:
    tiny = model_config("vim-t", 224)
    made = parse_reduction("r-meeto:tl-792,metric=delta,last_layer_trap=true", tiny)
    assert isinstance(made, RMeeTo)
    assert made.metric_name == "delta"
    assert made.schedule == create_reduction("r-meeto", tiny, "tl-792", last_layer_trap=True).schedule
    assert made.describe()["options"] == {"metric": "delta", "last_layer_trap": True}
    again = from_description(json.loads(json.dumps(made.describe())), tiny)
    assert again.describe() == made.describe()
    assert parse_reduction("token-recognition", tiny).schedule == method_schedule("token-recognition", tiny, "table2")
    assert torch.equal(parse_reduction("random:tl-552,seed=3", tiny).gone_1, RandomDrop(tiny, method_schedule("random", tiny, "tl-552"), 3).gone_1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pumer", "no reduction 'pumer'"),
        ("tome", "table 2 gives its settings for no model"),
        ("tome:tl-1", "no preset 'tl-1'"),
        ("tome:tl-792,seed=1", "no option seed; it has none"),
        ("random:tl-792,3", "'3' is no OPTION=VALUE"),
        ("utr:tl-792,prune=much", "utr"),
    ],
)
def test_a_text_that_means_nothing_says_so(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        parse_reduction(text, model_config("vim-t", 224))


def test_a_method_that_nobody_noted_cannot_be_made_again() -> None:
    with pytest.raises(PlanError, match="options were not noted"):
        from_description(ToMe(CONFIG, {1: 2}).describe(), CONFIG)
