"""VimConfig: every size of a Vision Mamba, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .errors import ConfigError

MAX_TOKENS = 16384
"""Longest sequence that the kernels and plans support, class token included."""

ImageSize = int | tuple[int, int]


def image_size_pair(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels from one number or a pair."""
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or any(not isinstance(side, int) or isinstance(side, bool) for side in pair):
        raise ConfigError(f"image_size is {image_size!r}; give one whole number or (height, width) in pixels")
    return (pair[0], pair[1])


@dataclass(frozen=True)
class VimConfig:
    """Sizes of a Vision Mamba with a middle class token (bimamba v2, Zhu et al. 2024).

    The published models differ in `d_model`, `dt_rank` and `stride` only; the other defaults
    are theirs. `dt_rank = 0` stands for ceil(d_model / 16).

    Raises:
        ConfigError: a size is out of range or the image is smaller than a patch.
    """

    name: str
    d_model: int
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    patch_size: int = 16
    stride: int = 16
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    norm_eps: float = 1e-5
    mean: tuple[float, float, float] = field(default=(0.485, 0.456, 0.406))
    std: tuple[float, float, float] = field(default=(0.229, 0.224, 0.225))

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", image_size_pair(self.image_size))
        if not self.dt_rank:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        for name in ("d_model", "depth", "d_state", "d_conv", "expand", "dt_rank", "patch_size", "stride", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.name}: {name} is {value!r}; it must be a whole number of at least 1")
        if self.d_state > 64:
            raise ConfigError(f"{self.name}: d_state is {self.d_state}; at most 64 is supported")
        if min(self.image_size) < self.patch_size:
            height, width = self.image_size
            raise ConfigError(
                f"{self.name}: image size {height}x{width} is smaller than a patch of {self.patch_size}; "
                f"give at least {self.patch_size}x{self.patch_size}"
            )
        if self.seqlen > MAX_TOKENS:
            height, width = self.image_size
            raise ConfigError(f"{self.name}: image size {height}x{width} makes {self.seqlen} tokens; at most {MAX_TOKENS} are supported")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def seqlen(self) -> int:
        """Tokens into layer 0: the patches and the class token."""
        return self.num_patches + 1

    @property
    def cls_index(self) -> int:
        """Position of the class token: the middle, num_patches // 2."""
        return self.num_patches // 2

    def with_changes(self, **changes: object) -> VimConfig:
        return replace(self, **changes)  # type: ignore[arg-type]
