"""Vision Mamba with Sequential Token Merging, in torch alone.

`create_model` makes a model from a name, weights and a merge plan; `exporter` turns it into ONNX and TensorRT.
"""

from .calibration import calibrate_constants
from .checkpoint import Checkpoint, Provenance, load_checkpoint, resize_pos_embed, state_dict_sha256
from .config import VimConfig
from .errors import CheckpointError, ConfigError, MissingDependencyError, PlanError, ShapeError, StmError
from .factory import create_model, with_plan
from .flops import gflops_paper, gflops_true, plan_summary
from .plan import PRESETS, RULES, WEIGHT_MODES, Group, MergePlan, make_plan
from .registry import list_models, model_config
from .scan import selective_scan, selective_scan_fn
from .version import __version__
from .vim import VisionMamba

__all__ = [
    "PRESETS",
    "RULES",
    "WEIGHT_MODES",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Group",
    "MergePlan",
    "MissingDependencyError",
    "PlanError",
    "Provenance",
    "ShapeError",
    "StmError",
    "VimConfig",
    "VisionMamba",
    "__version__",
    "calibrate_constants",
    "create_model",
    "gflops_paper",
    "gflops_true",
    "list_models",
    "load_checkpoint",
    "make_plan",
    "model_config",
    "plan_summary",
    "resize_pos_embed",
    "selective_scan",
    "selective_scan_fn",
    "state_dict_sha256",
    "with_plan",
]
