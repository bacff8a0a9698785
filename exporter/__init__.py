"""Vision Mamba with Sequential Token Merging -> ONNX and TensorRT, verified against PyTorch.

Every command of the `stm` CLI is one call here.

Names load on first use: `stm --help` answers at once, and verifying against saved outputs needs no torch.
"""

from typing import TYPE_CHECKING

from stm.lazy import lazy_names

if TYPE_CHECKING:
    from .deploy import ExportResult as ExportResult
    from .deploy import export as export
    from .errors import ArtefactError as ArtefactError
    from .errors import BuildError as BuildError
    from .errors import ExportError as ExportError
    from .errors import ParityError as ParityError
    from .errors import PerformanceError as PerformanceError
    from .errors import PluginError as PluginError
    from .evaluation.results import Evaluation as Evaluation
    from .evaluation.runner import evaluate as evaluate
    from .inspection import inspect as inspect
    from .onnx_export import export_onnx as export_onnx
    from .parity import ParityReport as ParityReport
    from .parity import verify as verify

_HOMES = {
    "ArtefactError": "errors",
    "BuildError": "errors",
    "Evaluation": "evaluation.results",
    "ExportError": "errors",
    "ExportResult": "deploy",
    "ParityError": "errors",
    "ParityReport": "parity",
    "PerformanceError": "errors",
    "PluginError": "errors",
    "evaluate": "evaluation.runner",
    "export": "deploy",
    "export_onnx": "onnx_export",
    "inspect": "inspection",
    "verify": "parity",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
