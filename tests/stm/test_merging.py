"""Merging: weights against their definition, the algebra where it is exact, order and sizes, the last layer, dtypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stm import Group, MergePlan, ShapeError, VimConfig, VisionMamba, calibrate_constants, make_plan, with_plan
from stm.merging import DirectionState, MergeLayer
from stm.ops import causal_conv_silu, merge_tokens, merge_weights, rms_norm
from stm.plan import WEIGHT_MODES
from stm.scan import selective_scan

SCAN_MODES = ("hsp", "hsp_literal", "decay")
CONFIG = VimConfig("vim-test", 32, depth=4, d_state=4, image_size=(80, 96), num_classes=10)  # 30 patches, class token at 15
# several groups a side, gaps between them, groups of one and of three, and merges of merged tokens
PLAN = MergePlan(
    "vim-test",
    (80, 96),
    seqlen=31,
    cls_index=15,
    depth=4,
    layers={
        1: (Group((0, 1, 3), 4), Group((5,), 11), Group((22,), 20), Group((27, 28), 26)),
        2: (Group((0,), 1), Group((17,), 16), Group((22, 23), 21)),
        3: (Group((1, 2), 3),),
    },
)


def vision_mamba(config: VimConfig = CONFIG, plan: MergePlan | None = None, seed: int = 0) -> VisionMamba:
    model = VisionMamba(config)
    model.init_weights(seed)
    model.set_plan(plan)
    return model.eval().requires_grad_(False)


def state(batch: int, length: int, config: VimConfig = CONFIG, dtype: torch.dtype = torch.float64) -> DirectionState:
    e, n = config.d_inner, config.d_state
    return DirectionState(
        torch.randn(batch, length, e, dtype=dtype),
        torch.randn(e, dtype=dtype),
        -torch.rand(e, n, dtype=dtype) - 0.01,
        torch.randn(batch, length, n, dtype=dtype),
    )


def definition(mode: str, s: DirectionState, order: list[int], pairs: list[tuple[int, int]], size: list[int]) -> np.ndarray:
    """One loop a token, channel and state, in scan order; `order` lists positions as the direction meets them."""
    raw = (s.delta + s.delta_bias).numpy().astype(np.float64)
    delta = np.log1p(np.exp(raw))
    A, B = s.A.numpy().astype(np.float64), s.B.numpy().astype(np.float64)
    out = np.full((raw.shape[0], len(pairs)), np.nan)
    for b in range(raw.shape[0]):
        for column, (p, q) in enumerate(pairs):
            between = order[order.index(p) + 1 : order.index(q) + 1]
            products, norms, quotients, decays = [], [], [], []
            for e in range(A.shape[0]):
                for n in range(A.shape[1]):
                    decay = 1.0
                    for t in between:
                        decay *= np.exp(size[t] * delta[b, t, e] * A[e, n])
                    bar_p, bar_q = delta[b, p, e] * B[b, p, n], delta[b, q, e] * B[b, q, n]
                    products.append(decay * bar_p * bar_q)
                    norms.append(bar_q * bar_q)
                    quotients.append(decay * bar_p / (bar_q + (-1e-6 if bar_q < 0 else 1e-6)))
                    decays.append(decay)
            out[b, column] = {
                "hsp": np.clip(sum(products) / (sum(norms) + 1e-12), 0, 1),
                "hsp_literal": np.mean(quotients),
                "decay": np.mean(decays),
            }[mode]
    return out


@pytest.mark.parametrize("proportional", [False, True], ids=["plain", "proportional_decay"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("mode", SCAN_MODES)
def test_weights_equal_their_definition(mode: str, layer: int, proportional: bool) -> None:
    plan = replace(PLAN, weights=mode, proportional_decay=proportional)
    length = plan.lengths[layer - 1]
    forward, backward = state(2, length), state(2, length)
    size = plan.sizes()[layer - 1] if proportional else [1] * length
    got = MergeLayer(plan, layer).weights(forward, backward)
    left = [pair for pair in plan.pairs(layer) if pair[0] < pair[1]]
    right = [pair for pair in plan.pairs(layer) if pair[0] > pair[1]]
    want = np.concatenate(
        [definition(mode, forward, list(range(length)), left, size), definition(mode, backward, list(range(length))[::-1], right, size)], axis=1
    )
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-11, atol=1e-13)
    if mode == "hsp":
        assert ((want > 0) & (want < 1)).any()
        assert (want == 0).any() or layer == 3, "the clamp is exercised"


def test_float32_weights_are_as_good_as_float32_allows() -> None:
    length = PLAN.seqlen
    forward, backward = state(1, length), state(1, length)
    want = MergeLayer(PLAN, 1).weights(forward, backward)
    narrow = [DirectionState(*(t.float() for t in (s.delta, s.delta_bias, s.A, s.B))) for s in (forward, backward)]
    got = MergeLayer(PLAN, 1).weights(*narrow)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-7)


def test_weights_at_zero_delta_and_zero_b_are_finite() -> None:
    length = PLAN.seqlen
    for mode in SCAN_MODES:
        s = state(1, length)
        s = DirectionState(torch.full_like(s.delta, -800.0), s.delta_bias, s.A, torch.zeros_like(s.B))
        assert torch.isfinite(MergeLayer(replace(PLAN, weights=mode), 1).weights(s, s)).all()


def test_large_delta_uses_softplus_s_threshold() -> None:
    s = state(1, PLAN.seqlen)
    s = DirectionState(s.delta + 700, s.delta_bias, s.A * 1e-4, s.B)
    got = MergeLayer(replace(PLAN, weights="decay"), 3).weights(s, s)
    d = (s.delta + s.delta_bias)[:, 2:4].sum(1)
    torch.testing.assert_close(got[0, 0], torch.exp(d.unsqueeze(-1) * s.A).mean(), rtol=1e-12, atol=0)


def test_unknown_mode_is_an_error() -> None:
    s = state(1, 3)
    with pytest.raises(ValueError, match="'best'"):
        merge_weights(s.delta, s.delta_bias, s.A, s.B, torch.ones(1, 3), torch.tensor([0]), torch.tensor([1]), "best")


# --- fixed weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_mean_is_the_mean_of_the_originals(layer: int) -> None:
    """A stream whose tokens hold means of originals stays one, whatever merged before."""
    plan = replace(PLAN, weights="mean")
    originals = torch.randn(2, plan.seqlen, 5, dtype=torch.float64)
    x = originals
    members = [list(tokens) for tokens in plan.members()]
    for index in range(1, layer + 1):
        x = MergeLayer(plan, index)(x, None, None)  # type: ignore[arg-type]
    want = torch.stack([originals[:, token].mean(1) for token in members[layer]], 1)
    torch.testing.assert_close(x, want, rtol=0, atol=1e-6)


def test_sum_adds() -> None:
    plan = replace(PLAN, weights="sum")
    x = torch.randn(1, plan.seqlen, 5, dtype=torch.float64)
    for layer in (1, 2, 3):
        x, before = MergeLayer(plan, layer)(x, None, None), x  # type: ignore[arg-type]
        torch.testing.assert_close(x.sum(1), before.sum(1), rtol=1e-12, atol=1e-12)


def test_constant_is_the_mean_of_hsp_over_images() -> None:
    model = vision_mamba()
    images = torch.randn(5, 3, 80, 96)
    constant = calibrate_constants(model, PLAN, [images[:3], images[3:]])
    assert constant.weights == "constant"
    assert MergePlan.from_json(constant.to_json()) == constant
    merged, seen = with_plan(model, PLAN), {}
    for index, block in enumerate(merged.blocks):
        if block.merge is not None:
            block.merge.register_forward_pre_hook(lambda m, a, index=index: seen.update({index: m.weights(a[1], a[2])}))
    with torch.no_grad():
        merged(images)
    assert constant.constants is not None
    assert constant.constants.keys() == seen.keys() == {1, 2, 3}
    for layer, weights in seen.items():
        np.testing.assert_allclose(constant.constants[layer], weights.double().mean(0).numpy(), rtol=1e-5)
        assert weights.std(0).max() > 0, "the average must be one of different weights"
    frozen = with_plan(model, constant).requires_grad_(False)
    assert frozen.blocks[1].merge is not None
    np.testing.assert_allclose(frozen.blocks[1].merge.weights(None, None)[0].numpy(), constant.constants[1], rtol=1e-6)  # type: ignore[arg-type]
    merged.requires_grad_(False)
    assert not torch.equal(frozen(images), merged(images))
    # with one image, its constants are its weights
    single = with_plan(model, calibrate_constants(model, PLAN, [images[:1]]))
    torch.testing.assert_close(single(images[:1]), merged(images[:1]), rtol=1e-4, atol=1e-4)


def test_calibration_needs_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        calibrate_constants(vision_mamba(), PLAN, [])


# --- merge_tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3], ids=["weights shared", "weights an image"])
def test_merge_tokens_is_its_loop(layer: int, rows: int) -> None:
    pairs, keep = PLAN.pairs(layer), PLAN.keep(layer)
    x = torch.randn(3, PLAN.lengths[layer - 1], 7, dtype=torch.float64)
    w = torch.randn(rows, len(pairs), dtype=torch.float64)
    want = x.clone()
    for b in range(3):
        for column, (p, q) in enumerate(pairs):
            want[b, q] += w[b if rows > 1 else 0, column] * x[b, p]
    got = merge_tokens(x, w, torch.tensor(keep), torch.tensor([p for p, _ in pairs]), torch.tensor([q for _, q in pairs]))
    torch.testing.assert_close(got, want[:, keep], rtol=1e-14, atol=1e-14)


def test_tokens_that_do_not_merge_keep_their_bits_and_order() -> None:
    x = torch.randn(2, PLAN.seqlen, 7)
    touched = {q for _, q in PLAN.pairs(1)}
    got = MergeLayer(replace(PLAN, weights="sum"), 1)(x, None, None)  # type: ignore[arg-type]
    for new, old in enumerate(PLAN.keep(1)):
        assert torch.equal(got[:, new], x[:, old]) == (old not in touched)


# --- where the algebra is exact: one channel, one state -------------------------------------------------------------------


def scalar_case(length: int, cls: int, seed: int, ascending: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, A, B, u in scan order, (1, length, 1); with `ascending` Bbar grows towards the end, so weights are in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    delta = 0.1 + 1.4 * torch.rand(length, generator=g, dtype=torch.float64)
    if ascending:
        B = (0.3 + torch.rand(length, generator=g, dtype=torch.float64).cumsum(0)) / delta
    else:
        B = (0.2 + 2 * torch.rand(length, generator=g, dtype=torch.float64)) * torch.where(torch.rand(length, generator=g) < 0.5, -1.0, 1.0)
    A = -0.01 - 0.5 * torch.rand(1, 1, generator=g, dtype=torch.float64)
    u = torch.randn(length, generator=g, dtype=torch.float64)
    return delta, A, B, u


def class_state(delta: Tensor, A: Tensor, B: Tensor, u: Tensor, cls: int, reverse: bool) -> float:
    """State of the scan at the class token (C = 1, D = 0), delta taken as it is."""
    shape = (1, -1, 1)
    y = selective_scan(u.view(shape), delta.view(shape), A, B.view(shape), torch.ones_like(B).view(shape), reverse=reverse)
    return float(y[0, cls, 0])


@st.composite
def scalar_layers(draw: st.DrawFn) -> tuple[int, int, int, int]:
    length = draw(st.integers(3, 60))
    cls = draw(st.integers(1, length - 2))
    return length, cls, draw(st.integers(1, 60)), draw(st.integers(0, 2**31))


def edge_plan(length: int, cls: int, k: int, right: bool, mode: str) -> tuple[MergePlan, int] | None:
    room = length - 1 - cls - 1 if right else cls - 1
    if not room:
        return None
    k = 1 + (k - 1) % room
    group = Group(tuple(range(length - k, length)), length - k - 1) if right else Group(tuple(range(k)), k)
    return MergePlan("scalar", (16, 16), length, cls, depth=2, weights=mode, layers={1: (group,)}), k


@pytest.mark.parametrize("right", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["hsp", "hsp_literal"])
@settings(max_examples=60, deadline=None)
@given(scalar_layers())
def test_scalar_merge_keeps_the_class_token_s_state(mode: str, right: bool, case: tuple[int, int, int, int]) -> None:
    """Paper's eq. 20: with the layer's own delta and B the state that the class token sees does not change.

    hsp needs weights in [0, 1]; hsp_literal is not clamped, so B of any size and sign does.
    """
    length, cls, k, seed = case
    made = edge_plan(length, cls, k, right, mode)
    if made is None:
        return
    plan, k = made
    delta, A, B, u = scalar_case(length, cls, seed, ascending=mode == "hsp")
    if right:
        delta, B, u = delta.flip(0), B.flip(0), u.flip(0)
    raw = torch.log(torch.expm1(delta)).view(1, -1, 1)  # softplus gives delta again
    side = DirectionState(raw, torch.zeros(1, dtype=torch.float64), A, B.view(1, -1, 1))
    layer = MergeLayer(plan, 1)
    w = layer.weights(side, side)
    if mode == "hsp":
        assert ((w > 0) & (w < 1)).all()
    merged_u = layer(u.view(1, -1, 1), side, side).view(-1)
    keep = plan.keep(1)
    want = class_state(delta, A, B, u, cls, right)
    got = class_state(delta[keep], A, B[keep], merged_u, plan.cls_positions[1], right)
    # the guards against division by zero are the only difference: 1e-12 of Bbar^2, or 1e-6 of Bbar
    target = plan.groups(1)[0].target
    bar = float(delta[target] * B[target])
    guard = 1e-12 / bar**2 if mode == "hsp" else 1e-6 / abs(bar)
    moved = float((w[0] * merged_u.new_tensor([u[p] for p, _ in plan.pairs(1)])).abs().sum()) * abs(bar)
    assert abs(got - want) <= 1.1 * guard * moved + 1e-12 * (1 + moved)
    # and the merge matters: dropping the sources changes the state
    dropped = class_state(delta[keep], A, B[keep], u[keep], plan.cls_positions[1], right)
    far = abs(dropped - want)
    assert far > 100 * abs(got - want) or far < 1e-6


@pytest.mark.parametrize("right", [False, True], ids=["forward", "backward"])
@settings(max_examples=60, deadline=None)
@given(scalar_layers())
def test_scalar_identity_with_weights_of_any_size(right: bool, case: tuple[int, int, int, int]) -> None:
    """The quotient Abar Bbar_p / Bbar_q itself, through merge_tokens: exact to rounding, beyond [0, 1] too."""
    length, cls, k, seed = case
    made = edge_plan(length, cls, k, right, "sum")
    if made is None:
        return
    plan, k = made
    delta, A, B, u = scalar_case(length, cls, seed, ascending=False)
    pairs, keep = plan.pairs(1), plan.keep(1)
    w = []
    for p, q in pairs:
        span = delta[q:p] if right else delta[p + 1 : q + 1]
        w.append(float(torch.exp(A[0, 0] * span.sum()) * delta[p] * B[p] / (delta[q] * B[q])))
    weights = torch.tensor([w], dtype=torch.float64)
    merged = merge_tokens(u.view(1, -1, 1), weights, torch.tensor(keep), torch.tensor([p for p, _ in pairs]), torch.tensor([q for _, q in pairs]))
    want = class_state(delta, A, B, u, cls, right)
    got = class_state(delta[keep], A, B[keep], merged.view(-1), plan.cls_positions[1], right)
    scale = float((delta * B * u).abs().sum())
    assert abs(got - want) <= 1e-13 * (1 + scale)


# --- the model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in WEIGHT_MODES if mode != "constant"])
def test_the_model_merges_where_the_plan_says(mode: str) -> None:
    plan = replace(PLAN, weights=mode)
    model, lengths, classes = vision_mamba(plan=plan), [], []
    for block in model.blocks:
        block.norm.register_forward_hook(lambda m, a, r: lengths.append(a[0].shape[1]))
        block.norm.register_forward_hook(lambda m, a, r: classes.append(a[0]))
    images = torch.randn(2, 3, 80, 96)
    model(images)
    assert lengths == plan.lengths
    # the class token itself never changes in a merge: at layer 1 it is the residual after layer 0
    plain, seen = vision_mamba(), []
    plain.blocks[1].norm.register_forward_hook(lambda m, a, r: seen.append(a[0]))
    plain(images)
    torch.testing.assert_close(classes[1][:, plan.cls_positions[1]], seen[0][:, 15], rtol=1e-6, atol=1e-6)


def test_proportional_decay_reaches_the_scan() -> None:
    plan = replace(PLAN, proportional_decay=True)
    model = vision_mamba(plan=plan)
    for block, sizes in zip(model.blocks, plan.sizes(), strict=True):
        assert block.decay_scale is not None
        assert block.decay_scale.tolist() == sizes
    images = torch.randn(1, 3, 80, 96)
    assert (model(images) - vision_mamba(plan=PLAN)(images)).abs().max() > 1e-4


@pytest.mark.parametrize("proportional", [False, True], ids=["plain", "proportional_decay"])
@pytest.mark.parametrize("mode", [None, "hsp", "mean"])
def test_class_token_only_last_layer_is_exact(mode: str | None, proportional: bool) -> None:
    plan = None if mode is None else replace(PLAN, weights=mode, proportional_decay=proportional)
    fast = vision_mamba(plan=plan).double()
    full = VisionMamba(CONFIG, plan, cls_only_last=False).double().eval()
    full.load_state_dict(fast.state_dict())
    images = torch.randn(2, 3, 80, 96, dtype=torch.float64)
    lengths: list[int] = []
    fast.blocks[-1].mixer.out_proj.register_forward_hook(lambda m, a, r: lengths.append(a[0].shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(fast(images), full(images), rtol=1e-12, atol=1e-12)
    assert lengths == [1], "the last layer computes one token"


def test_a_plan_can_be_set_and_taken_away() -> None:
    model, images = vision_mamba(), torch.randn(1, 3, 80, 96)
    plain = model(images)
    keys = set(model.state_dict())
    model.set_plan(PLAN)
    assert set(model.state_dict()) == keys, "a plan adds nothing to the state dict"
    merged = model(images)
    assert (merged - plain).abs().max() > 1e-3
    model.set_plan(make_plan(CONFIG))
    assert model.plan is None
    assert torch.equal(model(images), plain)
    twin = with_plan(model, PLAN)
    assert torch.equal(twin(images), merged)
    assert twin.head.weight.data_ptr() == model.head.weight.data_ptr(), "shared, not copied"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["hsp", "mean"])
def test_half_precision_runs_with_a_float32_residual(dtype: torch.dtype, mode: str) -> None:
    plan = replace(PLAN, weights=mode)
    images = torch.randn(2, 3, 80, 96)
    want = vision_mamba(plan=plan)(images)
    model = vision_mamba(plan=plan).to(dtype)
    residuals: list[torch.dtype] = []
    hidden: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, r: residuals.append(r[0].dtype))
        block.mixer.register_forward_hook(lambda m, a, r: hidden.append(r.hidden.dtype))
    got = model(images)
    assert got.dtype == dtype
    assert set(residuals) == {torch.float32}
    assert set(hidden) == {dtype}
    error = (got.float() - want).abs().max() / want.std()
    assert error < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fixed_weights_stay_float32_in_half_precision(dtype: torch.dtype) -> None:
    """The merge runs on the float32 residual, so weights of the plan must not be rounded to the model's dtype."""
    plan = replace(PLAN, weights="constant", constants={1: (0.1, 0.2, 0.3, 0.7, 0.9, 1 / 3, 0.6), 2: (0.1,) * 4, 3: (0.1,) * 2})
    x = torch.randn(1, 31, 4)
    want = MergeLayer(plan, 1)(x, None, None)  # type: ignore[arg-type]
    got = MergeLayer(plan, 1).to(dtype)(x, None, None)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3, 64, 64\), expected \(batch, 3, 80, 96\).*image_size=\(64, 64\)"):
        vision_mamba()(torch.zeros(2, 3, 64, 64))


