"""`python -m stm.data DIR`: write test images of the digit pairs as PNG files with a list of their classes, for `stm eval` and the samples.

They are 256 pixels wide and high: the usual preprocessing (to 256, crop 224) then cuts out exactly what the model was tested on.
"""

from __future__ import annotations

import argparse
import struct
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

from stm.errors import ConfigError, StmError

from .digit_pairs import VARIANTS, DigitPairs

MARGIN = 16  # 224 + 2 * 16 = 256
LIST = "val.txt"
_BATCH = 20


def png(image: Tensor) -> bytes:
    """(3, height, width), uint8, as a PNG file; rows are stored as differences to the pixel on the left, which halves them."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0)
    rows = pixels - torch.nn.functional.pad(pixels, (0, 0, 1, 0))[:, :-1]  # uint8: wraps around, as PNG wants it
    filtered = torch.cat([torch.ones(height, 1, dtype=torch.uint8), rows.reshape(height, 3 * width)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    packed = zlib.compress(bytes(filtered.flatten().tolist()), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def write_test_images(folder: Path, images: int, variants: tuple[str, ...] = VARIANTS) -> list[Path]:
    """The first `images` test images of each variant, as VARIANT-INDEX-CLASS.png, and their classes in val.txt; the same each time.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    makers = {variant: DigitPairs("test", variant, margin=MARGIN) for variant in variants}
    labels = {variant: maker.labels(torch.arange(images)).tolist() for variant, maker in makers.items()}
    names = {variant: [f"{variant}-{index:05d}-{label:02d}.png" for index, label in enumerate(labels[variant])] for variant in variants}
    every = [name for variant in variants for name in names[variant]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if other := sorted({path.name for path in folder.iterdir()} - {*every, LIST}):
            raise ConfigError(f"{folder} holds {other[0]}{', ..' if len(other) > 1 else ''}, which is not of these images; give an empty folder")
        for variant, maker in makers.items():
            for begin in range(0, images, _BATCH):
                part = names[variant][begin : begin + _BATCH]
                made, _ = maker.batch(torch.arange(begin, begin + len(part)))
                for name, image in zip(part, made, strict=True):
                    (folder / name).write_bytes(png(image))
        lines = [f"{name} {label}\n" for variant in variants for name, label in zip(names[variant], labels[variant], strict=True)]
        (folder / LIST).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from None
    return [folder / name for name in every]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stm.data", description="Write test images of digit pairs and the list of their classes.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="of each variant (default 100)")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one (default: both)")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images {args.images}: at least 1")
    variants = (args.variant,) if args.variant else VARIANTS
    try:
        written = write_test_images(args.folder, args.images, variants)
    except StmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {len(written)} test images to {args.folder} ({', '.join(f'{args.images} {name}' for name in variants)}) and their classes ({LIST})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
