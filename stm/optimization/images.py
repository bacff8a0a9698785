"""Images to search on where there are no others, and off-centre copies of those there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stm.config import VimConfig
from stm.errors import ConfigError, ShapeError

SHAPES = 120
GENERATED = 24  # dead leaves images to search on
HELD_OUT = 4  # every fourth image is kept for the check


def dead_leaves(config: VimConfig, count: int, seed: int = 0) -> Tensor:
    """Normalised images of the dead leaves model (Lee, Mumford & Huang 2001): opaque discs and boxes of random colour, radius density
    r^-3, in front of each other, lightly grained. They have the edges, occlusion and scale invariance of photographs, and the same
    statistics at every place, so that nothing favours the centre.

    Returns:
        (count, 3, height, width), float32, on the CPU.
    """
    g = torch.Generator().manual_seed(seed)
    height, width = config.image_size
    side = float(max(height, width))
    y, x = torch.arange(height).view(1, height, 1) + 0.5, torch.arange(width).view(1, 1, width) + 0.5
    pixels = torch.rand(count, 3, 1, 1, generator=g).expand(-1, -1, height, width).clone()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=g)

    smallest, largest = side / 40, side / 2.5
    for _ in range(SHAPES):  # from behind
        radius = (smallest**-2 + uniform(0, 1) * (largest**-2 - smallest**-2)).rsqrt()
        dx, dy = x - uniform(0, width), y - uniform(0, height)
        angle, stretch = uniform(0, math.pi), uniform(0.5, 2)
        u, v = (dx * angle.cos() + dy * angle.sin()) * stretch, dy * angle.cos() - dx * angle.sin()
        inside = torch.where(uniform(0, 1) < 0.5, u * u + v * v < radius * radius, (u.abs() < radius) & (v.abs() < radius))
        shade = uniform(-0.4, 0.4, 1, 1, 1) * (u / radius).unsqueeze(1)
        colour = (uniform(0, 1, 3, 1, 1) + shade).clamp(0, 1)
        pixels = torch.where(inside.unsqueeze(1), colour, pixels)
    pixels = (pixels + 0.03 * torch.randn(pixels.shape, generator=g)).clamp(0, 1)
    return normalised(pixels, config)


def normalised(pixels: Tensor, config: VimConfig) -> Tensor:
    """(batch, 3, height, width) in 0..1, or uint8, with the model's mean and deviation."""
    scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (scaled - mean) / std


def moved(images: Tensor, seed: int = 0) -> Tensor:
    """Each image turned around by a random step along both axes, a quarter to three quarters of its side: the middle lands elsewhere."""
    g = torch.Generator().manual_seed(seed)
    height, width = images.shape[-2:]
    steps = 0.25 + 0.5 * torch.rand(len(images), 2, generator=g)
    return torch.stack([image.roll((int(dy * height), int(dx * width)), (-2, -1)) for image, (dy, dx) in zip(images, steps.tolist(), strict=True)])


@dataclass(frozen=True)
class SearchImages:
    """Batches to search on and to check with, on the model's device; how many images that are, and what they are in words."""

    batches: list[Tensor]
    checks: list[Tensor]
    images: int
    held_out: int
    data: str


def search_images(
    config: VimConfig,
    device: torch.device,
    images: Tensor | None,
    held_out: Tensor | None,
    off_centre: bool,
    seed: int,
    batch: int | None,
    data: str | None,
) -> SearchImages:
    """What a search runs on: the arguments are those of `optimize_plan`.

    Raises:
        ConfigError: no images. ShapeError: images that do not fit.
    """
    if images is None:
        images, off_centre, data = dead_leaves(config, GENERATED * HELD_OUT // (HELD_OUT - 1), seed), False, data or "generated images"
    height, width = config.image_size
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
        raise ShapeError(f"images have shape {tuple(images.shape)}, expected (n, 3, {height}, {width}), normalised")
    if not len(images):
        raise ConfigError("no images to search on; give a few, or none at all for generated ones")
    if held_out is None:
        kept = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
        images, held_out = images[~kept], images[kept]
    if off_centre:
        images, held_out = (torch.cat([part, moved(part, seed)]) if len(part) else part for part in (images, held_out))
    # Batches alike: a plan that is out after the first one is out for what it does, not for where its images came from.
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    size = batch or (128 if device.type == "cuda" else 16)
    batches, checks = ([part.to(device) for part in torch.split(whole, size)] if len(whole) else [] for whole in (images, held_out))
    return SearchImages(batches, checks, len(images), len(held_out), data or "given images")
