"""Vision Mamba with Sequential Token Merging, in torch alone.

`create_model` makes a model from a name, weights and a merge plan; `exporter` turns it into ONNX and TensorRT.

Names load on first use, so that what needs no torch (plans, errors, checking an engine) runs without it.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .calibration import calibrate_constants as calibrate_constants
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import Provenance as Provenance
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import resize_pos_embed as resize_pos_embed
    from .checkpoint import state_dict_sha256 as state_dict_sha256
    from .config import VimConfig as VimConfig
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import MissingDependencyError as MissingDependencyError
    from .errors import PlanError as PlanError
    from .errors import ShapeError as ShapeError
    from .errors import StmError as StmError
    from .factory import create_model as create_model
    from .factory import with_plan as with_plan
    from .flops import gflops_paper as gflops_paper
    from .flops import gflops_true as gflops_true
    from .flops import plan_summary as plan_summary
    from .plan import PRESETS as PRESETS
    from .plan import RULES as RULES
    from .plan import WEIGHT_MODES as WEIGHT_MODES
    from .plan import Group as Group
    from .plan import MergePlan as MergePlan
    from .plan import make_plan as make_plan
    from .registry import list_models as list_models
    from .registry import model_config as model_config
    from .scan import selective_scan as selective_scan
    from .scan import selective_scan_fn as selective_scan_fn
    from .version import __version__ as __version__
    from .vim import VisionMamba as VisionMamba

_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Group": "plan",
    "MergePlan": "plan",
    "MissingDependencyError": "errors",
    "PRESETS": "plan",
    "PlanError": "errors",
    "Provenance": "checkpoint",
    "RULES": "plan",
    "ShapeError": "errors",
    "StmError": "errors",
    "VimConfig": "config",
    "VisionMamba": "vim",
    "WEIGHT_MODES": "plan",
    "__version__": "version",
    "calibrate_constants": "calibration",
    "create_model": "factory",
    "gflops_paper": "flops",
    "gflops_true": "flops",
    "list_models": "registry",
    "load_checkpoint": "checkpoint",
    "make_plan": "plan",
    "model_config": "registry",
    "plan_summary": "flops",
    "resize_pos_embed": "checkpoint",
    "selective_scan": "scan",
    "selective_scan_fn": "scan",
    "state_dict_sha256": "checkpoint",
    "with_plan": "factory",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
