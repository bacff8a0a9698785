"""Bodies of the portable ops in standard ONNX ops: what any runtime without our library runs.

Written in ONNX's text syntax. Rules that deploy to every runtime: flat, no attribute references, no Loop and nothing
unrolled (ONNX Scan instead), every internal name unique to its function (TensorRT before 10.8 binds a body's name to
an outer tensor of the same name).
"""

from __future__ import annotations

import onnx
from onnx import parser

from .op_schema import DOMAIN, OPS, conv_op_name, scan_op_name

_HEADER = '<opset_import: ["" : {opset}], domain: "stm">\n'


def _named(prefix: str, text: str) -> str:
    """`%` in a body stands for its prefix."""
    return text.replace("%", prefix + "_")


def _conv(name: str, reverse: bool) -> str:
    # starts of the four taps on the padded sequence; padding is 3 tokens before (fwd) or after (bwd)
    pads = "{0, 0, 0, 0, 3, 0}" if reverse else "{0, 3, 0, 0, 0, 0}"
    lines = [f"{name} (x, weight, bias) => (y) {{", f"  %pads = Constant <value = int64[6] {pads}> ()", "  %padded = Pad (x, %pads)"]
    lines += ["  %taps = Transpose <perm = [1, 0]> (weight)", "  %axis = Constant <value = int64[1] {1}> ()"]
    lines += ["  %length = Shape <start = 1, end = 2> (x)"]
    for tap in range(4):
        start = 3 - tap if reverse else tap
        lines += [
            f"  %start{tap} = Constant <value = int64[1] {{{start}}}> ()",
            f"  %stop{tap} = Add (%length, %start{tap})",
            f"  %part{tap} = Slice (%padded, %start{tap}, %stop{tap}, %axis)",
            f"  %number{tap} = Constant <value = int64 {{{tap}}}> ()",
            f"  %tap{tap} = Gather <axis = 0> (%taps, %number{tap})",
            f"  %product{tap} = Mul (%part{tap}, %tap{tap})",
        ]
    lines += [
        "  %sum0 = Add (%product0, bias)",
        "  %sum1 = Add (%sum0, %product1)",
        "  %sum2 = Add (%sum1, %product2)",
        "  %sum3 = Add (%sum2, %product3)",
        "  %gate = Sigmoid (%sum3)",
        "  y = Mul (%sum3, %gate)",
        "}",
    ]
    return "\n".join(lines)


def _scan(name: str, reverse: bool, scaled: bool, softplus: bool) -> str:
    """ONNX Scan over tokens; `scan_*_directions` walk backwards, so nothing is flipped."""
    count, way = (5 if scaled else 4), int(reverse)
    ones, ways = ", ".join("1" * count), ", ".join(str(way) * count)
    scaling = """
  %scale_axes = Constant <value = int64[1] {1}> ()
  %scale = Unsqueeze (decay_scale, %scale_axes)
  %timed = Mul (%d, %scale)"""
    return f"""
{name} (u, delta, A, B, C, D, delta_bias{", decay_scale" if scaled else ""}) => (y) {{
  %raw = Add (delta, delta_bias)
  %d = {"Softplus" if softplus else "Identity"} (%raw)
  %fed = Mul (%d, u){scaling if scaled else ""}
  %last = Constant <value = int64[1] {{-1}}> ()
  %one = Constant <value = int64[1] {{1}}> ()
  %batch = Shape <start = 0, end = 1> (u)
  %state = Shape (A)
  %extent = Concat <axis = 0> (%batch, %state)
  %zero = ConstantOfShape <value = float[1] {{0}}> (%extent)
  %h_end, %ys = Scan <
    num_scan_inputs = {count},
    scan_input_axes = [{ones}], scan_input_directions = [{ways}],
    scan_output_axes = [1], scan_output_directions = [{way}],
    body = %step (float[?, ?, ?] %h, float[?, ?] %dt, float[?, ?] %ft, float[?, ?] %bt, float[?, ?] %ct{", float[?, ?] %st" if scaled else ""})
           => (float[?, ?, ?] %h_next, float[?, ?] %y_now) {{
      %dt3 = Unsqueeze ({"%st" if scaled else "%dt"}, %last)
      %exponent = Mul (%dt3, A)
      %decay = Exp (%exponent)
      %kept = Mul (%decay, %h)
      %ft3 = Unsqueeze (%ft, %last)
      %bt3 = Unsqueeze (%bt, %one)
      %new = Mul (%ft3, %bt3)
      %h_next = Add (%kept, %new)
      %ct3 = Unsqueeze (%ct, %last)
      %y3 = MatMul (%h_next, %ct3)
      %y_now = Squeeze (%y3, %last)
    }}
  > (%zero, %d, %fed, B, C{", %timed" if scaled else ""})
  %skip = Mul (u, D)
  y = Add (%ys, %skip)
}}
"""


