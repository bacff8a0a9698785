"""The selective scan: the token-major op and the drop-in for mamba_ssm's function.

The truth is the step-by-step scan of tests/reference on the same inputs widened to float64;
for gradients, float64 autograd through a plain loop, itself compared with that scan.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import stm
from tests.reference import scan_reference

# A float32 reference was measured at 5.7e-7 of the largest output at worst: a few times that.
FLOAT32_BOUND = 2e-6
FLOAT64_BOUND = 1e-13
FLOAT32_GRADIENT_BOUND = 1e-5  # of the largest gradient
LENGTHS = [1, 2, 3, 7, 8, 31, 63, 64, 197, 372, 577, 784, 1025, 1134, 4097]


def widen(value: Tensor | None) -> np.ndarray | None:
    if value is None:
        return None
    value = value.detach()
    return value.to(torch.complex128 if value.is_complex() else torch.float64).numpy()


def relative_error(got: Tensor, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude; NaN counts as infinite."""
    difference = np.abs(widen(got) - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float("inf") if np.isnan(difference) else float(difference)


# --- mamba_ssm's own grid (tests/ops/test_selective_scan.py there) -------------------------


@dataclass(frozen=True)
class Case:
    seqlen: int = 128
    groups: int = 1
    itype: torch.dtype = torch.float32
    complex_A: bool = False
    variable_B: bool = True
    variable_C: bool = True
    has_D: bool = True
    has_z: bool = True
    has_delta_bias: bool = True
    delta_softplus: bool = True
    return_last_state: bool = True
    delta_factor: float = 1.0

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}".replace("torch.", "")
            for f in dataclasses.fields(self)
            if f.name == "seqlen" or getattr(self, f.name) != f.default
        ]
        return ",".join(changed)


HALVES = [torch.float16, torch.bfloat16]
PUBLISHED = [Case(seqlen, groups) for seqlen in (128, 256, 512, 1024, 2048, 4096) for groups in (1, 2)]
COMMENTED_OUT = [
    *(Case(seqlen) for seqlen in (8, 16, 32, 64, 372, 784, 1134)),
    *(Case(seqlen, groups, itype) for itype in HALVES for seqlen, groups in ((128, 1), (128, 2), (372, 1))),
    *(Case(seqlen, groups, complex_A=True) for seqlen, groups in ((8, 1), (128, 1), (128, 2), (372, 1))),
    *(Case(itype=itype, complex_A=True) for itype in HALVES),
    *(
        Case(variable_B=B, variable_C=C, complex_A=complex_A)
        for B, C in ((False, True), (True, False), (False, False))
        for complex_A in (False, True)
    ),
    *(Case(**{option: False}) for option in ("has_D", "has_z", "has_delta_bias", "delta_softplus", "return_last_state")),
    Case(has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False, return_last_state=False),
    Case(groups=2, has_z=False, has_D=False),
    Case(variable_B=False, itype=torch.float16),
]
ADDED = [
    *(Case(seqlen) for seqlen in (1, 2, 3, 7, 31, 197, 577)),
    Case(1, groups=2, complex_A=True),
    Case(4097, has_z=False),
    Case(groups=4),  # a group of its own for each channel
    Case(delta_factor=100.0),  # many steps past softplus's threshold of 20
    Case(delta_factor=100.0, itype=torch.bfloat16),
]


def make_inputs(case: Case) -> dict[str, Tensor | None]:
    """The published data: seed 0, batch 2, d_inner 4, d_state 8."""
    generator = torch.Generator().manual_seed(0)
    batch, d_inner, d_state = 2, 4, 8
    wtype = torch.complex64 if case.complex_A else torch.float32

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def uniform(*shape: int, dtype: torch.dtype) -> Tensor:
        return 0.5 * torch.rand(*shape, generator=generator, dtype=dtype)

    def B_or_C(variable: bool) -> Tensor:
        if not variable:
            return normal(d_inner, d_state, dtype=wtype)
        steps = case.seqlen * (2 if case.complex_A else 1)
        groups = () if case.groups == 1 else (case.groups,)
        return normal(batch, *groups, d_state, steps, dtype=case.itype)

    tokens = (batch, d_inner, case.seqlen)
    inputs: dict[str, Tensor | None] = {
        "A": -uniform(d_inner, d_state, dtype=wtype),
        "B": B_or_C(case.variable_B),
        "C": B_or_C(case.variable_C),
        "D": normal(d_inner, dtype=torch.float32) if case.has_D else None,
        "z": normal(*tokens, dtype=case.itype) if case.has_z else None,
        "delta_bias": uniform(d_inner, dtype=torch.float32) if case.has_delta_bias else None,
        "u": normal(*tokens, dtype=case.itype),
        "delta": case.delta_factor * uniform(*tokens, dtype=case.itype),
    }
    return inputs


