"""Published weights: from the package, or from the model hub, fetched once and cached by huggingface_hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .errors import MissingDependencyError
from .registry import PackagedWeights, model_entry


def fetch_published(name: str) -> tuple[Path, bool]:
    """The published checkpoint of a model: its path, and whether the published top-1 is that of its `model_ema`.

    It lies in the package, or is downloaded (once, with a progress bar) into huggingface_hub's cache, whose environment
    (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE) is honoured.

    Raises:
        MissingDependencyError: the package lacks the file, or huggingface_hub or the network is not there; says the two ways on.
    """
    weights = model_entry(name).weights
    ways = "Pass --checkpoint FILE, or --weights random for a trial with random weights (every output will say so)."
    if weights is None:
        raise MissingDependencyError(f"{name!r} has no published weights. {ways}")
    if isinstance(weights, PackagedWeights):
        if not weights.path.is_file():
            raise MissingDependencyError(
                f"the weights of {name!r} are part of this package, and {weights.path} is not there: "
                f"install it again, or train them as docs/training.md says. {ways}"
            )
        return weights.path, False
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise MissingDependencyError(f"published weights need the package huggingface_hub: pip install huggingface_hub. {ways}") from None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs each retry; our error says it once
    try:
        path = hf_hub_download(weights.repo, weights.filename, etag_timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT", "10")))
    except Exception as error:  # huggingface_hub raises many kinds; each means that the file is not to be had
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        raise MissingDependencyError(f"the published weights {weights.repo}/{weights.filename} cannot be had ({reason}). {ways}") from None
    finally:
        logger.setLevel(level)
    return Path(path), weights.ema
