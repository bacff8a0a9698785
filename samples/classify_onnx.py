"""Classify an image with an exported ViM: needs onnxruntime, numpy and pillow, nothing of this project.

python classify_onnx.py vim.onnx cat.jpg
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def preprocess(image: Image.Image, size: list[int], normalization: dict) -> np.ndarray:
    """Resize (bicubic), centre crop, scale to 0..1, normalise; returns (1, 3, height, width), float32."""
    height, width = size
    image = image.convert("RGB")
    ratio = normalization["crop_ratio"]
    least_height, least_width = int(height / ratio), int(width / ratio)
    if image.width * least_height <= image.height * least_width:
        resized = (least_width, max(least_height, int(least_width * image.height / image.width)))
    else:
        resized = (max(least_width, int(least_height * image.width / image.height)), least_height)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(normalization["mean"])) / np.float32(normalization["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=".onnx made by stm-export")
    parser.add_argument("image")
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map  # the file says how its images want to be prepared
    size, normalization = json.loads(meta["stm.image_size"]), json.loads(meta["stm.normalization"])
    names = json.loads(meta["stm.classes"]) if meta["stm.classes"] else None
    if json.loads(meta["stm.weights_random"]):
        print(f"WARNING: {meta['stm.weights']}: the classes below mean nothing")

    (logits,) = session.run(["logits"], {"images": preprocess(Image.open(args.image), size, normalization)})
    chances = np.exp(logits[0] - logits[0].max())
    chances /= chances.sum()
    for index in np.argsort(-chances)[:5]:
        print(f"{chances[index]:7.2%}  {names[index] if names else index}")


if __name__ == "__main__":
    main()
