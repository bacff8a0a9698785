"""Vision Mamba with Sequential Token Merging -> ONNX and TensorRT, verified against PyTorch.

Every command of the `stm` CLI is one call here.
"""

from .deploy import ExportResult, export
from .errors import ArtefactError, BuildError, ExportError, ParityError, PerformanceError, PluginError
from .inspection import inspect
from .onnx_export import export_onnx
from .parity import ParityReport, verify

__all__ = [
    "ArtefactError",
    "BuildError",
    "ExportError",
    "ExportResult",
    "ParityError",
    "ParityReport",
    "PerformanceError",
    "PluginError",
    "export",
    "export_onnx",
    "inspect",
    "verify",
]
