"""The scan's error against float64 beside that of the kernels ViM users run today, on the same inputs: at most twice theirs.

One StmMambaScan node in an engine, fp16. The rival flow is channel-first as in the published code: causal conv, dt_proj, one
selective scan a direction with softplus, D and gate inside, then the sum; through mamba_ssm and causal_conv1d where they are
installed, else through the same steps in torch with the same roundings (fp16 between kernels, float32 inside).
"""

import importlib.util
import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F

from exporter.op_schema import DOMAIN, DOMAIN_VERSION
from exporter.passes.tensorrt_common import plugin_node

E, R, N = 768, 24, 16
ROW = R + 2 * N
HALF = torch.float16


def inputs(batch, seqlen, level):
    """Tensors of one mixer. level: largest delta of most channels: "trained" 0.1, "extreme" 3 (and noisier A)."""
    g = torch.Generator().manual_seed(batch * 10007 + seqlen)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    largest = {"trained": 0.1, "extreme": 3.0}[level]
    step = torch.exp(uniform(math.log(1e-3), math.log(largest), 2, E))
    return {
        "xz": normal(batch, seqlen, 2 * E).to(HALF),
        "x_dbl": normal(2, batch, seqlen, ROW).to(HALF),
        "conv_weight": uniform(-0.5, 0.5, 2, E, 4).half().float(),
        "conv_bias": uniform(-0.5, 0.5, 2, E).half().float(),
        "dt_weight": uniform(-(R**-0.5), R**-0.5, 2, E, R).to(HALF),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "A": -torch.arange(1.0, N + 1).expand(2, E, N) * torch.exp(0.05 * normal(2, E, N)),
        "D": torch.ones(2, E) + 0.1 * normal(2, E),
    }


def truth(t):
    """Both directions in float64 on the GPU, (batch, seqlen, E)."""
    d = {name: value.cuda().double() for name, value in t.items()}
    x, z = d["xz"].chunk(2, -1)
    total = torch.zeros_like(x)
    for direction in (0, 1):
        seen, rows = (x, d["x_dbl"][0]) if direction == 0 else (x.flip(1), d["x_dbl"][1].flip(1))
        u = F.conv1d(seen.transpose(1, 2), d["conv_weight"][direction][:, None], d["conv_bias"][direction], padding=3, groups=E)
        u = F.silu(u[..., : x.shape[1]]).transpose(1, 2)
        delta = F.softplus(rows[..., :R] @ d["dt_weight"][direction].T + d["dt_bias"][direction])
        B, C = rows[..., R : R + N], rows[..., R + N :]
        A, h, ys = d["A"][direction], x.new_zeros(x.shape[0], E, N), []
        for k in range(x.shape[1]):
            h = torch.exp(delta[:, k, :, None] * A) * h + (delta[:, k] * u[:, k])[..., None] * B[:, k, None]
            ys.append((h * C[:, k, None]).sum(-1))
        y = torch.stack(ys, 1) + d["D"][direction] * u
        total += y if direction == 0 else y.flip(1)
    return total * F.silu(z)


def rival(t):
    """The published flow in fp16."""
    d = {name: value.cuda() for name, value in t.items()}
    x, z = d["xz"].transpose(1, 2).contiguous().chunk(2, 1)
    there = importlib.util.find_spec("mamba_ssm") is not None and importlib.util.find_spec("causal_conv1d") is not None
    total = None
    for direction in (0, 1):
        seen, gate, rows = (x, z, d["x_dbl"][0]) if direction == 0 else (x.flip(2), z.flip(2), d["x_dbl"][1].flip(1))
        seen, gate = seen.contiguous(), gate.contiguous()
        weight, bias = d["conv_weight"][direction].half(), d["conv_bias"][direction].half()
        delta = (rows[..., :R] @ d["dt_weight"][direction].T).transpose(1, 2).contiguous()
        B, C = (part.transpose(1, 2)[:, None].contiguous() for part in (rows[..., R : R + N], rows[..., R + N :]))
        if there:
            from causal_conv1d import causal_conv1d_fn
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            u = causal_conv1d_fn(seen, weight, bias, activation="silu")
            y = selective_scan_fn(u, delta, d["A"][direction], B, C, d["D"][direction], gate, d["dt_bias"][direction], True)
        else:
            u = F.silu(F.conv1d(seen.float(), weight[:, None].float(), bias.float(), padding=3, groups=E)[..., : x.shape[2]]).half()
            step = F.softplus(delta.float() + d["dt_bias"][direction][:, None])
            h, ys = torch.zeros(x.shape[0], E, N, device="cuda"), []
            for k in range(x.shape[2]):
                fed = (step[:, :, k] * u[:, :, k].float())[..., None] * B[:, 0, None, :, k].float()
                h = torch.exp(step[:, :, k, None] * d["A"][direction]) * h + fed
                ys.append((h * C[:, 0, None, :, k].float()).sum(-1))
            y = ((torch.stack(ys, 2) + d["D"][direction][:, None] * u.float()) * F.silu(gate.float())).half()
        total = y if direction == 0 else total + y.flip(2)
    return total.transpose(1, 2)


def ours(t):
    """One StmMambaScan node in a strongly typed engine."""
    from polygraphy.backend.trt import TrtRunner, engine_from_network, network_from_onnx_bytes

    from exporter.libraries import load_plugin

    load_plugin()
    arrays = {name: value.numpy() for name, value in t.items()}
    fed = [gs.Variable(name, arrays[name].dtype, arrays[name].shape) for name in ("xz", "x_dbl")]
    weights = [gs.Constant(name, np.ascontiguousarray(arrays[name])) for name in list(arrays)[2:]]
    y = gs.Variable("y", np.float16, (t["xz"].shape[0], t["xz"].shape[1], E))
    graph = gs.Graph([plugin_node("StmMambaScan", "scan", [*fed, *weights], [y])], fed, [y], opset=18)
    model = gs.export_onnx(graph)
    del model.opset_import[:]
    for domain, version in (("", 18), (DOMAIN, DOMAIN_VERSION)):
        entry = model.opset_import.add()
        entry.domain, entry.version = domain, version
    engine = engine_from_network(network_from_onnx_bytes(model.SerializeToString(), strongly_typed=True))
    with TrtRunner(engine) as runner:
        return torch.from_numpy(np.array(runner.infer({"xz": arrays["xz"], "x_dbl": arrays["x_dbl"]})["y"])).cuda()


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("level", ["trained", "extreme"])
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 197), (32, 197), (1, 788), (1, 4097)])
def test_error_is_at_most_twice_the_rivals(batch, seqlen, level, record):
    t = inputs(batch, seqlen, level)
    want = truth(t)
    mine, theirs = error(ours(t), want), error(rival(t), want)
    record("scan accuracy", batch=batch, seqlen=seqlen, level=level, ours=mine, rival=theirs)
    assert theirs < 5e-3, "the rival flow computes something else: the test is broken"
    assert mine <= 2 * theirs
