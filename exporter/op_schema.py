"""Our ONNX ops: one table from which exporter, bodies, wrappers, docs and tests derive.

Names are unique in the world because TensorRT ignores domains. Two stages:

`portable` ops leave the exporter and carry a function body in standard ops, so that any ONNX runtime runs them; they
have no attributes and no optional inputs. `fused` ops exist after the `tensorrt` lowering only: they are what the
plugin does best, and take whole GEMM outputs (TensorRT merges GEMMs on one input and pays copies to cut them apart).
Layout is token-major, (batch, seqlen, channels). fwd/bwd is the direction of the walk; bwd needs no flips.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import defs

DOMAIN = "stm"
INPUT, OUTPUT = "images", "logits"  # of every file and engine we make
DOMAIN_VERSION = 1
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""

_TYPES = {
    "T": "tensor(float)",
    "float": "tensor(float)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}


@dataclass(frozen=True)
class Operand:
    """A tensor of an op. `type` is T (the activation type), float, int32 or int64; `when` names the attribute
    setting that brings a fused op's optional operand."""

    name: str
    axes: str
    type: str = "T"
    when: str = ""


@dataclass(frozen=True)
class Attribute:
    name: str
    type: str  # INT, FLOAT or STRING
    default: int | float | str
    doc: str


@dataclass(frozen=True)
class OpSpec:
    name: str
    doc: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...] = ()
    fused: bool = False

    def schema(self) -> defs.OpSchema:
        """The onnx schema of a portable op, for the torch exporter."""
        parameter = defs.OpSchema.FormalParameter
        return defs.OpSchema(
            self.name,
            DOMAIN,
            DOMAIN_VERSION,
            self.doc,
            inputs=[parameter(o.name, _TYPES[o.type]) for o in self.inputs],
            outputs=[parameter(o.name, _TYPES[o.type]) for o in self.outputs],
        )


_X = Operand("x", "batch, seqlen, d_inner")
_SCAN_INPUTS = (
    Operand("u", "batch, seqlen, d_inner"),
    Operand("delta", "batch, seqlen, d_inner"),
    Operand("A", "d_inner, d_state"),
    Operand("B", "batch, seqlen, d_state"),
    Operand("C", "batch, seqlen, d_state"),
    Operand("D", "d_inner"),
    Operand("delta_bias", "d_inner"),
)
_SCALE = Operand("decay_scale", "seqlen")
_Y = (Operand("y", "batch, seqlen, d_inner"),)


def _scan(direction: str, scaled: bool, softplus: bool) -> OpSpec:
    step = "d_t = softplus(delta_t + delta_bias)" if softplus else "d_t = delta_t + delta_bias"
    decay = "exp(s_t d_t A)" if scaled else "exp(d_t A)"
    order = "from the first token to the last" if direction == "Fwd" else "from the last token to the first"
    name = "StmSelectiveScan" + ("" if softplus else "Linear") + ("Scaled" if scaled else "") + direction
    return OpSpec(name, f"{step}; h_t = {decay} h + d_t B_t u_t; y_t = C_t h_t + D u_t, {order}.", _SCAN_INPUTS + ((_SCALE,) if scaled else ()), _Y)


def _weights(mode: str, doc: str) -> OpSpec:
    return OpSpec(
        f"StmMergeWeights{mode}",
        doc,
        (
            Operand("delta", "batch, tokens, d_inner"),
            Operand("delta_bias", "d_inner"),
            Operand("A", "d_inner, d_state"),
            Operand("B", "batch, tokens, d_state"),
            Operand("span", "sources, tokens"),
            Operand("sources", "sources", "int64"),
            Operand("targets", "sources", "int64"),
        ),
        (Operand("w", "batch, sources"),),
    )


_CONV_INPUTS = (_X, Operand("weight", "d_inner, 4"), Operand("bias", "d_inner"))

