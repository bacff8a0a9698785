"""FLOP counts of a Vision Mamba under a merge plan, as the papers count and as the network runs.

Both counters use the convention of R-MeeTo (arXiv 2412.12496), which the STM paper's printed figures follow:
one multiply-accumulate counts one, the scan counts 9 a channel and state, norms, SiLU, gating, softplus and
residual adds count nothing, and the patch embedding is charged for seqlen instead of seqlen - 1 tokens.
"""

from __future__ import annotations

from typing import Any

from .config import VimConfig
from .plan import MergePlan


def _projections(config: VimConfig, tokens: int) -> int:
    return 3 * config.expand * tokens * config.d_model**2


def _one_direction(config: VimConfig, tokens: int) -> int:
    inner, state, rank = config.d_inner, config.d_state, config.dt_rank
    conv = (tokens + config.d_conv - 1) * inner * config.d_conv
    x_proj = tokens * inner * (rank + 2 * state)
    dt_proj = tokens * rank * inner
    scan = 9 * tokens * inner * state + 2 * tokens * inner
    return conv + x_proj + dt_proj + scan


def _ends(config: VimConfig) -> int:
    return config.seqlen * config.d_model * 3 * config.patch_size**2 + config.num_classes * config.d_model


def merge_flops(config: VimConfig, plan: MergePlan) -> int:
    """Cost of the merge itself: 5 d_inner d_state a source for a weight from the scan (its decay, the exponential, two
    dot products), 2 for `decay`, nothing for fixed weights; and d_model to add the source."""
    a_weight = {"hsp": 5, "hsp_literal": 5, "decay": 2}.get(plan.weights, 0) * config.d_inner * config.d_state
    return sum(plan.removed(layer) for layer in plan.layers) * (a_weight + config.d_model)


def gflops_paper(config: VimConfig, plan: MergePlan | None = None) -> float:
    """GFLOPs as the STM paper prints them: one scan direction only (ViM-Ti/S/B 1.45 / 5.08 / 18.87)."""
    lengths = plan.lengths if plan else [config.seqlen] * config.depth
    return (sum(_projections(config, n) + _one_direction(config, n) for n in lengths) + _ends(config)) / 1e9


def gflops_true(config: VimConfig, plan: MergePlan | None = None) -> float:
    """GFLOPs with both scan directions and the merge (ViM-Ti/S/B 1.82 / 5.91 / 20.89 unmerged).

    The last layer is counted on all its tokens, as in `gflops_paper`, so that figures of plans compare; the
    class-token-only last layer saves up to 1/24 more.
    """
    lengths = plan.lengths if plan else [config.seqlen] * config.depth
    body = sum(_projections(config, n) + 2 * _one_direction(config, n) for n in lengths)
    return (body + _ends(config) + (merge_flops(config, plan) if plan else 0)) / 1e9


def plan_summary(config: VimConfig, plan: MergePlan | None) -> dict[str, Any]:
    """The figures that every command prints and `--json` names (DESIGN section 3)."""
    lengths = plan.lengths if plan else [config.seqlen] * config.depth
    base_paper, base_true = gflops_paper(config), gflops_true(config)
    paper, true = gflops_paper(config, plan), gflops_true(config, plan)
    return {
        "model": config.name,
        "image_size": list(config.image_size),
        "weights": plan.weights if plan else None,
        "seqlen": lengths,
        "cls_index": plan.cls_positions if plan else [config.cls_index] * config.depth,
        "tokens_left": lengths[-1],
        "token_layers_removed": sum(config.seqlen - n for n in lengths),
        "gflops_paper": round(paper, 4),
        "gflops_true": round(true, 4),
        "gflops_paper_change": round(paper / base_paper - 1, 6),
        "gflops_true_change": round(true / base_true - 1, 6),
    }
