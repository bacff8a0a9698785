"""What all our runners share: a Polygraphy runner with fixed names for input and output."""

from __future__ import annotations

from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from ..op_schema import INPUT


class ImageRunner(BaseRunner):  # type: ignore[misc]
    """Images in, named tensors out; subclasses implement `infer_impl` and say their image size."""

    def __init__(self, name: str, image_size: tuple[int, int]) -> None:
        super().__init__(name=name)
        self.image_size = image_size

    def get_input_metadata_impl(self) -> Any:
        return TensorMetadata().add(INPUT, dtype=np.float32, shape=(-1, 3, *self.image_size))
