"""create_model: a name, weights and a plan -> a model ready to run."""

from __future__ import annotations

import os

import torch

from .checkpoint import Provenance, fit_state_dict, load_checkpoint, pos_embed_change, state_dict_sha256
from .config import ImageSize
from .errors import ConfigError
from .hub import fetch_published
from .plan import MergePlan, resolve_plan
from .registry import model_config
from .vim import VisionMamba


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    plan: MergePlan | str | os.PathLike[str] | None = None,
    image_size: ImageSize = 224,
    num_classes: int | None = None,
    seed: int = 0,
    ema: bool = False,
    pos_embed_resize: str = "correct",
    cls_only_last: bool = True,
) -> VisionMamba:
    """Create a Vision Mamba classifier in eval mode, float32, on the CPU.

    Args:
        name: `stm.list_models()`, or an official timm name.
        pretrained: take the published weights: from the package (vim-n), or fetched from the model hub (base: its EMA
            weights, whose top-1 is the published one).
        checkpoint: a weights file; excludes `pretrained`. Without either, weights are random from `seed`.
        plan: a MergePlan, a preset name such as "stm-20", or a plan file.
        image_size: pixels, one number or (height, width); a checkpoint of another size gets its position embedding
            interpolated.
        num_classes: of the head; without it as many as the published weights have.
        ema: take the checkpoint's `model_ema`.
        pos_embed_resize: "correct", "official" or "keep", see `resize_pos_embed`; `provenance` says what was interpolated.
        cls_only_last: compute only the class token in the last layer (exact).

    Returns:
        The model; `model.provenance` says where its weights came from.

    Raises:
        ConfigError, PlanError, CheckpointError, MissingDependencyError: each says what, where and the mend.
    """
    config = model_config(name, image_size, num_classes)
    if pretrained and checkpoint is not None:
        raise ConfigError("give pretrained=True or a checkpoint, not both")
    resolved = resolve_plan(config, plan)
    # Weights are filled in below: skip torch's own initialisation, which takes seconds for ViM-B.
    with torch.device("meta"):
        model = VisionMamba(config, cls_only_last=cls_only_last)
    kind = "checkpoint"
    if pretrained:
        checkpoint, published_ema = fetch_published(config.name)
        ema, kind = ema or published_ema, "published"
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint, ema)
        state = fit_state_dict(model, config, loaded.state_dict, str(loaded.path), pos_embed_resize)
        model.load_state_dict({key: value.float().clone() for key, value in state.items()}, strict=True, assign=True)
        provenance = Provenance(
            kind,
            f"{loaded.path.name} ({loaded.source})",
            loaded.sha256,
            ema=ema,
            pos_embed_resize=pos_embed_resize,
            pos_embed_change=pos_embed_change(loaded.state_dict["pos_embed"], config, pos_embed_resize),
        )
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        model.to_empty(device="cpu")
        model.init_weights(seed)
        provenance = Provenance("random", f"seed {seed}", state_dict_sha256(model.state_dict()), seed)
    if resolved is not None:
        model = with_plan(model, resolved)
    model.provenance = provenance
    return model.eval()


def with_plan(model: VisionMamba, plan: MergePlan | None) -> VisionMamba:
    """The same weights (shared, not copied) under another plan.

    Raises:
        PlanError: the plan was made for another model.
    """
    parameter = next(model.parameters())
    with torch.device("meta"):
        other = VisionMamba(model.config, cls_only_last=model.cls_only_last)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    other.set_plan(plan)
    other.provenance = model.provenance
    return other.to(parameter.device).train(model.training)