PORTABLE_OPS = (
    OpSpec("StmCausalConvSiluFwd", "silu of a causal depthwise convolution over tokens.", _CONV_INPUTS, _Y),
    OpSpec("StmCausalConvSiluBwd", "The same, looking at later tokens.", _CONV_INPUTS, _Y),
    *(_scan(direction, scaled, softplus) for softplus in (True, False) for scaled in (False, True) for direction in ("Fwd", "Bwd")),
    OpSpec(
        "StmRmsNorm",
        "x / sqrt(mean(x^2) + epsilon) * weight over the last axis.",
        (Operand("x", "batch, seqlen, d_model"), Operand("weight", "d_model"), Operand("epsilon", "")),
        (Operand("y", "batch, seqlen, d_model"),),
    ),
    _weights("Hsp", "Least-squares merge weights <Abar Bbar_p, Bbar_q> / <Bbar_q, Bbar_q>, clamped to [0, 1] (STM eq. 11)."),
    _weights("HspLiteral", "Mean of the quotients Abar Bbar_p / Bbar_q, the STM paper's text taken literally."),
    _weights("Decay", "Mean of the decay Abar between source and target."),
    OpSpec(
        "StmMergeTokens",
        "x_q += sum_p w_p x_p, then the sources vanish; order is kept (STM eq. 11).",
        (
            Operand("x", "batch, seqlen, d_model"),
            Operand("weights", "batch or 1, sources"),
            Operand("keep", "seqlen_out", "int64"),
            Operand("sources", "sources", "int64"),
            Operand("targets", "sources", "int64"),
        ),
        (Operand("y", "batch, seqlen_out, d_model"),),
    ),
)

_MIXER_WEIGHTS = (Operand("conv_weight", "2, d_inner, 4", "float"), Operand("conv_bias", "2, d_inner", "float"))