_NORM = """
StmRmsNorm (x, weight, epsilon) => (y) {
  %square = Mul (x, x)
  %axes = Constant <value = int64[1] {-1}> ()
  %mean = ReduceMean <keepdims = 1> (%square, %axes)
  %safe = Add (%mean, epsilon)
  %root = Sqrt (%safe)
  %scaled = Div (x, %root)
  y = Mul (%scaled, weight)
}
"""

_WEIGHTS_HEAD = """
{name} (delta, delta_bias, A, B, span, sources, targets) => (w) {{
  %raw = Add (delta, delta_bias)
  %d = Softplus (%raw)
  %sigma = MatMul (span, %d)
  %last = Constant <value = int64[1] {{-1}}> ()
  %two = Constant <value = int64[1] {{2}}> ()
  %zero = Constant <value = float {{0}}> ()
  %one = Constant <value = float {{1}}> ()
  %sigma4 = Unsqueeze (%sigma, %last)
  %exponent = Mul (%sigma4, A)
  %decay = Exp (%exponent)
"""

_WEIGHTS_PAIRS = """
  %dp = Gather <axis = 1> (%d, sources)
  %dq = Gather <axis = 1> (%d, targets)
  %bp = Gather <axis = 1> (B, sources)
  %bq = Gather <axis = 1> (B, targets)
"""

_WEIGHTS_TAIL = {
    "StmMergeWeightsDecay": """
  %axes = Constant <value = int64[2] {-2, -1}> ()
  %mean = ReduceMean <keepdims = 0> (%decay, %axes)
  w = Clip (%mean, %zero, %one)
}
""",
    "StmMergeWeightsHsp": _WEIGHTS_PAIRS
    + """
  %bb = Mul (%bp, %bq)
  %bb4 = Unsqueeze (%bb, %last)
  %inner4 = MatMul (%decay, %bb4)
  %inner = Squeeze (%inner4, %last)
  %dd = Mul (%dp, %dq)
  %terms = Mul (%inner, %dd)
  %above = ReduceSum <keepdims = 0> (%terms, %last)
  %dq2 = ReduceSumSquare <keepdims = 0> (%dq, %last)
  %bq2 = ReduceSumSquare <keepdims = 0> (%bq, %last)
  %norm = Mul (%dq2, %bq2)
  %tiny = Constant <value = float {1e-12}> ()
  %below = Add (%norm, %tiny)
  %quotient = Div (%above, %below)
  w = Clip (%quotient, %zero, %one)
}
""",
    "StmMergeWeightsHspLiteral": _WEIGHTS_PAIRS
    + """
  %dp4 = Unsqueeze (%dp, %last)
  %dq4 = Unsqueeze (%dq, %last)
  %bp4 = Unsqueeze (%bp, %two)
  %bq4 = Unsqueeze (%bq, %two)
  %source = Mul (%dp4, %bp4)
  %target = Mul (%dq4, %bq4)
  %negative = Less (%target, %zero)
  %up = Constant <value = float {1e-6}> ()
  %down = Constant <value = float {-1e-6}> ()
  %away = Where (%negative, %down, %up)
  %below = Add (%target, %away)
  %top = Mul (%decay, %source)
  %quotient = Div (%top, %below)
  %axes = Constant <value = int64[2] {-2, -1}> ()
  w = ReduceMean <keepdims = 0> (%quotient, %axes)
}
""",
}

_MERGE = """
StmMergeTokens (x, weights, keep, sources, targets) => (y) {
  %stay = Gather <axis = 1> (x, keep)
  %move = Gather <axis = 1> (x, sources)
  %last = Constant <value = int64[1] {-1}> ()
  %weights3 = Unsqueeze (weights, %last)
  %weighted = Mul (%move, %weights3)
  %keep2 = Unsqueeze (keep, %last)
  %equal = Equal (%keep2, targets)
  %scatter = Cast <to = 1> (%equal)
  %added = MatMul (%scatter, %weighted)
  y = Add (%stay, %added)
}
"""


def _texts() -> dict[str, str]:
    texts = {name: _conv(name, reverse) for reverse in (False, True) for name in [conv_op_name(reverse)]}
    for softplus in (True, False):
        for scaled in (False, True):
            for reverse in (False, True):
                name = scan_op_name(reverse, scaled, softplus)
                texts[name] = _scan(name, reverse, scaled, softplus)
    texts["StmRmsNorm"] = _NORM
    for name, tail in _WEIGHTS_TAIL.items():
        texts[name] = _WEIGHTS_HEAD.format(name=name) + tail
    texts["StmMergeTokens"] = _MERGE
    return texts


def function_body(name: str, opset: int) -> onnx.FunctionProto:
    """The FunctionProto of a portable op at this opset (18 to 20).

    Raises:
        KeyError: no portable op of that name.
    """
    texts = _texts()
    function = parser.parse_function(_HEADER.format(opset=opset) + _named(name, texts[name]))
    function.domain = DOMAIN
    function.doc_string = OPS[name].doc
    return function
