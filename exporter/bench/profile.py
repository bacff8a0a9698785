"""Where an engine's time goes: TensorRT's profiler, grouped by torch module, beside the floor of each kernel.

A floor is the largest of three times: bytes that must move over the copy bandwidth, special-function (MUFU) operations over their
rate, tensor operations over the GEMM rate (facts: bench/floors.py counts the same way). Nothing of a floor is measured but its ceilings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stm import VimConfig

from ..engine import engine_layers
from .statistics import median


@dataclass(frozen=True)
class Ceilings:
    """Bytes, special-function and tensor operations a second, and the shortest kernel; None: not known."""

    bytes: float
    mufu: float | None
    tensor: float | None
    launch_us: float
    source: str


# Measured ceilings by GPU name (half precision GEMM 8192^3, ex2.approx, device-to-device copy read + written, CUDA graph).
KNOWN = {
    "NVIDIA H100 80GB HBM3": Ceilings(3.015e12, 4.150e12, 693e12, 2.5, "measured on this kind of card (docs/performance.md, method)"),
}


def ceilings(gpu_name: str, *, sm_count: int | None = None, sm_hertz: float | None = None, copy_bandwidth: float | None = None) -> Ceilings | None:
    """From the table; else from a measured copy and, for MUFU, 16 operations a clock and SM; None if nothing is known.

    Args:
        copy_bandwidth: measured on this card, bytes a second, read + written.
    """
    if gpu_name in KNOWN:
        return KNOWN[gpu_name]
    if copy_bandwidth is None:
        return None
    mufu = 16.0 * sm_count * sm_hertz if sm_count and sm_hertz else None
    return Ceilings(copy_bandwidth, mufu, None, 2.5, f"copy measured here; MUFU 16 a clock and SM by architecture; {gpu_name} is not in the table")


def measured_copy_bandwidth(size: int = 1 << 30, repeats: int = 9) -> float:
    """Bytes a second, read + written, of a device-to-device copy; the median of some."""
    import torch

    size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 2):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        target.copy_(source)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return 2 * size / (median(times[2:]) * 1e-3)


@dataclass(frozen=True)
class Work:
    """What one kernel must do at least."""

    bytes: float = 0.0
    mufu: float = 0.0
    tensor: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.mufu + other.mufu, self.tensor + other.tensor)

    def floor_us(self, top: Ceilings) -> tuple[float, str]:
        """(microseconds, what binds); never under the shortest kernel."""
        terms = {"bytes": self.bytes / top.bytes}
        if top.mufu:
            terms["special functions"] = self.mufu / top.mufu
        if top.tensor:
            terms["tensor"] = self.tensor / top.tensor
        bound = max(terms, key=lambda name: terms[name])
        us = terms[bound] * 1e6
        return (top.launch_us, "launch") if us < top.launch_us else (us, bound)


def kernel_work(config: VimConfig, lengths: Sequence[int], batch: int, precision: str, cls_index: int | None = None) -> dict[str, Work]:
    """Module path -> work, for the kernels of our fused engine.

    Activations and weights take the precision's bytes, the residual stream float32. MUFU a channel and token: in the scan kernel
    2 directions x (d_state exponentials + 2 of softplus + 2 of SiLU) + 2 of the gate; in conv + x_proj 2 x 2.

    Args:
        lengths: tokens into each layer.
        cls_index: class token's place in the last layer, which computes only that token; None: the last layer is like the rest.
    """
    size = 4 if precision == "fp32" else 2
    d, inner, state, rank = config.d_model, config.d_inner, config.d_state, config.dt_rank
    row = -(-(rank + 2 * state) // 8) * 8
    patch = config.patch_size**2 * 3
    images = batch * config.image_size[0] * config.image_size[1] * 3
    tokens0 = batch * config.seqlen
    work = {
        "patch_embed.patch_rows": Work(4 * images + size * tokens0 * patch),
        "patch_embed.proj": Work(size * (tokens0 * patch + patch * d + tokens0 * d), 0, 2 * tokens0 * patch * d),
        # As the norms below, but the residual that it reads is one table for all images.
        "layers.0.norm": Work(4 * (config.seqlen + tokens0) * d + size * 2 * tokens0 * d),
        "head": Work(size * (batch * d + d * config.num_classes) + 4 * batch * config.num_classes, 0, 2 * batch * d * config.num_classes),
    }
    last = len(lengths) - 1
    for layer, length in enumerate(lengths):
        t = batch * length
        one = layer == last and cls_index is not None
        out = batch if one else t  # tokens that leave the mixer
        # With the class token alone the two walks share it and cover length + 1 tokens together, not 2 length.
        walked = batch * (length + 1) if one else 2 * t
        name = f"layers.{layer}"
        work[f"{name}.mixer.in_proj"] = Work(size * (t * d + 2 * t * inner + 2 * d * inner), 0, 4 * t * d * inner)
        x_weights = 2 * inner * row
        work[f"{name}.mixer.conv_xproj"] = Work(size * (t * inner + walked * row + x_weights), 2 * walked * inner, 2 * walked * inner * row)
        scan_bytes = size * (t * inner + out * 2 * inner + walked * row + 2 * rank * inner)
        work[f"{name}.mixer.mamba_scan"] = Work(scan_bytes, walked * inner * (state + 4) + 2 * out * inner, 2 * walked * rank * inner)
        work[f"{name}.mixer.out_proj"] = Work(size * (out * inner + out * d + inner * d), 0, 2 * out * inner * d)
        after = batch if one else batch * lengths[layer + 1] if layer < last else t
        # Residual read and written in float32, hidden read, normed written; the last layer reads one residual token only.
        before = batch if one else t
        norm = "norm_f" if layer == last else f"layers.{layer + 1}.norm"
        work[norm] = Work(4 * (before + after) * d + size * (before + after) * d, 0, 0)
    return work


# --- names -------------------------------------------------------------------------------------------------------------------

_MODULE = re.compile(r"(?<![\w.])((?:layers\.\d+(?:\.[A-Za-z_]\w*)*)|(?:patch_embed(?:\.\w+)*)|norm_f(?:\.\w+)*|head(?:\.\w+)*|pos_embed|cls_token)")
_LEAVES = ("weight", "bias", "weight_t", "fp16", "bf16", "fp32", "y", "x_dbl")


def modules_of(text: str) -> list[str]:
    """torch module paths named in a TensorRT layer's name or metadata, without tensors' own suffixes; in order, no repeats."""
    found = []
    for path in _MODULE.findall(text):
        parts = path.split(".")
        while len(parts) > 1 and (parts[-1] in _LEAVES or parts[-1].endswith("_half")):
            parts.pop()
        found.append(".".join(parts))
    return list(dict.fromkeys(found))


def collapsed(module: str) -> str:
    """`layers.3.mixer.in_proj` -> `layers.*.mixer.in_proj`: the same kernel in every layer."""
    return re.sub(r"^layers\.\d+", "layers.*", module)


def _owner(modules: Sequence[str], known: dict[str, Work]) -> str:
    """The module a node is booked on: the first that has a floor, itself or as the parent of what is named; else the first named."""
    for module in modules:
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            if (path := ".".join(parts[:end])) in known:
                return path
    return modules[0] if modules else "(TensorRT's own)"


def inspected(engine: Any, trt: Any) -> dict[str, str]:
    """Layer name -> the ONNX nodes that it came from, its name and tactic, as text."""
    return {layer["name"]: " ".join([*layer["nodes"], layer["name"], layer.get("tactic", "")]) for layer in engine_layers(engine, trt)}


def layer_times(backend: Any, batch: int, runs: int = 30) -> list[tuple[str, float]]:
    """(name, median microseconds) of each layer in execution order, from TensorRT's IProfiler over plain enqueues."""
    import tensorrt as trt
    import torch

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms * 1e3)

    profiler, stream = Profiler(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    context, enqueue, *buffers = backend.context(batch, stream)
    with torch.cuda.stream(stream):
        for _ in range(3):
            enqueue()
        stream.synchronize()
        context.profiler = profiler
        for _ in range(runs):
            enqueue()
            stream.synchronize()
    del buffers
    return [(name, median(times)) for name, times in profiler.times.items()]


def group(times: Sequence[tuple[str, float]], described: dict[str, str], work: dict[str, Work], top: Ceilings | None) -> dict[str, Any]:
    """Nodes, sums by module over all layers, and sums by layer, as JSON-able tables; modules by falling time."""
    total = sum(us for _, us in times) or 1.0
    nodes, by_module, by_layer = [], {}, {}  # type: ignore[var-annotated]
    booked: dict[str, list[str]] = {}
    for name, us in times:
        # The layer's own name goes first: metadata of a fused layer lists what flowed in as well.
        modules = list(dict.fromkeys(modules_of(name) + modules_of(described.get(name, ""))))
        owner = _owner(modules, work)
        nodes.append({"name": name, "us": round(us, 3), "module": owner, "modules": modules})
        booked.setdefault(owner, []).append(name)
        row = by_module.setdefault(collapsed(owner), {"module": collapsed(owner), "us": 0.0, "nodes": 0, "owners": set(), "fused": set()})
        row["us"] += us
        row["nodes"] += 1
        row["owners"].add(owner)
        row["fused"] |= {collapsed(module) for module in modules if module != owner and module in work and module not in booked}
        layer = re.match(r"layers\.\d+", owner)
        key = layer.group() if layer else "(outside the layers)"
        by_layer[key] = by_layer.get(key, 0.0) + us
    modules_out = []
    for row in sorted(by_module.values(), key=lambda row: -row["us"]):
        entry = {"module": row["module"], "us": round(row["us"], 3), "share": row["us"] / total, "nodes": row["nodes"]}
        if row["fused"]:
            entry["also_in_it"] = sorted(row["fused"])
        owners = [owner for owner in row["owners"] if owner in work]
        if top is not None and owners:
            floors = [work[owner].floor_us(top) for owner in owners]
            whole = sum((work[owner] for owner in owners), Work())
            bound = max((name for _, name in floors), key=[name for _, name in floors].count)
            entry |= {"floor_us": round(sum(us for us, _ in floors), 3), "bound": bound, "work": asdict(whole)}
            entry["gigabytes_per_second"] = round(whole.bytes / (row["us"] * 1e-6) / 1e9, 1) if row["us"] else 0.0
        modules_out.append(entry)
    return {
        "total_ms": round(sum(us for _, us in times) / 1e3, 4),
        "modules": modules_out,
        "layers": {name: round(us, 3) for name, us in by_layer.items()},
        "nodes": nodes,
    }


def profile_engine(backend: Any, case: Any, config: VimConfig, lengths: Sequence[int], cls_index: int | None) -> dict[str, Any]:
    """Per-node and per-module times of an engine at a batch, with floors where this card's ceilings are known or can be measured."""
    import tensorrt as trt
    import torch

    card = torch.cuda.get_device_properties(0)
    copy = None if card.name in KNOWN else measured_copy_bandwidth()
    kilohertz = getattr(card, "clock_rate", 0)
    top = ceilings(card.name, sm_count=card.multi_processor_count, sm_hertz=kilohertz * 1e3 if kilohertz else None, copy_bandwidth=copy)
    work = kernel_work(config, lengths, case.batch, case.precision, cls_index)
    tables = group(layer_times(backend, case.batch), inspected(backend.engine, trt), work, top)
    return {"case": str(case), "engine": backend.name, "ceilings": asdict(top) if top else {"source": "unknown"}, **tables}
