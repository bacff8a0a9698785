"""Model names: their sizes and where their published weights are."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from .config import ImageSize, VimConfig, image_size_pair
from .data.names import CLASS_NAMES
from .errors import ConfigError

WEIGHTS_FOLDER = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class PublishedWeights:
    """A checkpoint on the model hub, as its authors published it.

    `ema` says whether the reported top-1 is that of `model_ema` (only base; R-MeeTo lists base's 81.9 as
    the EMA figure).
    """

    repo: str
    filename: str
    ema: bool
    top1: float
    top5: float


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that we trained, a .safetensors in the package (stm/weights); README.md there is their model card."""

    filename: str

    @property
    def path(self) -> Path:
        return WEIGHTS_FOLDER / self.filename


@dataclass(frozen=True)
class ModelEntry:
    """`class_names` are those of `weights`, where they are not ImageNet's."""

    config: VimConfig
    official_name: str | None
    weights: PublishedWeights | PackagedWeights | None
    class_names: tuple[str, ...] | None = None


_NANO, _TINY, _SMALL, _BASE = 64, 192, 384, 768
_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"

_MODELS = {
    "vim-n": ModelEntry(
        VimConfig("vim-n", _NANO, num_classes=len(CLASS_NAMES)),
        None,  # ours alone: trained on digit pairs (stm/data)
        PackagedWeights("vim-n.safetensors"),
        CLASS_NAMES,
    ),
    "vim-t": ModelEntry(
        VimConfig("vim-t", _TINY),
        f"vim_tiny_patch16_224_{_SUFFIX}",
        PublishedWeights("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", False, 76.1, 93.0),
    ),
    "vim-s": ModelEntry(
        VimConfig("vim-s", _SMALL),
        f"vim_small_patch16_224_{_SUFFIX}",
        PublishedWeights("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", False, 80.5, 95.1),
    ),
    "vim-b": ModelEntry(
        VimConfig("vim-b", _BASE),
        "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
        PublishedWeights("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", True, 81.9, 95.8),
    ),
    "vim-t-stride8": ModelEntry(
        VimConfig("vim-t-stride8", _TINY, stride=8),
        f"vim_tiny_patch16_stride8_224_{_SUFFIX}",
        PublishedWeights("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", False, 78.3, 94.2),
    ),
    "vim-s-stride8": ModelEntry(
        VimConfig("vim-s-stride8", _SMALL, stride=8),
        f"vim_small_patch16_stride8_224_{_SUFFIX}",
        PublishedWeights("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", False, 81.6, 95.4),
    ),
}
_ALIASES = {entry.official_name: name for name, entry in _MODELS.items() if entry.official_name}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def model_entry(name: str) -> ModelEntry:
    """Look a model up by our name or by its official timm name.

    Raises:
        ConfigError: no such model; names the nearest.
    """
    key = _ALIASES.get(name, name)
    if key not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no model {name!r}.{hint} Models: {', '.join(_MODELS)}")
    return _MODELS[key]


def model_config(name: str, image_size: ImageSize = 224, num_classes: int | None = None) -> VimConfig:
    """The sizes of a model by name, for this image size (pixels) and number of classes (None: its weights')."""
    config = model_entry(name).config
    return config.with_changes(image_size=image_size_pair(image_size), num_classes=config.num_classes if num_classes is None else num_classes)
