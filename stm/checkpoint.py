"""Weights files -> our parameters: the published pickles (never executed), bare state dicts, safetensors."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MAX_TOKENS, VimConfig
from .errors import CheckpointError, MissingDependencyError

POS_EMBED_RESIZE = ("correct", "official", "keep")


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as read from a file.

    `source` is the entry it came from: "model", "model_ema" or "bare". `sha256` is the file's.
    """

    path: Path
    state_dict: dict[str, Tensor]
    source: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights came from; every output says it.

    `kind` is "random", "checkpoint" or "published".
    """

    kind: str
    source: str
    sha256: str
    seed: int | None = None
    ema: bool = False
    pos_embed_resize: str = "correct"
    pos_embed_change: str = ""  # "27x27 -> 14x14" where the position embedding was interpolated

    @property
    def is_random(self) -> bool:
        return self.kind == "random"

    def __str__(self) -> str:
        if self.is_random:
            return f"RANDOM weights (seed {self.seed}), not a trained model"
        resized = f", position embedding interpolated {self.pos_embed_change}" if self.pos_embed_change else ""
        return f"{self.kind} weights {self.source}{resized}"


def file_sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def state_dict_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and values; the same for equal weights whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(path: str | os.PathLike[str], ema: bool = False) -> Checkpoint:
    """Read a weights file without running anything in it.

    Accepts the published checkpoints (a dict with `model` and `model_ema`, and an argparse.Namespace, which is the
    only class allowed in the pickle), bare state dicts, and `.safetensors`.

    Args:
        ema: take `model_ema` instead of `model`.

    Raises:
        CheckpointError: no such file, truncated, a pickle with code, no weights, or another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict or a dict with 'model' or 'model_ema'")
    source = "bare"
    if isinstance(content.get("model"), dict) or isinstance(content.get("model_ema"), dict):
        source = "model_ema" if ema else "model"
        if not isinstance(content.get(source), dict):
            have = ", ".join(key for key in ("model", "model_ema") if isinstance(content.get(key), dict))
            raise CheckpointError(f"{path} has no {source!r}; it has {have}: {'drop' if ema else 'pass'} --ema (ema={not ema})")
        content = content[source]
    elif ema:
        raise CheckpointError(f"{path} is a bare state dict without 'model_ema'; drop --ema (ema=False)")
    if not content:
        raise CheckpointError(f"{path} holds no weights")
    for name, value in content.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: key {name!r:.80} is a {type(name).__name__}, not a parameter name; is this a ViM checkpoint?")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name!r:.80} is a {type(value).__name__}, not a tensor; is this a ViM checkpoint?")
        if value.device.type != "cpu" or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {name} has no plain data (device {value.device}, {value.layout}); save the state dict from the CPU")
    state = dict(content)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if rope := sorted(name for name in state if name.startswith("rope.") or ".rope." in name):
        raise CheckpointError(
            f"{path} has rotary embeddings ({rope[0]}): an older architecture (class token not in the middle) that this "
            "project does not support; use a checkpoint with 'midclstok' in its name"
        )
    return Checkpoint(path, state, source, file_sha256(path))


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise MissingDependencyError("reading .safetensors needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {error}; is the file truncated?") from None


