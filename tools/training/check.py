"""Compare the training kernels with torch's float64 on this machine's GPU and time them; half a minute. Run before a training.

python -m tools.training.check [vim-n|vim-t] [BATCH]

Times are of CUDA graphs, so the host plays no part: each stage of a layer by itself, repeated, and the whole forward and backward pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.data import DigitPairs
from stm.registry import model_config

from . import kernels
from .model import TrainingVim
from .model import layer as torch_layer

FLOORS = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 1e-2}
"""An error up to here is right, and one up to twice torch's own in that type."""


def inputs(config: VimConfig, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A layer's arguments as model.layer takes them, matrices of the usual scale."""
    g = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d, inner, states, rank = config.d_model, config.d_inner, config.d_state, config.dt_rank

    def normal(*sizes: int, kind: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, generator=g, device=device)).to(kind)

    return {
        "residual": normal(batch, config.seqlen, d, kind=wide),
        "update": normal(batch, config.seqlen, d),
        "norm": 1 + normal(d, kind=wide, scale=0.1),
        "in_proj": normal(2 * inner, d, scale=d**-0.5),
        "conv_weight": normal(2, inner, 4, kind=wide, scale=0.5),
        "conv_bias": normal(2, inner, kind=wide, scale=0.3),
        "x_proj": normal(2, rank + 2 * states, inner, scale=inner**-0.5),
        "dt_weight": normal(2, inner, rank, scale=rank**-0.5),
        "dt_bias": normal(2, inner, kind=wide) - 3,
        "A": -torch.arange(1, states + 1, device=device, dtype=wide).expand(2, inner, states).contiguous(),
        "D": normal(2, inner, kind=wide),
        "out_proj": normal(d, inner, scale=inner**-0.5),
    }


def kernel_layer(*arguments: Any) -> tuple[Tensor, Tensor]:
    """kernels.layer with model.layer's arguments."""
    residual, update, norm, in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj, eps = arguments
    packed, turned = kernels.pack_x_proj(x_proj, dt_weight.shape[2]), A.transpose(1, 2).contiguous()
    return kernels.layer(residual, update, norm, in_proj, conv_weight, conv_bias, packed, dt_weight, dt_bias, turned, D, out_proj, eps)


def results(function: Callable[..., tuple[Tensor, Tensor]], arguments: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Both outputs, and the gradient of each argument."""
    leaves = [a.detach().requires_grad_() for a in arguments.values()]
    found = function(*leaves, eps)
    g = torch.Generator(leaves[0].device).manual_seed(1)
    sent = [torch.randn(y.shape, generator=g, device=y.device).to(torch.bfloat16).to(y.dtype) for y in found]
    gradients = torch.autograd.grad(found, leaves, sent)
    return {"total": found[0].detach(), "added": found[1].detach()} | {f"d {name}": grad for name, grad in zip(arguments, gradients, strict=True)}


def compare(config: VimConfig, batch: int, dtype: torch.dtype, device: str) -> list[tuple[str, float, float]]:
    """Name, error (norm of the difference over the norm) and bound of a layer's outputs and gradients."""
    arguments = inputs(config, batch, dtype, device)
    wanted = results(torch_layer, {name: a.double() for name, a in arguments.items()}, config.norm_eps)
    found, torchs = (results(function, arguments, config.norm_eps) for function in (kernel_layer, torch_layer))

    def error(value: Tensor, name: str) -> float:
        return float((value.double() - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-300))

    return [(name, error(found[name], name), max(FLOORS[dtype], 2 * error(torchs[name], name))) for name in wanted]


def graph_seconds(work: Callable[[], object], repeats: int, replays: int = 3) -> float:
    """GPU time of one call: the least of `replays` runs of a CUDA graph with `repeats` calls."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    graph.replay()
    best = float("inf")
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        graph.replay()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        best = min(best, begin.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
    return best / repeats


def layer_stages(config: VimConfig, batch: int) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """What a layer calls, forward and backward, with the tensors that it gives."""
    seen: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    plain = kernels.run_stage

    def spy(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        seen.append((name, function, arguments))
        return plain(name, function, *arguments)

    kernels.run_stage = spy
    try:
        results(kernel_layer, inputs(config, batch, torch.bfloat16, "cuda"), config.norm_eps)
    finally:
        kernels.run_stage = plain
    return seen


def main() -> int:
    config = model_config(sys.argv[1] if len(sys.argv) > 1 else "vim-n", num_classes=100)
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        for name, error, bound in compare(config, 2, dtype, "cuda"):
            wrong += not error <= bound
            print(f"{dtype!s:15} {name:14} error {error:.1e} of {bound:.1e} {'ok' if error <= bound else 'WRONG'}", flush=True)
    times = {"forward": 0.0, "backward": 0.0}
    rows = []
    backward = False
    for name, function, arguments in layer_stages(config, batch):
        with torch.no_grad():
            taken = graph_seconds(lambda f=function, a=arguments: f(*a), repeats=5)
        backward |= name == "out_proj dx"
        times["backward" if backward else "forward"] += taken
        rows.append((name, taken))
    del arguments
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = TrainingVim(config, 0, "triton", torch.bfloat16).cuda()
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    parameters = list(model.parameters())
    step = graph_seconds(lambda: torch.autograd.grad(model(images).square().mean(), parameters), repeats=1)
    print(f"{config.name}, batch {batch}: GPU time of a layer's stages, and share of the whole forward and backward pass")
    for name, taken in rows:
        print(f"  {name:18} {1e3 * taken:7.3f} ms {config.depth * taken / step:6.1%}")
    for name, taken in times.items():
        print(f"  all of {name:11} {1e3 * taken:7.3f} ms {config.depth * taken / step:6.1%}")
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"  {config.depth} layers and all else: {1e3 * step:.1f} ms, {batch / step:.0f} images a second, {gib:.1f} GiB")
    pairs = DigitPairs("train", "anywhere", device="cuda")
    for _ in range(3):
        pairs.batch(torch.arange(batch, device="cuda"))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        pairs.batch(torch.arange(batch, device="cuda"))
    torch.cuda.synchronize()
    print(f"images: {10 * batch / (time.perf_counter() - start):.0f} a second")
    cpu, gpu = (
        DigitPairs("test", "anywhere").batch(torch.arange(20))[0],
        DigitPairs("test", "anywhere", device="cuda").batch(torch.arange(20))[0].cpu(),
    )
    off = (cpu.int() - gpu.int()).abs()
    print(f"GPU and CPU images differ by at most {int(off.max())}, in {float((off > 0).float().mean()):.2%} of the values")
    print(f"{wrong} results WRONG" if wrong else "kernels ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
