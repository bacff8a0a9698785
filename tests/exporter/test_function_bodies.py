"""Each portable op's body on ONNX Runtime against a float64 loop of its definition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.function_bodies import function_body
from exporter.op_schema import DOMAIN, DOMAIN_VERSION, FUSED_OPS, PORTABLE_OPS, OpSpec

from .conftest import run_onnx

OPS = {op.name: op for op in PORTABLE_OPS}
KINDS = {"T": TensorProto.FLOAT, "float": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
Array = np.ndarray


def model_of(spec: OpSpec, opset: int) -> onnx.ModelProto:
    """One node of the op with its body, every axis symbolic."""

    def values(operands: tuple) -> list[onnx.ValueInfoProto]:  # type: ignore[type-arg]
        made = []
        for operand in operands:
            rank = len([axis for axis in operand.axes.split(",") if axis.strip()])
            made.append(helper.make_tensor_value_info(operand.name, KINDS[operand.type], [f"{operand.name}{axis}" for axis in range(rank)]))
        return made

    node = helper.make_node(spec.name, [o.name for o in spec.inputs], [o.name for o in spec.outputs], domain=DOMAIN)
    graph = helper.make_graph([node], "one", values(spec.inputs), values(spec.outputs))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, functions=[function_body(spec.name, opset)], opset_imports=imports, ir_version=10)


# --- the truth, in float64 -------------------------------------------------------------------------------------------


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def conv(x: Array, weight: Array, bias: Array, reverse: bool) -> Array:
    batch, length, inner = x.shape
    y = np.full(x.shape, np.nan)
    for t in range(length):
        total = np.broadcast_to(bias, (batch, inner)).copy()
        for back in range(4):
            other = t + back if reverse else t - back
            if 0 <= other < length:
                total += weight[:, 3 - back] * x[:, other]
        y[:, t] = total / (1 + np.exp(-total))
    return y


def scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, bias: Array, scale: Array | None, linear: bool, reverse: bool) -> Array:
    d = delta + bias if linear else softplus(delta + bias)
    y = np.full(u.shape, np.nan)
    for b in range(u.shape[0]):
        h = np.zeros(A.shape)
        for t in range(u.shape[1])[:: -1 if reverse else 1]:
            s = 1 if scale is None else scale[t]
            h = np.exp(s * d[b, t, :, None] * A) * h + (d[b, t] * u[b, t])[:, None] * B[b, t]
            y[b, t] = h @ C[b, t] + D * u[b, t]
    return y


def weights(name: str, delta: Array, bias: Array, A: Array, B: Array, span: Array, sources: Array, targets: Array) -> Array:
    d = softplus(delta + bias)
    w = np.full((delta.shape[0], len(sources)), np.nan)
    for b in range(len(w)):
        for i, (p, q) in enumerate(zip(sources, targets, strict=True)):
            decay = np.exp((span[i] @ d[b])[:, None] * A)
            bar_p, bar_q = np.outer(d[b, p], B[b, p]), np.outer(d[b, q], B[b, q])
            if name.endswith("Literal"):
                w[b, i] = (decay * bar_p / (bar_q + np.where(bar_q < 0, -1e-6, 1e-6))).mean()
            elif name.endswith("Decay"):
                w[b, i] = decay.mean()
            else:
                w[b, i] = np.clip((decay * bar_p * bar_q).sum() / ((bar_q**2).sum() + 1e-12), 0, 1)
    return w


def tokens(x: Array, w: Array, keep: Array, sources: Array, targets: Array) -> Array:
    y = x.copy()
    for i, (p, q) in enumerate(zip(sources, targets, strict=True)):
        y[:, q] += w[:, i, None] * x[:, p]
    return y[:, keep]


def case(name: str, batch: int, length: int, inner: int, state: int) -> tuple[dict[str, Array], Array]:
    """Inputs (float32 values) and the result in float64."""
    g = np.random.default_rng(length)

    def normal(*shape: int) -> Array:
        return g.standard_normal(shape, dtype=np.float32)

    x = normal(batch, length, inner)
    if name.startswith("StmCausalConv"):
        feeds = {"x": x, "weight": normal(inner, 4), "bias": normal(inner)}
        return feeds, conv(*wide(feeds), reverse=name.endswith("Bwd"))
    A = -np.abs(normal(inner, state)) - np.float32(0.05)
    if name.startswith("StmSelectiveScan"):
        linear = "Linear" in name
        delta = np.abs(x) * np.float32(0.1) if linear else normal(batch, length, inner) * 3
        if not linear:
            delta.flat[0] = 40.0  # softplus is the identity up there
        feeds = {"u": x, "delta": delta, "A": A, "B": normal(batch, length, state), "C": normal(batch, length, state), "D": normal(inner)}
        feeds["delta_bias"] = np.abs(normal(inner)) * np.float32(0.1) if linear else normal(inner)
        scaled = "Scaled" in name
        if scaled:
            feeds["decay_scale"] = g.integers(1, 6, length).astype(np.float32)
        arguments = wide(feeds)
        return feeds, scan(*arguments[:7], arguments[7] if scaled else None, linear, name.endswith("Bwd"))
    if name == "StmRmsNorm":
        feeds = {"x": x * 7, "weight": normal(inner), "epsilon": np.array(1e-5, np.float32)}
        wx, ww, eps = wide(feeds)
        return feeds, wx / np.sqrt((wx**2).mean(-1, keepdims=True) + eps) * ww
    length = max(length, 5)
    sources, targets = np.array([0, 1, length - 1]), np.array([2, 2, length - 2])
    if name == "StmMergeTokens":
        keep = np.setdiff1d(np.arange(length), sources)
        feeds = {"x": normal(batch, length, inner), "weights": normal(batch, 3), "keep": keep, "sources": sources, "targets": targets}
        return feeds, tokens(*wide(feeds))
    span = np.zeros((3, length), np.float32)
    span[0, 1:3], span[1, 2], span[2, length - 2] = 1, 2, 1
    B = normal(batch, length, state)
    B[:, 1] = 0  # quotient 0 / something
    feeds = {"delta": normal(batch, length, inner), "delta_bias": normal(inner), "A": A, "B": B, "span": span, "sources": sources, "targets": targets}
    return feeds, weights(name, *wide(feeds))


def wide(feeds: dict[str, Array]) -> list[Array]:
    return [value.astype(np.float64) if value.dtype == np.float32 else value for value in feeds.values()]


SIZES = {"base": (2, 63, 6, 4), "one token": (1, 1, 1, 1), "short": (3, 2, 5, 3), "odd": (1, 197, 3, 16), "long": (1, 1025, 2, 2)}


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("name", OPS)
def test_body_equals_its_definition(name: str, opset: int) -> None:
    model = model_of(OPS[name], opset)
    onnx.checker.check_model(model, full_check=True)
    for batch, length, inner, state in SIZES.values():
        feeds, want = case(name, batch, length, inner, state)
        (got,) = run_onnx(model, **feeds)
        assert got.shape == want.shape
        scale = np.abs(want).max() + 1e-30
        assert np.abs(got - want).max() <= 3e-6 * scale + 1e-7, (batch, length, inner, state)


def test_merge_tokens_takes_weights_for_all_images_at_once() -> None:
    feeds, _ = case("StmMergeTokens", 3, 9, 5, 2)
    feeds["weights"] = feeds["weights"][:1]
    (got,) = run_onnx(model_of(OPS["StmMergeTokens"], 18), **feeds)
    full = {**feeds, "weights": np.repeat(feeds["weights"], 3, 0)}
    np.testing.assert_allclose(got, tokens(*wide(full)), rtol=1e-5, atol=1e-6)


# --- form ------------------------------------------------------------------------------------------------------------


def nodes(holder: onnx.FunctionProto | onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes(graph)


def internal_names(function: onnx.FunctionProto) -> set[str]:
    names = {name for node in nodes(function) for name in node.output}
    for node in nodes(function):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= {value.name for value in (*attribute.g.input, *attribute.g.output)} | {attribute.g.name}
    return names - set(function.input) - set(function.output)


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_no_internal_name_is_shared(opset: int) -> None:
    """TensorRT before 10.8 binds a body's name to an outer tensor of the same name."""
    seen: dict[str, str] = {}
    for name in OPS:
        function = function_body(name, opset)
        assert [entry.version for entry in function.opset_import if entry.domain == ""] == [opset]
        for internal in internal_names(function):
            assert internal not in seen, f"{internal} is in {name} and {seen[internal]}"
            assert internal.startswith(f"{name}_")
            seen[internal] = name


@pytest.mark.parametrize("name", OPS)
def test_bodies_are_flat_and_free_of_attributes(name: str) -> None:
    function = function_body(name, 18)
    assert (function.name, function.domain) == (name, DOMAIN)
    assert not function.attribute
    assert not function.attribute_proto
    assert list(function.input) == [operand.name for operand in OPS[name].inputs]
    assert list(function.output) == [operand.name for operand in OPS[name].outputs]
    assert function.doc_string
    for node in nodes(function):
        assert node.domain == ""
        assert node.op_type not in ("Loop", "If")
        assert not any(attribute.ref_attr_name for attribute in node.attribute)
    assert len(list(nodes(function))) < 60, "nothing is unrolled"
    onnx.checker.check_function(function, context(18))


def context(opset: int) -> onnx.checker.C.CheckerContext:
    made = onnx.checker.C.CheckerContext()
    made.ir_version = 10
    made.opset_imports = {"": opset, DOMAIN: DOMAIN_VERSION}
    return made


def test_fused_ops_have_no_body() -> None:
    for spec in FUSED_OPS:
        with pytest.raises(KeyError):
            function_body(spec.name, 18)
