"""The one door to what an ONNX file of ours says about itself; a file may come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from .errors import ArtefactError
from .tolerances import TOLERANCES

MAX_ONNX_BYTES = 1 << 31
MAX_CLASSES = 1_000_000


def load_onnx(path: Path) -> onnx.ModelProto:
    """Raises:
    ArtefactError: no such file, 2 GiB or more, or not an ONNX model.
    """
    if not path.is_file():
        raise ArtefactError(f"no file {path}")
    if path.stat().st_size >= MAX_ONNX_BYTES:
        raise ArtefactError(f"{path} has {path.stat().st_size} bytes; ONNX files of 2 GiB and more are not read")
    try:
        return onnx.load(str(path))
    except Exception as error:
        raise ArtefactError(f"cannot read {path} as ONNX: {str(error)[:200]}") from None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def read_metadata(path: Path) -> dict[str, Any]:
    """What an ONNX file says about itself, checked, under the names of an engine's sidecar.

    Raises:
        ArtefactError: no such file, not ONNX, not made by us, or damaged metadata.
    """
    return parse_metadata(path, load_onnx(path))


def parse_metadata(path: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """`read_metadata` of a model that is loaded already."""
    meta = {entry.key.removeprefix("stm."): entry.value for entry in model.metadata_props if entry.key.startswith("stm.")}
    if not meta:
        raise ArtefactError(f"{path} has no stm metadata: not made by stm-export, or stripped since; export it again")
    try:
        size = json.loads(meta["image_size"])
        _require(isinstance(size, list) and len(size) == 2 and all(type(s) is int and 1 <= s <= 1 << 16 for s in size), "image_size")
        config = json.loads(meta["config"])
        _require(isinstance(config, dict), "config")
        num_classes = config["num_classes"]
        _require(type(num_classes) is int and 1 <= num_classes <= MAX_CLASSES, "num_classes")
        _require(meta["precision"] in TOLERANCES, f"precision {meta['precision']!r:.20}")
        random = json.loads(meta["weights_random"])
        _require(type(random) is bool, "weights_random")
        seed = json.loads(meta.get("seed") or "null")
        _require((type(seed) is int and abs(seed) < 1 << 63) if random else seed is None, "seed")
        plan = json.loads(meta["plan"]) if meta["plan"] else None
        reduction = json.loads(meta["reduction"]) if meta.get("reduction") else None
        _require(reduction is None or (isinstance(reduction, dict) and isinstance(reduction.get("schedule"), dict)), "reduction")
        classes = json.loads(meta["classes"]) if meta.get("classes") else None
        _require(classes is None or (isinstance(classes, list) and len(classes) == num_classes), "classes")
        seqlen = json.loads(meta["seqlen"])
        _require(isinstance(seqlen, list) and all(type(n) is int for n in seqlen), "seqlen")
        text = {key: meta[key] for key in ("model", "weights", "weights_kind", "weights_sha256", "precision")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: its stm metadata is damaged ({str(error)[:80]}); export it again") from None
    return {
        **text,
        "weights_random": random,
        "seed": seed,
        "ema": meta.get("ema") == "true",
        "pos_embed_resize": meta.get("pos_embed_resize", "correct"),
        "image_size": size,
        "num_classes": num_classes,
        "classes": classes,
        "seqlen": seqlen,
        "plan": plan,
        "reduction": reduction,
    }
