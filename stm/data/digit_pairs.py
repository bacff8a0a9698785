"""Digit pairs: 100 classes of labelled images, made in batches on any device, the same for the same seed and index.

An image shows one large and one small handwritten digit among fragments of other digits on a textured ground; the class is
10 * large + small. No patch holds ink of both digits, and which digit is large shows only where its strokes are seen together,
so no single patch decides the class (at best one digit of two, a tenth of the images), and the small digit, some 40 pixels high,
needs detail: merging the wrong tokens costs accuracy.

Two variants: `centred` keeps both digits in the middle rows, as photographers do; `anywhere` lets them lie up to the border.
Splits differ in everything that is drawn: digits are split by the form that they were written on, textures by region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stm.errors import ConfigError, MissingDependencyError

from .names import NUM_CLASSES

SOURCES = Path(__file__).with_name("digit_sources.safetensors")
SPLITS = ("train", "test")
VARIANTS = ("centred", "anywhere")
TEST_FORMS = (11, 12, 13)
IMAGE_SIZE = 224
PATCH = 16  # what the layout below keeps the digits apart by

LARGE = (66.0, 92.0)  # pixels: the side of the digit's 8 x 8 box
SMALL = (40.0, 52.0)
STRETCH = 0.12  # log of the aspect ratio, either way
SHEAR = 0.25
TURN = math.radians(15)
WAVE = 0.05  # of half a box
CANDIDATES = 24
CELLS = 4  # fragments lie one a cell of a CELLS x CELLS grid
FRAGMENT = (10.0, 15.0)  # radius, pixels: too small to hold a whole digit of the size below
FRAGMENT_DIGIT = (56.0, 92.0)
REACH = 92.0  # largest sum of the two digits' radii: side by side, off the middle by 8 pixels, they then still fit

_BANK = 40  # side of the magnified digits: the 8 x 8 box and a source pixel of margin
_INK = 0.48  # of full ink: what counts as inside a stroke

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, splitmix64's increment
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014): int64 -> int64, all bits mixed; wraps around."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


class _Random:
    """Uniform numbers that depend on (key, how many were drawn before) alone: no state, any device, any batch."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.drawn = keys, 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(batch, *shape), float32 in [low, high)."""
        count = math.prod(shape)
        counters = torch.arange(self.drawn + 1, self.drawn + count + 1, device=self.keys.device)
        self.drawn += count
        bits = _shift(_mix(self.keys[:, None] + counters * _GOLDEN), 40)  # 24 bits: exact in float32
        return (low + (high - low) * (bits.float() * 2.0**-24)).reshape(-1, *shape)

    def below(self, bound: Tensor | int) -> Tensor:
        """(batch), int64 in [0, bound)."""
        return (self.uniform() * bound).long()  # bound is small: uniform() <= 1 - 2^-24, so the product stays below it


@dataclass(frozen=True)
class Scene:
    """Images with what is in them.

    images: (batch, 3, height, width), uint8. labels: (batch). ink: (batch, 2, height, width), the large and the small digit's
    masks, 0..1. centres, sizes: (batch, 2, 2) as (x, y) and (batch, 2), pixels.
    """

    images: Tensor
    labels: Tensor
    ink: Tensor
    centres: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class _Placed:
    """Digits to draw: one an image. All (batch) but `centre` (batch, 2)."""

    glyph: Tensor
    size: Tensor
    turn: Tensor
    stretch: Tensor
    shear: Tensor
    wave: Tensor  # (batch, 2): phases
    threshold: Tensor
    centre: Tensor

    @property
    def radius_factor(self) -> Tensor:
        """Bound on how far the distortions move ink from the centre; a shear by k has the norm (k + sqrt(k^2 + 4)) / 2."""
        shear = self.shear.abs()
        return torch.exp(self.stretch.abs() / 2) * (shear + torch.sqrt(shear * shear + 4)) / 2 * (1 + WAVE)


