"""Another Mamba: the usual channel-first block with `selective_scan_fn` swapped for ours, exported in two calls."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter import ExportError
from exporter.onnx_export import lower_portable, trace
from stm import selective_scan_fn

from .conftest import run_onnx


class TheirMamba(nn.Module):
    """Channel-first mixer as third parties write it: x, delta (batch, dim, seqlen), B, C (batch, [groups,] state, seqlen)."""

    def __init__(self, groups: int = 0, with_state: bool = False) -> None:
        super().__init__()
        self.groups, self.with_state, dim, self.state, self.rank = groups, with_state, 12, 4, 2
        self.in_proj = nn.Linear(8, 2 * dim, bias=False)
        self.conv1d = nn.Conv1d(dim, dim, 4, groups=dim, padding=3)
        self.x_proj = nn.Linear(dim, self.rank + 2 * max(1, groups) * self.state, bias=False)
        self.dt_proj = nn.Linear(self.rank, dim)
        self.A_log = nn.Parameter(torch.arange(1.0, self.state + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, seqlen, _ = hidden.shape
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :seqlen])
        width = max(1, self.groups) * self.state
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.rank, width, width], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight).transpose(1, 2)
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        if self.groups:
            B, C = (m.reshape(batch, self.groups, self.state, seqlen) for m in (B, C))
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=self.with_state,
        )
        y = y[0] if isinstance(y, tuple) else y
        return self.out_proj(y.transpose(1, 2))


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_their_model_exports_and_matches(groups: int) -> None:
    model = TheirMamba(groups).eval()
    proto = lower_portable(trace(model, torch.randn(2, 31, 8), input_name="hidden", output_name="mixed"))
    onnx.checker.check_model(proto, full_check=True)
    scans = [node for node in proto.graph.node if node.domain == "stm"]
    assert [node.op_type for node in scans] == ["StmSelectiveScanFwd"] * max(1, groups)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["hidden", "mixed"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 5):
        hidden = torch.randn(batch, 31, 8)
        want = model(hidden).numpy()
        (got,) = run_onnx(proto, hidden=hidden.numpy())
        assert np.abs(got - want).max() <= 1e-5 * want.std()


def test_the_last_state_cannot_be_exported_and_says_so() -> None:
    with pytest.raises(ExportError, match="return_last_state"):
        trace(TheirMamba(with_state=True).eval(), torch.randn(2, 31, 8))