FUSED_OPS = (
    OpSpec(
        "StmPatchRows",
        "The patches of images as rows of a matrix (im2row), row-major, in the order (channel, y, x) of the convolution's weight; "
        "zeros for the class token.",
        (Operand("images", "batch, 3, height, width", "float"),),
        (Operand("rows", "batch, seqlen, 3 patch_size^2"),),
        (
            Attribute("patch_size", "INT", 16, "side of a patch in pixels"),
            Attribute("stride", "INT", 16, "pixels from a patch to the next; patches overlap if it is smaller than they are"),
            Attribute("cls_index", "INT", -1, "-1: patches only; c: row c of an image is the class token's"),
            Attribute("precision", "STRING", "fp32", "T, which no input shows: fp32, fp16 or bf16"),
        ),
        fused=True,
    ),
    OpSpec(
        "StmConvXProj",
        "Both directions' conv + SiLU and x_proj; rows of x_dbl are dt, B, C, padded to a multiple of 8.",
        (Operand("xz", "batch, seqlen, 2 d_inner"), *_MIXER_WEIGHTS, Operand("x_proj_weight", "2, row, d_inner")),
        (Operand("x_dbl", "2, batch, seqlen, row"),),
        fused=True,
    ),
    OpSpec(
        "StmMambaScan",
        "Both directions from x_dbl to the gated sum: conv + SiLU again, dt_proj, softplus, scan, D, sum, gate (no halving); "
        "and the merge weights of the next layer.",
        (
            Operand("xz", "batch, seqlen, 2 d_inner"),
            Operand("x_dbl", "2, batch, seqlen, row"),
            *_MIXER_WEIGHTS,
            Operand("dt_weight", "2, d_inner, dt_rank"),
            Operand("dt_bias", "2, d_inner", "float"),
            Operand("A", "2, d_inner, d_state", "float"),
            Operand("D", "2, d_inner", "float"),
            Operand("merge_pairs", "sources, 2", "int32", "weight_mode > 0"),
            Operand("decay_scale", "seqlen", "float", "scaled_decay = 1"),
        ),
        (Operand("y", "batch, seqlen or 1, d_inner"), Operand("merge_weights", "batch, sources", "float", "weight_mode > 0")),
        (
            Attribute("cls_index", "INT", -1, "-1: every token; c: only token c, y is (batch, 1, d_inner)"),
            Attribute("weight_mode", "INT", 0, "0 none, 1 hsp, 2 decay, 3 hsp_literal"),
            Attribute("scaled_decay", "INT", 0, "1: the last input scales the decay of each token"),
        ),
        fused=True,
    ),
    OpSpec(
        "StmAddMergeNorm",
        "Residual add, token merge, RMSNorm in one pass, in float32.",
        (
            Operand("residual", "batch or 1, seqlen, d_model", "float"),
            Operand("hidden", "batch, seqlen or 1, d_model"),
            Operand("norm_weight", "d_model", "float"),
            Operand("merge_weights", "batch or 1, sources", "float", "merge = edge or table"),
            Operand("begin", "seqlen_out + 1", "int32", "merge = table"),
            Operand("members", "members", "int32", "merge = table"),
            Operand("member_weight", "members", "int32", "merge = table"),
        ),
        (Operand("residual_out", "batch, seqlen_out, d_model", "float"), Operand("normed", "batch, seqlen_out, d_model")),
        (
            Attribute("merge", "STRING", "none", "none, edge (sources are the outermost tokens) or table"),
            Attribute("left", "INT", 0, "edge: tokens 0..left-1 merge into token left"),
            Attribute("right", "INT", 0, "edge: the last `right` tokens merge into the one before them"),
            Attribute("out_len", "INT", 0, "table: seqlen_out"),
            Attribute("cls_index", "INT", -1, "c: residual token c with hidden token 0, seqlen_out = 1"),
            Attribute("epsilon", "FLOAT", 1e-5, "of the norm"),
        ),
        fused=True,
    ),
    OpSpec(
        "StmLinear",
        "y = x weight^T, sums in float32, for few tokens: fp16 and bf16. A norm between two of them needs no node: the first adds the "
        "residual and puts out the sum, its squares over each 16 columns and, as y, a sixteenth of it; the second multiplies its rows "
        "by 16 / sqrt(mean of squares + epsilon), the norm's weight being part of its own. Tokens at both ends may merge in between (edge "
        "rule): the first merges its sums.",
        (
            Operand("x", "batch, seqlen, in_features"),
            Operand("weight", "out_features, in_features"),
            Operand("squares", "batch, seqlen, in_features / 16", "float", "normed = 1"),
            Operand("residual", "batch, seqlen, out_features", "float", "adds = 1"),
            Operand("merge_weights", "batch or 1, sources", "float", "left or right > 0"),
        ),
        (
            Operand("y", "batch, seqlen - left - right, out_features"),
            Operand("residual_out", "batch, seqlen - left - right, out_features", "float", "adds = 1"),
            Operand("squares_out", "batch, seqlen - left - right, out_features / 16", "float", "adds = 1"),
        ),
        (
            Attribute("normed", "INT", 0, "1: squares normalise the rows of y"),
            Attribute("adds", "INT", 0, "1: y is a sixteenth of the sum with the residual"),
            Attribute("epsilon", "FLOAT", 1e-5, "of the norm"),
            Attribute("left", "INT", 0, "tokens of the sum merged on the left, needs adds = 1"),
            Attribute("right", "INT", 0, "tokens of the sum merged on the right, needs adds = 1"),
        ),
        fused=True,
    ),
)

OPS = {op.name: op for op in PORTABLE_OPS + FUSED_OPS}
WEIGHT_MODE_NUMBERS = {"none": 0, "hsp": 1, "decay": 2, "hsp_literal": 3}
WEIGHT_OPS = {"hsp": "StmMergeWeightsHsp", "hsp_literal": "StmMergeWeightsHspLiteral", "decay": "StmMergeWeightsDecay"}


def scan_op_name(reverse: bool, scaled: bool = False, softplus: bool = True) -> str:
    return "StmSelectiveScan" + ("" if softplus else "Linear") + ("Scaled" if scaled else "") + ("Bwd" if reverse else "Fwd")


def conv_op_name(reverse: bool) -> str:
    return "StmCausalConvSilu" + ("Bwd" if reverse else "Fwd")