class DigitPairs:
    """The images of one split and variant; `batch` makes those of any indices.

    Args:
        split: "train" or "test": other digits, other textures.
        variant: "centred" or "anywhere".
        seed: another seed makes other images of the same kind.
        device: where images are made. Results on two devices agree up to rounding of a pixel value.
        margin: extra pixels of ground on each side. 16 makes pictures of 256 pixels whose central 224 are the image, for
            programs that crop as ImageNet's preprocessing does.

    Raises:
        ConfigError: no such split or variant. MissingDependencyError: the package safetensors is missing.
    """

    def __init__(self, split: str, variant: str, seed: int = 0, device: torch.device | str = "cpu", margin: int = 0) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}; choose from {', '.join(SPLITS)}")
        if variant not in VARIANTS:
            raise ConfigError(f"variant is {variant!r}; choose from {', '.join(VARIANTS)}")
        if margin < 0:
            raise ConfigError(f"margin is {margin}; it must be 0 or more pixels")
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise MissingDependencyError("the digits and textures need the package safetensors: pip install safetensors") from None
        self.split, self.variant, self.seed, self.margin = split, variant, seed, margin
        self.device = torch.device(device)
        tensors = load_file(SOURCES)
        forms = tensors["forms"]
        chosen = torch.isin(forms, torch.tensor(TEST_FORMS, dtype=forms.dtype)) == (split == "test")
        labels = tensors["labels"][chosen].long()
        order = labels.argsort(stable=True)
        digits = tensors["digits"][chosen][order].float() / 16
        bank = F.interpolate(F.pad(digits, (1, 1, 1, 1))[:, None], size=_BANK, mode="bicubic", align_corners=False).clamp(0, 1)
        counts = labels.bincount(minlength=10)
        self.num_digits = len(digits)
        self._bank = bank.to(self.device)
        self._count = counts.to(self.device)
        self._first = (counts.cumsum(0) - counts).to(self.device)
        self._radius = _ink_radius(bank).to(self.device)
        self._textures = (tensors[f"textures.{split}"][:, None].float() / 255).to(self.device)
        self._keys = [self._key(stream).to(self.device) for stream in range(2)]

    @property
    def side(self) -> int:
        return IMAGE_SIZE + 2 * self.margin

    def labels(self, indices: Tensor) -> Tensor:
        """Classes of these images: each occurs once in every 100 indices from a multiple of 100 on, in shuffled order."""
        indices = indices.to(self.device)
        offset = _mix(self._keys[0] + torch.div(indices, NUM_CLASSES, rounding_mode="floor") * _GOLDEN)
        return (indices * 37 + _shift(offset, 33)) % NUM_CLASSES  # 37 and 100 have no common divisor

    def _key(self, stream: int) -> Tensor:
        """A key of its own for each seed, split, variant and stream."""
        key = torch.tensor(self.seed, dtype=torch.int64)
        for part in (SPLITS.index(self.split), VARIANTS.index(self.variant), stream):
            key = _mix(key * _GOLDEN + part + 1)
        return key

    def batch(self, indices: Tensor, clutter: float = 1.0) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, side, side), uint8, and labels (batch), of these indices (batch), int64.

        `clutter` below 1 leaves fragments out and weakens the ground: easier images, for the start of a training.
        """
        scene = self.scene(indices, clutter)
        return scene.images, scene.labels

    def scene(self, indices: Tensor, clutter: float = 1.0) -> Scene:
        """The same with masks and places, for tests and figures."""
        indices = indices.to(self.device)
        random = _Random(_mix(self._keys[1] + indices * _GOLDEN))
        labels = self.labels(indices)
        large = self._digit(random, torch.div(labels, 10, rounding_mode="floor"), LARGE)
        small = self._digit(random, labels % 10, SMALL)
        large, small = self._place(random, large, small)
        axis = torch.arange(self.side, device=self.device, dtype=torch.float32) + (0.5 - self.margin)
        ink = torch.stack([self._draw(placed, axis) for placed in (large, small)], 1)
        mask = torch.maximum(ink.amax(1), self._fragments(random, large, small, clutter))
        images = self._colour(random, mask, axis, clutter)
        return Scene(images, labels, ink, torch.stack([large.centre, small.centre], 1), torch.stack([large.size, small.size], 1))

    # --- digits ------------------------------------------------------------------------------------------------------------

    def _digit(self, random: _Random, digit: Tensor, size: tuple[float, float]) -> _Placed:
        stretch, shear, turn = random.uniform(3, low=-1, high=1).unbind(1)
        return _Placed(
            glyph=self._first[digit] + random.below(self._count[digit]),
            size=random.uniform(low=size[0], high=size[1]),
            turn=turn * TURN,
            stretch=stretch * STRETCH,
            shear=shear * SHEAR,
            wave=random.uniform(2, high=2 * math.pi),
            threshold=random.uniform(low=_INK - 0.06, high=_INK + 0.06),
            centre=random.uniform(2),  # set by _place
        )

    def _place(self, random: _Random, large: _Placed, small: _Placed) -> tuple[_Placed, _Placed]:
        """Put both inside the image, so far apart that no patch meets both; a pair too wide for that is made smaller."""
        radius_large, radius_small = (self._radius[placed.glyph] * placed.size * placed.radius_factor + 1 for placed in (large, small))
        fit = (REACH / (radius_large + radius_small)).clamp_max(1)
        large, small = (replace(placed, size=placed.size * fit) for placed in (large, small))
        radius_large, radius_small = radius_large * fit, radius_small * fit
        apart = radius_large + radius_small
        if self.variant == "centred":
            # Side by side about the middle: the middle rows hold both, whichever is left.
            angle = random.uniform(low=-math.radians(25), high=math.radians(25))
            distance = apart + PATCH * math.sqrt(2)
            step = distance[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
            step = torch.where(random.uniform(1) < 0.5, step, -step)
            middle = IMAGE_SIZE / 2 + random.uniform(2, low=-8, high=8)
            # The pair's extent is centred, not its mean: the large digit weighs more.
            shift = (radius_small - radius_large)[:, None] * step / (2 * distance[:, None])
            first, second = middle - step / 2 - shift, middle + step / 2 - shift
            first, second = (_inside(centre, radius) for centre, radius in ((first, radius_large), (second, radius_small)))
        else:
            places = random.uniform(CANDIDATES, 4)
            radii = torch.stack([radius_large, radius_large, radius_small, radius_small], 1)[:, None]
            places = radii + places * (IMAGE_SIZE - 2 * radii)
            gap = (places[..., :2] - places[..., 2:]).abs()
            enough = (gap.norm(dim=-1) >= apart[:, None] + PATCH * math.sqrt(2)) | (gap.amax(-1) >= apart[:, None] + PATCH)
            # The first that fits; the last, should none fit, is opposite corners.
            corner = torch.cat([radii[:, 0, :2], IMAGE_SIZE - radii[:, 0, 2:]], 1)
            rank = enough * torch.arange(CANDIDATES, 0, -1, device=self.device)
            chosen = places.gather(1, rank.argmax(1)[:, None, None].expand(-1, 1, 4))[:, 0]
            chosen = torch.where(enough.any(1, keepdim=True), chosen, corner)
            first, second = chosen[:, :2], chosen[:, 2:]
        return replace(large, centre=first), replace(small, centre=second)

    def _draw(self, placed: _Placed, axis: Tensor) -> Tensor:
        """Mask of one digit an image, (batch, side, side), 0..1."""
        half = placed.size[:, None, None] / 2
        x = (axis[None, None, :] - placed.centre[:, 0, None, None]) / half
        y = (axis[None, :, None] - placed.centre[:, 1, None, None]) / half
        cos, sin = placed.turn.cos()[:, None, None], placed.turn.sin()[:, None, None]
        x, y = x * cos + y * sin, y * cos - x * sin
        x = x + placed.shear[:, None, None] * y
        x, y = x * torch.exp(placed.stretch / 2)[:, None, None], y * torch.exp(-placed.stretch / 2)[:, None, None]
        x, y = x + WAVE * torch.sin(3 * y + placed.wave[:, 0, None, None]), y + WAVE * torch.sin(3 * x + placed.wave[:, 1, None, None])
        grid = torch.stack([x, y], -1) * 0.8  # the box is 8 of the bank's 10 source pixels
        value = F.grid_sample(self._bank[placed.glyph], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
        steep = (0.36 * placed.size)[:, None, None]  # an edge some two pixels wide at any size
        return torch.sigmoid((value - placed.threshold[:, None, None]) * steep)

    # --- what distracts ----------------------------------------------------------------------------------------------------

    def _fragments(self, random: _Random, large: _Placed, small: _Placed, clutter: float) -> Tensor:
        """Pieces of other digits in small discs, in the same ink, clear of both digits; (batch, side, side)."""
        batch, cells = len(large.size), CELLS * CELLS
        cell = IMAGE_SIZE // CELLS
        draws = random.uniform(cells, 9)
        glyph = (draws[..., 0] * self.num_digits).long()
        size = FRAGMENT_DIGIT[0] + draws[..., 1] * (FRAGMENT_DIGIT[1] - FRAGMENT_DIGIT[0])
        turn = (2 * draws[..., 2] - 1) * math.pi
        radius = FRAGMENT[0] + draws[..., 3] * (FRAGMENT[1] - FRAGMENT[0])
        place = cell / 2 + (2 * draws[..., 4:6] - 1) * (cell / 2 - radius - 2)[..., None]
        piece = (2 * draws[..., 6:8] - 1) * 0.55  # which part of the digit, in half boxes
        corner = torch.arange(CELLS, device=self.device) * cell
        centre = place.view(batch, CELLS, CELLS, 2) + torch.stack(torch.meshgrid(corner, corner, indexing="xy"), -1)
        clear = torch.ones(batch, cells, dtype=torch.bool, device=self.device)
        for placed in (large, small):
            reach = (self._radius[placed.glyph] * placed.size * placed.radius_factor)[:, None] + radius
            clear &= (centre.view(batch, cells, 2) - placed.centre[:, None]).norm(dim=-1) > reach
        shown = clear & (draws[..., 8] < 0.75 * clutter)
        axis = torch.arange(cell, device=self.device, dtype=torch.float32) + 0.5
        x = axis[None, None, None, :] - place[..., 0, None, None]
        y = axis[None, None, :, None] - place[..., 1, None, None]
        disc = torch.sigmoid((radius[..., None, None] - torch.sqrt(x * x + y * y)) * 1.5) * shown[..., None, None]
        cos, sin, half = turn.cos()[..., None, None], turn.sin()[..., None, None], size[..., None, None] / 2
        grid = torch.stack([(x * cos + y * sin) / half + piece[..., 0, None, None], (y * cos - x * sin) / half + piece[..., 1, None, None]], -1) * 0.8
        bank = self._bank[glyph.flatten()]
        value = F.grid_sample(bank, grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False).view(batch, cells, cell, cell)
        ink = torch.sigmoid((value - _INK) * (0.36 * size)[..., None, None]) * disc
        tiled = ink.view(batch, CELLS, CELLS, cell, cell).transpose(2, 3).reshape(batch, IMAGE_SIZE, IMAGE_SIZE)
        return F.pad(tiled, (self.margin,) * 4)

    def _colour(self, random: _Random, mask: Tensor, axis: Tensor, clutter: float) -> Tensor:
        """Ground and ink in two tints each, lit from one side; uint8."""
        texture = random.below(len(self._textures))
        turn, scale = random.uniform(high=2 * math.pi), torch.exp(random.uniform(low=-0.5, high=0.5))
        offset = random.uniform(2, low=-1, high=1)
        x, y = axis[None, None, :] / 112 - 1, axis[None, :, None] / 112 - 1
        cos, sin = (turn.cos() * scale)[:, None, None], (turn.sin() * scale)[:, None, None]
        grid = torch.stack([x * cos + y * sin + offset[:, 0, None, None], y * cos - x * sin + offset[:, 1, None, None]], -1)
        ground = F.grid_sample(self._textures[texture], grid, mode="bilinear", padding_mode="reflection", align_corners=False) - 0.5
        level, contrast, strength = random.uniform(low=0.2, high=0.8), random.uniform(low=0.1, high=0.35), random.uniform(low=0.35, high=0.5)
        contrast = contrast * (0.25 + 0.75 * clutter)
        # Ink is brighter on dark grounds and darker on bright ones.
        ink = level + torch.where(level < 0.5, strength, -strength)
        light = random.uniform(2, low=-0.08, high=0.08)
        shade = (light[:, 0, None, None] * x + light[:, 1, None, None] * y)[:, None]
        tint = random.uniform(3, 3, low=-0.12, high=0.12)
        tint = tint - tint.mean(2, keepdim=True)  # of mean ground, of its contrast, of ink; brightness is set above
        base, vary, drawn = (tint[:, kind, :, None, None] for kind in range(3))
        field = level[:, None, None, None] + base + ground * (contrast[:, None, None, None] + vary)
        inked = ink[:, None, None, None] + drawn + ground * (0.25 * contrast[:, None, None, None])
        picture = torch.lerp(field, inked, mask[:, None]) + shade
        return picture.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _ink_radius(bank: Tensor) -> Tensor:
    """Largest distance of ink from the middle, in sides of the digit's box; (digits)."""
    axis = (torch.arange(_BANK) + 0.5) / _BANK * 10 - 5
    distance = torch.hypot(axis[None, :], axis[:, None]) / 8
    return ((bank[:, 0] > _INK - 0.12) * distance).amax((1, 2))


def _inside(centre: Tensor, radius: Tensor) -> Tensor:
    reach = radius[:, None]
    return torch.minimum(torch.maximum(centre, reach), IMAGE_SIZE - reach)
