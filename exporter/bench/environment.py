"""What was measured on: GPU with clocks and power, CPU, versions. Reads only; never touches a card's settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ..gpus import driver

_PACKAGES = (
    "stm-vim",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "mamba-ssm",
    "causal-conv1d",
    "triton",
    "numpy",
)
# Query name -> (our name, whether it is a number). A field that this nvidia-smi does not know is left out.
_STATE = {
    "clocks.sm": ("sm_mhz", True),
    "clocks.mem": ("memory_mhz", True),
    "clocks.max.sm": ("max_sm_mhz", True),
    "power.draw": ("power_watts", True),
    "power.limit": ("power_limit_watts", True),
    "temperature.gpu": ("celsius", True),
    "pstate": ("power_state", False),
    "utilization.gpu": ("utilization_percent", True),
    "clocks_throttle_reasons.active": ("throttle_reasons", False),
}


def _smi(fields: str, index: str) -> list[str] | None:
    if not shutil.which("nvidia-smi"):
        return None
    try:
        ran = subprocess.run(
            ["nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [part.strip() for part in ran.stdout.splitlines()[0].split(",")] if ran.returncode == 0 and ran.stdout.strip() else None


def gpu_state() -> dict[str, Any] | None:
    """Clocks, power and temperature of the first visible GPU now; None without nvidia-smi or GPU."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    found = _smi(",".join(_STATE), index)
    answers: dict[str, str] = {}
    if found is not None and len(found) == len(_STATE):
        answers = dict(zip(_STATE, found, strict=True))
    else:  # one unknown field spoils the whole query: ask one by one
        for field in _STATE:
            if (one := _smi(field, index)) is not None:
                answers[field] = one[0]
    state: dict[str, Any] = {}
    for field, text in answers.items():
        name, numeric = _STATE[field]
        if not numeric:
            state[name] = text
            continue
        try:
            state[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return state or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """A JSON-able description of this machine; creates no CUDA context."""
    card = driver()
    first = card.gpus[0] if card.gpus else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "gpu": first.name if first else None,
        "gpu_sm": first.sm if first else None,
        "gpu_memory_bytes": first.memory_bytes if first else None,
        "gpus_visible": len(card.gpus),
        "driver": card.version,
        "driver_cuda": card.cuda,
        "cpu": _cpu(),
        "cpu_cores": cores,
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": _versions(),
    }
