"""The published evaluation's preprocessing, pixel for pixel, with Pillow and numpy."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from stm.errors import ConfigError

from ..images import CROP_RATIO, MAX_PIXELS, Floats, preprocess


class UnreadableImageError(ConfigError):
    """An image of the data that cannot be decoded."""


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to int(size / crop_ratio) (bicubic, antialiased), centre crop, 0..1, normalise: 224 from 256 as published.

    What `Resize(256, interpolation=3), CenterCrop(224), ToTensor(), Normalize` of torchvision computes, to the last bit: the
    longer side is cut to whole pixels, not rounded. For sizes that are not square, the smallest image that covers
    (height, width) / crop_ratio.

    Args:
        size: (height, width) in pixels.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_ratio: float = CROP_RATIO

    def __post_init__(self) -> None:
        if not 0 < self.crop_ratio <= 1:
            raise ConfigError(f"crop ratio is {self.crop_ratio}; it is the share of the resized image that is kept, 0 < ratio <= 1")

    def __call__(self, image: Image.Image) -> Floats:
        """(3, height, width), float32."""
        return preprocess(image, self.size, self.mean, self.std, self.crop_ratio)

    def identity(self) -> dict[str, Any]:
        return {"size": list(self.size), "crop_ratio": self.crop_ratio, "resize": "bicubic", "mean": list(self.mean), "std": list(self.std)}


def decode(data: bytes) -> Image.Image:
    """An image file's bytes as RGB.

    Raises:
        UnreadableImageError: not an image, damaged, or more than 100 million pixels; the caller says which file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data and large pictures
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImageError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
                return image.convert("RGB")
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        text = str(error).splitlines()[0] if str(error) else ""
        raise UnreadableImageError(
            "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {text[:150]}"
        ) from None
