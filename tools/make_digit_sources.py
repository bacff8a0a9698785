"""Make stm/data/digit_sources.safetensors: handwritten digits and textures, cut from the wheels of scikit-learn and scikit-image.

    python tools/make_digit_sources.py scikit_learn-*.whl scikit_image-*.whl

The wheels are read as archives, so neither package need be installed and no version of Python matters. The file of 1,797 digits
repeats one form of about 128 digits 14 times (13 people, scikit-learn's description says), so a digit's place says on which form
it was written: the last forms are the test split's. Of each picture one square serves training and another one testing.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

OUTPUT = Path(__file__).resolve().parent.parent / "stm" / "data" / "digit_sources.safetensors"
FORM_START = "0955650989"  # the form's first thirty digits count 0..9 three times, with slips; what follows them has none
FORM_OFFSET = 30
SIDE = 160
# file, scale, and the upper left corners (x, y), after scaling, of the training and the testing square
PICTURES = {
    "brick.png": (0.7, (0, 0), (190, 190)),
    "grass.png": (0.7, (0, 0), (190, 190)),
    "gravel.png": (0.7, (0, 0), (190, 190)),
    "coffee.png": (0.8, (0, 0), (320, 160)),
    "chelsea.png": (1.0, (60, 60), (270, 120)),
    "camera.png": (0.7, (0, 198), (190, 198)),
    "hubble_deep_field.jpg": (0.6, (0, 0), (400, 300)),
    "retina.jpg": (0.4, (90, 200), (310, 200)),
}


def forms(labels: np.ndarray) -> np.ndarray:
    """Number of the form that each digit was written on."""
    text = "".join(str(label) for label in labels)
    starts = [match.start() - FORM_OFFSET for match in re.finditer(FORM_START, text)]
    return np.searchsorted(np.maximum(starts, 0), np.arange(len(labels)), side="right") - 1


def square(archive: zipfile.ZipFile, name: str, scale: float, corner: tuple[int, int]) -> np.ndarray:
    """One grey square, its histogram flattened, so that every texture has the same mean and contrast."""
    with archive.open(f"skimage/data/{name}") as file:
        image = Image.open(io.BytesIO(file.read())).convert("L")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    x, y = corner
    if x + SIDE > image.width or y + SIDE > image.height:
        raise SystemExit(f"{name}: the square at {corner} leaves the picture of {image.size}")
    cut = np.asarray(image.crop((x, y, x + SIDE, y + SIDE)), dtype=np.float64)
    # Half way between the picture and its ranks: full equalisation turns dark skies into noise.
    ranks = cut.ravel().argsort(kind="stable").argsort(kind="stable").reshape(cut.shape) / (cut.size - 1)
    spread = (cut - cut.min()) / max(1.0, cut.max() - cut.min())
    return np.round(255 * (0.5 * ranks + 0.5 * spread)).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scikit_learn", type=Path)
    parser.add_argument("scikit_image", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    with zipfile.ZipFile(args.scikit_learn) as archive:
        text = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz")).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.uint8)
    labels = table[:, 64].copy()
    form = forms(labels)
    with zipfile.ZipFile(args.scikit_image) as archive:
        train = [square(archive, name, scale, corner) for name, (scale, corner, _) in PICTURES.items()]
        test = [square(archive, name, scale, corner) for name, (scale, _, corner) in PICTURES.items()]
    tensors = {
        "digits": torch.from_numpy(table[:, :64].reshape(-1, 8, 8).copy()),
        "labels": torch.from_numpy(labels),
        "forms": torch.from_numpy(form.astype(np.uint8)),
        "textures.train": torch.from_numpy(np.stack(train)),
        "textures.test": torch.from_numpy(np.stack(test)),
    }
    save_file(tensors, args.output, metadata={"textures": ",".join(PICTURES)})
    print(f"{args.output}: {args.output.stat().st_size} bytes, {len(labels)} digits on {form.max() + 1} forms {np.bincount(form).tolist()}")


if __name__ == "__main__":
    main()
