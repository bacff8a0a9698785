"""PyTorch as a Polygraphy runner: the reference, in float32 or float64 (Polygraphy's PytRunner forces CUDA)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from stm import VisionMamba

from ..op_schema import INPUT, OUTPUT
from .base import ImageRunner


class TorchRunner(ImageRunner):
    """Runs a VisionMamba where its parameters are, in its own dtype, TF32 off.

    Args:
        taps: module paths ("layers.3.mixer.in_proj") whose outputs are returned too, under those names.
    """

    def __init__(self, model: VisionMamba, taps: Sequence[str] = (), name: str = "pytorch") -> None:
        super().__init__(name, model.config.image_size)
        self.model, self.taps = model, tuple(taps)

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Any]:
        parameter = next(self.model.parameters())
        images = torch.as_tensor(feed_dict[INPUT]).to(parameter.device, parameter.dtype)
        outputs: OrderedDict[str, Any] = OrderedDict()

        def tap(name: str) -> Any:
            def hook(module: torch.nn.Module, arguments: Any, result: Any) -> None:
                outputs[name] = result.detach().float().cpu().numpy()

            return hook

        hooks = [self.model.get_submodule(name).register_forward_hook(tap(name)) for name in self.taps]
        conv_tf32, matmul_tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        start = time.perf_counter()
        try:
            with torch.no_grad():
                logits = self.model(images).float().cpu().numpy()
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv_tf32, matmul_tf32
            for hook in hooks:
                hook.remove()
        self.inference_time = time.perf_counter() - start
        outputs[OUTPUT] = logits
        return outputs