def _read_pickle(path: Path) -> object:
    with open(path, "rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle of protocol 2 and later
        raise CheckpointError(f"cannot read {path}: {'it is empty' if not start else 'it is not a PyTorch file'}; is this the weights file?")
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Mapped, so that the optimiser's state, half of a published file, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as first:
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                text = str(error).strip() or str(first).strip() or type(error).__name__
                if "Unsupported" in text or "weights_only" in text or "Weights only" in text:
                    raise CheckpointError(
                        f"{path} is a pickle that needs more than tensors and argparse.Namespace; nothing in it was executed. "
                        "If you trust it, load it yourself and save its state dict as .safetensors"
                    ) from None
                raise CheckpointError(f"cannot read {path}: {text.splitlines()[0][:200]}; is the file truncated or not a checkpoint?") from None


def resize_pos_embed(pos_embed: Tensor, config: VimConfig, method: str = "correct") -> Tensor:
    """Position embedding (1, P + 1, d_model) of a square grid for `config`'s grid, by bicubic interpolation ("keep": as it is).

    "correct" takes the class slot where the model puts it, P // 2, before and after. "official" is what the published
    fine-tuning script does: slot 0 counts as the class slot, so the true one enters the grid; use it to reproduce
    checkpoints that were made so and not trained since.

    Raises:
        CheckpointError: the source grid is not square, or the method is unknown.
    """
    if method not in POS_EMBED_RESIZE:
        raise CheckpointError(f"pos_embed_resize is {method!r}; choose from {', '.join(POS_EMBED_RESIZE)}")
    if method == "keep":
        return pos_embed
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"pos_embed has {patches} patch slots, not a square grid, and the model needs {config.num_patches}; "
            "create the model with the checkpoint's own image size"
        )
    slot, new_slot = (0, 0) if method == "official" else (patches // 2, config.cls_index)
    cls = pos_embed[:, slot : slot + 1]
    grid = torch.cat([pos_embed[:, :slot], pos_embed[:, slot + 1 :]], 1)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=config.grid, mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([grid[:, :new_slot], cls, grid[:, new_slot:]], 1)


def pos_embed_change(pos_embed: Tensor, config: VimConfig, method: str) -> str:
    """ "14x14 -> 7x28" if an embedding of that many slots will be interpolated for `config`, else "".

    Nothing in a file says what its grid was. All published ones are square, so a square number of patches counts as a square
    grid even where another grid has as many (7x28); `keep` takes such an embedding as it is.
    """
    if method == "keep" or pos_embed.dim() != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[2] != config.d_model or pos_embed.shape[1] < 3:
        return ""
    side = math.isqrt(pos_embed.shape[1] - 1)
    rows, columns = config.grid
    if (side, side) == (rows, columns) or (side * side != pos_embed.shape[1] - 1 and pos_embed.shape[1] == config.seqlen):
        return ""
    return f"{side}x{side} -> {rows}x{columns}"


def fit_state_dict(
    model: nn.Module, config: VimConfig, state: Mapping[str, Tensor], where: str, pos_embed_resize: str = "correct"
) -> dict[str, Tensor]:
    """Check a state dict against a model and interpolate its position embedding where the grid differs.

    Raises:
        CheckpointError: missing or extra keys, or a wrong shape; names them and both values.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:

        def few(names: list[str]) -> str:
            return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

        parts = ([f"lacks {few(missing)}"] if missing else []) + ([f"has unknown {few(extra)}"] if extra else [])
        raise CheckpointError(f"{where} does not fit {config.name!r}: it {' and '.join(parts)}")
    fitted = dict(state)
    pos = fitted["pos_embed"]
    if pos.dim() == 3 and pos.shape[1] > MAX_TOKENS:
        raise CheckpointError(f"{where}: pos_embed has {pos.shape[1]} slots; at most {MAX_TOKENS} tokens are supported")
    if pos_embed_change(pos, config, pos_embed_resize):
        fitted["pos_embed"] = resize_pos_embed(pos.float(), config, pos_embed_resize)
    for name, value in fitted.items():
        if value.shape != expected[name].shape:
            mend = ""
            if name.startswith("head.") and value.dim():
                mend = f"; pass --num-classes {value.shape[0]} (num_classes={value.shape[0]})"
            elif name.startswith(("cls_token", "pos_embed")):
                mend = "; is it another model size?"
            raise CheckpointError(f"{where}: {name} has shape {tuple(value.shape)}, {config.name!r} needs {tuple(expected[name].shape)}{mend}")
        if not value.is_floating_point():
            raise CheckpointError(f"{where}: {name} has dtype {value.dtype}; weights are floating point")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: {name} has NaN or infinite values; the checkpoint is damaged or its training diverged")
    return fitted