def reference(case: Case, inputs: dict[str, Tensor | None]) -> tuple[np.ndarray, np.ndarray]:
    arrays = {name: widen(value) for name, value in inputs.items()}
    return scan_reference.selective_scan(**arrays, delta_softplus=case.delta_softplus)


def loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    decay_scale: Tensor | None = None,
) -> Tensor:
    """The same recurrence in torch, for autograd; channel-first."""
    d_inner = u.shape[1]

    def steps(value: Tensor) -> list[Tensor]:
        if value.dim() == 2:
            return [value] * u.shape[2]
        if A.is_complex():
            value = torch.view_as_complex(value.unflatten(-1, (-1, 2)))
        if value.dim() == 3:
            value = value.unsqueeze(1)
        return list(value.repeat_interleave(d_inner // value.shape[1], dim=1).unbind(-1))

    d = delta if delta_bias is None else delta + delta_bias[:, None]
    d = F.softplus(d) if delta_softplus else d
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)
    outputs = []
    scales = [1.0] * u.shape[2] if decay_scale is None else decay_scale.tolist()
    for u_t, d_t, B_t, C_t, s_t in zip(u.unbind(2), d.unbind(2), steps(B), steps(C), scales, strict=True):
        h = torch.exp(s_t * d_t[..., None] * A) * h + d_t[..., None] * B_t * u_t[..., None]
        y_t = (h * C_t).sum(-1)
        outputs.append(2 * y_t.real if A.is_complex() else y_t)
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def published_tolerances(case: Case) -> dict[str, tuple[float, float]]:
    """(rtol, atol) for the output, the last state and each gradient."""
    rtol, atol = {
        torch.float32: (6e-4, 2e-3),
        torch.float16: (3e-3, 5e-3),
        torch.bfloat16: (3e-2, 5e-2),
    }[case.itype]
    rtol_w, atol_w = (max(1e-3, rtol), max(1e-3, atol)) if case.has_z else (1e-3, 1e-3)
    return {
        "y": (rtol, atol),
        "state": (rtol, atol),
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (rtol_w, 5 * atol_w),
        "B": (rtol, atol) if case.variable_B else (rtol_w, atol_w),
        "C": (rtol, atol) if case.variable_C else (rtol_w, atol_w),
        "D": (rtol_w, atol_w),
        "z": (rtol_w, atol_w),
        "delta_bias": (rtol_w, atol_w),
    }


def assert_close(name: str, got: Tensor, expected: np.ndarray, tolerance: tuple[float, float]) -> None:
    rtol, atol = tolerance
    assert got.shape == expected.shape, name
    np.testing.assert_allclose(widen(got), expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", PUBLISHED + COMMENTED_OUT + ADDED, ids=str)
def test_mamba_grid(case):
    inputs = make_inputs(case)
    leaves = {name: None if v is None else v.requires_grad_() for name, v in inputs.items()}
    result = stm.selective_scan_fn(**leaves, delta_softplus=case.delta_softplus, return_last_state=case.return_last_state)
    y, state = result if case.return_last_state else (result, None)
    expected_y, expected_state = reference(case, inputs)
    tolerances = published_tolerances(case)
    assert y.dtype == case.itype
    assert_close("y", y, expected_y, tolerances["y"])
    if case.itype == torch.float32 and case.delta_factor == 1:
        assert relative_error(y, expected_y) <= FLOAT32_BOUND
    if state is not None:
        assert state.dtype == (torch.complex64 if case.complex_A else torch.float32)
        assert_close("state", state, expected_state, tolerances["state"])
        assert relative_error(state, expected_state) <= 2 * FLOAT32_BOUND

    wide = {
        name: None if v is None else v.detach().to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_()
        for name, v in inputs.items()
    }
    wide_y = loop(**wide, delta_softplus=case.delta_softplus)
    assert relative_error(wide_y, expected_y) <= FLOAT64_BOUND  # the loop is the reference
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case.itype)
    y.backward(grad)
    wide_y.backward(grad.double())
    for name, leaf in leaves.items():
        if leaf is not None:
            assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
            expected = widen(wide[name].grad)
            assert_close(f"d{name}", leaf.grad, expected, tolerances[name])
            if case.itype == torch.float32:
                assert relative_error(leaf.grad, expected) <= FLOAT32_GRADIENT_BOUND, name


@pytest.mark.parametrize("itype", HALVES, ids=str)
def test_drop_in_computes_in_float32(itype):
    """Only y is rounded to u's type: its error is about one rounding, not one a step."""
    case = Case(784, itype=itype, has_z=False)
    inputs = make_inputs(case)
    expected, _ = reference(case, inputs)
    y = stm.selective_scan_fn(**inputs, delta_softplus=True)
    bound = 0.51 * torch.finfo(itype).eps * np.abs(expected) + 1e-6 * np.abs(expected).max()
    assert (np.abs(widen(y) - expected) <= bound).all()


def test_drop_in_takes_views():
    """Slices and transposes, as models pass them."""
    case = Case(31)
    inputs = make_inputs(case)
    expected, _ = reference(case, inputs)
    strided = {name: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v is not None and v.dim() > 1 else v for name, v in inputs.items()}
    assert relative_error(stm.selective_scan_fn(**strided, delta_softplus=True), expected) <= FLOAT32_BOUND


@pytest.mark.parametrize(("groups_B", "groups_C"), [(1, 2), (6, 1), (3, 6), (2, 3)], ids=str)
def test_groups_of_B_and_C_may_differ(groups_B, groups_C):
    """The published reference spreads each over the channels by itself: 2 and 3 groups cut 6 channels unevenly."""
    inputs = make_inputs(Case(9))
    for name, value in inputs.items():
        if value is not None and name not in ("B", "C"):
            axis = 0 if name in ("A", "D", "delta_bias") else 1
            inputs[name] = torch.cat([value, 0.5 * value.narrow(axis, 0, 2)], axis)
    inputs["B"], inputs["C"] = torch.randn(2, groups_B, 8, 9), torch.randn(2, groups_C, 8, 9)
    expected, _ = reference(Case(9), inputs)
    assert relative_error(stm.selective_scan_fn(**inputs, delta_softplus=True), expected) <= FLOAT32_BOUND


def test_drop_in_takes_positional_arguments():
    inputs = make_inputs(Case(8))
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    named = stm.selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    placed = stm.selective_scan_fn(*(inputs[name] for name in order), True, True)
    assert all(torch.equal(a, b) for a, b in zip(named, placed, strict=True))


# --- the token-major op ----------------------------------------------------------------------


def token_inputs(seqlen: int, batch: int = 2, d_inner: int = 6, d_state: int = 16, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Everything on, the sizes of the steps as in a Vision Mamba; weights stay float32 or wider."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = (batch, seqlen, d_inner)
    return {
        "u": normal(*tokens).to(dtype),
        "delta": (normal(*tokens) - 2).to(dtype),
        "A": -torch.exp(normal(d_inner, d_state)).to(wide),
        "B": normal(batch, seqlen, d_state).to(dtype),
        "C": normal(batch, seqlen, d_state).to(dtype),
        "D": normal(d_inner).to(wide),
        "z": normal(*tokens).to(dtype),
        "delta_bias": normal(d_inner).to(wide),
    }


def token_reference(inputs: dict[str, Tensor], *, delta_softplus: bool = True, reverse: bool = False) -> np.ndarray:
    """Channel-first, and for `reverse` everything that runs along the sequence flipped twice."""
    arrays = {name: widen(value) for name, value in inputs.items()}
    for name in ("u", "delta", "B", "C", "z", "decay_scale"):
        if name in arrays:
            value = arrays[name]
            value = np.moveaxis(value, 1, -1) if value.ndim == 3 else value
            arrays[name] = value[..., ::-1] if reverse else value
    y, _ = scan_reference.selective_scan(**arrays, delta_softplus=delta_softplus)
    return np.moveaxis(y[..., ::-1] if reverse else y, -1, 1)


def decay_scale_for(seqlen: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sizes of merged tokens: 1, 2, 3 and 5 in turn, the same for neither direction."""
    return torch.tensor([1.0, 2.0, 3.0, 5.0, 1.0], dtype=dtype).repeat(seqlen // 5 + 1)[:seqlen]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_token_major(seqlen, reverse):
    wide = token_inputs(seqlen)
    narrow = {name: value.float() for name, value in wide.items()}
    y = stm.selective_scan(**wide, delta_softplus=True, reverse=reverse)
    assert y.dtype == torch.float64
    assert y.shape == wide["u"].shape
    assert relative_error(y, token_reference(wide, reverse=reverse)) <= FLOAT64_BOUND
    y = stm.selective_scan(**narrow, delta_softplus=True, reverse=reverse)
    assert y.dtype == torch.float32
    assert relative_error(y, token_reference(narrow, reverse=reverse)) <= FLOAT32_BOUND


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("delta_softplus", [True, False], ids=["softplus", "no_softplus"])
def test_token_major_options(absent, scaled, reverse, delta_softplus):
    inputs = {name: value for name, value in token_inputs(37).items() if name not in absent}
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].abs()
        if "delta_bias" in inputs:
            inputs["delta_bias"] = inputs["delta_bias"].abs()
    if scaled:
        inputs["decay_scale"] = decay_scale_for(37)
    y = stm.selective_scan(**inputs, delta_softplus=delta_softplus, reverse=reverse)
    expected = token_reference(inputs, delta_softplus=delta_softplus, reverse=reverse)
    assert relative_error(y, expected) <= FLOAT64_BOUND


@pytest.mark.parametrize(("batch", "d_inner", "d_state"), [(1, 1, 1), (3, 5, 17), (1, 384, 16), (2, 4, 64)])
def test_token_major_sizes(batch, d_inner, d_state):
    inputs = token_inputs(19, batch, d_inner, d_state)
    y = stm.selective_scan(**inputs, delta_softplus=True)
    assert relative_error(y, token_reference(inputs)) <= FLOAT64_BOUND


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_token_major_half(dtype, reverse):
    """State and sums in float32, one rounding at the end."""
    inputs = token_inputs(577, dtype=dtype)
    y = stm.selective_scan(**inputs, delta_softplus=True, reverse=reverse)
    assert y.dtype == dtype
    expected = token_reference(inputs, reverse=reverse)
    bound = 0.51 * torch.finfo(dtype).eps * np.abs(expected) + FLOAT32_BOUND * np.abs(expected).max()
    assert (np.abs(widen(y) - expected) <= bound).all()


def test_unit_decay_scale_changes_nothing():
    inputs = token_inputs(31)
    ones = torch.ones(31, dtype=torch.float64)
    assert torch.equal(
        stm.selective_scan(**inputs, delta_softplus=True),
        stm.selective_scan(**inputs, delta_softplus=True, decay_scale=ones),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "delta",
    [(20.0, 20.001), (19.0, 21.0), (30.0, 80.0), (-80.0, -30.0), (0.0, 0.0), (500.0, 1000.0)],
    ids=["at the threshold", "around it", "past it", "tiny steps", "zero", "decay to nothing"],
)
def test_extreme_steps_stay_finite(delta, dtype):
    """Past softplus's threshold the identity; a long product of decays may vanish, never overflow."""
    inputs = token_inputs(300, dtype=dtype)
    low, high = delta
    share = torch.linspace(0, 1, inputs["u"].numel(), dtype=torch.float64).reshape(inputs["u"].shape)
    inputs["delta"] = (low + (high - low) * share).to(dtype)
    inputs["delta_bias"] = torch.zeros_like(inputs["delta_bias"])
    bound = FLOAT64_BOUND if dtype == torch.float64 else FLOAT32_BOUND
    for reverse in (False, True):
        y = stm.selective_scan(**inputs, delta_softplus=True, reverse=reverse)
        assert torch.isfinite(y).all()
        assert relative_error(y, token_reference(inputs, reverse=reverse)) <= bound


def test_token_major_takes_views():
    """x and z as the two halves of one GEMM's output, B and C as columns of another's."""
    inputs = token_inputs(13)
    expected = token_reference(inputs)
    inputs["u"], inputs["z"] = torch.cat([inputs["u"], inputs["z"]], dim=-1).chunk(2, dim=-1)
    inputs["B"], inputs["C"] = torch.cat([inputs["B"], inputs["C"]], dim=-1).chunk(2, dim=-1)
    inputs["delta"] = inputs["delta"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not inputs["u"].is_contiguous()
    assert relative_error(stm.selective_scan(**inputs, delta_softplus=True), expected) <= FLOAT64_BOUND


def test_inputs_are_left_alone():
    inputs = token_inputs(13)
    copies = {name: value.clone() for name, value in inputs.items()}
    stm.selective_scan(**inputs, delta_softplus=True)
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)


def test_two_forms_agree():
    """The drop-in is the token-major op in the other layout."""
    inputs = token_inputs(64, dtype=torch.float32)
    y = stm.selective_scan(**inputs, delta_softplus=True)
    swapped = {n: v.transpose(1, 2) if v.dim() == 3 else v for n, v in inputs.items()}
    y_mamba = stm.selective_scan_fn(**swapped, delta_softplus=True)
    assert relative_error(y_mamba.transpose(1, 2), widen(y)) <= FLOAT32_BOUND


# --- as a torch operator ---------------------------------------------------------------------

OPCHECK_ROWS = {
    "all on": {},
    "reverse": {"reverse": True},
    "scaled": {"scaled": True},
    "scaled, reverse": {"scaled": True, "reverse": True},
    "no softplus": {"softplus": False},
    "float16": {"dtype": torch.float16},
}


def op_arguments(
    dtype: torch.dtype = torch.float64,
    softplus: bool = True,
    reverse: bool = False,
    scaled: bool = False,
    grad: bool = False,
) -> tuple:
    """What the exported op takes; D and delta_bias are always there, z is applied outside."""
    inputs = token_inputs(5, d_state=3, dtype=dtype)
    tensors = [inputs[name].requires_grad_(grad) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    return (*tensors, decay_scale_for(5, tensors[2].dtype) if scaled else None, softplus, reverse)


@pytest.mark.parametrize("row", OPCHECK_ROWS.values(), ids=OPCHECK_ROWS.keys())
def test_opcheck(row):
    torch.library.opcheck(torch.ops.stm.selective_scan.default, op_arguments(**row))


@pytest.mark.parametrize("op", ["selective_scan", "selective_scan_with_state"])
@pytest.mark.parametrize("name", ["all on", "scaled, reverse"])
def test_opcheck_with_autograd(name, op):
    overload = getattr(torch.ops.stm, op).default
    torch.library.opcheck(overload, op_arguments(**OPCHECK_ROWS[name], grad=True))


@pytest.mark.parametrize("row", OPCHECK_ROWS.values(), ids=OPCHECK_ROWS.keys())
def test_fake_output_is_like_the_real_one(row):
    """A wrong fake dtype or stride surfaces only after export, as another op's failure."""
    arguments = op_arguments(**row)
    real = torch.ops.stm.selective_scan(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.stm.selective_scan(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in arguments))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias")], ids=["all", "bare"])
def test_gradcheck(absent, scaled, reverse):
    inputs = token_inputs(5, batch=2, d_inner=2, d_state=3)
    names = [name for name in inputs if name not in absent]
    scale = decay_scale_for(5) if scaled else None

    def run(*values: Tensor) -> Tensor:
        return stm.selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True, reverse=reverse, decay_scale=scale)

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("seqlen", [1, 2, 31, 197])
@pytest.mark.parametrize("chunk", [1, 2, 5, None], ids="chunk={}".format)
def test_token_major_gradients(monkeypatch, seqlen, reverse, chunk):
    """Against the loop, and over the borders of the blocks that bound the op's memory."""
    if chunk is not None:
        monkeypatch.setattr("stm.scan._CHUNK_ELEMENTS", chunk * 2 * 6 * 4)
    inputs = {name: value.requires_grad_() for name, value in token_inputs(seqlen, d_state=4).items()}
    scale = decay_scale_for(seqlen)
    y = stm.selective_scan(**inputs, delta_softplus=True, reverse=reverse, decay_scale=scale)
    mirrored = {}
    for name, value in inputs.items():
        value = value.detach().transpose(1, 2) if value.dim() == 3 else value.detach()
        mirrored[name] = (value.flip(-1) if reverse and value.dim() == 3 else value).requires_grad_()
    mirrored_y = loop(**mirrored, delta_softplus=True, decay_scale=scale.flip(0) if reverse else scale)
    assert relative_error(y, token_reference(inputs | {"decay_scale": scale}, reverse=reverse)) <= FLOAT64_BOUND
    grad = torch.randn(y.shape, dtype=torch.float64)
    y.backward(grad)
    mirrored_y.backward(grad.transpose(1, 2).flip(-1) if reverse else grad.transpose(1, 2))
    for name, value in inputs.items():
        expected = mirrored[name].grad
        if expected.dim() == 3:
            expected = (expected.flip(-1) if reverse else expected).transpose(1, 2)
        assert relative_error(value.grad, widen(expected)) <= 1e-12, name


@pytest.mark.parametrize("frozen", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_gradient_with_one_input_frozen(frozen):
    """An input that needs no gradient gets none and disturbs no other."""
    inputs = token_inputs(9)
    every = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    stm.selective_scan(**every, delta_softplus=True).square().sum().backward()
    some = {name: value.clone().requires_grad_(name != frozen) for name, value in inputs.items()}
    stm.selective_scan(**some, delta_softplus=True).square().sum().backward()
    assert some[frozen].grad is None
    assert all(torch.equal(some[name].grad, every[name].grad) for name in inputs if name != frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_meta_and_fake(dtype):
    inputs = token_inputs(7, dtype=dtype)
    y = stm.selective_scan(**{name: v.to("meta") for name, v in inputs.items()}, delta_softplus=True)
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, inputs["u"].shape)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) for name, v in inputs.items()}
        y = stm.selective_scan(**fake, delta_softplus=True, reverse=True)
    assert (y.dtype, y.shape) == (dtype, inputs["u"].shape)


# --- errors ----------------------------------------------------------------------------------

# argument -> its wrong shape and the two extents that the message must name
TOKEN_ERRORS = {
    "delta seqlen": ("delta", (2, 11, 6), ("11", "13")),
    "delta d_inner": ("delta", (2, 13, 7), ("7", "6")),
    "delta batch": ("delta", (3, 13, 6), ("3", "2")),
    "A d_inner": ("A", (7, 16), ("7", "6")),
    "A rank": ("A", (2, 6, 16), ("(2, 6, 16)",)),
    "B d_state": ("B", (2, 13, 15), ("15", "16")),
    "B seqlen": ("B", (2, 12, 16), ("12", "13")),
    "C batch": ("C", (3, 13, 16), ("3", "2")),
    "C d_state": ("C", (2, 13, 15), ("15", "16")),
    "D": ("D", (7,), ("7", "6")),
    "z": ("z", (2, 12, 6), ("12", "13")),
    "delta_bias": ("delta_bias", (7,), ("7", "6")),
    "decay_scale": ("decay_scale", (12,), ("12", "13")),
    "u rank": ("u", (13, 6), ("(13, 6)",)),
}


@pytest.mark.parametrize(("name", "shape", "named"), TOKEN_ERRORS.values(), ids=TOKEN_ERRORS.keys())
def test_token_major_shape_errors(name, shape, named):
    inputs = token_inputs(13)
    inputs[name] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(stm.ShapeError) as error:
        stm.selective_scan(**inputs, delta_softplus=True)
    assert name in str(error.value)
    assert all(value in str(error.value) for value in named), str(error.value)


MAMBA_ERRORS = {
    "delta": ("delta", (2, 4, 30), ("30", "31")),
    "A": ("A", (5, 8), ("5", "4")),
    "B seqlen": ("B", (2, 8, 30), ("30", "31")),
    "B d_state": ("B", (2, 7, 31), ("7", "8")),
    "B groups": ("B", (2, 3, 8, 31), ("3", "4")),
    "B constant": ("B", (4, 7), ("7", "8")),
    "C seqlen": ("C", (2, 8, 30), ("30", "31")),
    "C batch": ("C", (3, 8, 31), ("3", "2")),
    "D": ("D", (5,), ("5", "4")),
    "z": ("z", (2, 5, 31), ("5", "4")),
    "delta_bias": ("delta_bias", (5,), ("5", "4")),
}


@pytest.mark.parametrize(("name", "shape", "named"), MAMBA_ERRORS.values(), ids=MAMBA_ERRORS.keys())
def test_drop_in_shape_errors(name, shape, named):
    inputs = make_inputs(Case(31))
    inputs[name] = torch.ones(shape)
    with pytest.raises(stm.ShapeError) as error:
        stm.selective_scan_fn(**inputs, delta_softplus=True)
    assert all(value in str(error.value) for value in named), str(error.value)
