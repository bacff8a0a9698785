"""Compare the training kernels with torch's float64 on this machine's GPU and time them; seconds. Run before a training.

python -m tools.training.check [vim-n|vim-t] [BATCH]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stm.config import VimConfig
from stm.data import DigitPairs
from stm.ops import causal_conv_silu
from stm.registry import model_config
from stm.scan import selective_scan

from .kernels import conv_pair, gate_pair, scan_pair
from .model import TrainingVim

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of each result's largest value


def references(rank: int, d_state: int) -> dict[str, Callable[..., Tensor]]:
    def scan(u: Tensor, delta: Tensor, x_dbl: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        _, B, C = x_dbl.split([rank, d_state, d_state], -1)
        return torch.stack(
            [selective_scan(u[k], delta[k], A[k], B[k], C[k], D[k], delta_bias=bias[k], delta_softplus=True, reverse=bool(k)) for k in range(2)]
        )

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack([causal_conv_silu(x, weight[k], bias[k], bool(k)) for k in range(2)])

    def gate(y: Tensor, z: Tensor) -> Tensor:
        return (y[0] + y[1]) * F.silu(z) * 0.5

    return {"scan": scan, "conv": conv, "gate": gate}


def inputs(config: VimConfig, batch: int, dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    g = torch.Generator(device).manual_seed(0)
    shape, wide = (2, batch, config.seqlen, config.d_inner), torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=g, device=device).to(kind)

    inner, state = config.d_inner, config.d_state
    A = -torch.arange(1, state + 1, device=device, dtype=wide).expand(2, inner, state).contiguous()
    x_dbl = normal(2, batch, config.seqlen, config.dt_rank + 2 * state)
    scan = [normal(*shape), normal(*shape), x_dbl, A, normal(2, inner, kind=wide), normal(2, inner, kind=wide) - 3]
    xz = normal(batch, config.seqlen, 2 * inner)
    return {
        "scan": scan,
        "conv": [xz[..., :inner], normal(2, inner, 4, kind=wide), normal(2, inner, kind=wide)],
        "gate": [normal(*shape), xz[..., inner:]],
    }


def run(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in arguments]
    y = function(*leaves)
    g = torch.Generator(y.device).manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=g, device=y.device).to(y.dtype))]


def compare(config: VimConfig, batch: int, dtype: torch.dtype, device: str) -> list[tuple[str, float]]:
    """Largest error of each kernel's result and gradients, as a share of the largest value."""
    kernels = {"scan": scan_pair, "conv": conv_pair, "gate": gate_pair}
    truth = references(config.dt_rank, config.d_state)
    rows = []
    for name, arguments in inputs(config, batch, dtype, device).items():
        found = run(kernels[name], arguments)
        wanted = run(truth[name], [a.double() for a in arguments])
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            rows.append((f"{name} {'y' if number == 0 else f'grad {number - 1}'}", float((a.double() - b).abs().max() / b.abs().max())))
    return rows


def seconds(work: Callable[[], object], rounds: int = 10) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def where_the_time_goes(work: Callable[[], object], rows: int = 16) -> list[str]:
    """The GPU's time in one call, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    return [f"one step: {total / 1000:.1f} ms in kernels"] + [
        f"  {event.self_device_time_total / total:5.1%} {event.self_device_time_total / 1000:7.2f} ms {event.count:5} x {event.key[:100]}"
        for event in kernels[:rows]
    ]


def main() -> int:
    config = model_config(sys.argv[1] if len(sys.argv) > 1 else "vim-n")
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    worst = 0.0
    for dtype, bound in BOUNDS.items():
        for name, error in compare(config, 3, dtype, "cuda"):
            worst = max(worst, error / bound)
            print(f"{dtype!s:15} {name:12} error {error:.1e} {'ok' if error <= bound else 'WRONG'}", flush=True)
    arguments = inputs(config, batch, torch.bfloat16, "cuda")
    for name, function in (("scan", scan_pair), ("conv", conv_pair), ("gate", gate_pair)):
        leaves = [a.detach().requires_grad_() for a in arguments[name]]
        y = function(*leaves)
        dy = torch.randn_like(y)
        forward = seconds(lambda f=function, x=leaves: f(*x))
        both = seconds(lambda f=function, x=leaves, g=dy: torch.autograd.grad(f(*x), x, g))
        print(f"{config.name} batch {batch}: {name} forward {1e3 * forward:.3f} ms, backward {1e3 * (both - forward):.3f} ms a layer", flush=True)
    pairs = DigitPairs("train", "anywhere", device="cuda")
    made = seconds(lambda: pairs.batch(torch.arange(batch, device="cuda")))
    print(f"images: {batch / made:.0f} a second")
    cpu, gpu = (
        DigitPairs("test", "anywhere").batch(torch.arange(20))[0],
        DigitPairs("test", "anywhere", device="cuda").batch(torch.arange(20))[0].cpu(),
    )
    off = (cpu.int() - gpu.int()).abs()
    print(f"GPU and CPU images differ by at most {int(off.max())}, in {float((off > 0).float().mean()):.2%} of the values")
    model = TrainingVim(config.with_changes(num_classes=100), 0, "triton", torch.bfloat16).cuda()
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    step = seconds(forward_backward)
    print(f"forward and backward of {config.name}: {batch / step:.0f} images a second, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for line in where_the_time_goes(forward_backward):
        print(line)
    print("kernels ok" if worst <= 1 else "kernels WRONG")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
