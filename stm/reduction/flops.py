"""FLOPs of a method, in the convention of `stm.flops`."""

from __future__ import annotations

from typing import Any

from stm.config import VimConfig
from stm.flops import _ends, _one_direction, _projections, gflops_paper, gflops_true

from .base import Reduction


def matching_flops(reduction: Reduction) -> int:
    """Cost of finding and merging, all layers: R-MeeTo's published count for matching methods, ours in its style else."""
    lengths = [reduction.config.seqlen, *reduction.lengths]
    return sum(reduction.matching_flops(lengths[layer], count) for layer, count in reduction.schedule.items())


def merge_matrix_flops(reduction: Reduction) -> int:
    """What merging costs as the exported graph has it: a product N_out r d_model; dropping moves rows and costs none."""
    lengths, total = [reduction.config.seqlen, *reduction.lengths], 0
    for layer, count in reduction.schedule.items():
        total += (lengths[layer] - count) * count * reduction.config.d_model if reduction.merges else 0
    return total


def reduction_gflops_paper(reduction: Reduction, matching: bool = True) -> float:
    """GFLOPs as R-MeeTo and the STM paper print them: one scan direction, with the matching (R-MeeTo r = 2 on ViM-Ti: 1.409)."""
    config = reduction.config
    body = sum(_projections(config, n) + _one_direction(config, n) for n in reduction.lengths)
    return (body + _ends(config) + (matching_flops(reduction) if matching else 0)) / 1e9


def reduction_gflops_true(reduction: Reduction) -> float:
    """GFLOPs with both directions, the matching, and the aligned scan on the whole sequence where a method has one."""
    config = reduction.config
    body = sum(_projections(config, n) + 2 * _one_direction(config, n) for n in reduction.lengths)
    if reduction.aligned:
        scan = 9 * config.d_inner * config.d_state + 2 * config.d_inner
        body += 2 * scan * reduction.token_layers_removed
    return (body + _ends(config) + matching_flops(reduction)) / 1e9


def reduction_summary(reduction: Reduction) -> dict[str, Any]:
    """The figures of `stm.plan_summary` for a method, and its schedule."""
    config: VimConfig = reduction.config
    paper, true = reduction_gflops_paper(reduction), reduction_gflops_true(reduction)
    return {
        "method": reduction.name,
        "model": config.name,
        "image_size": list(config.image_size),
        "schedule": dict(reduction.schedule),
        "seqlen": reduction.lengths,
        "tokens_left": reduction.lengths[-1],
        "token_layers_removed": reduction.token_layers_removed,
        "gflops_paper": round(paper, 4),
        "gflops_paper_without_matching": round(reduction_gflops_paper(reduction, matching=False), 4),
        "gflops_true": round(true, 4),
        "gflops_merge_matrix": round(merge_matrix_flops(reduction) / 1e9, 4),
        "gflops_paper_change": round(paper / gflops_paper(config) - 1, 6),
        "gflops_true_change": round(true / gflops_true(config) - 1, 6),
    }
