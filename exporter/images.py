"""Images in: the published preprocessing with numpy and Pillow, and the photographs that ship with the package."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stm.errors import ConfigError
from stm.registry import model_entry

if TYPE_CHECKING:  # this module runs without torch
    from stm.vim import VisionMamba

DATA = Path(__file__).parent / "data"
CROP_RATIO = 0.875
MAX_PIXELS = 100_000_000

Floats = NDArray[np.float32]


def resized(image_size: tuple[int, int], size: tuple[int, int], crop_ratio: float = CROP_RATIO) -> tuple[int, int]:
    """(width, height) of an image of `image_size` (width, height) after the resize that goes before a crop to `size` (height,
    width): the shorter side decides, the longer one is cut to whole pixels as torchvision does it."""
    width, height = image_size
    least_height, least_width = (int(side / crop_ratio) for side in size)
    if width * least_height <= height * least_width:
        return least_width, max(least_height, int(least_width * height / width))
    return max(least_width, int(least_height * width / height)), least_height


def preprocess(image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], crop_ratio: float = CROP_RATIO) -> Floats:
    """Resize so that the crop is `crop_ratio` of it (bicubic, antialiased), centre crop, scale to 0..1, normalise.

    At 224 this is the published evaluation: shorter side to 256, crop 224 (ImageNet mean and std; the model's own
    `default_cfg` says otherwise and is not what was used).

    Args:
        size: (height, width) of the result in pixels.

    Returns:
        (3, height, width), float32.
    """
    height, width = size
    image = image.convert("RGB")
    image = image.resize(resized(image.size, size, crop_ratio), Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255.0
    normal = (pixels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file.

    Raises:
        ConfigError: no such file, not an image, or more than 100 million pixels.
    """
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ConfigError(f"{path} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"cannot read image {path}: {error}") from None


def photos() -> list[Image.Image]:
    """The photographs that ship with the package (data/README.md says whose they are)."""
    return [load_image(path) for path in sorted((DATA / "photos").glob("*.jpg"))]


def parity_inputs(size: tuple[int, int], mean: Sequence[float], std: Sequence[float], batches: Sequence[int] = (1, 5), seed: int = 0) -> list[Floats]:
    """Inputs for a parity check: for each batch size one array of photographs and one of seeded noise.

    Noise has unit variance, as normalised images have; where a batch needs more photographs than there are, they come
    again flipped and turned, so no two images are equal.
    """
    rng = np.random.default_rng(seed)
    base = [preprocess(image, size, mean, std) for image in photos()]
    inputs = []
    for batch in batches:
        pictures = []
        for index in range(batch):
            picture, turn = base[index % len(base)], index // len(base)
            if turn % 2:
                picture = picture[:, :, ::-1]
            pictures.append(np.roll(picture, 17 * (turn // 2), axis=2))
        inputs.append(np.ascontiguousarray(np.stack(pictures)))
        inputs.append(rng.standard_normal((batch, 3, *size), dtype=np.float32))
    return inputs


def varied_inputs(size: tuple[int, int], mean: Sequence[float], std: Sequence[float], count: int, seed: int = 0) -> Floats:
    """`count` different images: crops, flips and brightness changes of the photographs; (count, 3, height, width)."""
    rng = np.random.default_rng(seed)
    pictures, sources = [], photos()
    for index in range(count):
        image = sources[index % len(sources)]
        share = math.sqrt(rng.uniform(0.3, 1.0))
        w, h = int(image.width * share), int(image.height * share)
        x, y = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
        picture = preprocess(image.crop((x, y, x + w, y + h)), size, mean, std)
        if rng.random() < 0.5:
            picture = picture[:, :, ::-1]
        pictures.append(picture * np.float32(rng.uniform(0.6, 1.4)))
    return np.stack(pictures)


def class_names(model: VisionMamba) -> list[str] | None:
    """What a model's classes are called: the published weights' own names, ImageNet's for 1000 classes, else unknown."""
    provenance = model.provenance
    if provenance is not None and provenance.kind == "published":
        names = model_entry(model.config.name).class_names
        if names is not None and len(names) == model.config.num_classes:
            return list(names)
    return imagenet_classes() if model.config.num_classes == 1000 else None


def imagenet_classes() -> list[str]:
    return (DATA / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
