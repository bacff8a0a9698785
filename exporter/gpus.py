"""What NVIDIA driver and GPUs this machine has, without starting CUDA in torch or TensorRT.

`trt.Builder` on a machine with no driver aborts the process, so whoever makes one asks here first. libcuda is asked through
ctypes (it creates no context and sees what CUDA_VISIBLE_DEVICES leaves); nvidia-smi only for the driver's name.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_LIBCUDA = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_ERRORS = {
    35: "the driver is older than its user library",
    100: "no GPU is visible",
    101: "a GPU that does not exist is asked for",
    802: "the GPUs are not ready (NVSwitch fabric manager)",
    803: "driver and libcuda.so.1 are of different versions",
    804: "this GPU cannot run with a compatibility libcuda.so.1",
    999: "the driver does not answer",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA numbers it."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]

    @property
    def sm(self) -> int:
        """90 for compute capability 9.0."""
        return self.compute_capability[0] * 10 + self.compute_capability[1]

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_bytes / 2**30:.0f} GiB, sm_{self.sm}"


@dataclass(frozen=True)
class Driver:
    """The driver and its GPUs; `problem` says why there is none."""

    version: str = ""
    cuda: str = ""  # the newest CUDA it runs
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


def driver(with_version: bool = True) -> Driver:
    """Ask the driver; never raises, never creates a CUDA context. The driver's version costs a run of nvidia-smi."""
    version = _version() if with_version else ""
    try:
        cuda = ctypes.CDLL(_LIBCUDA)
        status = cuda.cuInit(0)
    except (OSError, AttributeError) as error:
        return Driver(version, problem=f"no usable NVIDIA driver ({error})")
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if status:
        return Driver(version, newest, problem=f"{_ERRORS.get(status, 'cuInit failed')} (CUDA error {status})")
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(version, newest, gpus, "" if gpus else "no GPU is visible (CUDA_VISIBLE_DEVICES?)")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(index, name.value.decode(errors="replace"), memory.value, (capability[0], capability[1]))


def _version() -> str:
    """The driver's version, for example "580.159.04"; "" if nobody knows."""
    if shutil.which("nvidia-smi"):
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ran = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            if ran.returncode == 0 and ran.stdout.strip():
                return ran.stdout.split()[0]
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found.group(1) if found else ""
