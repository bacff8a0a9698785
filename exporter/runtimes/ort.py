"""ONNX Runtime sessions for Polygraphy's own runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from polygraphy.backend.onnxrt import OnnxrtRunner


def onnxruntime_session(model: str | Path | bytes, providers: tuple[str, ...] = ("CPUExecutionProvider",), threads: int = 0) -> Any:
    """An InferenceSession that logs errors only; `threads` 0 leaves the choice to ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=list(providers))


def onnxruntime_runner(model: str | Path | bytes) -> Any:
    """A Polygraphy runner on the CPU."""
    return OnnxrtRunner(lambda: onnxruntime_session(model), name="onnxruntime-cpu")
