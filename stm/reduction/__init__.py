"""Token reduction that looks at the image: the rivals of merge plans, re-implemented from their descriptions.

`create_reduction` makes a method from a name and a preset, `ReducedVim` (or `with_reduction`) runs a model under it,
`freeze` turns it into a MergePlan. `exporter.onnx_export.export_onnx` exports a ReducedVim as it does a merged model.
"""

from .base import Reduced, Reduction, ScanState, Selection, Tokens
from .famba_v import FambaV, strategy_layers
from .flops import matching_flops, merge_matrix_flops, reduction_gflops_paper, reduction_gflops_true, reduction_summary
from .freezing import freeze
from .hidden_state_alignment import Alignment, HiddenStateAlignment
from .model import ReducedMixer, ReducedVim, with_reduction
from .mtr import MTR, BalancedMTR
from .r_meeto import RMeeTo, interval_layers
from .random_drop import RandomDrop
from .registry import (
    EQUAL_TOKEN_LAYERS,
    METHODS,
    PRESETS,
    create_reduction,
    even_schedule,
    from_description,
    list_reductions,
    load_reduction,
    method_schedule,
    parse_reduction,
    save_reduction,
    schedule_text,
    schedules_table,
)
from .token_recognition import TokenRecognition, keep_schedule
from .tome import BalancedToMe, ToMe
from .utr import UTR

__all__ = [
    "EQUAL_TOKEN_LAYERS",
    "METHODS",
    "MTR",
    "PRESETS",
    "UTR",
    "Alignment",
    "BalancedMTR",
    "BalancedToMe",
    "FambaV",
    "HiddenStateAlignment",
    "RMeeTo",
    "RandomDrop",
    "Reduced",
    "ReducedMixer",
    "ReducedVim",
    "Reduction",
    "ScanState",
    "Selection",
    "ToMe",
    "TokenRecognition",
    "Tokens",
    "create_reduction",
    "even_schedule",
    "freeze",
    "from_description",
    "interval_layers",
    "keep_schedule",
    "list_reductions",
    "load_reduction",
    "matching_flops",
    "merge_matrix_flops",
    "method_schedule",
    "parse_reduction",
    "reduction_gflops_paper",
    "reduction_gflops_true",
    "reduction_summary",
    "save_reduction",
    "schedule_text",
    "schedules_table",
    "strategy_layers",
    "with_reduction",
]
