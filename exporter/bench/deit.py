"""DeiT (arXiv 2012.12877) with random weights: what a user of small transformers runs instead, to be timed beside a ViM.

Attention is written out, matmul - softmax - matmul, because that is the pattern TensorRT fuses into one kernel.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stm import VimConfig

from ..errors import ExportError
from ..onnx_export import IR_VERSION, _quiet
from ..op_schema import INPUT, OUTPUT

OPSET = 20  # has Gelu
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DeitConfig:
    """Published sizes: tiny 192 / 3 heads, small 384 / 6, base 768 / 12; depth 12, patches of 16."""

    d_model: int
    heads: int
    image_size: tuple[int, int]
    depth: int = 12
    patch_size: int = 16
    num_classes: int = 1000

    @classmethod
    def like(cls, vim: VimConfig) -> DeitConfig:
        """The DeiT of a ViM's width: tiny, small and base correspond."""
        return cls(vim.d_model, max(1, vim.d_model // 64), vim.image_size, num_classes=vim.num_classes)

    @property
    def name(self) -> str:
        return {192: "deit-t", 384: "deit-s", 768: "deit-b"}.get(self.d_model, f"deit-{self.d_model}")

    @property
    def patches(self) -> int:
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)


class _Attention(nn.Module):
    def __init__(self, config: DeitConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.d_model // config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, seqlen, d_model = x.shape
        q, k, v = self.qkv(x).reshape(batch, seqlen, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax((q * self.width**-0.5) @ k.transpose(-2, -1), dim=-1)
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, seqlen, d_model))
        return mixed


class _Block(nn.Module):
    def __init__(self, config: DeitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.attn = _Attention(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.fc1 = nn.Linear(config.d_model, 4 * config.d_model)
        self.fc2 = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


class Deit(nn.Module):
    """float32 images in, float32 logits out, as our engines; between them the parameters' dtype."""

    def __init__(self, config: DeitConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.d_model, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.d_model) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, config.patches + 1, config.d_model) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images.to(self.cls_token.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits.float()


def deit(config: DeitConfig, seed: int = 0) -> Deit:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Deit(config).eval().requires_grad_(False)


def deit_onnx(config: DeitConfig, precision: str, batch: int) -> onnx.ModelProto:
    """ONNX at a fixed batch, `images` -> `logits` in float32, strongly typed inside.

    Raises:
        ExportError: torch cannot export it.
    """
    images = torch.zeros(batch, 3, *config.image_size)
    module = deit(config).to(_DTYPES[precision])
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, (images,), dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], optimize=True
            )
    except Exception as error:
        raise ExportError(f"torch.onnx.export of DeiT failed: {type(error).__name__}: {str(error)[:300]}") from error
    assert program is not None
    buffer = io.BytesIO(program.model_proto.SerializeToString())
    model = onnx.load(buffer)
    model.ir_version = min(model.ir_version, IR_VERSION)
    return model