# --- custom ops ----------------------------------------------------------------------------------------------------------


def _arguments(name: str) -> tuple[object, ...]:
    s = state(2, 9, dtype=torch.float32)
    x = torch.randn(2, 9, 64)
    index = [torch.tensor(positions) for positions in ([1, 2, 3, 4, 5, 6, 7], [0, 8], [1, 7])]
    if name == "causal_conv_silu":
        return x.requires_grad_(), torch.randn(64, 4, requires_grad=True), torch.randn(64), True
    if name == "rms_norm":
        return x.requires_grad_(), torch.randn(64, requires_grad=True), 1e-5
    if name == "merge_tokens":
        return x.requires_grad_(), torch.rand(2, 2, requires_grad=True), *index
    if name == "selective_scan":
        D, scale = torch.randn(64), torch.rand(9)
        return x.requires_grad_(), s.delta, s.A.requires_grad_(), s.B, torch.randn(2, 9, 4), D, s.delta_bias, scale, True, True
    mode = name.removeprefix("merge_weights:")
    return s.delta.requires_grad_(), s.delta_bias, s.A, s.B, torch.ones(2, 9), index[1], index[2], mode


@pytest.mark.parametrize("name", ["causal_conv_silu", "rms_norm", "merge_tokens", "selective_scan", *(f"merge_weights:{m}" for m in SCAN_MODES)])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.stm, name.partition(":")[0]).default
    torch.library.opcheck(op, _arguments(name))


def test_causal_conv_is_a_conv1d() -> None:
    conv = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3, dtype=torch.float64)
    for length in (1, 2, 63):
        x = torch.randn(2, length, 5, dtype=torch.float64)
        want = torch.nn.functional.silu(conv(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        weight, bias = conv.weight.squeeze(1), conv.bias
        torch.testing.assert_close(causal_conv_silu(x, weight, bias, False), want)
        torch.testing.assert_close(causal_conv_silu(x.flip(1), weight, bias, True), want.flip(1))


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    want = x / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), want)
    assert rms_norm(x.float() * 1e4, weight.half(), 1e-5).isfinite().all(), "computed in float32"
