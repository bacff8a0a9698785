"""What the Sequential Token Merging paper (arXiv 2509.22691) prints in its tables 2 and 3, for the plans that fit it.

ImageNet-1k validation, 224 px, official weights, no training after merging. The paper names plans by rates only. Which plan a row
used is inferred from its printed FLOPs (a fit, not a proof): `source` says so. Cells that we could not read are absent.
"""

from __future__ import annotations

from dataclasses import dataclass

from stm import MergePlan, VimConfig, make_plan
from stm.plan import PRESETS


@dataclass(frozen=True)
class Published:
    """One cell: top-1 in percent; `flops` as printed, "" where we have no figure."""

    top1: float
    flops: str
    source: str


_VIM = "table 2, ViM without merging"
_FIT = "printed under 20 %; its FLOPs fit this plan"
_TINY_FIT = "printed under 20 %; its 1.28 G and accuracy are those of 15 %, k = 1"
_SAME = "the paper's row is nearly constant over the rates: no target"
_UNMERGED = {
    "vim-t": Published(76.1, "1.45 G", _VIM),
    "vim-s": Published(80.5, "5.08 G", _VIM),
    "vim-b": Published(81.9, "18.87 G", _VIM),
}
# (model, preset) -> cells; both sides of the class token, rule `edge`.
_MERGED: dict[tuple[str, str], tuple[Published, ...]] = {
    ("vim-t", "stm-15"): (Published(75.1, "1.28 G", f"table 2, STM ({_TINY_FIT})"), Published(75.1, "", "table 3, 15 %")),
    ("vim-t", "stm-20"): (Published(75.0, "", "table 3, 20 %"),),
    ("vim-t", "stm-30"): (Published(73.3, "", "table 3, 30 %"),),
    ("vim-t", "stm-40"): (Published(72.2, "", "table 3, 40 % (its -22.3 % FLOPs fit this plan)"),),
    ("vim-s", "stm-15"): (Published(79.1, "", f"table 3, 15 % ({_SAME})"),),
    ("vim-s", "stm-20"): (Published(79.3, "4.23 G", f"table 2, STM ({_FIT})"), Published(79.3, "", "table 3, 20 %")),
    ("vim-s", "stm-30"): (Published(79.1, "", f"table 3, 30 % ({_SAME})"),),
    ("vim-s", "stm-40"): (Published(79.1, "", f"table 3, 40 % ({_SAME})"),),
    ("vim-b", "stm-20"): (Published(79.8, "15.73 G", f"table 2, STM ({_FIT})"),),
}
_ODD = "pairs of equal figures, higher at higher rates: no target"
_ONE_SIDED = {
    ("vim-t", preset): (Published(top1, "", f"table 3, one side, {rate} % ({_ODD})"),)
    for preset, rate, top1 in (("stm-15", 15, 31.1), ("stm-20", 20, 31.1), ("stm-30", 30, 34.6), ("stm-40", 40, 34.6))
}
# (model, method) at its preset `table2`, without retraining.
_RIVALS = {
    ("vim-t", "r-meeto"): Published(52.3, "1.41 G", "table 2, R-MeeTo (r = 2 every second layer, by its FLOPs)"),
    ("vim-s", "r-meeto"): Published(78.7, "", "table 2, R-MeeTo (r = 2 every second layer)"),
    ("vim-b", "r-meeto"): Published(79.1, "-4.7 %", "table 2, R-MeeTo (r = 2 every second layer, by its FLOPs)"),
    ("vim-t", "hsa"): Published(49.3, "1.29 G", "table 2, Hidden State Alignment (one cut after layer 10, by its FLOPs)"),
    ("vim-s", "hsa"): Published(72.0, "3.60 G", "table 2, Hidden State Alignment (keep 0.75 before layers 6, 12, 18, by its FLOPs)"),
    ("vim-b", "hsa"): Published(79.6, "-12.1 %", "table 2, Hidden State Alignment (48 tokens before layer 12, by its FLOPs)"),
}


def _comparable(config: VimConfig) -> bool:
    return config.image_size == (224, 224) and config.num_classes == 1000


def published_plan(config: VimConfig, plan: MergePlan | None) -> tuple[Published, ...]:
    """Cells for a model under a plan; the paper's weights are hidden-states protection, so others match nothing."""
    if not _comparable(config):
        return ()
    if plan is None or not plan.merges:
        return (_UNMERGED[config.name],) if config.name in _UNMERGED else ()
    if plan.weights not in ("hsp", "hsp_literal"):
        return ()
    for rule, table in (("edge", _MERGED), ("one_sided", _ONE_SIDED)):
        for preset in PRESETS:
            if (config.name, preset) in table and make_plan(config, preset=preset, rule=rule, weights=plan.weights) == plan:
                return table[config.name, preset]
    return ()


def published_rival(config: VimConfig, method: str, preset: str) -> tuple[Published, ...]:
    """Cells for a model under a rival of `stm.reduction`."""
    found = _RIVALS.get((config.name, method)) if preset == "table2" and _comparable(config) else None
    return (found,) if found else ()
