"""A plan as a picture: which patches become one token, how many tokens each layer sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stm import ConfigError, MergePlan, VimConfig, plan_summary

from .files import written_aside
from .images import load_image, photos, preprocess


def draw_plan(config: VimConfig, plan: MergePlan, path: str | Path, image: str | Path | None = None) -> Path:
    """Write a PNG: left the image's patches, those that end as one token in one colour with the target outlined; right
    the tokens a layer, both sides of the class token apart.

    Args:
        image: a picture to lay under the patches; a photograph of the package by default.

    Raises:
        PlanError: the plan does not fit the model.
        ExportError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plan.check_fits(config)
    path = Path(path)
    if path.suffix != ".png":
        raise ConfigError(f"cannot draw to {path}: pictures are .png")
    picture = load_image(image) if image is not None else photos()[1]
    height, width = config.image_size
    pixels = preprocess(picture, config.image_size, (0, 0, 0), (1, 1, 1)).transpose(1, 2, 0)
    summary = plan_summary(config, plan)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 6.2), width_ratios=(1.05, 1), layout="constrained")
    groups = draw_groups(left, config, plan, pixels)
    merged = sum(len(token) for token in groups)
    left.set_title(
        f"{merged} patches end as {len(groups)} merged tokens (one colour a token, the target outlined)\n"
        f"red: the class token's place between the two sides",
        fontsize=10,
    )

    layers = np.arange(config.depth)
    lengths, cls = np.array(plan.lengths), np.array(plan.cls_positions)
    right.bar(layers, cls, color="#4477aa", label="before the class token")
    right.bar(layers, lengths - cls - 1, bottom=cls + 1, color="#ee9944", label="after it")
    right.bar(layers, np.ones_like(layers), bottom=cls, color="crimson", label="class token")
    right.axhline(plan.seqlen, color="grey", linewidth=0.8, linestyle="--")
    for layer in (0, config.depth - 1):
        right.annotate(str(lengths[layer]), (layer, lengths[layer]), ha="center", va="bottom", fontsize=9)
    right.set_xlabel("layer")
    right.set_ylabel("tokens the layer computes on")
    right.set_ylim(0, plan.seqlen * 1.16)
    right.legend(loc="upper right", fontsize=9, ncols=3, frameon=False)
    right.set_title(
        f"{summary['token_layers_removed']} token-layers removed, {summary['tokens_left']} of {plan.seqlen} tokens left\n"
        f"{summary['gflops_true']:.2f} GFLOPs ({summary['gflops_true_change']:+.1%}); "
        f"counted as in the paper {summary['gflops_paper']:.2f} ({summary['gflops_paper_change']:+.1%})",
        fontsize=10,
    )
    figure.suptitle(f"Merge plan for {config.name} at {height}x{width}, weights {plan.weights}", fontsize=12)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
    return path


def draw_groups(axes: Any, config: VimConfig, plan: MergePlan, pixels: NDArray[np.floating]) -> list[list[int]]:
    """Draw what becomes of each patch over an image (height, width, 3), 0..1: patches that end as one token in one colour, the target
    outlined, the class token's place as a red line. Returns the merged tokens' members."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    height, width = config.image_size
    rows, columns = config.grid
    axes.imshow(np.clip(pixels, 0, 1), extent=(0, columns, rows, 0), aspect="auto" if rows * width == columns * height else None)
    axes.set_aspect(1)
    groups = [token for token in list(plan.members())[-1] if len(token) > 1]
    colours = colormaps["tab10"]
    for index, token in enumerate(groups):
        # original position -> patch: the class token sits in the middle of the sequence
        patches = [position - (position > plan.cls_index) for position in token]
        kept = patches[0]  # members are listed target first
        for patch in patches:
            y, x = divmod(patch, columns)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=(*colours(index % 10)[:3], 0.7), edgecolor="none"))
        y, x = divmod(kept, columns)
        axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor="black", linewidth=2))
    if rows * columns <= 1024:
        axes.hlines(range(rows + 1), 0, columns, colors="white", linewidth=0.4, alpha=0.6)
        axes.vlines(range(columns + 1), 0, rows, colors="white", linewidth=0.4, alpha=0.6)
    seam = config.cls_index
    y, x = divmod(seam, columns)
    axes.plot([0, x, x, columns] if x else [0, columns], [y + 1, y + 1, y, y] if x else [y, y], color="crimson", linewidth=2)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    return groups
